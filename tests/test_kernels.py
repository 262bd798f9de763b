"""Hand-written backward passes against autograd of the plain formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from golfbook.model import kernels
from golfbook.model.attention import causal_attention
from golfbook.plain import layers


def compare(ours, plain, *inputs: torch.Tensor, atol: float = 1e-10) -> None:
    outputs = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(*outputs, atol=atol, rtol=0)
    direction = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(9), dtype=outputs[0].dtype)
    gradients = [torch.autograd.grad(out, inputs, direction) for out in outputs]
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, atol=atol, rtol=0)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_rms_norm(scale):
    compare(lambda x: kernels.rms_norm(x, scale), lambda x: scale * layers.rms_norm(x), values(3, 4, 10))
    tiny = 0.005 * torch.ones(1, 512)
    expected = 0.005 / (0.005**2 + 2.0**-23) ** 0.5
    torch.testing.assert_close(kernels.rms_norm(tiny), torch.full((1, 512), expected))


@pytest.mark.parametrize("slope", [0.5, 0.0, 1.0])
def test_squared_leaky_relu(slope):
    compare(lambda x: kernels.squared_leaky_relu(x, slope), lambda x: F.leaky_relu(x, slope) ** 2, values(5, 7))


def test_mix_and_add_scaled():
    x, y, weights = values(2, 3, 8), values(2, 3, 8, seed=1), values(2, 8, seed=2)
    compare(kernels.mix, lambda x, y, w: w[0] * x + w[1] * y, x, y, weights)
    compare(kernels.add_scaled, lambda x, s, y: x + s * y, x, values(8, seed=3), y)


@pytest.mark.parametrize("rotated_dims", [4, 10])
def test_normed_heads(rotated_dims):
    angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01])[: rotated_dims // 2]).double()
    cos, sin = angles.cos(), angles.sin()

    def plain(x: torch.Tensor) -> torch.Tensor:
        return layers.rotate(layers.rms_norm(x), angles)

    x, gain = values(2, 5, 3, 10), values(3, seed=1)
    compare(lambda x: kernels.normed_heads(x, cos, sin), plain, x)
    compare(lambda x, g: kernels.normed_heads(x, cos, sin, g), lambda x, g: plain(x) * g[:, None], x, gain)


def test_remove_own_value():
    compare(kernels.remove_own_value, layers.remove_own_value, values(2, 3, 4, 6), values(2, 3, 2, 6, seed=1))
    y, v = values(1, 1, 2, 6), torch.zeros(1, 1, 1, 6, dtype=torch.float64)
    assert torch.equal(kernels.remove_own_value(y, v), y)


def test_inputs_are_left_alone():
    """Views are cheap, so a kernel that works in place could change what it was given."""
    q, k, v = (values(1, 1, 7, 6, seed=s) for s in range(3))
    before = [x.detach().clone() for x in (q, k, v)]
    causal_attention(q, k, v, "blocked").sum().backward()
    x = values(2, 5, 3, 10)
    kept, table = x.detach().clone(), torch.ones(5, 2, dtype=torch.float64)
    kernels.normed_heads(x, table, table).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, x), (*before, kept), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_kept(dtype):
    x = values(2, 3, 8).detach().to(dtype).requires_grad_()
    channel, table, heads = torch.rand(2, 8), torch.rand(3, 2), x.view(2, 3, 2, 4)
    outputs = [kernels.rms_norm(x, 0.7), kernels.squared_leaky_relu(x, 0.5), kernels.mix(x, x, channel)]
    outputs += [kernels.add_scaled(x, channel[0], x), kernels.normed_heads(heads, table, table, channel[0, :2])]
    outputs += [kernels.remove_own_value(heads, heads[:, :, :1])]
    for out in outputs:
        assert out.dtype == dtype
        (gradient,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        assert gradient.dtype == dtype

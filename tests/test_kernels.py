"""Hand-written backward passes against autograd of the plain formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from golfbook import kernels


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
    plain = lambda x: scale * F.rms_norm(x, (10,), eps=kernels.RMS_EPS)  # noqa: E731
    compare(lambda x: kernels.rms_norm(x, scale), plain, values(3, 4, 10))
    tiny = 0.005 * torch.ones(1, 512)
    expected = 0.005 / (0.005**2 + 2.0**-23) ** 0.5
    torch.testing.assert_close(kernels.rms_norm(tiny), torch.full((1, 512), expected))


@pytest.mark.parametrize("slope", [0.5, 0.0, 1.0])
def test_squared_leaky_relu(slope):
    compare(lambda x: kernels.squared_leaky_relu(x, slope), lambda x: F.leaky_relu(x, slope) ** 2, values(5, 7))


def masked_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    group, time = q.size(1) // k.size(1), q.size(2)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT / q.size(-1) ** 0.5
    allowed = torch.ones(time, time, dtype=torch.bool).tril()
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("time", [1, 5, 8, 16, 23])
def test_blocked_attention_equals_the_masked_reference(time, monkeypatch):
    monkeypatch.setattr(kernels, "QUERY_BLOCK", 8)
    compare(kernels.causal_attention, masked_reference, values(2, 4, time, 6), values(2, 2, time, 6, seed=1),
            values(2, 2, time, 6, seed=2))  # fmt: skip
    plain = F.scaled_dot_product_attention
    q, k, v = values(2, 4, time, 6), values(2, 2, time, 6, seed=1), values(2, 2, time, 6, seed=2)
    torch.testing.assert_close(kernels.causal_attention(q, k, v), plain(q, k, v, is_causal=True, enable_gqa=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_kept(dtype):
    x = values(2, 3, 8).detach().to(dtype).requires_grad_()
    for out in (kernels.rms_norm(x, 0.7), kernels.squared_leaky_relu(x, 0.5)):
        assert out.dtype == dtype
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert gradient.dtype == dtype

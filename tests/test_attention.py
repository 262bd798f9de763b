"""Every attention backend that runs here against the masked formula, values and gradients."""

from __future__ import annotations

import pytest
import torch

from golfbook import compute
from golfbook.errors import RunError
from golfbook.model import attention
from golfbook.model.attention import causal_attention
from golfbook.plain.layers import masked_attention
from test_kernels import compare, values


def heads(time: int, width: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return values(2, 4, time, width), values(2, 2, time, width, seed=1), values(2, 2, time, width, seed=2)


@pytest.mark.parametrize("backend", ["auto", "blocked", "sdpa"])
@pytest.mark.parametrize("time", [1, 5, 8, 16, 23])
def test_backends_equal_the_masked_attention(backend, time, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)  # halved for short inputs: eight positions a block
    compare(lambda q, k, v: causal_attention(q, k, v, backend), masked_attention, *heads(time))


@pytest.mark.parametrize("time", [1, 5, 130])
def test_flex_attention_equals_the_masked_attention(time):
    q, k, v = (x.detach().float() for x in heads(time, 16))
    torch.testing.assert_close(causal_attention(q, k, v, "flex"), masked_attention(q, k, v))
    with pytest.raises(RunError, match=r"no backward pass on a CPU; use 'auto'"):
        causal_attention(q.requires_grad_(), k, v, "flex")


def test_masks_made_while_scoring_can_be_trained_with():
    attention._block_mask.cache_clear()
    attention._mask.cache_clear()
    cpu = torch.device("cpu")
    with torch.inference_mode():
        block, mask = attention._block_mask(40, cpu), attention._mask(4, 2, torch.float32, cpu)
    assert not mask.is_inference() and not block.kv_indices.is_inference() and not block.kv_num_blocks.is_inference()


@pytest.mark.parametrize("time", [700, 512])
def test_long_inputs_in_their_own_blocks(time):
    compare(lambda q, k, v: causal_attention(q, k, v, "blocked"), masked_attention, *heads(time))


@pytest.mark.parametrize("backend", ["blocked", "sdpa", "flex"])
def test_bfloat16_stays_near_the_exact_values(backend):
    exact = [x.detach() for x in heads(96, 16)]
    out = causal_attention(*(x.bfloat16() for x in exact), backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), masked_attention(*exact), atol=0.03, rtol=0.02)


def test_what_can_run_here_and_why_the_others_cannot(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert attention.candidates(cpu, torch.bfloat16, training=True) == ["sdpa", "blocked"]
    assert attention.why_not("sdpa", cpu, torch.float32) == ""
    monkeypatch.setattr(attention, "flash3_obstacle", lambda: "No module named 'flash_attn_interface'")
    assert attention.candidates(gpu, torch.bfloat16, training=True) == ["sdpa"]
    with pytest.raises(RunError, match=r"flash_attn_interface\) cannot be imported.*; use 'auto'"):
        causal_attention(*heads(4), "flash3")
    monkeypatch.setattr(attention, "flash3_obstacle", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert attention.candidates(gpu, torch.bfloat16, training=True) == ["sdpa", "flash3"]
    assert attention.candidates(gpu, torch.float32, training=True) == ["sdpa"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert attention.candidates(gpu, torch.bfloat16, training=True) == ["sdpa"]
    with pytest.raises(RunError, match="needs a Hopper GPU"):
        causal_attention(*heads(4), "flash3")


def test_auto_is_what_was_measured_for_the_kind_of_call(monkeypatch):
    called = []
    for name in ("blocked", "sdpa"):
        computed = attention._COMPUTE[name]
        monkeypatch.setitem(
            attention._COMPUTE, name, lambda *x, name=name, computed=computed: called.append(name) or computed(*x)
        )
    monkeypatch.setattr(compute, "_current", compute.Choices())
    q, k, v = (x.float() for x in heads(8))
    causal_attention(q, k, v)
    compute._current = compute.Choices(attention={compute.case(False, torch.float32, 8): "blocked"})
    with torch.no_grad():
        causal_attention(q, k, v)
    causal_attention(q.detach(), k.detach(), v.detach())
    causal_attention(q.requires_grad_(), k, v)
    causal_attention(*(x.detach().repeat(1, 1, 100, 1) for x in (q, k, v)))  # long
    assert called == ["sdpa", "blocked", "blocked", "sdpa", "sdpa"]


def test_inference_computes_what_training_computes():
    for time in (60, 700):
        q, k, v = (x.detach().float() for x in heads(time))
        trained = causal_attention(q.clone().requires_grad_(), k, v, "blocked").detach()
        assert torch.equal(causal_attention(q, k, v, "blocked"), trained)


def test_flash_attention_3_is_called_in_its_own_layout(monkeypatch):
    """A stand-in of the package: shapes (B, T, H, d), causal, and releases that return the normaliser as well."""
    import sys
    import types

    with_normaliser = False

    def flash_attn_func(q, k, v, causal):
        assert causal and q.shape == (2, 5, 4, 6) and k.shape == v.shape == (2, 5, 2, 6)
        out = masked_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return (out, None) if with_normaliser else out

    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr(attention, "why_not", lambda *_, **__: "")
    compare(lambda q, k, v: causal_attention(q, k, v, "flash3"), masked_attention, *heads(5))
    with_normaliser = True
    compare(lambda q, k, v: causal_attention(q, k, v, "flash3"), masked_attention, *heads(5))

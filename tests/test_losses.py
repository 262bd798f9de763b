"""The fused loss against the plain formula: value, gradients, chunk borders, and no gradient where none is asked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from golfbook.model import cross_entropy
from golfbook.model.cross_entropy import softcapped_cross_entropy


@pytest.mark.parametrize("cap", [5.0, 60.0])
@pytest.mark.parametrize("positions", [1, 7, 8, 23])
def test_equals_the_plain_formula(positions, cap, monkeypatch):
    """Tolerance: a float32 logit near ``2 cap`` is off by half a unit in its last place, and so is log p."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 8 * 50)  # eight positions a chunk
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, 12, generator=generator, dtype=torch.float64).mul_(3).requires_grad_()
    head = torch.randn(50, 12, generator=generator, dtype=torch.float64).mul_(3).requires_grad_()
    targets = torch.randint(0, 50, (positions,), generator=generator)
    plain = F.cross_entropy(cap * torch.tanh(hidden @ head.T / cap), targets)
    fused = softcapped_cross_entropy(hidden, head, targets, cap)
    assert fused.item() == pytest.approx(plain.item(), abs=1e-5)
    expected = torch.autograd.grad(2.5 * plain, (hidden, head))
    for ours, theirs in zip(torch.autograd.grad(2.5 * fused, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=8 * cap * torch.finfo(torch.float32).eps)


def test_no_gradient_work_without_a_gradient():
    hidden, head, targets = torch.randn(2, 5, 8), torch.randn(20, 8), torch.randint(0, 20, (2, 5))
    loss = softcapped_cross_entropy(hidden, head, targets, 30.0)
    assert not loss.requires_grad
    tied = head.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(softcapped_cross_entropy(hidden, tied, targets, 30.0), tied)
    assert gradient.shape == head.shape

"""Cross-entropy of soft-capped logits, with its gradient computed on the way and no full-size logits kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 2**19  # logits alive at a time: 2 MiB in float32, which stays in a core's cache


def softcapped_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Mean over all positions of ``-log softmax(cap tanh(hidden head^T / cap))[target]``; float32 scalar in nats.

    ``hidden`` (..., D), ``head`` (V, D), ``targets`` (...) int64. Equal to the plain formula (PR 1166 section 4, steps
    9-11); but positions go through in chunks, and since the loss is a mean its gradient is known as soon as the logits
    are, so the forward pass already computes it and the logits are never stored.
    """
    return _SoftcappedCrossEntropy.apply(hidden.flatten(0, -2), head, targets.flatten(), cap)


class _SoftcappedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden, head, targets, cap = inputs
        count, keep = len(hidden), any(ctx.needs_input_grad[:2])
        rows = max(1, CHUNK_LOGITS // len(head))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if keep else None
        d_head = torch.zeros_like(head) if keep else None
        for start in range(0, count, rows):
            h, target = hidden[start : start + rows], targets[start : start + rows, None]
            t = F.linear(h, head.to(h.dtype)).float().div_(cap).tanh_()
            slope = 1 - t * t if keep else None
            logits = t.mul_(cap)
            normaliser = logits.logsumexp(-1, keepdim=True)
            total += (normaliser - logits.gather(1, target)).sum()
            if slope is not None and d_hidden is not None and d_head is not None:
                gradient = logits.sub_(normaliser).exp_()
                gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
                gradient = gradient.mul_(slope).div_(count).to(h.dtype)
                d_hidden[start : start + rows] = gradient @ head.to(h.dtype)
                d_head += gradient.mT @ h
        if keep:
            ctx.save_for_backward(d_hidden, d_head)
        return total / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        return gradients[0] * d_hidden, gradients[0] * d_head, None, None

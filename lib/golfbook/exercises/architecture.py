"""Exercises of 02 Architecture: a detector of leaks, the sharpest softmax, and which block feeds which."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golfbook.config.load import load_config
from golfbook.exercises.check import Misconception, compare
from golfbook.model.attention import causal_attention
from golfbook.model.gpt import GPT, initialise
from golfbook.model.kernels import rms_norm
from golfbook.model.refiners import TTTLinear

LENGTH, MINI_BATCH = 48, 16
SMALL = {"vocab_size": 16, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 4}
Layer = Callable[[Tensor], Tensor]


@torch.no_grad()
def suspects() -> dict[str, tuple[Layer, bool]]:
    """Return five functions of states (1, 48, 16) by name, each with whether a position sees a later one."""
    refiner = TTTLinear(load_config({"model": {**SMALL, "ttt_linear": {"enabled": True, "num_heads": 2}}}).model)
    for parameter in refiner.parameters():  # every gate open
        parameter.normal_(0.0, 0.3)
    share, at = torch.rand(16), random.randrange(1, LENGTH - 1)

    def smear(x: Tensor) -> Tensor:
        return (1 - share) * x + share * F.pad(x, (0, 0, 1, -1))

    def batch_statistics(x: Tensor) -> Tensor:
        means = x.unflatten(1, (-1, MINI_BATCH)).mean(2)  # (1, mini-batches, D)
        return x + refiner(x) - means.repeat_interleave(MINI_BATCH, 1)

    def once(x: Tensor) -> Tensor:
        y = smear(x)
        y[:, at] += x[:, at + 1]
        return y

    return {
        "TTT-Linear": (lambda x: x + refiner(x), False),
        "smear gate": (smear, False),
        "mini-batch mean": (batch_statistics, True),
        "one position": (once, True),
        "faint mean": (lambda x: x + 1e-5 * x.mean(1, keepdim=True), True),
    }


@torch.no_grad()
def leak_detector(answer: Callable[[Layer, Tensor], bool]) -> str:
    """Judge ``leaks(f, x)``: whether some output of ``f`` depends on a later position of ``x`` (1, T, D)."""
    x = torch.randn(1, LENGTH, 16)
    verdicts = {name: (bool(answer(f, x.clone())), truth) for name, (f, truth) in suspects().items()}
    wrong = {name for name, (said, truth) in verdicts.items() if said != truth}
    if wrong & {"TTT-Linear", "smear gate"}:
        raise Misconception("a layer is accused that looks back only; outputs from the change on may move")
    if "mini-batch mean" in wrong:
        raise Misconception(
            f"a leak inside a mini-batch of {MINI_BATCH} tokens is missed: a change that starts where a mini-batch "
            "starts cannot show it, so cut elsewhere too"
        )
    if "one position" in wrong:
        raise Misconception("a leak at a single position is missed: one cut shows only what crosses that cut")
    if "faint mean" in wrong:
        raise Misconception("a faint leak is missed: a tolerance forgives it, and what looks back only moves no bit")
    return "all five verdicts are true: three leaks found, one of them inside a mini-batch, and nobody else accused"


@torch.no_grad()
def sharpest(answer: Callable[[float, int, int], float]) -> str:
    """Judge ``largest(gain, width, keys)``: the largest weight that one key of attention can get, in exact numbers."""
    for gain, width, keys in ((1.5, 64, 1024), (random.uniform(0.1, 0.25), 8, random.randint(20, 200))):
        q = rms_norm(torch.randn(width, dtype=torch.float64))
        k = torch.cat((-q.expand(keys - 1, width), q[None]))  # all but the last key point away from the query
        values = torch.eye(2, dtype=torch.float64)[[0] * (keys - 1) + [1]]  # (keys, 2): marks the last key
        queries = (gain * q).expand(keys, width)
        one = causal_attention(queries[None, None], k[None, None], F.pad(values, (0, width - 2))[None, None], "sdpa")
        truth, given = float(one[0, 0, -1, 1]), float(answer(gain, width, keys))
        logits = {  # of the one key and of the others
            "the product of two normed vectors is not a cosine: their length is not one": (gain, -gain),
            "other keys can do better than stand at right angles to the query": (gain * width**0.5, 0.0),
            "normed vectors are longer than one, and other keys can point away from the query": (gain, 0.0),
            "attention divides its logits by something": (gain * width, -gain * width),
        }
        mistakes = {why: 1 / (1 + (keys - 1) * math.exp(rest - top)) for why, (top, rest) in logits.items()}
        otherwise = f"gain {gain:.3g}, width {width}, {keys} keys: attention gets to another weight"
        compare(given, truth, otherwise, mistakes, rtol=1e-3)
    return "attention itself gives that weight to the one key along the query when all others point away from it"


class _Marked(nn.Module):
    """Stand for a block: keep what it is given, pass on a vector that names it."""

    def __init__(self, mark: Tensor) -> None:
        super().__init__()
        self.mark = mark

    def forward(self, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        self.seen = x[0, 0]
        return self.mark.expand_as(x), x


@torch.no_grad()
def skip_source(answer: Callable[[int, int], int | None]) -> str:
    """Judge ``source(layers, block)``: the block whose output a skip adds to the input of ``block``; None: no skip."""
    for layers in (11, 2 * random.randint(2, 7), 2 * random.randint(2, 7) + 1):
        half = layers // 2
        for block in (*range(half, layers), *range(half)):
            truth, given = _source(layers, block), answer(layers, block)
            if given == truth:
                continue
            asked = f"block {block} of {layers}"
            if block < half:
                raise Misconception(f"{asked} is in the first half, which gives and does not take")
            if truth is None:
                raise Misconception(f"{asked} finds nothing left on the stack: the second half is one longer")
            if given == block - half:
                raise Misconception(f"{asked}: what was stored first does not come back first")
            if given == layers - 1 - block:
                raise Misconception(f"{asked}: a mirror about the middle holds for an even number of blocks only")
            raise Misconception(f"{asked} is fed by another block: name the one stored last that is still there")
    return "the mark of that block, and of no other, arrives in the library's own model: last in, first out"


def _source(layers: int, block: int) -> int | None:
    """Return what the library does: every block passes on its own mark, and the marks that arrive are read."""
    off = {"xsa": 0, "bigram": {"vocab_size": 0}, "value_embedding": {"layers": []}}
    model = initialise(GPT(load_config({"model": {**SMALL, **off, "num_layers": layers}}).model), 0)
    marked = [_Marked(torch.eye(16)[i]) for i in range(layers)]
    model.blocks = nn.ModuleList(marked)
    model.hidden(torch.zeros(1, 2, dtype=torch.int64))
    arrived = marked[block].seen - (marked[block - 1].mark if block else 0)
    return int(arrived.argmax()) if block >= layers // 2 and arrived.abs().max() > 0.5 else None


EXERCISES: dict[str, Callable[[Any], str]] = {"02.1": leak_detector, "02.2": sharpest, "02.3": skip_source}

"""A training step with :mod:`golfbook.plain`: the other side of ``bench_training.py`` and ``bench_quality.py``.

The plain model and the plain Muon, with what torch itself offers for the rest, as the published scripts have it: its
kernel of attention, its fused AdamW, its clipping. With ``banks`` the matrices of all layers are stacked and cut out
layer by layer, as PR 1166's code stores them; else each matrix is a parameter and an orthogonalisation of its own, as
in PR 1170 and 1232.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from golfbook.config.architecture import ModelConfig
from golfbook.config.schema import Config
from golfbook.model.gpt import GPT
from golfbook.plain.model import PlainGPT
from golfbook.plain.muon import PlainMuon
from golfbook.published.checkpoints import BANKS, bank, unbank
from golfbook.train.muon import parameter_groups

torch_attention = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)


def plain_model(config: ModelConfig, weights: Mapping[str, Tensor], precision: str = "float32") -> PlainGPT:
    """The plain model in a precision, with torch's kernel of attention."""
    dtype = getattr(torch, precision)
    return PlainGPT(config, {name: weight.to(dtype) for name, weight in weights.items()}, torch_attention)


class PlainStep:
    """Forward, backward, clipping and update of the plain model, called like :class:`TrainingStep`."""

    def __init__(self, model: GPT, config: Config, device: torch.device, banks: bool) -> None:
        train = config.train
        self.config, self.device = config, device
        state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        own = {n: w.to(device).requires_grad_() for n, w in (bank(state) if banks else state).items()}
        groups = parameter_groups(model, train)
        matrices = {name for name in own if name in BANKS or name in groups["matrix"]}
        tables = set(groups["embed"])
        self.own = own
        self.muon = PlainMuon([own[name] for name in own if name in matrices], train)
        self.adam = torch.optim.AdamW(
            [
                {"params": [own[name] for name in own if name in tables], "lr": train.optimizer.embed_lr},
                {
                    "params": [own[name] for name in own if name not in matrices | tables],
                    "lr": train.optimizer.scalar_lr,
                },
            ],
            betas=(train.optimizer.adam_beta1, train.optimizer.adam_beta2),
            eps=train.optimizer.adam_eps,
            weight_decay=train.optimizer.adam_weight_decay,
            fused=True,
        )

    def schedule(self, lr_scale: float, momentum: float) -> None:
        """Set the rates and Muon's momentum of the next step."""
        train = self.config.train
        self.muon.lr, self.muon.momentum = train.optimizer.matrix_lr * lr_scale, momentum
        for group, rate in zip(
            self.adam.param_groups, (train.optimizer.embed_lr, train.optimizer.scalar_lr), strict=True
        ):
            group["lr"] = rate * lr_scale

    def state(self) -> dict[str, Tensor]:
        """The weights by the library's names."""
        return {name: weight.detach() for name, weight in unbank(self.own).items()}

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take one step; returns the loss before it."""
        for weight in self.own.values():
            weight.grad = None
        model = plain_model(self.config.model, unbank(self.own), self.config.machine.precision)
        loss = model.loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.own.values(), self.config.train.optimizer.grad_clip)
        self.muon.step()
        self.adam.step()
        return loss.detach()

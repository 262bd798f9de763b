"""Training as a reader would write it from the formulas: the other side of ``bench_training.py``.

Torch's own building blocks, one formula a line, autograd for everything: ``scaled_dot_product_attention``,
``cross_entropy`` on all logits, the loop of TTT-Linear, Newton-Schulz as written, torch's fused AdamW (as published).
With ``banks`` the matrices of all layers are stacked and cut out layer by layer, as PR 1166's code stores them; else
each matrix is a parameter and an orthogonalisation of its own, as in PR 1170 and 1232.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from bench_optimizer import PlainMuon
from bench_ttt_linear import plain_loop
from torch import Tensor, nn

from golfbook.config.architecture import ModelConfig
from golfbook.config.schema import Config
from golfbook.model.gpt import GPT
from golfbook.train.muon import parameter_groups

BANKS = {
    "qo": ("attn.c_q.weight", "attn.proj.weight"),
    "kv": ("attn.c_k.weight", "attn.c_v.weight"),
    "up": ("mlp.fc.weight",),
    "down": ("mlp.proj.weight",),
}


def rms_norm(x: Tensor) -> Tensor:
    """Norm without a gain that keeps the dtype of ``x``, as torch did up to 2.11."""
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)


def angles(config: ModelConfig, time: int) -> Tensor:
    """Rotary angles (T, R/2) with the rule for long inputs."""
    dims, base = config.rope_dims, config.rope_base
    if time > config.rope_train_length:
        base *= (time / config.rope_train_length) ** (dims / (dims - 2))
    return torch.outer(torch.arange(time), base ** -(torch.arange(0, dims, 2) / dims))


class PlainGPT(nn.Module):
    """The model of :class:`GPT`, for the presets of PR 1166 and 1232 and those scaled down from them."""

    def __init__(self, model: GPT, banks: bool) -> None:
        super().__init__()
        self.config: ModelConfig = model.config
        self.weights = nn.ParameterDict()
        self.angles = torch.empty(0)
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.ttt, self.flow = (copy.deepcopy(getattr(model, n, None)) for n in ("ttt_refiner", "flow_refiner"))
        state = {name: value for name, value in state.items() if "_refiner." not in name}
        self.banked: dict[str, tuple[str, int]] = {}
        layers = self.config.num_layers
        for bank, roles in BANKS.items() if banks else ():
            names = [f"blocks.{i}.{role}" for role in roles for i in range(layers)]
            self.banked |= {name: (bank, at) for at, name in enumerate(names)}
            self.weights[f"bank {bank}"] = nn.Parameter(torch.stack([state.pop(name) for name in names]))
        for name, value in state.items():
            self.weights[name.replace(".", "/")] = nn.Parameter(value)

    def weight(self, name: str) -> Tensor:
        if name in self.banked:
            bank, at = self.banked[name]
            return self.weights[f"bank {bank}"][at]
        return self.weights[name.replace(".", "/")]

    def linear(self, x: Tensor, name: str, bias: str = "") -> Tensor:
        return F.linear(x, self.weight(name).to(x.dtype), self.weight(bias).to(x.dtype) if bias else None)

    def attention(self, i: int, x: Tensor, extra: Tensor | None, first: Tensor | None) -> tuple[Tensor, Tensor]:
        config, name = self.config, f"blocks.{i}.attn"
        batch, time, _ = x.shape
        heads, kv, width = config.num_heads, config.num_kv_heads, config.head_dim
        q = self.linear(x, f"{name}.c_q.weight").view(batch, time, heads, width)
        k = self.linear(x, f"{name}.c_k.weight").view(batch, time, kv, width)
        v = self.linear(x, f"{name}.c_v.weight")
        raw = v = v if extra is None else v + extra
        if first is not None and config.value_residual == "lambda":
            mix = self.weight(f"{name}.vr_lambda").to(v.dtype)
            v = mix[0] * first + mix[1] * v
        v = v.view(batch, time, kv, width)
        q, k = self.rope(rms_norm(q)), self.rope(rms_norm(k))
        q = q * self.weight(f"{name}.q_gain").to(q.dtype)[:, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        if i in config.xsa_layers:
            y = y.reshape(batch, time, kv, -1, width)
            direction = F.normalize(v, dim=-1).unsqueeze(-2)
            y = (y - (y * direction).sum(-1, keepdim=True) * direction).reshape(batch, time, heads, width)
        if config.gated_attention:
            gate = torch.sigmoid(self.linear(x, f"{name}.attn_gate.weight", f"{name}.attn_gate.bias"))
            y = y * gate.unsqueeze(-1)
        return self.linear(y.reshape(batch, time, -1).to(x.dtype), f"{name}.proj.weight"), raw

    def rope(self, x: Tensor) -> Tensor:
        dims = self.config.rope_dims
        if self.angles.size(0) != x.size(1):
            self.angles = angles(self.config, x.size(1)).to(x.device)
        cos, sin = self.angles.cos()[:, None].to(x.dtype), self.angles.sin()[:, None].to(x.dtype)
        a, b, rest = x[..., : dims // 2], x[..., dims // 2 : dims], x[..., dims:]
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)

    def block(self, i: int, x: Tensor, x0: Tensor, extra: Tensor | None, first: Tensor | None) -> tuple[Tensor, Tensor]:
        name, scale = f"blocks.{i}", (i + 1) ** -0.5
        mix = self.weight(f"{name}.resid_mix").to(x.dtype)
        u = mix[0] * x + mix[1] * x0
        attended, raw = self.attention(i, scale * rms_norm(u), extra, first)
        y = u + self.weight(f"{name}.attn_scale").to(x.dtype) * attended
        h = self.linear(scale * rms_norm(y), f"{name}.mlp.fc.weight")
        h = F.leaky_relu(h, self.config.leaky_slope).square().to(x.dtype)
        return y + self.weight(f"{name}.mlp_scale").to(x.dtype) * self.linear(h, f"{name}.mlp.proj.weight"), raw

    def stream(self, tokens: Tensor) -> Tensor:
        config, weight = self.config, self.weight
        x = F.embedding(tokens, weight("tok_emb.weight"))
        pairs = (36313 * tokens[:, 1:]).bitwise_xor(27191 * tokens[:, :-1]) % (config.bigram.vocab_size - 1)
        rows = F.embedding(F.pad(pairs, (1, 0), value=config.bigram.vocab_size - 1), weight("bigram.embed.weight"))
        x = x + weight("bigram.scale") * self.linear(rows, "bigram.proj.weight")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.bfloat16)
        x = rms_norm(x)
        gate = torch.sigmoid(weight("smear.gate")).to(x.dtype)
        x = x0 = (1 - gate) * x + gate * F.pad(x, (0, 0, 1, -1))
        extras: dict[int, Tensor] = {}
        if config.value_embedding_layers:
            vectors = F.embedding(tokens, weight("ve_shared.embed.weight"))
            shared = (weight("ve_shared.scale") * self.linear(vectors, "ve_shared.proj.weight")).to(x.dtype)
            extras = {
                i: weight(f"ve_layer_scales.{n}").to(x.dtype) * shared
                for n, i in enumerate(config.value_embedding_layers)
            }
        stack, first, half = [], None, config.num_layers // 2
        for i in range(config.num_layers):
            if i >= half and stack:
                x = x + weight("skip_weights")[i - half].to(x.dtype) * stack.pop()
            x, raw = self.block(i, x, x0, extras.get(i), first)
            if i == 0 and config.value_residual != "none":
                first = raw
            if i < half:
                stack.append(x)
        return rms_norm(x)

    def logits(self, tokens: Tensor) -> Tensor:
        """Soft-capped logits (B, T, V), float32."""
        config = self.config
        x = self.stream(tokens)
        if self.ttt is not None:
            x = x + plain_loop(self.ttt, x).to(x.dtype)
        if self.flow is not None:
            x = x + self.flow(x)
        return config.logit_softcap * torch.tanh(self.linear(x, "tok_emb.weight").float() / config.logit_softcap)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())


class PlainStep:
    """Forward, backward, clipping and update of :class:`PlainGPT`, called like :class:`TrainingStep`."""

    def __init__(self, model: GPT, config: Config, device: torch.device, banks: bool) -> None:
        train = config.train
        self.model, self.config, self.device = PlainGPT(model, banks).to(device), train, device
        groups = parameter_groups(model, train)
        own = self.model.weights
        tables = {name.replace(".", "/") for name in groups["embed"]}
        stacks = [parameter for name, parameter in own.items() if name.startswith("bank ")]
        matrices = {name.replace(".", "/") for name in groups["matrix"]} & set(own)
        self.muon = PlainMuon([*stacks, *(own[name] for name in matrices)], train)
        used = {id(p) for p in (*stacks, *(own[name] for name in matrices | tables))}
        others = [parameter for parameter in self.model.parameters() if id(parameter) not in used]
        self.adam = torch.optim.AdamW(
            [
                {"params": [own[name] for name in tables], "lr": train.optimizer.embed_lr},
                {"params": others, "lr": train.optimizer.scalar_lr},
            ],
            betas=(train.optimizer.adam_beta1, train.optimizer.adam_beta2),
            eps=train.optimizer.adam_eps,
            weight_decay=train.optimizer.adam_weight_decay,
            fused=True,
        )
        self.autocast = config.machine.precision == "bfloat16"

    def schedule(self, lr_scale: float, momentum: float) -> None:
        """Set the rates and Muon's momentum of the next step."""
        self.muon.lr, self.muon.momentum = self.config.optimizer.matrix_lr * lr_scale, momentum
        for group, rate in zip(
            self.adam.param_groups, (self.config.optimizer.embed_lr, self.config.optimizer.scalar_lr), strict=True
        ):
            group["lr"] = rate * lr_scale

    def state(self) -> dict[str, Tensor]:
        """The weights by the library's names."""
        found = {name.replace("/", "."): p.detach() for name, p in self.model.weights.items() if "bank " not in name}
        for name, (bank, at) in self.model.banked.items():
            found[name] = self.model.weights[f"bank {bank}"][at].detach()
        for prefix, module in (("ttt_refiner", self.model.ttt), ("flow_refiner", self.model.flow)):
            if module is not None:
                found |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
        return found

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take one step; returns the loss before it."""
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.grad_clip)
        self.muon.step()
        self.adam.step()
        return loss.detach()

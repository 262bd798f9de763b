"""The model as its formulas: every component of :class:`golfbook.config.schema.ModelConfig`, one formula a line.

Takes the same settings and the same state dict as the fast model. Nothing is fused, cut into chunks or kept for later,
and autograd makes all gradients. Everything is computed in the dtype of the weights: float64 for a reference without
rounding to speak of, float32, or bfloat16, where logits and the fast weights of TTT-Linear are still float32.

Formulae: PR 1166, sections 4 to 9, unless a docstring names another source. Shapes: B rows, T positions, D model width,
H query heads, K key/value heads, d = D / H, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from golfbook.config.architecture import ModelConfig
from golfbook.plain import ttt_linear
from golfbook.plain.layers import (
    before,
    bigram_rows,
    masked_attention,
    remove_own_value,
    rms_norm,
    rotary_angles,
    rotate,
    time_embedding,
)

Weights = Mapping[str, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v to the output, shapes as in masked_attention
BOS_ID = 1  # starts every document


def part(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names begin with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


class PlainGPT:
    """A model from its settings and its weights, by the names of the state dict, all of one dtype.

    ``attend`` computes the attention itself; the benchmarks put torch's own kernel there.
    """

    def __init__(self, config: ModelConfig, weights: Weights, attend: Attend = masked_attention) -> None:
        self.config, self.weights, self.attend = config, weights, attend

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the start of the residual stream (B, T, D): tokens, hashed pairs, norm, smear gate."""
        config, weights = self.config, self.weights
        x = F.embedding(tokens, weights["tok_emb.weight"])
        rows = config.bigram.vocab_size
        if rows:
            table = weights["bigram.embed.weight"]
            vectors = F.embedding(bigram_rows(tokens, rows), table)  # (B, T, bigram.dim)
            if config.bigram.trigram:  # PR 1406 section 4
                vectors = vectors + F.embedding(bigram_rows(tokens, rows, 3), table)
            x = x + weights["bigram.scale"] * F.linear(vectors, weights["bigram.proj.weight"])
        x = rms_norm(x)
        if config.smear:
            gate, previous = torch.sigmoid(weights["smear.gate"]), before(x)
            if config.smear_document_mask:
                previous = previous.masked_fill((tokens == BOS_ID).unsqueeze(-1), 0.0)
            x = (1 - gate) * x + gate * previous
        return x

    def value_embeddings(self, tokens: Tensor) -> dict[int, Tensor]:
        """Return what each layer that has it adds to its values, (B, T, K d)."""
        if not self.config.value_embedding_layers:
            return {}
        shared = part(self.weights, "ve_shared.")
        vectors = F.embedding(tokens, shared["embed.weight"])  # (B, T, value_embedding.dim)
        vectors = shared["scale"] * F.linear(vectors, shared["proj.weight"])
        layers = enumerate(self.config.value_embedding_layers)
        return {layer: self.weights[f"ve_layer_scales.{n}"] * vectors for n, layer in layers}

    def attention(
        self, i: int, x: Tensor, extra: Tensor | None, first: Tensor | None, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return the output (B, T, D) of layer ``i`` and its raw values (B, T, K d).

        ``extra`` is the value embedding, ``first`` the raw values of layer 0, both (B, T, K d).
        """
        config, w = self.config, part(self.weights, f"blocks.{i}.attn.")
        heads, groups = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
        q = F.linear(x, w["c_q.weight"]).unflatten(-1, heads)  # (B, T, H, d)
        k = F.linear(x, w["c_k.weight"]).unflatten(-1, groups)  # (B, T, K, d)
        v = F.linear(x, w["c_v.weight"])  # (B, T, K d)
        v = raw = v if extra is None else v + extra
        if first is not None and config.value_residual == "lambda":  # PR 1170
            v = w["vr_lambda"][0] * first + w["vr_lambda"][1] * v
        elif first is not None and config.value_residual == "alpha":  # PR 1406
            v = v + torch.sigmoid(w["vrl_alpha"]) * first
        v = v.unflatten(-1, groups)  # (B, T, K, d)
        angles = rotary_angles(config, x.size(1), length, x.device)
        q, k = rotate(rms_norm(q), angles) * w["q_gain"][:, None], rotate(rms_norm(k), angles)
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)  # (B, T, H, d)
        if i in config.xsa_layers:
            y = remove_own_value(y, v)
        if config.gated_attention:
            gate = torch.sigmoid(F.linear(x, w["attn_gate.weight"], w["attn_gate.bias"]))  # (B, T, H)
            y = y * gate.unsqueeze(-1)
        return F.linear(y.flatten(2), w["proj.weight"]), raw

    def canon(self, name: str, x: Tensor) -> Tensor:
        """Return ``x_t + sigmoid(l) sum_k w_k x_{t-k}`` where the layer has it, else ``x`` (PR 1170 section 4.1)."""
        w = part(self.weights, f"{name}.")
        if not w:
            return x
        mixed = torch.stack([w["weight"][k] * before(x, k) for k in range(self.config.canon.kernel)]).sum(0)
        return x + torch.sigmoid(w["delta_gate_logit"]) * mixed

    def block(
        self, i: int, x: Tensor, x0: Tensor, extra: Tensor | None, first: Tensor | None, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return the stream (B, T, D) after layer ``i``, and the layer's raw values."""
        config, w = self.config, part(self.weights, f"blocks.{i}.")
        scale = (i + 1) ** -0.5 if config.ln_scale else 1.0
        u = w["resid_mix"][0] * x + w["resid_mix"][1] * x0
        attended, values = self.attention(
            i, self.canon(f"blocks.{i}.canon_a", scale * rms_norm(u)), extra, first, length
        )
        y = u + w["attn_scale"] * attended
        h = F.linear(self.canon(f"blocks.{i}.canon_c", scale * rms_norm(y)), w["mlp.fc.weight"])  # (B, T, hidden)
        h = F.leaky_relu(h, config.leaky_slope).square()
        out = y + w["mlp_scale"] * F.linear(h, w["mlp.proj.weight"])
        if config.depth_gate:
            gate = torch.sigmoid(F.linear(u.detach(), w["dtg_gate.weight"], w["dtg_gate.bias"]))  # (B, T, 1)
            out = u + gate * (out - u)
        return out, values

    def stream(self, tokens: Tensor, length: int = 0) -> Tensor:
        """Return the normed state (B, T, D) after all layers; ``length`` as in :meth:`hidden`."""
        config, length = self.config, length or tokens.size(1)
        x = x0 = self.embed(tokens)
        extras, first = self.value_embeddings(tokens), None
        outputs: list[Tensor] = []  # of the first half
        half = config.num_layers // 2
        again = config.recurrent_layers
        for i in range(config.num_layers):
            if i >= half and outputs:  # U-Net: the first of the second half meets the last of the first half
                x = x + self.weights["skip_weights"][i - half] * outputs.pop()
            x, values = self.block(i, x, x0, extras.get(i), first, length)
            if i == 0 and config.value_residual != "none":
                first = values
            for _ in range(again.count(i) if config.recurrence_place == "in_place" else 0):
                x, _ = self.block(i, x, x0, extras.get(i), first if i else None, length)
            if i < half and config.unet_skips:
                outputs.append(x)
        for i in again if config.recurrence_place == "after" else ():
            x, _ = self.block(i, x, x0, extras.get(i), first if i else None, length)
        return rms_norm(x)

    def refined(self, tokens: Tensor, length: int = 0) -> Tensor:
        """Return the state (B, T, D) with the corrections of TTT-Linear and of the FlowRefiner."""
        x = self.stream(tokens, length)
        if self.config.ttt_linear.enabled:
            x = x + ttt_linear.refine(part(self.weights, "ttt_refiner."), x, self.config.ttt_linear)
        if self.config.flow.enabled:
            w = part(self.weights, "flow_refiner.")
            z = F.linear(x, w["down_proj.weight"])  # (B, T, latent)
            h = F.gelu(F.linear(z, w["velocity_net.0.weight"], w["velocity_net.0.bias"]))
            z = z + F.linear(h, w["velocity_net.2.weight"], w["velocity_net.2.bias"])
            x = x + torch.sigmoid(w["gate"]) * F.linear(z, w["up_proj.weight"])
        return x

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B, T, D) of native flow at states ``x`` and times ``t`` (B, T) (PR 1170 section 10)."""
        w = part(self.weights, "native_flow.")
        time = time_embedding(t, x.size(-1)).to(x.dtype)
        time = F.gelu(F.linear(time, w["time_proj.0.weight"], w["time_proj.0.bias"]))  # (B, T, hidden)
        return F.linear(F.gelu(F.linear(x, w["v_in.weight"], w["v_in.bias"]) + time), w["v_out.weight"])

    def hidden(self, tokens: Tensor, length: int = 0) -> Tensor:
        """Return the state (B, T, D) that the output head reads.

        ``length`` computes what the first T positions of an input of so many tokens have; 0: T.
        """
        x = self.refined(tokens, length)
        if self.config.native_flow.enabled:  # one step of Euler's method at time 1
            x = x + torch.sigmoid(self.weights["native_flow.gate"]) * self.velocity(x, x.new_ones(x.shape[:2]))
        return x

    def head(self, x: Tensor, name: str = "") -> Tensor:
        """Return the logits ``cap tanh(x W^T / cap)`` (..., V) of states (..., D), at least float32."""
        name = name or ("tok_emb.weight" if self.config.tie_embeddings else "lm_head.weight")
        z = F.linear(x, self.weights[name])
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return self.config.logit_softcap * torch.tanh(z / self.config.logit_softcap)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, T, V) of token ids (B, T)."""
        return self.head(self.hidden(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of ``targets`` (B, T) given ``tokens`` (B, T), a scalar."""
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())

    def auxiliary_loss(self, tokens: Tensor, targets: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Return what training adds to the loss: flow matching and multi-token prediction, each by its weight.

        Flow matching goes from ``noise`` z (B, T, D) at time 0 to the state x at 1, by ``times`` t (B, T): the velocity
        at ``(1 - t) z + t x`` should be ``x - z``.
        """
        native, mtp, total = self.config.native_flow, self.config.mtp, torch.zeros((), device=tokens.device)
        if native.enabled:
            x, t = self.refined(tokens).detach(), times.unsqueeze(-1)
            error = self.velocity((1 - t) * noise + t * x, times) - (x - noise)
            total = total + native.loss_weight * error.square().mean()
        for ahead in range(1, mtp.num_heads + 1):  # head n reads position t and predicts target t + n
            z = self.head(self.hidden(tokens)[:, :-ahead], f"mtp_heads.{ahead - 1}.weight")
            loss = F.cross_entropy(z.flatten(0, 1), targets[:, ahead:].flatten())
            total = total + mtp.loss_weight * loss / mtp.num_heads
        return total

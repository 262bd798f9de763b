"""Building blocks of the published transformers: norm, rotary positions, attention and its options, MLP, embeddings.

Formulae follow PR 1166 (sections 4-7 of its description) unless a docstring names another source. Shapes: B rows, T
positions, D model width, H query heads, K key/value heads, d = D/H. Linear maps are ``y = x W^T`` without bias.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golfbook.compute import Backend
from golfbook.config.architecture import ModelConfig
from golfbook.model.attention import causal_attention
from golfbook.model.cache import Memory
from golfbook.model.component import ZERO, Component, Draw, Facts, Work, constant, normal, orthogonal, product
from golfbook.model.kernels import add_scaled, mix, normed_heads, remove_own_value, rms_norm, squared_leaky_relu

# A fused attention kernel computes five products in its backward pass (it makes the scores again), two in its forward.
ATTENTION_BACKWARD = 2.5
CONTROL = Facts(storage="control")
MATRIX = Facts("matrix", "matrix", orthogonal)
OUTPUT = Facts("matrix", "matrix", ZERO)  # a block starts as the identity


def table(draw: Draw) -> Facts:
    """Return the facts of a table with a row a token."""
    return Facts("embed", draw=draw, dtype=torch.bfloat16)


def rope_frequencies(
    length: int, dims: int, base: float, train_length: int, device: torch.device | None = None
) -> Tensor:
    """Return the angle a position of each rotated pair in an input of ``length`` tokens, (dims/2,) float32.

    Beyond ``train_length`` the base grows to ``base * (length/train_length)^(dims/(dims-2))`` (NTK rule, PR 1166
    section 5).
    """
    if length > train_length:
        base = base * (length / train_length) ** (dims / (dims - 2))
    exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
    return torch.pow(base, -exponents)


@functools.lru_cache(maxsize=16)
def rope_tables(
    positions: int, dims: int, base: float, train_length: int, device: torch.device, length: int = 0
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotary angles, each (positions, dims/2) float32.

    The frequencies are those of an input of ``length`` tokens (0: the positions). Computed in float32 at any length;
    the published code rounds short tables to bfloat16 by accident.
    """
    with torch.inference_mode(False):  # tables made while scoring must stay usable by autograd
        frequencies = rope_frequencies(length or positions, dims, base, train_length, device)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), frequencies)
        return angles.cos(), angles.sin()


class Attention(Component):
    """Causal grouped-query attention with QK norm, partial RoPE and a per-head query gain (PR 1166 section 5).

    Options: exclusive self-attention, a per-head output gate, and mixing in the values of layer 0 (PR 1170).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim, head_dim = config.model_dim, config.head_dim
        kv_dim = config.num_kv_heads * head_dim
        self.config = config
        self.backend: Backend = "auto"
        self.exclusive = layer in config.xsa_layers
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        if config.value_residual == "lambda":
            self.vr_lambda = nn.Parameter(torch.tensor([0.5, 0.5]))
        elif config.value_residual == "alpha":
            self.vrl_alpha = nn.Parameter(torch.zeros(1))
        self.c_q = nn.Linear(dim, dim, bias=False)
        self.c_k = nn.Linear(dim, kv_dim, bias=False)
        self.c_v = nn.Linear(dim, kv_dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        if config.gated_attention:
            self.attn_gate = nn.Linear(dim, config.num_heads, bias=True)

    def facts(self) -> dict[str, Facts]:
        found = {f"{name}.weight": MATRIX for name in ("c_q", "c_k", "c_v")} | {
            "proj.weight": OUTPUT,
            "q_gain": CONTROL,
        }
        if self.config.value_residual == "lambda":
            found["vr_lambda"] = CONTROL
        elif self.config.value_residual == "alpha":
            found["vrl_alpha"] = Facts(storage="matrix")
        if self.config.gated_attention:
            found |= {"attn_gate.weight": Facts(storage="control", draw=ZERO)}
            found |= {"attn_gate.bias": Facts(storage="control", draw=constant(4.0))}
        return found

    def work(self, length: int, pairs: int, training: bool) -> Iterable[Work]:
        dim, kv_dim = self.config.model_dim, self.c_k.out_features
        yield product("attention matrices", length, dim, 2 * dim + 2 * kv_dim)
        yield Work("attention products", 4 * pairs * dim, 4 * pairs * dim * ATTENTION_BACKWARD)
        if self.config.gated_attention:
            yield product("gates", length, dim, self.config.num_heads)

    def forward(
        self,
        x: Tensor,
        value_embedding: Tensor | None = None,
        first_values: Tensor | None = None,
        length: int | None = None,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (output (B, T, D), raw values (B, T, K*d)).

        ``value_embedding`` (B, T, K*d) is added to the values; ``first_values`` are layer 0's raw values. ``length``
        is the number of positions that the rotary base is made for, where ``x`` is only the beginning of them.
        ``memory`` holds the keys and values of the positions before ``x``, and takes those of ``x``.
        """
        config = self.config
        batch, time, _ = x.shape
        start = memory.cache.position if memory else 0
        q = self.c_q(x).view(batch, time, config.num_heads, config.head_dim)
        k = self.c_k(x).view(batch, time, config.num_kv_heads, config.head_dim)
        v = raw = self.c_v(x)
        if value_embedding is not None:
            v = raw = v + value_embedding
        if first_values is not None and config.value_residual == "lambda":
            mix = self.vr_lambda.to(v.dtype)
            v = mix[0] * first_values + mix[1] * v
        elif first_values is not None:
            v = v + torch.sigmoid(self.vrl_alpha).to(v.dtype) * first_values
        v = v.view(batch, time, config.num_kv_heads, config.head_dim)
        rotated = config.rope_dims or config.head_dim
        rotation = (rotated, config.rope_base, config.rope_train_length, x.device)
        if memory:  # one table for all positions, not one for each number of them
            cos, sin = (t[start : start + time] for t in rope_tables(memory.cache.length, *rotation))
        else:
            cos, sin = rope_tables(time, *rotation, length or time)
        q, k = normed_heads(q, cos, sin, self.q_gain), normed_heads(k, cos, sin)
        keys, values = (memory.all("keys", k), memory.all("values", v)) if memory else (k, v)
        q, keys, values = (z.transpose(1, 2) for z in (q, keys, values))
        y = causal_attention(q, keys, values, self.backend).transpose(1, 2)
        if self.exclusive:  # XSA, PR 1166 section 5 step 8
            y = remove_own_value(y, v)
        if config.gated_attention:
            y = y * torch.sigmoid(self.attn_gate(x)).unsqueeze(-1)
        return self.proj(y.reshape(batch, time, -1)), raw


class MLP(Component):
    """``W_proj leaky(W_fc x)^2``: with the published slope 0.5, z^2 above zero and z^2/4 below (PR 1166 s. 4.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = int(config.mlp_mult * config.model_dim)
        self.slope = config.leaky_slope
        self.fc = nn.Linear(config.model_dim, hidden, bias=False)
        self.proj = nn.Linear(hidden, config.model_dim, bias=False)

    def facts(self) -> dict[str, Facts]:
        return {"fc.weight": Facts("matrix", "mlp", orthogonal), "proj.weight": Facts("matrix", "mlp", ZERO)}

    def work(self, length: int, pairs: int, training: bool) -> Iterable[Work]:
        yield product("MLP", length, self.fc.in_features, 2 * self.fc.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.proj(squared_leaky_relu(self.fc(x), self.slope))


class Canon(Component):
    """``x_t + sigmoid(l) sum_k w_k x_{t-k}``, zeros before the sequence, w = 0 at first (PR 1170 section 4.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.canon.kernel, config.model_dim))
        self.delta_gate_logit = nn.Parameter(torch.tensor(config.canon.gate_init))

    def facts(self) -> dict[str, Facts]:
        return {"weight": Facts(), "delta_gate_logit": Facts()}

    def forward(self, x: Tensor, memory: Memory | None = None, name: str = "") -> Tensor:
        """Map (B, T, D) to (B, T, D); ``memory`` holds the last inputs before ``x`` under ``name``."""
        weight, kernel, time = self.weight.to(x.dtype), self.weight.size(0), x.size(1)
        read = memory.last(name, x, kernel - 1) if memory else x
        padded = F.pad(read, (0, 0, kernel - 1 + time - read.size(1), 0))[:, -(kernel - 1 + time) :]
        mixed = torch.stack([weight[k] * padded[:, kernel - 1 - k :][:, :time] for k in range(kernel)]).sum(0)
        return x + torch.sigmoid(self.delta_gate_logit).to(x.dtype) * mixed


class Block(Component):
    """One layer: residual mix with the embedding stream, attention, MLP (PR 1166 section 4.1).

    ``u = r0 x + r1 x0``; ``y = u + alpha Attn(s rms(u))``; ``out = y + beta MLP(s rms(y))`` with s = 1/sqrt(layer+1).
    Options: Canon on the inputs of attention and MLP; a gate ``out <- u + sigmoid(w stop(u) + 2) (out - u)``.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim = config.model_dim
        self.scale = 1.0 / math.sqrt(layer + 1) if config.ln_scale else 1.0
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        if layer >= config.num_layers - config.canon.last_n:
            self.canon_a, self.canon_c = Canon(config), Canon(config)
        if config.depth_gate:
            self.dtg_gate = nn.Linear(dim, 1)

    def facts(self) -> dict[str, Facts]:
        found = dict.fromkeys(("attn_scale", "mlp_scale", "resid_mix"), CONTROL)
        if hasattr(self, "dtg_gate"):
            found |= {"dtg_gate.weight": Facts(draw=ZERO), "dtg_gate.bias": Facts(draw=constant(2.0))}
        return found

    def work(self, length: int, pairs: int, training: bool) -> Iterable[Work]:
        if hasattr(self, "dtg_gate"):
            yield product("gates", length, self.dtg_gate.in_features, 1, times=1)  # its input gets no gradient

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        value_embedding: Tensor | None = None,
        first_values: Tensor | None = None,
        length: int | None = None,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (stream (B, T, D), raw values of this layer (B, T, K*d)).

        ``length`` as in :class:`Attention`; ``memory`` is that of one pass through this block.
        """
        u = mix(x, x0, self.resid_mix)
        normed = rms_norm(u, self.scale)
        attended, values = self.attn(self._canon("a", normed, memory), value_embedding, first_values, length, memory)
        y = add_scaled(u, self.attn_scale, attended)
        out = add_scaled(y, self.mlp_scale, self.mlp(self._canon("c", rms_norm(y, self.scale), memory)))
        if hasattr(self, "dtg_gate"):
            out = u + torch.sigmoid(self.dtg_gate(u.detach())) * (out - u)
        return out, values

    def _canon(self, place: str, x: Tensor, memory: Memory | None) -> Tensor:
        return getattr(self, f"canon_{place}")(x, memory, f"canon_{place}") if hasattr(self, "canon_a") else x


class BigramHash(Component):
    """Embedding of the (previous, current) token pair by a hash into a small table (PR 1166 section 4 step 2).

    Row ``h = ((36313 t) xor (27191 t_prev)) mod (rows - 1)``; the last row serves position 0 of every sequence. With
    trigrams a second row of the same table is added, hashed with ``51497 t_prev2`` too (PR 1406 section 4).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rows, self.trigram = config.bigram.vocab_size, config.bigram.trigram
        self.proj_scale = (2 * config.num_layers) ** -0.5 if config.bigram.scaled_init else 1.0
        self.scale = nn.Parameter(torch.tensor(0.05))
        self.embed = nn.Embedding(self.rows, config.bigram.dim)
        self.proj = nn.Linear(config.bigram.dim, config.model_dim, bias=False)

    def facts(self) -> dict[str, Facts]:
        return {
            "scale": Facts(),
            "embed.weight": table(ZERO),
            "proj.weight": Facts(storage="matrix", draw=self._draw_proj),
        }

    def work(self, length: int, pairs: int, training: bool) -> Iterable[Work]:
        yield product("bigram", length, self.proj.in_features, self.proj.out_features)

    def _draw_proj(self, tensor: Tensor, generator: torch.Generator) -> None:
        orthogonal(tensor, generator)
        tensor.mul_(self.proj_scale)

    def rows_of(self, tokens: Tensor, order: int = 2) -> Tensor:
        """Return the table rows (B, T) of the last ``order`` tokens at each position of ``tokens`` (B, T); int64."""
        key, time = torch.zeros_like(tokens[:, order - 1 :]), tokens.size(1)
        for back, prime in enumerate((36313, 27191, 51497)[:order]):
            key = torch.bitwise_xor(key, prime * tokens[:, order - 1 - back : time - back])
        return F.pad(key % (self.rows - 1), (time - key.size(1), 0), value=self.rows - 1)

    def forward(self, tokens: Tensor, memory: Memory | None = None) -> Tensor:
        """Map token ids (B, T) to vectors (B, T, D); ``memory`` holds the last ids before them."""
        time = tokens.size(1)
        if memory:
            tokens = memory.last("tokens", tokens, 2)
        rows = self.embed(self.rows_of(tokens)[:, -time:])
        if self.trigram:
            rows = rows + self.embed(self.rows_of(tokens, 3)[:, -time:])
        vectors = self.proj(rows)
        return self.scale.to(vectors.dtype) * vectors


class SmearGate(Component):
    """Mix each position with its predecessor: ``(1-g) x_t + g x_{t-1}``, g = sigmoid(gate), x_{-1} = 0 (PR 1166).

    With ``starts`` given, the predecessor of a document's first token counts as zero too, so that nothing crosses a
    document boundary here (the ruling of PR 1797 and 1855).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.model_dim))

    def facts(self) -> dict[str, Facts]:
        return {"gate": CONTROL}

    def forward(self, x: Tensor, starts: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, D); ``starts`` (B, T) bool marks the first token of each document.

        ``memory`` holds the input before ``x``.
        """
        read = memory.last("input", x, 1) if memory else x
        gate, before = torch.sigmoid(self.gate).to(x.dtype), F.pad(read, (0, 0, 1 + x.size(1) - read.size(1), -1))
        if starts is not None:
            before = before.masked_fill(starts.unsqueeze(-1), 0.0)
        return (1 - gate) * x + gate * before


class ValueEmbedding(Component):
    """A second token embedding, as wide as the values, shared by the layers that add it (PR 1166 section 7)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.embed = nn.Embedding(config.vocab_size, config.value_embedding.dim)
        self.proj = nn.Linear(config.value_embedding.dim, config.num_kv_heads * config.head_dim, bias=False)

    def facts(self) -> dict[str, Facts]:
        proj = Facts(storage="matrix", draw=orthogonal)
        return {"scale": CONTROL, "embed.weight": table(normal(0.01)), "proj.weight": proj}

    def work(self, length: int, pairs: int, training: bool) -> Iterable[Work]:
        yield product("value embedding", length, self.proj.in_features, self.proj.out_features)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, T) to (B, T, K*d)."""
        vectors = self.proj(self.embed(tokens))
        return self.scale.to(vectors.dtype) * vectors

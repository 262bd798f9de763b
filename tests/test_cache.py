"""A cache changes no logit: tokens read one after the other, or in pieces, give those of the whole forward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from golfbook.config.load import load_config, preset_names
from golfbook.errors import RunError
from golfbook.evaluate.generate import next_logits
from golfbook.model.cache import Cache
from golfbook.model.gpt import BOS_ID, GPT, initialise

LENGTH = 44  # two whole mini-batches of TTT-Linear and a part of one
SMALL = {
    "model.vocab_size": 61,
    "model.model_dim": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.rope_dims": 4,
    "model.num_layers": 5,
    "model.rope_train_length": 24,  # shorter than the input: the base depends on the length
    "model.bigram.vocab_size": 97,
    "model.bigram.dim": 8,
    "model.value_embedding.dim": 8,
    "model.ttt_linear.num_heads": 2,
}
OPTIONS: dict[str, dict] = {
    "plain": {"model.bigram.vocab_size": 0, "model.smear": False, "model.unet_skips": False, "model.xsa": 0},
    "trigram": {"model.bigram.trigram": True},
    "untied": {"model.tie_embeddings": False},
    "document mask": {"model.smear_document_mask": True},
    "all exclusive": {"model.xsa": 5},
    "recurrence after": {"model.recurrence": [1, 3, 1]},
    "recurrence in place": {"model.recurrence": [0, 2, 4], "model.recurrence_place": "in_place"},
    "value residual lambda": {"model.value_residual": "lambda"},
    "value residual alpha": {"model.value_residual": "alpha", "model.recurrence": [0, 2]},
    "value embeddings": {"model.value_embedding.layers": [0, 2, -1]},
    "canon": {"model.canon.last_n": 5, "model.recurrence": [2], "model.recurrence_place": "in_place"},
    "canon of one": {"model.canon.last_n": 2, "model.canon.kernel": 1},
    "gates": {"model.gated_attention": True, "model.depth_gate": True},
    "all rotated": {"model.rope_dims": 0},
    "ttt": {"model.ttt_linear.enabled": True},
    "flow": {"model.flow.enabled": True},
    "native flow": {"model.native_flow.enabled": True},
    "all refiners": {f"model.{name}.enabled": True for name in ("ttt_linear", "flow", "native_flow")},
}


def noisy(overrides: dict, preset: str = "quickstart", size: float = 0.3) -> GPT:
    """A small model none of whose weights is at the zero or one that it starts from."""
    config = load_config(preset, scale="published" if preset == "quickstart" else "tiny", overrides=overrides)
    model = initialise(GPT(config.model), 0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def text(model: GPT, rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    tokens = torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(2))
    tokens[:, 20] = BOS_ID
    return tokens


@torch.no_grad()
def whole(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of the forward pass without a cache."""
    return model.logits(model.hidden(tokens))


@torch.no_grad()
def in_pieces(model: GPT, tokens: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """Logits (B, T, V) of the same tokens, read in pieces of these lengths."""
    cache = Cache(tokens.size(1))
    return torch.cat([model.logits(model.hidden(part, cache=cache)) for part in tokens.split(pieces, dim=1)], dim=1)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [LENGTH], [7, 1, 1, 20, 15], [16, 16, 12], [1, 2, 30, 11]], ids=str)
def test_pieces_give_the_logits_of_the_whole(option: str, pieces: list[int]) -> None:
    model = noisy({**SMALL, **OPTIONS[option]})
    tokens = text(model)
    expected = whole(model, tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(in_pieces(model, tokens, pieces), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset(preset: str) -> None:
    """Logits token by token, and the greedy text that each side writes by itself."""
    model = noisy({}, preset, 0.1)  # wider matrices than above
    tokens = text(model)
    torch.testing.assert_close(in_pieces(model, tokens, [1] * LENGTH), whole(model, tokens), atol=1e-5, rtol=1e-5)
    slow, fast, cache = tokens[:, :3], tokens[:, :3], Cache(LENGTH)
    while slow.size(1) < LENGTH:
        padded = F.pad(slow, (0, LENGTH - slow.size(1)))
        slow = torch.cat((slow, likeliest(whole(model, padded)[:, slow.size(1) - 1], slow)), dim=1)
        fast = torch.cat((fast, likeliest(next_logits(model, fast[:, cache.position :], cache), fast)), dim=1)
    assert torch.equal(slow, fast)


def likeliest(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row (B, 1) but the one before: a random model with a tied head repeats itself."""
    return logits.scatter(1, tokens[:, -1:], -torch.inf).argmax(-1, keepdim=True)


def test_bfloat16_stays_close() -> None:
    model = noisy({**SMALL, **OPTIONS["all refiners"]})
    tokens = text(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = in_pieces(model, tokens, [1] * LENGTH)
    assert (found - whole(model, tokens)).abs().mean() < 0.1


def test_what_does_not_fit_is_refused() -> None:
    model = noisy(SMALL)
    with torch.no_grad(), pytest.raises(RunError, match="44 positions holds 0; 45 more"):
        model.hidden(text(model, length=45), cache=Cache(LENGTH))
    with pytest.raises(RunError, match="gradient"):
        model.hidden(text(model), cache=Cache(LENGTH))

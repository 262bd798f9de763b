"""Text that a model writes: one token after the other, each drawn from what the model expects next.

Nothing is cached from token to token: every step is the forward pass that scoring makes, so a text is drawn from
exactly the probabilities that :func:`golfbook.evaluate.scoring.score` charges for it. The windows here are short.
"""

from __future__ import annotations

import torch
from torch import Tensor

from golfbook.data.tokenizer import Tokenizer
from golfbook.errors import ConfigError
from golfbook.evaluate.scoring import evaluating
from golfbook.model.gpt import GPT


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    window: int,
    tokens: int = 40,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
) -> str:
    """Return up to ``tokens`` tokens that ``model`` writes after ``prompt``, as text; the same seed, the same text.

    The document ends, and the text with it, where the model writes BOS. ``window`` is how many tokens the model looks
    back on, the one that it is scored with. ``temperature`` divides the logits (0: always the likeliest token);
    ``top_k`` keeps the likeliest pieces (0: all). Raises :class:`ConfigError` for settings out of range.
    """
    if window < 1 or tokens < 0 or temperature < 0 or top_k < 0:
        raise ConfigError(
            f"generating needs a window of at least 1 and tokens, temperature and top_k of at least 0; got window "
            f"{window}, tokens {tokens}, temperature {temperature}, top_k {top_k}"
        )
    draw = torch.Generator().manual_seed(seed)
    given = [int(token) for token in tokenizer.encode_document(prompt)]
    ids = list(given)
    for _ in range(tokens):
        logits = next_logits(model, torch.tensor(ids[-window:]), window)[: tokenizer.vocab_size]
        token = _choose(logits, temperature, top_k, draw)
        if token == tokenizer.bos_id:
            break
        ids.append(token)
    return tokenizer.decode(ids)[len(tokenizer.decode(given)) :]


def next_logits(model: GPT, tokens: Tensor, window: int) -> Tensor:
    """Return the logits (V,) float32, on the CPU, of what follows ``tokens`` (n,) int64 in a window of ``window``.

    TTT-Linear corrects whole mini-batches only, so the input is filled up on the right, which no causal model sees.
    """
    refiner = model.config.ttt_linear
    multiple = refiner.mini_batch if refiner.enabled else 1
    length = min(window, -(-len(tokens) // multiple) * multiple)
    padded = torch.zeros(1, length, dtype=torch.int64)
    padded[0, : len(tokens)] = tokens
    with evaluating(model), torch.inference_mode():
        hidden = model.hidden(padded.to(next(model.parameters()).device), length=window)  # (1, length, D)
        return model.logits(hidden[0, len(tokens) - 1]).float().cpu()


def _choose(logits: Tensor, temperature: float, top_k: int, draw: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    kept = logits.topk(min(top_k or len(logits), len(logits)))  # sorted, likeliest first
    share = (kept.values.double() / temperature).softmax(0)
    return int(kept.indices[torch.multinomial(share, 1, generator=draw)])

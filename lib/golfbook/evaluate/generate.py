"""Text that a model writes: one token after the other, each drawn from what the model expects next.

A :class:`golfbook.model.cache.Cache` keeps what the model has read, so a step computes one position; a text is drawn
from the probabilities that :func:`golfbook.evaluate.scoring.score` charges for it, but for the order of float32 sums.
Once a text is longer than the window, every token moves its beginning, and with it everything that was kept: each step
is then a forward pass over the whole window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from golfbook.data.tokenizer import Tokenizer
from golfbook.errors import ConfigError
from golfbook.evaluate.scoring import evaluating
from golfbook.model.cache import Cache
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
    generator = torch.Generator().manual_seed(seed)
    given = [int(token) for token in tokenizer.encode_document(prompt)]
    ids, cache = list(given), Cache(window)
    with evaluating(model):
        for _ in range(tokens):
            if len(ids) > window:
                cache = Cache(window)
            new = torch.tensor([ids[-window:][cache.position :]])
            logits = next_logits(model, new, cache)[:, : tokenizer.vocab_size]
            token = int(draw(logits, temperature, top_k, generator))
            if token == tokenizer.bos_id:
                break
            ids.append(token)
    return tokenizer.decode(ids)[len(tokenizer.decode(given)) :]


def next_logits(model: GPT, tokens: Tensor, cache: Cache) -> Tensor:
    """Return the logits (B, V) float32, on the CPU, of what follows ``tokens`` (B, T) int64 after those in ``cache``.

    The model is taken as it is, in eval mode. Raises :class:`golfbook.errors.RunError` where the cache has no room for
    them.
    """
    with torch.inference_mode():
        hidden = model.hidden(tokens.to(next(model.parameters()).device), cache=cache)  # (B, T, D)
        return model.logits(hidden[:, -1]).float().cpu()


def draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw a token id for each row of ``logits`` (B, V), (B,) int64; ``temperature`` and ``top_k`` as in generate."""
    if temperature == 0:
        return logits.argmax(-1)
    kept = logits.topk(min(top_k or logits.size(1), logits.size(1)))  # sorted, likeliest first
    share = (kept.values.double() / temperature).softmax(-1)
    return kept.indices.gather(1, torch.multinomial(share, 1, generator=generator))[:, 0]

"""Generated text: the likeliest token is the argmax of the whole forward pass, and draws follow its probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from golfbook.config.load import load_config
from golfbook.data.tokenizer import Tokenizer
from golfbook.errors import ConfigError
from golfbook.evaluate.generate import generate, next_logits
from golfbook.evaluate.scoring import score
from golfbook.model.cache import Cache
from golfbook.model.gpt import GPT, initialise

WINDOW = 48
PROMPT = "The quick brown fox jumps over the lazy dog, and"
OVERRIDES = {"model.model_dim": 32, "model.num_heads": 2, "model.num_kv_heads": 1, "model.ttt_linear.num_heads": 2}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(__file__).parent / "data/fineweb_1024_bpe.model")


def noisy(overrides: dict, size: float = 0.3) -> GPT:
    """A model whose every part does something: no weight is at the zero or one that it starts from."""
    model = initialise(GPT(load_config("quickstart", overrides={**OVERRIDES, **overrides}).model), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


PARTS = {
    "plain": {},
    "ttt": {"model.ttt_linear.enabled": True},
    "recurrence": {"model.recurrence": [1, 2], "model.recurrence_place": "in_place"},
    "flow": {"model.flow.enabled": True, "model.mtp.num_heads": 1},
}


@pytest.mark.parametrize("part", PARTS)
def test_greedy_text_is_the_argmax_of_the_whole_forward_pass(part: str, tokenizer: Tokenizer) -> None:
    """Compared with whole windows, zeros after the text; at lengths that fill no mini-batch, and beyond the window."""
    model = noisy(PARTS[part]).eval()
    ids = tokenizer.encode_document(PROMPT).tolist()
    assert len(ids) < WINDOW - 8
    start = len(ids)
    for _ in range(40):
        context = ids[-WINDOW:]
        with torch.no_grad():
            logits = model(torch.tensor([context + [0] * (WINDOW - len(context))]))[0, len(context) - 1]
        token = int(logits[: tokenizer.vocab_size].argmax())
        if token == tokenizer.bos_id:
            break
        ids.append(token)
    assert len(ids) > start + 3
    written = generate(model, tokenizer, PROMPT, window=WINDOW, temperature=0)
    assert tokenizer.decode(ids) == PROMPT + written


@pytest.mark.parametrize("part", PARTS)
def test_draws_follow_what_scoring_charges(part: str, tokenizer: Tokenizer) -> None:
    model = noisy(PARTS[part])
    ids = tokenizer.encode_document(PROMPT)
    for count in (1, 15, 16, 17):
        for token in (5, 700):
            charged = score(model, np.append(ids[:count], np.uint16(token)), window=WINDOW, stride=WINDOW)[-1]
            read = torch.from_numpy(ids[:count].astype(np.int64))[None]
            expected = next_logits(model, read, Cache(WINDOW)).log_softmax(1)[0, token]
            assert -charged == pytest.approx(expected.item(), abs=2e-5)


def test_frequencies_of_draws(tokenizer: Tokenizer) -> None:
    """The first piece of many texts occurs as often as the model, temperature and top_k say."""
    model = noisy({})
    logits = next_logits(model, torch.tensor(tokenizer.encode_document("").astype(np.int64))[None], Cache(WINDOW))[0]
    likeliest = logits.topk(3)
    share = (likeliest.values / 4.0).softmax(0)
    drawn = [generate(model, tokenizer, window=WINDOW, tokens=1, seed=s, temperature=4.0, top_k=3) for s in range(300)]
    for token, expected in zip(likeliest.indices.tolist(), share.tolist(), strict=True):
        assert drawn.count(tokenizer.decode([tokenizer.bos_id, token])) / 300 == pytest.approx(expected, abs=0.1)
    assert len(set(drawn)) == 3


def test_one_seed_one_text_and_the_model_keeps_its_mode(tokenizer: Tokenizer) -> None:
    model = noisy({}).train()
    state = torch.get_rng_state()
    texts = [generate(model, tokenizer, "a", window=WINDOW, tokens=12, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_pieces_that_the_tokenizer_lacks_are_never_written(tokenizer: Tokenizer) -> None:
    model = noisy({"model.vocab_size": 2048}).eval()
    with torch.no_grad():
        model.tok_emb.weight[1024:] *= 100  # by far the largest logits, of either sign
    assert generate(model, tokenizer, window=WINDOW, tokens=20, temperature=0)


def test_the_end_of_the_document_ends_the_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy({})
    logits = torch.zeros(1, 1024)
    logits[0, tokenizer.bos_id] = 50.0
    monkeypatch.setattr(GPT, "logits", lambda self, hidden: logits)
    assert generate(model, tokenizer, "word", window=WINDOW) == ""


@pytest.mark.parametrize("wrong", [{"window": 0}, {"tokens": -1}, {"temperature": -0.1}, {"top_k": -1}])
def test_settings_out_of_range_are_named(wrong: dict, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
        generate(noisy({}), tokenizer, **{"window": WINDOW, **wrong})

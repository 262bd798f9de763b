"""The driver of adaptation: what a rule is given, when, and that learning nothing is plain scoring."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golfbook.config.load import load_config
from golfbook.config.tables import RULES, named
from golfbook.errors import ConfigError
from golfbook.evaluate import adaptation, scoring
from golfbook.model.gpt import GPT, initialise


def tiny() -> GPT:
    torch.set_num_threads(1)
    model = initialise(GPT(load_config("quickstart", scale="tiny", overrides={"model.vocab_size": 64}).model), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


TOKENS = np.random.default_rng(0).integers(0, 64, 400).astype(np.uint16)


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (64, 24), (500, 64)])
def test_learning_nothing_is_plain_scoring_to_the_bit(window: int, stride: int) -> None:
    model, rule = tiny(), named(RULES, "keep")
    adapted = adaptation.adapt_and_score(model, TOKENS, rule, window=window, stride=stride, chunk=50)
    assert np.array_equal(adapted, scoring.score(model, TOKENS, window=window, stride=stride))


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 300), window=st.integers(1, 80), share=st.integers(1, 80), chunk=st.integers(1, 200))
def test_a_rule_sees_each_token_once_and_only_after_its_score(count, window, share, chunk) -> None:
    """Every loss is that of the weights before its chunk was learnt, whatever the windows."""
    model, tokens = tiny(), TOKENS[:count]
    seen: list[int] = []
    original = scoring.Scorer.__call__
    scored = [0]

    def call(self, batch):
        scored[0] += int((batch.stop - batch.first).sum())
        return original(self, batch)

    def rule(given: GPT, learnt: torch.Tensor) -> None:
        assert given is model and learnt.dtype == torch.int64
        assert len(seen) + len(learnt) - 1 <= scored[0] < count - 1, "a token that is not scored yet"
        assert learnt.tolist() == tokens[len(seen) : len(seen) + len(learnt)].tolist()
        seen.extend(learnt[1:].tolist())
        assert len(learnt) - 1 >= chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring.Scorer, "__call__", call)
        stride = min(share, window)
        adaptation.adapt_and_score(model, tokens, rule, window=window, stride=stride, chunk=chunk, batch_windows=2)
    assert scored[0] == count - 1
    assert seen == tokens[1 : 1 + len(seen)].tolist() and len(seen) < count


def test_what_was_learnt_changes_later_losses_alone() -> None:
    model, calls = tiny(), []

    def rule(model: GPT, learnt: torch.Tensor) -> None:
        calls.append(len(learnt) - 1)
        with torch.no_grad():
            model.tok_emb.weight.mul_(1.1)

    before = scoring.score(model, TOKENS, window=64, stride=64)
    after = adaptation.adapt_and_score(model, TOKENS, rule, window=64, stride=64, chunk=128, batch_windows=1)
    assert calls[0] == 128 and np.array_equal(before[:128], after[:128])
    assert not np.isclose(before[128:], after[128:]).all()
    assert not torch.is_inference(model.tok_emb.weight)
    with pytest.raises(ConfigError, match="at least 1 token"):
        adaptation.adapt_and_score(model, TOKENS, rule, window=64, stride=64, chunk=0)

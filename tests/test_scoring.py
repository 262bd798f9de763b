"""Scoring: every target once, exact against a per-window loop, and the published values with and without their tail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from golfbook.config.load import load_config
from golfbook.errors import ConfigError, DataError, RunError
from golfbook.evaluate import scoring
from golfbook.evaluate.scoring import bits_per_byte, score, score_windows, summarize
from golfbook.evaluate.windows import plan_windows, published_windows
from golfbook.model.gpt import GPT, initialise
from golfbook.plain import score as plain_score
from reference import fill_hashed, hashed_tokens, sine
from test_model import pr1406_tiny

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class RunningMean(nn.Module):
    """A causal stand-in: the state is the mean of all embeddings so far plus a term that depends on the length."""

    def __init__(self, vocab_size: int = 13, width: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.config = SimpleNamespace(vocab_size=vocab_size, ttt_linear=SimpleNamespace(enabled=False))
        self.table = nn.Parameter(torch.randn(vocab_size, width, generator=generator))
        self.head = nn.Parameter(torch.randn(vocab_size, width, generator=generator))
        self.dropout = nn.Dropout(0.5)  # scoring in training mode would show
        self.inputs: list[torch.Tensor] = []
        self.head_rows = 0

    def hidden(self, tokens: torch.Tensor, length: int | None = None) -> torch.Tensor:
        self.inputs.append(tokens)
        length = length or tokens.size(1)
        mean = self.table[tokens].cumsum(1) / torch.arange(1, tokens.size(1) + 1)[:, None]
        return self.dropout(mean + 0.01 * length)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.head_rows += hidden.shape[:-1].numel()
        return hidden @ self.head.T


def by_hand(model, tokens, window, stride):
    """The plain score, with logits in float64."""
    model.eval()
    return plain_score.score(lambda ids: model.logits(model.hidden(ids)).double(), tokens, window, stride)


def random_tokens(count: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, count).astype(np.uint16)


sizes = st.integers(1, 40).flatmap(lambda window: st.tuples(st.just(window), st.integers(1, window)))


@given(targets=st.integers(1, 300), size=sizes)
@settings(max_examples=300, deadline=None)
def test_plan_scores_every_target_once_with_enough_context(targets, size):
    window, stride = size
    plan = plan_windows(targets, window, stride)
    assert plan.targets.tolist() == list(range(targets))
    assert (plan.first >= plan.starts).all() and (plan.stop <= plan.starts + window).all()
    context = plan.targets - np.repeat(plan.starts, plan.stop - plan.first)  # tokens before the one that is read last
    assert (context[plan.targets >= window] >= window - stride).all()
    assert len(plan) == 1 or (plan.stop - plan.first)[1:-1].tolist() == [stride] * (len(plan) - 2)


@pytest.mark.parametrize(
    ("targets", "window", "stride", "expected"),
    [
        (5, 8, 3, [(0, 0, 5)]),  # fewer targets than a window
        (16, 8, 8, [(0, 0, 8), (8, 8, 16)]),  # contiguous
        (17, 8, 8, [(0, 0, 8), (8, 8, 16), (16, 16, 17)]),
        (10, 8, 5, [(0, 0, 8), (5, 8, 10)]),  # the stride is longer than what is left
        (11, 8, 2, [(0, 0, 8), (2, 8, 10), (4, 10, 11)]),
    ],
)
def test_plan_examples(targets, window, stride, expected):
    plan = plan_windows(targets, window, stride)
    assert list(zip(plan.starts.tolist(), plan.first.tolist(), plan.stop.tolist(), strict=True)) == expected


def test_published_windows_repeat_their_tail():
    """PR 1166 section 18.3 in small: 2048 -> 256 tokens, stride 64 -> 16, the last 16 targets 16 times."""
    plan = published_windows(6000, 256, 16)
    counts = np.bincount(plan.targets, minlength=6000)
    assert len(plan) == 375 and counts.sum() == 6000 + 240
    assert counts[:-16].tolist() == [1] * 5984 and counts[-16:].tolist() == [16] * 16
    full = published_windows(62_021_632, 2048, 64)  # the whole validation split
    assert len(full) == 969_088 and int((full.stop - full.first).sum()) == 62_023_616


@given(targets=st.integers(1, 120), size=sizes, batch=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_score_equals_the_per_window_loop(targets, size, batch):
    window, stride = size
    model = RunningMean()
    tokens = random_tokens(targets + 1, 13, seed=targets)
    nll = score(model, tokens, window=window, stride=stride, batch_windows=batch)
    assert nll.dtype == np.float32 and nll.shape == (targets,)
    assert model.head_rows == targets  # only scored positions reach the head, each once
    assert len({x.shape for x in model.inputs}) == 1
    assert model.inputs[0].shape[0] <= batch and model.inputs[0].shape[1] == min(window, targets)
    np.testing.assert_allclose(nll, by_hand(model, tokens, window, stride), atol=2e-5)


@pytest.fixture(scope="module")
def small_gpt() -> GPT:
    """All architectural parts at width 32, weights far from their initial values."""
    config = load_config(
        {
            "model": {
                "vocab_size": 16, "num_layers": 4, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 4,
                "rope_train_length": 16, "bigram": {"vocab_size": 32, "dim": 8},
                "value_embedding": {"dim": 8, "layers": [-2, -1]}, "ttt_linear": {"enabled": True, "num_heads": 4},
                "flow": {"enabled": True, "latent_dim": 8, "hidden_dim": 16},
            }
        }
    ).model  # fmt: skip
    model = initialise(GPT(config), seed=1)
    fill_hashed(model)
    return model.eval()


def test_score_of_the_real_model_equals_the_loop(small_gpt):
    tokens = random_tokens(150, 16)
    for stride in (5, 16, 32):
        nll = score(small_gpt, tokens, window=32, stride=stride, batch_windows=4)
        np.testing.assert_allclose(nll, by_hand(small_gpt, tokens, 32, stride), atol=2e-5)


def test_probabilities_of_all_continuations_sum_to_one(small_gpt):
    for count in (10, 32, 33, 75):  # inside the first window, at its end, just beyond, several windows on
        stem = random_tokens(count, 16, seed=count)
        losses = [
            score(small_gpt, np.append(stem, np.uint16(v)), window=32, stride=8)[-1].astype(float) for v in range(16)
        ]
        assert math.fsum(math.exp(-x) for x in losses) == pytest.approx(1.0, abs=1e-5)


def test_score_is_causal(small_gpt):
    """What follows a target cannot change its loss."""
    tokens = random_tokens(100, 16)
    other = tokens.copy()
    other[61:] = (other[61:] + 3) % 16
    a, b = (score(small_gpt, t, window=32, stride=8) for t in (tokens, other))
    np.testing.assert_array_equal(a[:60], b[:60])
    assert (a[60:] != b[60:]).all()


def test_batch_size_and_head_chunk_change_only_rounding(small_gpt, monkeypatch):
    """float32 sums in another order: no loss moves by more than 2e-5 nats."""
    tokens = random_tokens(400, 16)
    one = score(small_gpt, tokens, window=32, stride=8, batch_windows=1)
    monkeypatch.setattr(scoring, "CPU_TOKENS", 100 * 32)
    for batch in (2, 7, 100):
        np.testing.assert_allclose(
            score(small_gpt, tokens, window=32, stride=8, batch_windows=batch), one, atol=2e-5, rtol=0
        )
    rows = []
    inner = GPT.logits

    def spy(self, hidden):
        rows.append(len(hidden))
        return inner(self, hidden)

    monkeypatch.setattr(GPT, "logits", spy)
    monkeypatch.setattr(scoring, "HEAD_LOGITS", 5 * 16)
    np.testing.assert_allclose(score(small_gpt, tokens, window=32, stride=8), one, atol=2e-5, rtol=0)
    assert max(rows) == 5 and sum(rows) == 399


def test_passes_on_a_cpu_stay_small():
    model = RunningMean()
    score(model, random_tokens(5001, 13), window=256, stride=64, batch_windows=1000)
    assert {x.numel() for x in model.inputs} == {scoring.CPU_TOKENS}


@pytest.mark.parametrize("preset", ["pr1166_e2e_ttt_flow", "pr1232_flow", "pr1406"])
def test_a_window_longer_than_the_text_changes_no_score(preset, monkeypatch):
    """Beyond 1,024 positions the rotary base depends on the window, and TTT-Linear on whole mini-batches."""
    model = initialise(GPT(load_config(preset, scale="tiny").model), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    tokens = random_tokens(38, 1024)
    whole = by_hand(model, tokens, 2048, 2048)
    rows = []
    hidden = GPT.hidden
    monkeypatch.setattr(
        GPT, "hidden", lambda self, tokens, length=None: rows.append(tokens.shape) or hidden(self, tokens, length)
    )
    np.testing.assert_allclose(score(model, tokens, window=2048, stride=64), whole, atol=2e-5, rtol=0)
    assert rows == [(1, 48 if model.config.ttt_linear.enabled else 37)]


MEMORY = """
import resource, sys
import numpy as np, torch
from golfbook.config.load import load_config
from golfbook.model.gpt import GPT, initialise
from golfbook import compute
from golfbook.evaluate import scoring
torch.set_num_threads(1)
compute.prepare(1, torch.device("cpu"), compute.Choices(attention={"inference, float32, long": "blocked"}))
small = {"model.num_layers": 2, "model.xsa": 1, "model.model_dim": 32, "model.num_heads": 2, "model.num_kv_heads": 1}
model = initialise(GPT(load_config("quickstart", overrides=small).model), 0)
count, window = int(sys.argv[1]), int(sys.argv[2])
tokens = np.random.default_rng(0).integers(0, 1024, count + 1).astype(np.uint16)
scoring.score(model, tokens[:65], window=64, stride=64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scoring.score(model, tokens, window=window, stride=window)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize(("targets", "window", "most"), [(1, 2**40, 50), (8000, 8000, 150)])
def test_memory_of_long_windows(targets, window, most):
    """MiB beyond a short score; 8,000 positions kept 250 of weights a layer."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(targets), str(window)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < most


def test_modes_come_back_and_gradients_still_flow(small_gpt):
    model = GPT(small_gpt.config)
    model.load_state_dict(small_gpt.state_dict())
    model.train()
    model.blocks[1].eval()
    before = [m.training for m in model.modules()]
    seen = []
    score(model, random_tokens(60, 16), window=24, stride=8, progress=lambda done, total: seen.append((done, total)),
          batch_windows=2)  # fmt: skip
    assert [m.training for m in model.modules()] == before
    assert seen == [(2, 6), (4, 6), (6, 6)]
    batch = torch.from_numpy(random_tokens(25, 16).astype(np.int64))[None]
    model.loss(batch[:, :-1], batch[:, 1:]).backward()  # same length as the windows: cached tables are usable
    assert all(p.grad is not None for p in model.parameters())

    class Broken(RunningMean):
        def hidden(self, tokens, length=None):
            raise KeyError("stop")

    broken = Broken().train()
    with pytest.raises(KeyError):
        score(broken, random_tokens(9, 13), window=4, stride=2)
    assert broken.training and broken.dropout.training


def test_clear_errors():
    model, tokens = RunningMean(), random_tokens(20, 13)
    with pytest.raises(ConfigError, match=r"score\.stride must be from 1 to the window of 4 tokens, got 5"):
        score(model, tokens, window=4, stride=5)
    with pytest.raises(ConfigError, match=r"score\.window"):
        score(model, tokens, window=0, stride=1)
    with pytest.raises(ConfigError, match=r"score\.batch_windows"):
        score(model, tokens, window=4, stride=2, batch_windows=0)
    for few in (tokens[:1], tokens[:0]):
        with pytest.raises(DataError, match="fewer than two tokens"):
            score(model, few, window=4, stride=2)
    with pytest.raises(DataError, match="token 13 is outside the model's vocabulary of 13"):
        score(model, np.array([1, 2, 13, 4]), window=4, stride=2)
    with pytest.raises(DataError, match="token -1"):
        score(model, np.array([1, -1, 4]), window=4, stride=2)
    with pytest.raises(DataError, match="row of integers"):
        score(model, tokens[None], window=4, stride=2)
    with pytest.raises(DataError, match="row of integers"):
        score(model, tokens.astype(np.float32), window=4, stride=2)
    with pytest.raises(DataError, match="at least one byte"):
        bits_per_byte(np.ones(3), 0)
    with torch.no_grad():
        model.table[5] = torch.inf
    tokens = np.array([1, 2, 3, 5, 3, 2], dtype=np.uint16)
    with pytest.raises(RunError, match="2 of 5 targets is not finite, first at target 3"):
        score(model, tokens, window=5, stride=5)


def test_bits_per_byte_adds_in_float64():
    nll = np.full(3_000_000, 0.1, dtype=np.float32)
    assert bits_per_byte(nll, 1_000_000) == pytest.approx(3 * float(np.float32(0.1)) / math.log(2), rel=1e-12)
    assert summarize(np.array([1.0, 3.0]), 4) == {
        "val_bpb": 4 / (4 * math.log(2)), "val_loss": 2.0, "tokens": 2, "bytes": 4,
    }  # fmt: skip


def synthetic_bytes(tokens: np.ndarray, base: np.ndarray, lead: np.ndarray, boundary: np.ndarray) -> np.ndarray:
    return base[tokens[1:]] + (lead[tokens[1:]] & ~boundary[tokens[:-1]])


def test_published_small_model_with_and_without_the_repeated_tail():
    """Reference values of the published PR 1166 evaluation of a small trained model on real text (6000 targets)."""
    meta = json.loads((GOLDEN / "small_pr1166.json").read_text())
    model = GPT(load_config({"model": meta["model"]}).model)
    model.load_state_dict(load_file(GOLDEN / "trained_small_pr1166.safetensors"))
    stored = np.load(GOLDEN / "bytes_first50docs.npz")
    tokens, byte_counts = stored["stream"][:6001], stored["token_bytes"][:6000].astype(np.int64)

    def evaluate(windows):
        nll = score_windows(model, tokens, windows, window=256, batch_windows=16)
        return summarize(nll, int(byte_counts[windows.targets].sum()))

    for windows, loss, bpb, total in (
        (plan_windows(6000, 256, 16), 5.42283181844155, 3.1491315867598972, 14906),
        (published_windows(6000, 256, 16), 5.4356985459916105, 3.140647281758125, None),
        (published_windows(6000, 256, 64), 5.421282126190435, 3.1587022140179206, None),
        (plan_windows(5888, 256, 256), 5.435374716053838, 3.1516225949995684, None),  # whole sequences only
    ):
        result = evaluate(windows)
        assert result["val_loss"] == pytest.approx(loss, abs=2e-5)
        assert result["val_bpb"] == pytest.approx(bpb, abs=2e-5)
        assert total is None or result["bytes"] == total


def test_published_tiny_model_values():
    """The specification's values for a tiny PR 1166 model, which count the tail again and again."""
    model = GPT(
        load_config(
            {
                "model": {
                    "num_layers": 4, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 8, "xsa": 2,
                    "bigram": {"vocab_size": 64, "dim": 16}, "value_embedding": {"dim": 16, "layers": [2, 3]},
                    "ttt_linear": {"enabled": True, "num_heads": 4},
                    "flow": {"enabled": True, "latent_dim": 16, "hidden_dim": 32},
                }
            }
        ).model
    )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == 254_022
    fill_hashed(model)
    tokens = hashed_tokens("val", 1025)
    ids = np.arange(1024)
    counts = synthetic_bytes(tokens, 1 + ids % 5, ids % 3 == 0, ids < 4)
    for windows, loss, bpb in (
        (plan_windows(1024, 128, 128), 7.686026, 3.260976),
        (published_windows(1024, 128, 64), 7.663067, 3.250905),
        (published_windows(1024, 128, 32), 7.683793, 3.264689),
    ):
        nll = score_windows(model, tokens, windows, window=128, batch_windows=8)
        result = summarize(nll, int(counts[windows.targets].sum()))
        assert result["val_loss"] == pytest.approx(loss, abs=2e-5)
        assert result["val_bpb"] == pytest.approx(bpb, abs=2e-5)
    assert counts.sum() == 3482


def test_published_pr1406_values():
    """PR 1406 section 30: contiguous and sliding evaluation of its tiny model with recurrence."""
    a = np.floor(1e6 * (sine(900, 1001).numpy() + 0.5)).astype(np.int64) % 1000
    tokens = (a * a // 31000) % 32
    assert tokens[:12].tolist() == [2, 6, 14, 3, 27, 17, 18, 11, 13, 2, 17, 20] and tokens.sum() == 9955
    ids = np.arange(32)
    counts = synthetic_bytes(tokens, 1 + ids % 3, ids % 2 == 0, ids == 0)
    sliding = published_windows(1000, 64, 16)
    assert len(sliding) == 63 and len(sliding.targets) == 1048
    model = pr1406_tiny((2, 3))
    for windows, loss, bpb in ((plan_windows(960, 64, 64), 5.140382, 3.277792), (sliding, 5.119528, 3.266009)):
        result = summarize(score_windows(model, tokens, windows, window=64), int(counts[windows.targets].sum()))
        assert result["val_loss"] == pytest.approx(loss, abs=1e-5)
        assert result["val_bpb"] == pytest.approx(bpb, abs=1e-5)

"""Bits per byte of whole streams against values of the published evaluation code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from golfbook.config.load import load_config
from golfbook.data.tokenizer import Tokenizer
from golfbook.evaluate import scoring
from golfbook.evaluate.windows import Windows, plan_windows, published_windows
from golfbook.model.gpt import GPT
from reference import fill_hashed, hashed_tokens

HERE = Path(__file__).parent
TINY = {
    "vocab_size": 1024, "num_layers": 4, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 8, "xsa": 2,
    "bigram": {"vocab_size": 64, "dim": 16}, "value_embedding": {"dim": 16, "layers": [2, 3]},
    "flow": {"enabled": True, "latent_dim": 16, "hidden_dim": 32}, "ttt_linear": {"enabled": True, "num_heads": 4},
}  # fmt: skip
TINY_B = {
    **TINY, "num_layers": 5, "xsa": 5, "gated_attention": True, "value_residual": "lambda",
    "value_embedding": {"layers": []}, "flow": {}, "ttt_linear": {},
}  # fmt: skip


def published_score(nll: np.ndarray, windows: Windows, token_bytes: np.ndarray) -> tuple[float, float]:
    """Loss and bits per byte over every scored target, repeats included."""
    total = nll.astype(np.float64).sum()
    return total / len(nll), total / (np.log(2) * token_bytes[windows.targets].sum())


def test_trained_model_on_real_text():
    """The small trained PR 1166 model on 6,000 FineWeb targets; window 256, each token once and as published."""
    meta = json.loads((HERE / "golden" / "small_pr1166.json").read_text())
    model = GPT(load_config({"model": meta["model"]}).model)
    model.load_state_dict(load_file(HERE / "golden" / "trained_small_pr1166.safetensors"))
    tokens = np.load(HERE / "golden" / "tokens_6001.npy")
    token_bytes = Tokenizer.load(HERE / "data" / "fineweb_1024_bpe.model").token_bytes(tokens)
    assert token_bytes.sum() == 14906
    once = scoring.score(model, tokens, window=256, stride=16)
    summary = scoring.summarize(once, int(token_bytes.sum()))
    assert summary["tokens"] == 6000
    assert summary["val_loss"] == pytest.approx(5.42283181844155, abs=1e-6)
    assert summary["val_bpb"] == pytest.approx(3.1491315867598972, abs=1e-6)
    for stride, loss, bpb in ((16, 5.4356985459916105, 3.140647281758125), (64, 5.421282126190435, 3.1587022140179206)):
        windows = published_windows(6000, 256, stride)
        nll = scoring.score_windows(model, tokens, windows, window=256)
        assert published_score(nll, windows, token_bytes) == pytest.approx((loss, bpb), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "plain", "sliding"),
    [
        (TINY, (7.686026, 3.260976), {64: (7.663067, 3.250905), 32: (7.683793, 3.264689)}),
        (TINY_B, (7.406866, 3.142536), {64: (7.392562, 3.136149), 32: (7.391845, 3.140647)}),
    ],
)
def test_published_tiny_configurations(values, plain, sliding):
    """PR 1166 and PR 1232 at tiny size on synthetic tokens and byte tables (section 24.5)."""
    model = GPT(load_config({"model": values}).model).eval()
    fill_hashed(model)
    tokens = hashed_tokens("val", 1025)
    before, target = tokens[:-1], tokens[1:]
    token_bytes = 1 + target % 5 + ((target % 3 == 0) & (before >= 4))
    assert token_bytes.sum() == 3482
    contiguous = plan_windows(1024, 128, 128)
    nll = scoring.score_windows(model, tokens, contiguous, window=128)
    assert published_score(nll, contiguous, token_bytes) == pytest.approx(plain, abs=2e-6)
    for stride, expected in sliding.items():
        windows = published_windows(1024, 128, stride)
        nll = scoring.score_windows(model, tokens, windows, window=128)
        assert published_score(nll, windows, token_bytes) == pytest.approx(expected, abs=2e-6)


def test_pr1406_stream():
    """Contiguous and sliding scores of the PR 1406 tiny model with recurrence (section 30)."""
    from test_model import pr1406_tiny

    a = np.floor(1e6 * (sine_tokens(900, 1001) + 0.5)) % 1000
    tokens = (np.floor(a * a / 31000) % 32).astype(np.int64)
    assert tokens[:12].tolist() == [2, 6, 14, 3, 27, 17, 18, 11, 13, 2, 17, 20]
    assert tokens.sum() == 9955
    token_bytes = 1 + tokens[1:] % 3 + ((tokens[1:] % 2 == 0) & (tokens[:-1] != 0))
    model = pr1406_tiny((2, 3))
    contiguous = plan_windows(960, 64, 64)
    nll = scoring.score_windows(model, tokens[:961], contiguous, window=64)
    assert published_score(nll, contiguous, token_bytes) == pytest.approx((5.140382, 3.277792), abs=2e-6)
    windows = published_windows(1000, 64, 16)
    assert len(windows) == 63 and len(windows.targets) == 1048
    nll = scoring.score_windows(model, tokens, windows, window=64)
    assert published_score(nll, windows, token_bytes) == pytest.approx((5.119528, 3.266009), abs=2e-6)


def sine_tokens(tag: int, count: int) -> np.ndarray:
    from reference import sine

    values: torch.Tensor = sine(tag, count)
    return values.numpy()

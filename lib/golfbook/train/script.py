"""What ``train_gpt.py`` of a submission does: score the artifact beside it, or train and export one first.

``golfbook score`` finds its numbers by the same :func:`score_files`, so both give the same ones.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from golfbook.compress.calibration import calibrate
from golfbook.compress.container import find_tokenizer, read_artifact
from golfbook.compress.export import export
from golfbook.config.schema import BudgetConfig, ScoreConfig
from golfbook.data import dataset, documents
from golfbook.errors import ConfigError, DataError, GolfbookError
from golfbook.evaluate import scoring
from golfbook.files import atomic_write_bytes
from golfbook.run import open_run
from golfbook.train import choices, loop
from golfbook.train.checkpoints import load_model

USER_ERROR = 2


def score_files(
    artifact: Path,
    files: Sequence[Path],
    *,
    stride: int,
    window: int | None = None,
    tokenizer: Path | None = None,
    text_field: str = "text",
    device: torch.device | None = None,
    progress: scoring.Progress | None = None,
) -> dict[str, Any]:
    """Score an artifact on texts (.txt, .jsonl, folders of them) or on shards of tokens (.bin), in sliding windows.

    ``window`` is by default that of training. The device is the CPU where none is given; what is fastest on this
    machine is measured once and kept. Returns ``val_bpb``, ``val_loss``, what was scored and how, and the size of the
    artifact. Raises :class:`golfbook.errors.GolfbookError` naming the file that is damaged, empty or does not fit.
    """
    loaded = read_artifact(artifact)
    pieces = find_tokenizer(artifact, loaded, tokenizer)
    window = window or loaded.train_window
    if stride > window:
        raise ConfigError(f"--stride {stride} is more than the window of {window} tokens")
    if all(path.suffix == ".bin" for path in files):
        tokens, total_bytes = dataset.read_shards_for_scoring(pieces, files)
        count, changes = int(np.sum(tokens == pieces.bos_id)), "unknown: shards hold tokens, and not the text"
    elif any(path.suffix == ".bin" for path in files):
        raise DataError("give texts or shards, not both")
    else:
        texts = [text for path in files for text in documents.read_documents(path, text_field)]
        tokens, _, total_bytes, changes = dataset.encode_for_scoring(pieces, texts)
        count = len(texts)
    device = device or torch.device("cpu")
    choices.set_up(torch.get_num_threads(), device)
    started = time.monotonic()
    nll = scoring.score(loaded.build(), tokens, window=window, stride=stride, device=device, progress=progress)
    seconds = time.monotonic() - started
    values = scoring.summarize(nll, total_bytes)
    return {
        "artifact": artifact,
        "val_bpb": values["val_bpb"],
        "val_loss": values["val_loss"],
        "tokens": values["tokens"],
        "bytes": total_bytes,
        "documents": count,
        "normalisation": changes,
        "window": window,
        "stride": stride,
        "seconds": seconds,
        "tokenizer": pieces.path,
        "artifact_bytes": loaded.bytes,
    }


def run_script(script: str) -> int:
    """Do what the command line asks of the script at this path; return the exit status.

    Relative paths of a configuration, and the cache, are taken to be in the folder of the script.
    """
    here = Path(script).resolve().parent
    os.environ.setdefault("GOLFBOOK_ROOT", str(here))
    parser = argparse.ArgumentParser(description="Score artifact.golf, or train and export one first.")
    parser.add_argument("files", nargs="*", type=Path, help="texts (.txt, .jsonl, folders of them) or shards (.bin)")
    parser.add_argument("--train", type=Path, metavar="FOLDER", help="train by its config.json (default: ours)")
    parser.add_argument("--stride", type=int, default=ScoreConfig().stride, help="targets scored a window")
    parser.add_argument("--window", type=int, help="tokens a window; default: as in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    if given.stride < 1 or not (given.files or given.train):
        parser.error("--stride must be at least 1" if given.stride < 1 else "name the text to score, or --train FOLDER")
    try:
        if given.train:
            status = _train(given.train, here / "config.json", Path(script).stat().st_size)
            if status or int(os.environ.get("RANK", 0)):
                return status
        if given.files:
            found = score_files(
                (given.train or here) / "artifact.golf",
                given.files,
                stride=given.stride,
                window=given.window,
                device=torch.device(given.device),
            )
            code, limit = Path(script).stat().st_size, BudgetConfig().limit_bytes
            total = code + found["artifact_bytes"]
            found |= {"code_bytes": code, "total_bytes": total, "limit_bytes": limit, "within_budget": total <= limit}
            for name, value in found.items():
                print(f"{name}: {value}")
    except GolfbookError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def _train(folder: Path, config: Path, code_bytes: int) -> int:
    """Train in ``folder``, or go on from its checkpoint, and write its artifact; return the exit status."""
    target = folder / "config.json"
    if not target.is_file() and config.is_file():
        atomic_write_bytes(target, config.read_bytes())
    run = open_run(folder)
    status = loop.train(run)
    if status or int(os.environ.get("RANK", 0)):
        return status
    data, model = dataset.prepare(run.config), load_model(run)
    statistics, limit = calibrate(model, run.config, data), run.config.budget.limit_bytes - code_bytes
    export(run.artifact_path, model, run.config, data.tokenizer.sha256, statistics, limit)
    atomic_write_bytes(run.tokenizer_path, data.tokenizer.path.read_bytes())
    return 0

"""A submission folder: one run as the challenge wants it, which needs nothing of this workbook any more.

The folder is written aside and renamed, so it is there and whole, or not there; equal inputs give equal bytes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from golfbook.compress import packing
from golfbook.compress.budget import size_report
from golfbook.config.schema import ScoreConfig
from golfbook.errors import RunError
from golfbook.files import sha256_bytes
from golfbook.run import Run

README = """\
# {name}

{blurb}

```sh
pip install -r requirements.txt
python train_gpt.py TEXT...                 # score artifact.golf on .txt or .jsonl files, or on .bin shards
python train_gpt.py --train FOLDER TEXT...  # train by config.json in FOLDER, export there, then score that
```

`val_loss` {val_loss!r}, `val_bpb` {val_bpb!r}: {tokens:,} tokens, {bytes:,} bytes of text, windows of {window} tokens,
{stride} scored in each (`--stride {stride}`{default}). On the CPU the script computes what `golfbook score` computes.
What is fastest on a machine is measured once and kept in `.cache` beside the script; nothing else is written.
With several processes: `torchrun --standalone --nproc-per-node {processes} train_gpt.py --train FOLDER`.

| counted | bytes |
|---|---|
| `train_gpt.py`, which trains, exports and scores | {code_bytes:,} |
| `artifact.golf`, the weights | {artifact_bytes:,} |
| both, of {limit_bytes:,} | {total_bytes:,} |

`train_gpt.py` was packed from golfbook ({commit}): a first line says how to open it. It needs Python {python}.
`artifact.golf` is read without unpickling, and checked by the hash inside it; it also names the hash of
`tokenizer.model`, which is not counted, as in the challenge.

| file | SHA-256 |
|---|---|
{sums}
"""


def export_submission(
    run: Run,
    folder: str | Path,
    *,
    author: str = "",
    github_id: str = "",
    name: str = "",
    blurb: str = "",
) -> dict[str, Any]:
    """Write the submission of a scored run into ``folder`` and return what its ``submission.json`` says.

    The fields are those of the challenge: author, github_id, name, blurb, date (of the score), val_loss, val_bpb,
    bytes_total, bytes_code. An earlier submission in ``folder`` is replaced. Raises :class:`RunError` where the run is
    not scored, where the folder is another one, and where the disk refuses.
    """
    if not run.is_done("test_time_training"):
        raise RunError(f"{run.name} has no valid score yet: finish its stages (golfbook run, or notebook 05) first")
    result = run.read_result("test_time_training")
    assert result is not None
    code = packing.script()
    sizes = size_report(result["artifact_bytes"], run.config.budget.limit_bytes)
    if not sizes["within_budget"]:
        raise RunError(f"{run.name} has {sizes['total_bytes']:,} bytes, over the limit of {sizes['limit_bytes']:,}")
    model = run.config.model
    submission = {
        "author": author,
        "github_id": github_id,
        "name": name or f"{run.study} {run.variant}, seed {run.config.seed}",
        "blurb": blurb
        or f"{model.num_layers} layers of width {model.model_dim}, vocabulary {model.vocab_size}, preset "
        f"{run.config.preset}; scored in sliding windows of {result['window']} tokens, stride {result['stride']}.",
        "date": result["finished_at"],
        "val_loss": result["val_loss"],
        "val_bpb": result["val_bpb"],
        "bytes_total": sizes["total_bytes"],
        "bytes_code": sizes["code_bytes"],
    }
    files = {
        "train_gpt.py": code,
        "artifact.golf": _read(run.artifact_path),
        "tokenizer.model": _read(run.tokenizer_path),
        "config.json": _read(run.path / "config.json"),
        "train.log": _read(run.log_path),
        "requirements.txt": "".join(f"{line}\n" for line in packing.requirements()).encode(),
        "submission.json": (json.dumps(submission, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    text = README.format(
        **{key: submission[key] for key in ("name", "blurb", "val_loss", "val_bpb")},
        **{key: result[key] for key in ("tokens", "bytes", "window", "stride")},
        **sizes,
        default=", the default" if result["stride"] == ScoreConfig().stride else "",
        processes=run.config.machine.processes,
        commit=(result["environment"] or {}).get("git_commit") or "no commit",
        python=f"{packing.version()} or newer",
        sums="\n".join(f"| `{file}` | {sha256_bytes(data)} |" for file, data in files.items()),
    )
    _write(Path(folder), {**files, "README.md": text.encode()})
    return submission


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files into a new folder and put it in the place of ``folder``, if that is a submission or empty."""
    folder = folder.resolve()
    left = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = left - {*files, ".cache"}
    script = folder / "train_gpt.py"
    if folder.exists() and (
        not folder.is_dir() or foreign or (left and not (script.is_file() and packing.is_ours(script.read_bytes())))
    ):
        what = f"it holds {', '.join(sorted(foreign)[:5])}" if foreign else "it was not written by golfbook export"
        raise RunError(f"{folder} is not replaced: {what}; name another folder, or delete it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            for name, data in files.items():
                (new / name).write_bytes(data)
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            new.rename(folder)
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror or error}; check free space and permissions") from error

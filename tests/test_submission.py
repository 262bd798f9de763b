"""The submission: one script scores and trains as the library does, where no library is; minifying changes nothing."""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import shutil
import subprocess
import symtable
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from conftest import invent_choices
from golfbook import cli
from golfbook.compress import budget, packing
from golfbook.compress.minify import minify
from golfbook.compress.submission import export_submission
from golfbook.config.load import load_config
from golfbook.data.shards import write_shard
from golfbook.data.tokenizer import Tokenizer
from golfbook.errors import RunError
from golfbook.files import sha256_bytes
from golfbook.run import Run, create_run
from golfbook.study import stages

WORDS = ("the", "model", "reads", "a", "token", "and", "learns", "to", "guess", "what", "comes", "next", "from", "it")
FIELDS = ["author", "github_id", "name", "blurb", "date", "val_loss", "val_bpb", "bytes_total", "bytes_code"]
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sysconfig.get_path("purelib")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    invent_choices(folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOLFBOOK_RUNS", str(folder / "runs"))
        patch.setenv("GOLFBOOK_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def run(home: Path) -> Run:
    """A run that was really trained, quantised and scored."""
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(WORDS, size=60)) + f" number {i}." for i in range(120)]
    corpus = home / "documents.jsonl"
    corpus.write_text("\n".join(f'{{"text": "{line}"}}' for line in lines), encoding="utf-8")
    settings = {
        "data": {"source": "text", "path": str(corpus), "max_validation_tokens": 600},
        "model": {
            "vocab_size": 300, "num_layers": 3, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 8,
            "xsa": 1, "bigram": {"vocab_size": 64, "dim": 8}, "value_embedding": {"dim": 8, "layers": [-1]},
            "ttt_linear": {"enabled": True, "num_heads": 2, "mini_batch": 8}, "flow": {"enabled": True},
        },
        "train": {"steps": 12, "batch_tokens": 256, "sequence_length": 64, "schedule": {"warmdown_steps": 6}},
        "quantize": {"passthrough_numel": 64},
        "score": {"stride": 16},
    }  # fmt: skip
    run = create_run("packed", "tiny", load_config(settings, seed=1))
    stages.ensure(run, "test_time_training")
    return run


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    export_submission(run, tmp_path / "submission", author="A. Name", github_id="name")
    return tmp_path / "submission"


def call(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder where golfbook is not installed: -S leaves out what makes it importable here."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GOLFBOOK")}
    return subprocess.run(
        [sys.executable, "-S", *words], cwd=folder, capture_output=True, text=True,
        env={**kept, "PYTHONPATH": PACKAGES, **environment},
    )  # fmt: skip


def printed(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


def scored(artifact: Path, text: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, object]:
    """What golfbook score says."""
    capsys.readouterr()
    cli.app(["score", str(artifact), "--text", str(text), "--json", *options], standalone_mode=False)
    return dict(json.loads(capsys.readouterr().out))


def test_the_script_alone_scores_as_golfbook_does(
    run: Run, home: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the model reads what comes next — é, 漢字. " * 9, encoding="utf-8")
    assert call(folder, "-c", "import golfbook").returncode == 1, "golfbook is importable, so this proves nothing"
    where = "import train_gpt, golfbook.model.gpt as m; print(m.__file__); print(train_gpt.__file__)"
    inside, script = call(folder, "-c", where).stdout.split()
    assert inside == f"{script}/golfbook/model/gpt.py" and Path(script) == folder / "train_gpt.py"

    before = {path.name for path in folder.iterdir()}
    for options in (("--stride", "16"), ("--stride", "5", "--window", "32")):
        found = printed(call(folder, "train_gpt.py", str(text), *options, GOLFBOOK_CACHE=str(home / "cache")))
        expected = scored(run.artifact_path, text, capsys, *options)
        for name in ("val_bpb", "val_loss", "tokens", "bytes", "artifact_bytes", "code_bytes", "total_bytes"):
            assert found[name] == str(expected[name]), name
    sizes = {name: (folder / name).stat().st_size for name in ("train_gpt.py", "artifact.golf")}
    assert (found["code_bytes"], found["artifact_bytes"]) == tuple(str(size) for size in sizes.values())
    assert {path.name for path in folder.iterdir()} == before, "the script left something behind"


def test_the_script_scores_shards(run: Run, home: Path, folder: Path, tmp_path: Path) -> None:
    text = "the model reads what comes next and learns to guess"
    (tmp_path / "text.txt").write_text(text)
    tokens = Tokenizer.load(run.tokenizer_path).encode_document(text)
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    cache = {"GOLFBOOK_CACHE": str(home / "cache")}
    of_text = printed(call(folder, "train_gpt.py", str(tmp_path / "text.txt"), **cache))
    of_shard = printed(call(folder, "train_gpt.py", str(tmp_path / "fineweb_val_000000.bin"), **cache))
    assert [of_shard[n] for n in ("val_bpb", "tokens", "bytes")] == [of_text[n] for n in ("val_bpb", "tokens", "bytes")]
    both = call(folder, "train_gpt.py", str(tmp_path / "text.txt"), str(tmp_path / "fineweb_val_000000.bin"), **cache)
    assert both.returncode == 2 and both.stderr == "error: give texts or shards, not both\n"


def test_the_script_alone_trains_the_same_artifact(run: Run, home: Path, folder: Path, tmp_path: Path) -> None:
    cache = {"GOLFBOOK_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = call(folder, "train_gpt.py", "--train", str(tmp_path / "again"), str(home / "documents.jsonl"), **cache)
    assert printed(done)["artifact_bytes"] == str(run.artifact_path.stat().st_size)
    assert (tmp_path / "again/artifact.golf").read_bytes() == run.artifact_path.read_bytes()
    result = json.loads((tmp_path / "again/result.training.json").read_text())
    assert result["val_bpb"] == (run.read_result("training") or {})["val_bpb"]
    assert result["environment"]["code_sha256"] == sha256_bytes(packing.script())


def test_what_is_wrong_is_said_in_a_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    artifact = folder / "artifact.golf"
    good = artifact.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for data, message in ((bytes(flipped), "checksum does not match"), (good[:-1], "is damaged")):
        artifact.write_bytes(data)
        done = call(folder, "train_gpt.py", str(tmp_path / "text.txt"))
        assert (
            (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: ") and message in done.stderr
        )
        assert len(done.stderr.splitlines()) == 1
    artifact.write_bytes(good)
    assert "does not exist" in call(folder, "train_gpt.py", "none.txt").stderr
    (folder / "tokenizer.model").write_bytes(b"x")
    assert "is not the tokenizer of" in call(folder, "train_gpt.py", str(tmp_path / "text.txt")).stderr


def test_the_folder_says_what_the_challenge_asks(run: Run, folder: Path) -> None:
    files = {path.name: path for path in folder.iterdir()}
    found = json.loads(files["submission.json"].read_text(encoding="utf-8"))
    result = run.read_result("test_time_training") or {}
    assert list(found) == FIELDS and (found["author"], found["github_id"]) == ("A. Name", "name")
    assert (found["val_bpb"], found["date"]) == (result["val_bpb"], result["finished_at"])
    assert found["bytes_code"] == files["train_gpt.py"].stat().st_size == budget.code_bytes()
    assert found["bytes_total"] == found["bytes_code"] + files["artifact.golf"].stat().st_size
    assert files["artifact.golf"].read_bytes() == run.artifact_path.read_bytes()
    assert files["train.log"].read_bytes() == run.log_path.read_bytes()
    page = files["README.md"].read_text(encoding="utf-8")
    assert f"{found['bytes_total']:,}" in page and repr(found["val_bpb"]) in page and "--stride 16" in page
    for name in files.keys() - {"README.md"}:
        assert f"| `{name}` | {sha256_bytes(files[name].read_bytes())} |" in page
    needed = {line.partition(">")[0] for line in files["requirements.txt"].read_text().splitlines()}
    assert {"torch", "numpy", "pydantic", "sentencepiece", "zstandard"} <= needed
    assert not needed & {"pandas", "matplotlib", "typer", "rich", "python-minifier", "PyYAML"}


def test_the_same_run_gives_the_same_bytes_and_only_a_submission_is_replaced(
    run: Run, folder: Path, tmp_path: Path, read_only: Callable[[Path], AbstractContextManager[None]]
) -> None:
    def content(where: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in where.iterdir() if path.is_file()}

    before = content(folder)
    (folder / "artifact.golf").write_bytes(b"damaged")
    (folder / ".cache").mkdir()
    export_submission(run, folder, author="A. Name", github_id="name")
    assert content(folder) == before and not (folder / ".cache").exists()
    for name in ("mine.txt", "train_gpt.py"):
        other = tmp_path / f"holds {name}"
        other.mkdir()
        (other / name).write_text("print('mine')")
        with pytest.raises(RunError, match="is not replaced"):
            export_submission(run, other)
        assert content(other) == {name: b"print('mine')"}
    (tmp_path / "empty").mkdir()
    export_submission(run, tmp_path / "empty")
    with read_only(tmp_path), pytest.raises(RunError, match="cannot write"):
        export_submission(run, folder)
    assert content(folder) == before
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_a_run_without_a_valid_score_is_refused(run: Run, tmp_path: Path) -> None:
    copy = Run(shutil.copytree(run.path, tmp_path / run.path.name), run.config)
    copy.artifact_path.write_bytes(b"another")
    with pytest.raises(RunError, match="has no valid score"):
        export_submission(copy, tmp_path / "submission")
    assert not (tmp_path / "submission").exists()


def test_the_command_line_exports(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.app(
        ["export", str(run.path), "--to", str(tmp_path / "out"), "--name", "mine", "--modules"], standalone_mode=False
    )
    text = capsys.readouterr().out
    assert "golfbook.model.gpt" in text and "bytes_code" in text and "written to" in text
    assert json.loads((tmp_path / "out/submission.json").read_text())["name"] == "mine"


def test_the_script_is_small_and_text(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packing.script.cache_clear()  # another test may have kept it in memory, with another cache on disk
    script = packing.script()
    costs = packing.costs(packing.unpack(script))
    print(f"{len(script):,} bytes;", ", ".join(f"{name} {cost}" for name, cost in costs.items()))
    assert budget.code_bytes() == len(script) < 70_000
    stated = re.search(r"one script of about\s+(\d+) kB", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert stated and abs(1000 * int(stated[1]) - len(script)) < 5000, "README.md states another size"
    compile(script, "train_gpt.py", "exec")
    assert {"golfbook.train.script", "golfbook.train.loop", "golfbook.compress.container"} <= costs.keys()
    rooms = {name.split(".")[1] for name in costs if "." in name}
    assert not rooms & {"cli", "plain", "study", "analysis", "plots", "panels", "exercises"}
    packing.script.cache_clear()
    monkeypatch.setattr(packing, "minify", lambda *_: pytest.fail("what is in the cache is not packed again"))
    assert packing.script() == script


def test_every_module_runs_alone(home: Path, folder: Path) -> None:
    """What was left out is nowhere needed while modules are imported, in whatever order."""
    names = [name for name in packing.unpack(packing.script())]
    code = f"import importlib, train_gpt\nfor name in {names[::-1]!r}: importlib.import_module(name)"
    assert call(folder, "-c", code).stderr == ""


def test_names_of_the_packed_modules_are_defined(home: Path) -> None:
    """No line mentions a name that was dropped: every global name is defined in its module, or built in."""
    for module, text in packing.unpack(packing.script()).items():
        top = symtable.symtable(text, module, "exec")
        defined = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
        waiting = [top]
        while waiting:
            table = waiting.pop()
            waiting += table.get_children()
            for symbol in table.get_symbols():
                name = symbol.get_name()
                if symbol.is_global() and symbol.is_referenced():
                    known = name in defined or hasattr(builtins, name) or name in ("__file__", "__name__")
                    assert known, f"{module}: {name} is not defined"


def test_any_bytes_survive_quoting() -> None:
    generator = np.random.default_rng(0)
    samples = [bytes(range(256)) * 3, b"'''\0007\r\n\\'\0'", *(generator.bytes(5000) for _ in range(20))]
    samples += [bytes(generator.choice(list(b"'\0\\\r\n07"), 400).tolist()) for _ in range(20)]
    for data in samples:
        text = f"# coding: latin-1\nx='''{packing._quoted(data)}'''".encode("latin-1")
        names: dict[str, str] = {}
        exec(compile(text, "x", "exec"), names)
        assert names["x"].encode("latin-1") == data


SOURCES = {
    "p": '"""Package."""\n__version__ = "1"\n',
    "p.a": '''"""Text."""
from __future__ import annotations
from typing import TYPE_CHECKING, Any
import p.c
from p import b as bee
from p.d import Section, unused
if TYPE_CHECKING:
    from p.e import never
TABLE = {"x": "d.by_text"}
OTHER = {"x": "e.never"}
count: int = 0
def main(long_name: Any) -> Any:
    """Docstring."""
    global count
    count += 1
    assert long_name
    return bee.helper(long_name) + bee.Plain().used() + _private(long_name) + len(TABLE)
def _private(long_name: int) -> int:
    from p.e import lazy
    return lazy(long_name) + Section(width=2).width
def forgotten() -> None:
    return OTHER
''',
    "p.b": """
def helper(x): return x + 1
def helper_of_none(x): return x
class Plain:
    size: int = 3
    def used(self): return self.size + self._inner()
    def _inner(self): return 0
    def unused(self): return helper_of_none(1)
    def __len__(self): return 1
""",
    "p.c": "print('no work at import')\ndef f(): return 1\n",
    "p.d": """
from pydantic import BaseModel, Field
class Section(BaseModel):
    width: int = Field(1, description="width of it")
    def called_by_a_framework(self): return 1
def unused(): return 1
def by_text(): return 1
_registered = []
@_registered.append
def _(): return 1
""",
    "p.e": "def lazy(x): return x * 2\ndef never(): return 1\n",
}


def test_minifying_keeps_what_is_needed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    small = minify(SOURCES, "p.a.main")
    text = "\n".join(small.values())
    assert set(small) == {"p.a", "p.b", "p.d", "p.e"}
    for name in ("helper", "used", "__len__", "by_text", "lazy", "called_by_a_framework", "width:int", "append"):
        assert name in text, name
    for name in (
        "helper_of_none",
        "unused",
        "never",
        "forgotten",
        "OTHER",
        "description",
        "ocstring",
        "Any",
        "_private",
    ):
        assert name not in text, name
    for name in SOURCES:
        module = types.ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            monkeypatch.setattr(sys.modules["p"], name.partition(".")[2], module, raising=False)
    for name in ("p.e", "p.d", "p.b", "p.a"):
        exec(compile(small[name], name, "exec"), vars(sys.modules[name]))
    assert sys.modules["p.a"].main(5) == 6 + 3 + (10 + 2) + 1


def test_annotations_that_torch_reads_stay() -> None:
    text = "import torch\n@torch.library.custom_op('a::b', mutates_args=())\n"
    text += "def f(x: torch.Tensor) -> torch.Tensor: return x\n"
    assert "x:torch.Tensor" in minify({"p": "", "p.a": text}, "p.a.f")["p.a"]
    plain = minify({"p": "", "p.a": "def f(x: int) -> int:\n    y: int = x\n    return y"}, "p.a.f")["p.a"]
    assert not [
        node
        for node in ast.walk(ast.parse(plain))
        if isinstance(node, ast.AnnAssign) or getattr(node, "annotation", None)
    ]

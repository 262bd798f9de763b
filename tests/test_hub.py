"""The FineWeb download against a hub on this machine: resume, checksums, and clear words without a connection."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golfbook.config.load import load_config
from golfbook.data import fineweb
from golfbook.data.dataset import prepare
from golfbook.data.fineweb import REPOSITORY, SHARD_FOLDER, TOKENIZER_FOLDER, TOKENIZER_NAME, download_fineweb
from golfbook.data.shards import write_shard
from golfbook.data.tokenizer import Tokenizer, audit_documents
from golfbook.errors import DataError

HERE = Path(__file__).parent
COMMIT = "c0ffee" + "0" * 34


class FakeHub:
    """Speaks the parts of the hub's protocol that the download uses; ``faults`` makes it misbehave."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.faults: dict[str, Any] = {}  # cut: bytes before the connection ends, once; corrupt, ignore_range, status
        self.requests: list[tuple[str, str | None]] = []  # (file name, Range header) of each file request
        hub_ = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub_.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = urllib.parse.unquote(handler.path.partition("?")[0])
        if path.startswith(f"/api/datasets/{REPOSITORY}/tree/{COMMIT}/"):
            return self._json(handler, self._tree(path.partition(f"/tree/{COMMIT}/")[2]))
        if path == f"/api/datasets/{REPOSITORY}":
            return self._json(handler, {"id": REPOSITORY, "sha": COMMIT, "siblings": [], "tags": []})
        prefix = f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
        if path.startswith(prefix) and path.removeprefix(prefix) in self.files:
            return self._file(handler, path.removeprefix(prefix))
        handler.send_error(404)

    def _json(self, handler: BaseHTTPRequestHandler, value: Any) -> None:
        body = json.dumps(value).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _tree(self, folder: str) -> list[dict[str, Any]]:
        entries = []
        for path, content in self.files.items():
            if path.rpartition("/")[0] != folder:
                continue
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if path.endswith(".bin"):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries

    def _file(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        content, wanted = self.files[path], handler.headers.get("Range")
        self.requests.append((path.rpartition("/")[2], wanted))
        if "status" in self.faults:
            return handler.send_error(self.faults["status"])
        if self.faults.get("corrupt") and path.endswith(".bin"):
            content = bytes([content[0] ^ 1]) + content[1:]
        start = 0
        if wanted and not self.faults.get("ignore_range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted).group(1))  # type: ignore[union-attr]
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        body = content[start:]
        if path.endswith(".bin") and "cut" in self.faults:
            body = body[: self.faults["cut"]]
            if not self.faults.get("always"):
                del self.faults["cut"]
        handler.wfile.write(body)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("hub")
    model = HERE / "data/fineweb_1024_bpe.model"
    tokenizer = Tokenizer.load(model)
    documents = [json.loads(line)["text"] for line in (HERE / "data/fineweb_docs_100.jsonl").read_text().splitlines()]
    files = {f"{TOKENIZER_FOLDER}/{TOKENIZER_NAME}": model.read_bytes(), f"{TOKENIZER_FOLDER}/other.json": b"{}"}
    for name, part in (("train_000000", slice(10, 25)), ("train_000001", slice(25, 32)), ("val_000000", slice(0, 8))):
        path = folder / f"fineweb_{name}.bin"
        write_shard(path, audit_documents(tokenizer, documents[part], name).tokens)
        files[f"{SHARD_FOLDER}/{path.name}"] = path.read_bytes()
    return files


@pytest.fixture
def fake(published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(fineweb, "CHUNK", 4096)
    monkeypatch.setattr(fineweb, "PAUSE", 0.0)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = FakeHub(dict(published))
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    yield server
    server.close()


def _leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.part"))


def test_download_brings_what_is_asked_for_and_no_more(fake: FakeHub, tmp_path: Path) -> None:
    got = download_fineweb(tmp_path, 1)
    assert [p.name for p in got.train] == ["fineweb_train_000000.bin"]
    assert [p.name for p in got.validation] == ["fineweb_val_000000.bin"]
    assert got.revision == COMMIT
    for path in (*got.train, *got.validation):
        assert path.read_bytes() == fake.files[f"{SHARD_FOLDER}/{path.name}"]
    assert got.tokenizer.read_bytes() == (HERE / "data/fineweb_1024_bpe.model").read_bytes()
    assert _leftovers(tmp_path) == []
    fake.close()  # what is there needs no connection
    assert download_fineweb(tmp_path, 1) == got


def test_more_shards_reuse_the_ones_that_are_there(fake: FakeHub, tmp_path: Path) -> None:
    download_fineweb(tmp_path, 1)
    fake.requests.clear()
    got = download_fineweb(tmp_path, 2)
    assert len(got.train) == 2
    assert fake.requests == [("fineweb_train_000001.bin", None)]


def test_cut_connection_is_resumed_at_the_byte(fake: FakeHub, tmp_path: Path) -> None:
    fake.faults["cut"] = 5000
    got = download_fineweb(tmp_path, 1)
    assert ("fineweb_val_000000.bin", "bytes=5000-") in fake.requests
    assert got.validation[0].read_bytes() == fake.files[f"{SHARD_FOLDER}/fineweb_val_000000.bin"]


def test_part_of_a_killed_process_is_continued(fake: FakeHub, tmp_path: Path) -> None:
    content = fake.files[f"{SHARD_FOLDER}/fineweb_val_000000.bin"]
    part = tmp_path / f"fineweb_val_000000.bin.{hashlib.sha256(content).hexdigest()[:12]}.part"
    part.write_bytes(content[:7777])
    got = download_fineweb(tmp_path, 1)
    assert ("fineweb_val_000000.bin", "bytes=7777-") in fake.requests
    assert got.validation[0].read_bytes() == content


def test_damaged_part_is_replaced(fake: FakeHub, tmp_path: Path) -> None:
    content = fake.files[f"{SHARD_FOLDER}/fineweb_val_000000.bin"]
    part = tmp_path / f"fineweb_val_000000.bin.{hashlib.sha256(content).hexdigest()[:12]}.part"
    for damage in (b"\0" * 7777, content + b"too long"):
        part.write_bytes(damage)
        got = download_fineweb(tmp_path, 1)
        assert got.validation[0].read_bytes() == content
        got.validation[0].unlink()


def test_server_without_ranges(fake: FakeHub, tmp_path: Path) -> None:
    fake.faults |= {"cut": 5000, "ignore_range": True}
    got = download_fineweb(tmp_path, 1)
    assert got.validation[0].read_bytes() == fake.files[f"{SHARD_FOLDER}/fineweb_val_000000.bin"]


def test_wrong_checksum_is_named_and_removed(fake: FakeHub, tmp_path: Path) -> None:
    fake.faults["corrupt"] = True
    with pytest.raises(DataError, match=r"fineweb_val_000000.bin: .* do not have the checksum"):
        download_fineweb(tmp_path, 1)
    assert not list(tmp_path.glob("*.bin")) and _leftovers(tmp_path) == []
    del fake.faults["corrupt"]
    assert download_fineweb(tmp_path, 1).validation[0].is_file()


def test_file_damaged_on_disk_is_fetched_again(fake: FakeHub, tmp_path: Path) -> None:
    got = download_fineweb(tmp_path, 1)
    got.train[0].write_bytes(got.train[0].read_bytes()[:-1])
    again = download_fineweb(tmp_path, 1)
    assert again.train[0].read_bytes() == fake.files[f"{SHARD_FOLDER}/fineweb_train_000000.bin"]


def test_connection_that_brings_nothing_ends_with_a_message_and_keeps_bytes(fake: FakeHub, tmp_path: Path) -> None:
    fake.faults |= {"cut": 0, "always": True}
    with pytest.raises(DataError, match=r"no connection to the hub: .* stopped at 0 of \d+ bytes"):
        download_fineweb(tmp_path, 1)
    assert (tmp_path / TOKENIZER_NAME).is_file()


def test_refused_and_busy_hub(fake: FakeHub, tmp_path: Path) -> None:
    fake.faults["status"] = 403
    with pytest.raises(DataError, match=r"refuses .*HTTP 403"):
        download_fineweb(tmp_path, 1)
    fake.faults["status"] = 503
    with pytest.raises(DataError, match="HTTP 503"):
        download_fineweb(tmp_path, 1)


def test_no_hub_at_all(fake: FakeHub, tmp_path: Path) -> None:
    fake.close()
    with pytest.raises(DataError, match=r"no connection to the hub.*data.source: shards"):
        download_fineweb(tmp_path, 1)


def test_more_shards_than_published_and_changed_layout(fake: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fineweb_train_shards is 3, but .* holds 2"):
        download_fineweb(tmp_path, 3)
    del fake.files[f"{TOKENIZER_FOLDER}/{TOKENIZER_NAME}"]
    with pytest.raises(DataError, match="layout has changed"):
        download_fineweb(tmp_path, 1)


def test_prepare_downloads_once(
    fake: FakeHub, golfbook_home: Path, monkeypatch: pytest.MonkeyPatch, read_only: Callable[[Path], Any]
) -> None:
    config = load_config(overrides={"data": {"source": "fineweb", "max_validation_tokens": 0}})
    dataset = prepare(config)
    assert dataset.info["revision"] == COMMIT
    assert dataset.info["bytes_source"] == "table"
    assert dataset.val_bytes == dataset.val_token_bytes.sum(dtype=np.int64) > 10_000
    count = len(fake.requests)
    with read_only(golfbook_home):
        again = prepare(config)
    assert len(fake.requests) == count and again.fingerprint == dataset.fingerprint

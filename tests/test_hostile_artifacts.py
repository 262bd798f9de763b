"""Hostile artifacts: whatever a file holds, reading it gives a model or an ArtifactError, soon and in little memory."""

from __future__ import annotations

import contextlib
import json
import lzma
import random
import time
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forged import SHA, forge, refused, tiny_model, unpack, write
from golfbook.compress.coders import ByteCoder, entry_of
from golfbook.compress.container import PREFIX, read_artifact, write_artifact
from golfbook.compress.export import quantize_model
from golfbook.compress.quantizer import QuantizedTensor
from golfbook.config.load import load_config
from golfbook.config.schema import QuantizeConfig
from golfbook.config.tables import CODERS, named
from golfbook.errors import ArtifactError, ConfigError

FAST, SLOW = 400, 4000  # damaged files a coder; five coders
SECONDS = 2.0  # for one damaged file of the tiny model on a busy machine; a valid one takes some 20 ms


def stepped(config: QuantizeConfig) -> dict[str, QuantizedTensor]:
    """The tensors of the tiny model with all kinds among them: integers, steps with and without a trellis, floats."""
    generator = torch.Generator().manual_seed(3)
    found = quantize_model(tiny_model(), config)
    for name, tensor in found.items():
        if tensor.q is None or tensor.q.ndim != 2 or ".mlp." in name:
            continue
        rows, columns = tensor.q.shape
        logs = torch.randint(0, 20, (rows + columns,), generator=generator, dtype=torch.uint8)
        found[name] = QuantizedTensor(
            name, "step", 0, q=tensor.q.to(torch.int16), scale=torch.tensor(0.01).half(), rows=logs[:rows],
            columns=logs[rows:] if columns > 8 else None, states=8 if ".attn." in name else 1,
        )  # fmt: skip
    return found


def valid_file(path: Path, coder: str) -> bytes:
    config = QuantizeConfig(passthrough_numel=40, scale_floor=False, coder=coder, coder_level=3)
    write_artifact(path, tiny_model().config, stepped(config), SHA, config, 24)
    return path.read_bytes()


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("artifact") / "artifact.golf"
    assert write(path, tiny_model()) == path.stat().st_size
    return path.read_bytes()


@given(data=st.data())
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_an_artifact_error(tmp_path, valid, data):
    """One byte changed anywhere, or the file cut anywhere."""
    path = tmp_path / "artifact.golf"
    at = data.draw(st.integers(0, len(valid) - 1) | st.integers(0, PREFIX.size))
    if data.draw(st.booleans()):
        path.write_bytes(valid[:at])
    else:
        broken = bytearray(valid)
        broken[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(bytes(broken))
    with pytest.raises(ArtifactError):
        read_artifact(path)


@pytest.mark.parametrize("coder", CODERS)
def test_coders_refuse_damage_and_foreign_bytes(tmp_path, coder):
    path = tmp_path / "a"
    header, good = unpack(valid_file(path, coder))
    name = coder.encode()
    path.write_bytes(forge(header, good, coder=name))
    read_artifact(path)
    for stream in (good[:-1], good + b"\0\0\0\0", good + good, good[: len(good) // 2], b"no stream", b""):
        assert "a" in refused(path, forge(header, stream, coder=name))
    found = named(CODERS, coder)
    if isinstance(found, ByteCoder):
        body = b"".join(found.decompress(memoryview(good)))
        bomb = found.compress(body + bytes(2**28), 1)  # a small file that unpacks to 256 MiB
        assert "more data than it declares" in refused(path, forge(header, bomb, coder=name))
        assert "its data end after" in refused(path, forge(header, found.compress(body[:-1], 1), coder=name))
    else:
        header["model"]["vocab_size"] = 2**22
        assert "cannot hold" in refused(path, forge(header, good, coder=name))


def damaged(header: dict, stream: bytes, coder: bytes, rng: random.Random) -> bytes:
    """One file with a right checksum: its stream, a number or word of its header, its codes or a length changed."""
    kind = rng.choice(["stream", "stream", "cut", "text", "number", "codes", "stored", "length"])
    broken, text, stored, length = bytearray(stream), json.dumps(header).encode(), None, None
    if kind == "stream":
        for _ in range(rng.choice([1, 1, 4, 64])):
            at = rng.randrange(len(broken)) if rng.random() < 0.7 else rng.randrange(min(64, len(broken)))
            broken[at] = rng.randrange(256)
    elif kind == "cut":
        broken = broken[: rng.randrange(len(broken))] + rng.randbytes(rng.choice([0, 0, 1, 4, 400]))
    elif kind == "text":
        at = rng.randrange(len(text))
        text = text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
    elif kind == "number":
        changed = json.loads(text)
        place = changed["model"]
        while isinstance(place[key := rng.choice(sorted(place))], dict):
            place = place[key]
        place[key] = rng.choice([0, 1, 2, 3, 7, 64, 2**15, 2**22, 2**31, 2**63, -1, 0.5, None, True, [], [1, 1]])
        text = json.dumps(changed).encode()
    elif kind == "codes":
        changed = json.loads(text)
        for _ in range(rng.choice([1, 1, 8])):
            codes = ["h", "f", "q6", "q8", "s3", "t1", "t8", "t256rc", "t4r", "t64c", "t9", "q9", ""]
            changed["codes"][rng.randrange(len(changed["codes"]))] = rng.choice(codes)
        if rng.random() < 0.1:
            changed["codes"] = changed["codes"] * rng.choice([0, 2, 500])
        text = json.dumps(changed).encode()
    elif kind == "stored":
        coded = bytearray(zlib.compress(text, wbits=-15))
        coded[rng.randrange(len(coded))] = rng.randrange(256)
        stored = bytes(coded)
    else:
        length = rng.choice([0, 1, len(text) - 1, len(text) + 1, 2**18, 2**18 + 1, 2**32 - 1])
    return forge(text, bytes(broken), coder=coder, header_length=length, stored=stored)


def outlast(path: Path, coder: str, count: int, seed: int) -> None:
    """Read ``count`` damaged files; each must be refused or give a model, in bounded time."""
    header, stream = unpack(valid_file(path, coder))
    rng, refusals = random.Random(seed), 0
    for _ in range(count):
        path.write_bytes(damaged(header, stream, coder.encode(), rng))
        started = time.process_time()
        try:
            read_artifact(path)
        except ArtifactError as error:
            refusals += 1
            assert len(str(error)) < 2000
        assert time.process_time() - started < SECONDS
    assert refusals > count / 2


@pytest.mark.parametrize("coder", CODERS)
def test_damage_of_every_part(tmp_path, coder):
    outlast(tmp_path / "a", coder, FAST, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("coder", CODERS)
def test_much_damage_of_every_part(tmp_path, coder):
    outlast(tmp_path / "a", coder, SLOW, seed=2)


@pytest.mark.parametrize("coder", ["xz", "entropy"])
def test_damage_takes_little_memory(tmp_path, coder):
    path, rng = tmp_path / "a", random.Random(3)
    header, stream = unpack(valid_file(path, coder))
    found = 0
    while found < 60:
        data = damaged(header, stream, coder.encode(), rng)
        path.write_bytes(data)
        try:
            read_artifact(path)
        except ArtifactError:
            refused(path, data)
            found += 1


def test_a_stream_of_zeros_cannot_claim_much(tmp_path):
    """The entropy coder spends at least 1/64 bit a value, and a trellis has a bounded number of columns."""
    path = tmp_path / "a"
    header, _ = unpack(valid_file(path, "entropy"))
    header["model"]["vocab_size"] = 2**20
    refused(path, forge(header, bytes(2**12), coder=b"entropy"))
    tall = QuantizedTensor("t", "step", 0, q=torch.zeros((1, 2**19), dtype=torch.int16), states=8,
                           scale=torch.tensor(1.0).half())  # fmt: skip
    entropy = named(CODERS, "entropy")
    with pytest.raises(ValueError, match="columns, more than"):
        entropy.encode([tall], 0)
    with pytest.raises(ValueError, match="columns, more than"):
        entropy.decode(memoryview(bytes(2**12)), [entry_of(tall)])


def test_an_unknown_coder_is_named(tmp_path, valid):
    header, stream = unpack(valid)
    assert "the coder 'paq', this golfbook has xz, zstd" in refused(tmp_path / "a", forge(header, stream, coder=b"paq"))
    assert "this golfbook has" in refused(tmp_path / "a", forge(header, stream, coder=b"\xff\xfe\0\0\0\0xz"))
    with pytest.raises(ConfigError, match=r"unknown quantize.coder 'zst'; did you mean 'zstd'"):
        load_config(overrides={"quantize.coder": "zst"})
    with pytest.raises(ConfigError, match=r"unknown quantize.quantizer 'percentile'; did you mean 'percentiles'"):
        load_config(overrides={"quantize.quantizer": "percentile"})
    with pytest.raises(ConfigError, match="more than the 9 that xz has"):
        load_config(overrides={"quantize.coder_level": 10})


def test_forging_an_unchanged_file_works(tmp_path, valid):
    path = tmp_path / "artifact.golf"
    path.write_bytes(forge(*unpack(valid)))
    assert read_artifact(path).train_window == 24


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.num_layers", 2_000_000_000, "more than 512 layers"),
        ("model.recurrence", [0] * 600, "more than 512 layers"),
        ("model.mtp", {"num_heads": 10**9, "loss_weight": 0.2}, "nothing that only training uses"),
        ("model.num_layers", 3, "its model has"),
        ("model.num_layers", 1, "model.value_embedding.layers"),
        ("model.vocab_size", 10**30, "model.vocab_size"),
        ("model.vocab_size", 2**40, "more than 134217728 values"),
        ("model.vocab_size", -1, "model.vocab_size"),
        ("model.model_dim", 2**62, "no model can be built"),
        ("model.mlp_mult", 1e308, "no model can be built"),
        ("model.mlp_mult", "3", "model.mlp_mult"),
        ("model.qk_gain_init", float("nan"), "not valid"),
        ("model.qk_gain_init", float("inf"), "not valid"),
        ("model.surprise", 1, "model.surprise"),
        ("model.smear", None, "model"),
        ("quantize.matrix_bits", 99, "quantize.matrix_bits"),
        ("tokenizer", "short", "tokenizer"),
        ("window", 2**40, "window"),
        ("window", None, "window"),
        ("extra", "x", "extra"),
        ("codes", {}, "codes"),
        ("codes", [], "codes of 0 tensors, its model has"),
        ("codes", ["h"] * 5000, "codes of 5000 tensors, its model has"),
        ("codes", ["int64"], "codes.0"),
        ("codes", ["q9"], "codes.0"),
        ("codes", ["t2"], "codes.0"),
        ("codes", ["t8cr"], "codes.0"),
        ("codes", [["h"]], "codes.0"),
        ("codes", [6], "codes.0"),
    ],
)
def test_hostile_headers(tmp_path, valid, key, value, expected):
    header, stream = unpack(valid)
    *parents, last = key.split(".")
    place = header
    for name in parents:
        place = place[name]
    if value is None and last != "smear":
        del place[last]
    else:
        place[last] = value
    assert expected in refused(tmp_path / "a", forge(header, stream))


def test_hostile_prefixes(tmp_path, valid):
    path = tmp_path / "a"
    header, good = unpack(valid)
    text = json.dumps(header).encode()
    assert "not valid" in refused(path, forge(b"[" * 200_000, good))
    assert "not valid" in refused(path, forge(b"\xff\xfe{}", good))
    assert "not valid" in refused(path, forge(b"9" * 200_000, good))
    assert "declares a header of" in refused(path, forge(text + b" " * 2**18, good))
    assert "longer than declared" in refused(path, forge(header, good, header_length=5))
    assert "longer than declared" in refused(path, forge(text + bytes(2**28), good, header_length=len(text)))
    assert "it ends after" in refused(path, forge(header, good, header_length=len(text) + 1))
    stored = zlib.compress(text, wbits=-15)
    assert "does not end where" in refused(path, forge(header, good, stored=stored + b"\0"))
    assert "ends too early" in refused(path, forge(header, good, stored=stored[:-1]))
    assert "not valid" in refused(path, forge(header, good, stored=b"\xff" * 99))
    vector = list(header["codes"])
    header["codes"] = ["t8"] * len(vector)
    assert "of kind step is no matrix" in refused(path, forge(header, good))


def test_hostile_xz_streams(tmp_path, valid):
    path = tmp_path / "a"
    header, good = unpack(valid)
    assert "does not end where" in refused(path, forge(header, good + b"\0\0\0\0"))
    assert "does not end where" in refused(path, forge(header, good + good))
    assert "is damaged" in refused(path, forge(header, good[:-1]))
    assert "is damaged" in refused(path, forge(header, b"not xz at all"))
    greedy = bytearray(good)  # a dictionary of 4 GiB: block header byte 16, then padding and the header's CRC-32
    size = 4 * (greedy[12] + 1)
    assert greedy[14:16] == b"\x21\x01"
    greedy[16] = 40
    greedy[12 + size - 4 : 12 + size] = zlib.crc32(greedy[12 : 12 + size - 4]).to_bytes(4, "little")
    assert "Memory usage limit" in refused(path, forge(header, bytes(greedy)))


def test_values_that_no_writer_makes(tmp_path, valid):
    path = tmp_path / "a"
    header, stream = unpack(valid)
    body = lzma.decompress(stream)
    first = sorted(quantize_model(tiny_model(), QuantizeConfig(passthrough_numel=40, scale_floor=False)).values(),
                   key=lambda tensor: tensor.name)[header["codes"].index("q6")].name  # fmt: skip
    offset = 0
    for tensor in sorted(quantize_model(tiny_model(), QuantizeConfig(passthrough_numel=40)).values(),
                         key=lambda tensor: tensor.name):  # fmt: skip
        if tensor.name == first:
            break
        offset += 0 if tensor.q is None else tensor.q.numel()
    for value in (32, 0x80):
        changed = bytearray(body)
        changed[offset] = value
        assert f"'{first}' holds integers beyond 6 bits" in refused(path, forge(header, lzma.compress(changed)))
    changed = bytearray(body)
    changed[-2:] = b"\x00\x7c"  # the last float16: infinity
    assert "not finite" in refused(path, forge(header, lzma.compress(changed)))


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_behind_a_right_checksum(tmp_path, valid, data):
    """Anything inside the JSON or the stream changed: an ArtifactError or a valid model, never another exception."""
    path = tmp_path / "a"
    header, stream = unpack(valid)
    text, broken = bytearray(json.dumps(header).encode()), bytearray(stream)
    place = text if data.draw(st.booleans()) else broken
    place[data.draw(st.integers(0, len(place) - 1) | st.integers(0, 40))] = data.draw(st.integers(0, 255))
    path.write_bytes(forge(bytes(text), bytes(broken)))
    with contextlib.suppress(ArtifactError):
        read_artifact(path).build()

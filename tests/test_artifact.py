"""The artifact file: round trip, exact losses, hostile input, byte budget, and its tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import random
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golfbook.compress import container as module
from golfbook.compress.budget import code_bytes, size_report
from golfbook.compress.coders import STEP_BYTES
from golfbook.compress.container import (
    MAGIC,
    PREFIX,
    VERSION,
    find_tokenizer,
    read_artifact,
    write_artifact,
)
from golfbook.compress.export import quantize_model
from golfbook.compress.packing import code_modules, import_closure
from golfbook.compress.quantizer import dequantize, quantize
from golfbook.config.load import load_config
from golfbook.config.schema import QuantizeConfig
from golfbook.config.tables import CODERS, named
from golfbook.data.tokenizer import train_tokenizer
from golfbook.errors import ArtifactError, ConfigError, GolfbookError
from golfbook.evaluate.scoring import score
from golfbook.files import sha256_file
from golfbook.model.gpt import GPT, initialise

SHA = "0123456789abcdef" * 4
TINY = {
    "vocab_size": 32, "num_layers": 2, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 4, "xsa": 1,
    "bigram": {"vocab_size": 16, "dim": 4}, "value_embedding": {"dim": 4, "layers": [1]},
    "ttt_linear": {"enabled": True, "num_heads": 2}, "flow": {"enabled": True, "latent_dim": 4, "hidden_dim": 8},
}  # fmt: skip


def tiny_model(**values) -> GPT:
    torch.set_num_threads(1)
    model = initialise(GPT(load_config({"model": {**TINY, **values}}).model), seed=2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write(path: Path, model: GPT, config: QuantizeConfig | None = None) -> int:
    config = config or QuantizeConfig(passthrough_numel=40, scale_floor=False)
    quantized = quantize_model(model, config)
    return write_artifact(path, model.config, quantized, SHA, config, 24)


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("artifact") / "artifact.golf"
    assert write(path, tiny_model()) == path.stat().st_size
    return path.read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        QuantizeConfig(passthrough_numel=40, scale_floor=False),
        QuantizeConfig(passthrough_numel=0, matrix_bits=5, other_bits=4, coder_level=9),  # 3-D, scalar and control
        QuantizeConfig(quantizer="row_maximum", coder_level=0),  # everything in float16
    ],
)
def test_round_trip_is_exact(tmp_path, config):
    model = tiny_model()
    path = tmp_path / "artifact.golf"
    quantized = quantize_model(model, config)
    size = write_artifact(path, model.config, quantized, SHA, config, 24)
    artifact = read_artifact(path)
    assert artifact.bytes == size == path.stat().st_size and artifact.sha256 == sha256_file(path)
    assert (artifact.model_config, artifact.quantize_config) == (model.config, config)
    assert (artifact.tokenizer_sha256, artifact.train_window) == (SHA, 24)
    decoded = dequantize(quantized)
    assert set(artifact.state) == set(decoded)
    for name, tensor in decoded.items():
        assert artifact.state[name].dtype == torch.float32 and torch.equal(artifact.state[name], tensor)
        assert artifact.quantized[name].kind == quantized[name].kind
        assert artifact.quantized[name].bits == quantized[name].bits

    model.load_state_dict(decoded)
    built = artifact.build()
    assert not built.training and all(p.requires_grad and p.device.type == "cpu" for p in built.parameters())
    tokens = np.random.default_rng(0).integers(0, 32, 150).astype(np.uint16)
    expected = score(model, tokens, window=24, stride=24)
    np.testing.assert_array_equal(score(built, tokens, window=24, stride=24), expected)
    with torch.no_grad():
        built.tok_emb.weight.zero_()
    np.testing.assert_array_equal(score(artifact.build(), tokens, window=24, stride=24), expected)


@pytest.mark.parametrize("coder", CODERS)
def test_every_coder_gives_back_what_it_took(tmp_path, coder):
    config = QuantizeConfig(passthrough_numel=40, scale_floor=False, coder=coder, coder_level=3)
    model, path = tiny_model(), tmp_path / "artifact.golf"
    write(path, model, config)
    artifact = read_artifact(path)
    for name, tensor in dequantize(quantize_model(model, config)).items():
        assert torch.equal(artifact.state[name], tensor)
    encode, decode = named(CODERS, coder)
    for data in (b"", b"a", bytes(5 * STEP_BYTES), random.Random(0).randbytes(2 * STEP_BYTES + 7)):
        pieces = list(decode(memoryview(encode(data, 1))))
        assert b"".join(pieces) == data and all(0 < len(piece) <= STEP_BYTES for piece in pieces)


@pytest.mark.parametrize("coder", CODERS)
def test_coders_refuse_damage_and_foreign_bytes(tmp_path, valid, coder):
    path, (header, body) = tmp_path / "a", unpack(valid)
    encode, _ = named(CODERS, coder)
    good, name = encode(json.dumps(header).encode() + body, 3), coder.encode()
    path.write_bytes(forge(header, body, stream=good, coder=name))
    read_artifact(path)
    for stream in (good[:-1], good + b"\0\0\0\0", good + good, good[: len(good) // 2], b"no stream", b""):
        assert "a" in refused(path, forge(header, body, stream=stream, coder=name))
    bomb = encode(json.dumps(header).encode() + body + bytes(2**28), 1)
    assert "more data than it declares" in refused(path, forge(header, body, stream=bomb, coder=name))
    generator = random.Random(1)
    for _ in range(200):
        broken = bytearray(good)
        broken[generator.randrange(len(broken))] ^= generator.randrange(1, 256)
        path.write_bytes(forge(header, body, stream=bytes(broken), coder=name))
        with contextlib.suppress(ArtifactError):  # a changed weight is no fault that can be seen
            read_artifact(path)


def test_an_unknown_coder_is_named(tmp_path, valid):
    header, body = unpack(valid)
    assert "the coder 'paq', this golfbook has xz, zstd" in refused(tmp_path / "a", forge(header, body, coder=b"paq"))
    assert "this golfbook has" in refused(tmp_path / "a", forge(header, body, coder=b"\xff\xfe\0\0\0\0xz"))
    with pytest.raises(ConfigError, match=r"unknown quantize.coder 'zst'; did you mean 'zstd'"):
        load_config(overrides={"quantize.coder": "zst"})
    with pytest.raises(ConfigError, match=r"unknown quantize.quantizer 'percentile'; did you mean 'percentiles'"):
        load_config(overrides={"quantize.quantizer": "percentile"})
    with pytest.raises(ConfigError, match="more than the 9 that xz has"):
        load_config(overrides={"quantize.coder_level": 10})


def test_same_weights_same_bytes_whatever_the_order(tmp_path):
    model = tiny_model()
    config = QuantizeConfig(passthrough_numel=40)
    quantized = quantize_model(model, config)
    write_artifact(tmp_path / "a", model.config, quantized, SHA, config, 24)
    write_artifact(tmp_path / "b", model.config, dict(reversed(quantized.items())), SHA, config, 24)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_overhead_is_small(tmp_path):
    """All that is not tensor data: prefix, JSON header and table, for a model with 59 tensors."""
    model = initialise(GPT(load_config("quickstart").model), seed=0)
    config = load_config("quickstart").quantize
    quantized = quantize_model(model, config)
    size = write_artifact(tmp_path / "a", model.config, quantized, SHA, config, 256)
    body = b"".join(module._pack([quantized[name] for name in sorted(quantized)]))
    assert size - len(lzma.compress(body, check=lzma.CHECK_NONE, preset=config.coder_level)) < 1000


def test_writer_refuses_tensors_that_are_not_the_models(tmp_path):
    model, path = tiny_model(), tmp_path / "a"
    config = QuantizeConfig()
    quantized = quantize_model(model, config)
    without = {name: t for name, t in quantized.items() if name != "smear.gate"}
    made = {"smear.gate": torch.zeros(3), "new.weight": torch.zeros(2)}
    other = quantize(made, dict.fromkeys(made, "control"), config)
    with pytest.raises(ArtifactError) as caught:
        write_artifact(path, model.config, {**without, **other}, SHA, config, 24)
    assert "extra 'new.weight'" in str(caught.value)
    assert "'smear.gate' has shape (3,), expected (16,)" in str(caught.value)
    with pytest.raises(ArtifactError, match=r"missing 'smear.gate'"):
        write_artifact(path, model.config, without, SHA, config, 24)
    with pytest.raises(ArtifactError, match="tokenizer"):
        write_artifact(path, model.config, quantized, "no hash", config, 24)
    assert not path.exists()


def test_clear_messages_for_damaged_files(tmp_path, valid):
    path = tmp_path / "artifact.golf"

    def message(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(ArtifactError) as caught:
            read_artifact(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "not a golfbook artifact" in message(b"")
    assert "not a golfbook artifact" in message(b"PK\x03\x04" + valid[4:])
    assert "version 1, this golfbook reads version 2" in message(valid[:4] + b"\x01\x00" + valid[6:])
    assert "is damaged: it ends inside its first" in message(valid[:30])
    assert "is damaged: expected" in message(valid[:-1])
    assert "is damaged: expected" in message(valid + b"\0")
    flipped = bytearray(valid)
    flipped[len(valid) // 2] ^= 1
    assert "is damaged: its checksum does not match" in message(bytes(flipped))
    with pytest.raises(ArtifactError, match=r"cannot read artifact .*nowhere"):
        read_artifact(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="cannot read artifact"):
        read_artifact(tmp_path)


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


def unpack(data: bytes) -> tuple[dict, bytes]:
    length = PREFIX.unpack_from(data)[3]
    raw = lzma.decompress(data[PREFIX.size :])
    return json.loads(raw[:length]), raw[length:]


def forge(
    header: dict | bytes,
    body: bytes,
    stream: bytes | None = None,
    raw_length: int | None = None,
    coder: bytes = b"xz",
) -> bytes:
    """A file whose checksum is right, whatever it holds."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if stream is None:
        stream = lzma.compress(text + body, check=lzma.CHECK_NONE, preset=0)
    lengths = (len(text), len(text) + len(body) if raw_length is None else raw_length, len(stream))
    digest = hashlib.sha256(PREFIX.pack(MAGIC, VERSION, coder, *lengths, b"") + stream).digest()
    return PREFIX.pack(MAGIC, VERSION, coder, *lengths, digest) + stream


def refused(path: Path, data: bytes) -> str:
    """The error message of a forged file; reading it must take little memory."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError) as caught:
            read_artifact(path)
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 2000
    return str(caught.value)


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
        ("model.num_layers", 3, "missing 'blocks.2.attn"),
        ("model.num_layers", 1, "model.value_embedding.layers"),
        ("model.vocab_size", 10**30, "model.vocab_size"),
        ("model.vocab_size", 2**40, "'tok_emb.weight' has shape"),
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
        ("tensors", {}, "tensors"),
        ("tensors", [], "missing 'skip_weights'"),
        ("tensors", [["smear.gate", "h", [16]]] * 2, "listed twice"),
        ("tensors", [["../etc/passwd", "h", [16]]], "tensors.0"),
        ("tensors", [["smear.gate", "int64", [16]]], "tensors.0"),
        ("tensors", [["smear.gate", "h", [-16]]], "tensors.0"),
        ("tensors", [["smear.gate", "h", [0]]], "tensors.0"),
        ("tensors", [["smear.gate", "h", [True]]], "tensors.0"),
        ("tensors", [["smear.gate", "h", [16.0]]], "tensors.0"),
        ("tensors", [["smear.gate", "h", [2**60]]], "tensors.0"),
        ("tensors", [["smear.gate", "h", [1] * 9]], "tensors.0"),
        ("tensors", [["smear.gate", "h", [2**20, 2**20]]], "more than 134217728 values"),
        ("tensors", [["smear.gate"]], "tensors.0"),
    ],
)
def test_hostile_headers(tmp_path, valid, key, value, expected):
    header, body = unpack(valid)
    *parents, last = key.split(".")
    place = header
    for name in parents:
        place = place[name]
    if value is None and last != "smear":
        del place[last]
    else:
        place[last] = value
    assert expected in refused(tmp_path / "a", forge(header, body))


def test_hostile_streams(tmp_path, valid):
    path = tmp_path / "a"
    header, body = unpack(valid)
    text = json.dumps(header).encode()
    assert "not valid" in refused(path, forge(b"[" * 200_000, body))
    assert "not valid" in refused(path, forge(b"\xff\xfe{}", body))
    assert "not valid" in refused(path, forge(b"9" * 200_000, body))
    assert "declares a header of" in refused(path, forge(text + b" " * 2**18, body))
    assert "declares a header of" in refused(path, forge(header, body, raw_length=5))
    assert "its tensors need" in refused(path, forge(header, body + b"\0"))
    assert "its tensors need" in refused(path, forge(header, body[:-1]))
    assert "its tensors need" in refused(path, forge(header, body, raw_length=2**32 - 1))
    pack = lzma.compress
    assert "its data end after" in refused(path, forge(header, body, stream=pack(text + body[:-1])))
    assert "more data than it declares" in refused(path, forge(header, body, stream=pack(text + body + b"\0")))
    bomb = pack(text + body + bytes(2**28), preset=0)  # a small file that unpacks to 256 MiB
    assert "more data than it declares" in refused(path, forge(header, body, stream=bomb))
    good = pack(text + body)
    assert "does not end where" in refused(path, forge(header, body, stream=good + b"\0\0\0\0"))
    assert "does not end where" in refused(path, forge(header, body, stream=good + good))
    assert "is damaged" in refused(path, forge(header, body, stream=good[:-1]))
    assert "is damaged" in refused(path, forge(header, body, stream=b"not xz at all"))
    greedy = bytearray(good)  # a dictionary of 4 GiB: block header byte 16, then padding and the header's CRC-32
    size = 4 * (greedy[12] + 1)
    assert greedy[14:16] == b"\x21\x01"
    greedy[16] = 40
    greedy[12 + size - 4 : 12 + size] = zlib.crc32(greedy[12 : 12 + size - 4]).to_bytes(4, "little")
    assert "Memory usage limit" in refused(path, forge(header, body, stream=bytes(greedy)))


def test_values_that_no_writer_makes(tmp_path, valid):
    path = tmp_path / "a"
    header, body = unpack(valid)
    first = next(name for name, code, _ in header["tensors"] if code == "q6")
    offset = 0
    for name, code, shape in header["tensors"]:
        if name == first:
            break
        offset += int(np.prod(shape)) if code[0] in "qs" else 0
    for value in (32, 0x80):
        changed = bytearray(body)
        changed[offset] = value
        assert f"'{first}' holds integers beyond 6 bits" in refused(path, forge(header, bytes(changed)))
    changed = bytearray(body)
    changed[-2:] = b"\x00\x7c"  # the last float16: infinity
    assert "not finite" in refused(path, forge(header, bytes(changed)))


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_behind_a_right_checksum(tmp_path, valid, data):
    """Anything inside the JSON or the stream changed: an ArtifactError or a valid model, never another exception."""
    path = tmp_path / "a"
    header, body = unpack(valid)
    text = bytearray(json.dumps(header).encode())
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at] = data.draw(st.integers(0, 255))
        path.write_bytes(forge(bytes(text), body))
    else:
        stream = bytearray(lzma.compress(bytes(text) + body, check=lzma.CHECK_NONE, preset=0))
        at = data.draw(st.integers(0, len(stream) - 1) | st.integers(0, 40))
        stream[at] = data.draw(st.integers(0, 255))
        path.write_bytes(forge(bytes(text), body, stream=bytes(stream)))
    with contextlib.suppress(ArtifactError):
        read_artifact(path).build()


def test_the_script_is_packed_from_what_the_result_needs():
    modules = code_modules()
    needed = {
        "train.loop",
        "compress.coders",
        "model.gpt",
        "model.layers",
        "train.muon",
        "compress.rowwise",
        "compress.container",
    }
    assert needed | {"evaluate.scoring", "config.schema", "config.__init__", "__init__"} <= set(modules)
    assert not {"cli", "plain", "study", "analysis", "plots", "panels"} & {name.split(".")[0] for name in modules}
    assert 10_000 < code_bytes() < sum(path.stat().st_size for path in modules.values()) / 5


def test_import_closure_follows_every_form_of_import(tmp_path):
    package = tmp_path / "pack"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "a": "import os\nfrom pack import b as bee\n",
        "b": "def f():\n    import pack.c\n",
        "c": "from pack.d import x\nfrom pathlib import Path\n",
        "d": "from pack import missing, a\nimport other.e\nfrom pack.r import f\n",
        "e": "from pack import a\n",
        "r/__init__": "",
        "r/f": "import pack.r.g\n",
        "r/g": "",
        "r/h": "from pack.r import f\n",
    }.items():
        path = package / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert list(import_closure(["a"], package)) == ["__init__", "a", "b", "c", "d", "r.__init__", "r.f", "r.g"]


def test_size_report():
    code = code_bytes()
    report = size_report(1000, code + 1000)
    assert report == {
        "code_bytes": code, "artifact_bytes": 1000, "total_bytes": code + 1000, "limit_bytes": code + 1000,
        "within_budget": True,
    }  # fmt: skip
    assert size_report(1001, code + 1000)["within_budget"] is False


def test_find_tokenizer(tmp_path):
    words = [f"the cat number {i} sat on mat {i * i} and said nothing of use" for i in range(300)]
    mine, other = (train_tokenizer(words, size, tmp_path / f"{size}.model") for size in (300, 310))
    model, folder = tiny_model(), tmp_path / "run"
    config = QuantizeConfig()
    path = folder / "artifact.golf"
    write_artifact(path, model.config, quantize_model(model, config), sha256_file(mine), config, 24)
    artifact = read_artifact(path)
    with pytest.raises(ArtifactError, match=r"no tokenizer at .*tokenizer\.model"):
        find_tokenizer(path, artifact)
    assert find_tokenizer(path, artifact, mine).sha256 == artifact.tokenizer_sha256
    (folder / "tokenizer.model").write_bytes(other.read_bytes())
    with pytest.raises(ArtifactError) as caught:
        find_tokenizer(path, artifact)
    assert f"expected sha256 {sha256_file(mine)}" in str(caught.value)
    assert f"found {sha256_file(other)}" in str(caught.value)
    (folder / "tokenizer.model").write_bytes(mine.read_bytes())
    assert find_tokenizer(path, artifact).vocab_size == 300


def test_unwritable_folder_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GolfbookError, match="cannot write"):
        write(tmp_path / "file" / "artifact.golf", tiny_model())

"""The artifact file: round trip, exact losses, byte budget, and its tokenizer."""

from __future__ import annotations

import lzma
import random

import numpy as np
import pytest
import torch

from forged import SHA, tiny_model, write
from golfbook.compress.budget import code_bytes, size_report
from golfbook.compress.coders import STEP_BYTES, ByteCoder, pack
from golfbook.compress.container import (
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
from golfbook.errors import ArtifactError, GolfbookError
from golfbook.evaluate.scoring import score
from golfbook.files import sha256_file
from golfbook.model.gpt import GPT, initialise


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
    found = named(CODERS, coder)
    if isinstance(found, ByteCoder):
        for data in (b"", b"a", bytes(5 * STEP_BYTES), random.Random(0).randbytes(2 * STEP_BYTES + 7)):
            pieces = list(found.decompress(memoryview(found.compress(data, 1))))
            assert b"".join(pieces) == data and all(0 < len(piece) <= STEP_BYTES for piece in pieces)


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
    body = b"".join(pack([quantized[name] for name in sorted(quantized)]))
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
    assert "version 1, this golfbook reads version 3" in message(valid[:4] + b"\x01\x00" + valid[6:])
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

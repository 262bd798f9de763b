"""Artifacts for tests: small valid ones, and files whose checksum is right, whatever they hold."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch

from golfbook.compress.coders import deflate
from golfbook.compress.container import MAGIC, PREFIX, VERSION, read_artifact, write_artifact
from golfbook.compress.export import quantize_model
from golfbook.config.load import load_config
from golfbook.config.schema import QuantizeConfig
from golfbook.errors import ArtifactError
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


def unpack(data: bytes) -> tuple[dict, bytes]:
    """The header and the coded stream of an artifact."""
    stored = PREFIX.unpack_from(data)[3]
    text = zlib.decompress(data[PREFIX.size : PREFIX.size + stored], wbits=-15)
    return json.loads(text), data[PREFIX.size + stored :]


def forge(
    header: dict | bytes,
    stream: bytes,
    coder: bytes = b"xz",
    header_length: int | None = None,
    stored: bytes | None = None,
) -> bytes:
    """A file whose checksum and outer lengths are right, whatever it holds."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    stored = deflate(text, 1) if stored is None else stored
    lengths = (len(stored), len(text) if header_length is None else header_length, len(stream))
    digest = hashlib.sha256(PREFIX.pack(MAGIC, VERSION, coder, *lengths, b"") + stored + stream).digest()
    return PREFIX.pack(MAGIC, VERSION, coder, *lengths, digest) + stored + stream


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

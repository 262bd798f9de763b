"""The artifact: a whole quantised model in one small file that is safe to read.

Layout (integers little-endian): magic ``GOLF``, version u16, name of the coder (8 bytes, zeros after it), lengths u32
of the header as stored, of its text and of the coded stream, SHA-256 of all the rest (32 bytes), header, stream.
The header is JSON (model and quantiser settings, tokenizer hash, training window, codes of the tensors), deflated. Its
model says which tensors there are and in which order; what is stored of each says its code
(:data:`golfbook.compress.coders.CODES`), and the coder knows the rest.

Nothing is unpickled, and nothing is believed: sizes are bounded before memory is taken for them, and a
model that only a huge machine could build is refused before it is built.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from golfbook.compress.coders import CODES, Coder, Entry, deflate, entry_of, inflate
from golfbook.compress.entropy import CHECK
from golfbook.compress.estimates import cross_entropy_bits
from golfbook.compress.quantizer import QuantizedTensor, dequantize
from golfbook.config.architecture import ModelConfig
from golfbook.config.schema import QuantizeConfig
from golfbook.config.tables import CODERS, named
from golfbook.data.tokenizer import Tokenizer
from golfbook.errors import ArtifactError
from golfbook.files import atomic_write_bytes, canonical_json, sha256_bytes, sha256_file
from golfbook.model.gpt import GPT, exported

MAGIC, VERSION = b"GOLF", 3
PREFIX = struct.Struct("<4sH8sIII32s")
MAX_FILE_BYTES = 2**29
MAX_HEADER_BYTES = 2**18
MAX_VALUES = 2**27  # numbers in a model: 134 million, five times the largest published system
MAX_LAYERS = 512


class Header(BaseModel):
    """What the JSON in an artifact holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: ModelConfig
    quantize: QuantizeConfig
    tokenizer: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    window: Annotated[int, Field(ge=1, le=2**20)]
    codes: list[Annotated[str, Field(pattern=rf"^({CODES.pattern})$")]]


@dataclass(frozen=True, eq=False)
class Artifact:
    """A read artifact. ``state`` holds the decoded float32 tensors, ``bytes`` is the size of the file."""

    model_config: ModelConfig
    quantize_config: QuantizeConfig
    state: dict[str, Tensor]
    quantized: dict[str, QuantizedTensor]
    tokenizer_sha256: str
    train_window: int
    bytes: int
    sha256: str

    def build(self) -> GPT:
        """Build the model, in eval mode on the CPU, with weights of its own."""
        model = _empty_model(self.model_config)
        model.load_state_dict({name: tensor.clone() for name, tensor in self.state.items()}, assign=True)
        return model.eval()


def write_artifact(
    path: str | Path,
    model_config: ModelConfig,
    quantized: Mapping[str, QuantizedTensor],
    tokenizer_sha256: str,
    quantize_config: QuantizeConfig,
    train_window: int,
) -> int:
    """Write ``path`` atomically and return its size in bytes; the same arguments give the same bytes.

    ``train_window`` is the length in tokens that the model was trained at, the natural window to score it with. Raises
    :class:`ArtifactError` where ``quantized`` is not exactly the tensors of ``model_config``.
    """
    text, header, ordered = _header(model_config, quantized, tokenizer_sha256, quantize_config, train_window)
    coder: Coder = named(CODERS, quantize_config.coder)
    try:
        stream = coder.encode(ordered, quantize_config.coder_level)
    except ValueError as error:
        raise ArtifactError(f"the model to write cannot be coded: {error}") from None
    name, lengths = quantize_config.coder.encode(), (len(header), len(text), len(stream))
    digest = hashlib.sha256(PREFIX.pack(MAGIC, VERSION, name, *lengths, b"") + header + stream).digest()
    data = PREFIX.pack(MAGIC, VERSION, name, *lengths, digest) + header + stream
    atomic_write_bytes(path, data)
    return len(data)


def expected_bytes(
    model_config: ModelConfig,
    quantized: Mapping[str, QuantizedTensor],
    tokenizer_sha256: str,
    quantize_config: QuantizeConfig,
    train_window: int,
) -> int:
    """Return the bytes that :func:`write_artifact` would write with the coder "entropy", without coding anything."""
    _, header, ordered = _header(model_config, quantized, tokenizer_sha256, quantize_config, train_window)
    return PREFIX.size + len(header) + CHECK.size + math.ceil(cross_entropy_bits(ordered) / 8)


def _header(
    model_config: ModelConfig,
    quantized: Mapping[str, QuantizedTensor],
    tokenizer_sha256: str,
    quantize_config: QuantizeConfig,
    train_window: int,
) -> tuple[bytes, bytes, list[QuantizedTensor]]:
    """Return the text of a header, what is stored of it, and the tensors in the model's order."""
    shapes = _shapes(model_config, "the model to write")
    _check_tensors(quantized, shapes)
    ordered = [quantized[name] for name in shapes]
    tree = {
        "model": model_config.model_dump(mode="json"),
        "quantize": quantize_config.model_dump(mode="json"),
        "tokenizer": tokenizer_sha256,
        "window": train_window,
        "codes": [entry_of(tensor).code for tensor in ordered],
    }
    text = canonical_json(tree).encode()
    _parse_header(text, "the model to write")
    return text, deflate(text, 9), ordered


def read_artifact(path: str | Path) -> Artifact:
    """Read and check an artifact; raises :class:`ArtifactError` naming the file and what is wrong with it."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ArtifactError(f"{path} is larger than {MAX_FILE_BYTES} bytes, so it is no artifact")
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read artifact {path}: {error.strerror}") from None
    if data[: len(MAGIC)] != MAGIC:
        raise ArtifactError(f"{path} is not a golfbook artifact: it does not begin with {MAGIC.decode()}")
    if len(data) < PREFIX.size:
        raise ArtifactError(f"{path} is damaged: it ends inside its first {PREFIX.size} bytes")
    _, version, name, stored_length, header_length, stream_length, digest = PREFIX.unpack_from(data)
    if version != VERSION:
        raise ArtifactError(f"{path} has artifact version {version}, this golfbook reads version {VERSION}")
    found, expected = len(data) - PREFIX.size, stored_length + stream_length
    if found != expected:
        raise ArtifactError(f"{path} is damaged: expected {expected} bytes after the prefix, found {found}")
    body = memoryview(data)[PREFIX.size :]
    hasher = hashlib.sha256(PREFIX.pack(MAGIC, version, name, stored_length, header_length, stream_length, b""))
    hasher.update(body)
    if hasher.digest() != digest:
        raise ArtifactError(f"{path} is damaged: its checksum does not match; copy or make it again")
    if header_length > MAX_HEADER_BYTES:
        raise ArtifactError(f"{path} declares a header of {header_length} bytes (limit {MAX_HEADER_BYTES})")
    coder = _coder(name, path)
    header = _parse_header(_header_text(body[:stored_length], header_length, path), str(path))
    shapes = _shapes(header.model, str(path))
    if len(header.codes) != len(shapes):
        raise ArtifactError(f"{path} has codes of {len(header.codes)} tensors, its model has {len(shapes)}")
    table = [Entry(name, code, shape) for code, (name, shape) in zip(header.codes, shapes.items(), strict=True)]
    for entry in table:
        if entry.code[0] == "t" and len(entry.shape) != 2:
            raise ArtifactError(f"{path}: tensor '{entry.name}' of kind step is no matrix")
    try:
        quantized = coder.decode(body[stored_length:], table)
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    return Artifact(
        model_config=header.model,
        quantize_config=header.quantize,
        state=dequantize(quantized),
        quantized=quantized,
        tokenizer_sha256=header.tokenizer,
        train_window=header.window,
        bytes=len(data),
        sha256=sha256_bytes(data),
    )


def find_tokenizer(artifact_path: str | Path, artifact: Artifact, explicit: Path | None = None) -> Tokenizer:
    """Load the tokenizer of an artifact: ``explicit``, or ``tokenizer.model`` beside the artifact.

    Raises :class:`ArtifactError` where there is none, or where it is not the one the model was trained with.
    """
    path = Path(explicit) if explicit is not None else Path(artifact_path).parent / "tokenizer.model"
    if not path.is_file():
        raise ArtifactError(
            f"no tokenizer at {path}; put the SentencePiece .model with sha256 {artifact.tokenizer_sha256} there, or "
            "name its path"
        )
    found = sha256_file(path)
    if found != artifact.tokenizer_sha256:
        raise ArtifactError(
            f"{path} is not the tokenizer of {artifact_path}: expected sha256 {artifact.tokenizer_sha256}, "
            f"found {found}"
        )
    return Tokenizer.load(path)


def _coder(name: bytes, path: Path) -> Coder:
    text = name.rstrip(b"\0").decode("ascii", "replace")
    if text not in CODERS:
        raise ArtifactError(f"{path} was written with the coder '{text}', this golfbook has {', '.join(CODERS)}")
    coder: Coder = named(CODERS, text)
    return coder


def _header_text(stored: memoryview, length: int, path: Path) -> bytes:
    text = b""
    try:
        for piece in inflate(stored):
            text += piece
            if len(text) > length:
                raise ValueError("it is longer than declared")
    except ValueError as error:
        raise ArtifactError(f"{path}: the header is not valid: {error}") from None
    if len(text) < length:
        raise ArtifactError(f"{path}: the header is not valid: it ends after {len(text)} of {length} bytes")
    return text


def _parse_header(text: bytes, where: str) -> Header:
    try:
        header = Header.model_validate_json(text)
        canonical = json.dumps(header.model_dump(mode="json"), allow_nan=False)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "text"
        raise ArtifactError(f"{where}: the header is not valid at '{key[:200]}': {first['msg'][:300]}") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: the header is not valid: {str(error)[:300]}") from None
    if len(canonical) > 2 * MAX_HEADER_BYTES:
        raise ArtifactError(f"{where}: the header is too long")
    return header


def _shapes(config: ModelConfig, where: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a model, sorted by name; it is built without memory for its weights."""
    lists = (config.recurrence, config.value_embedding.layers, config.xsa if isinstance(config.xsa, tuple) else ())
    if max(config.num_layers, *map(len, lists)) > MAX_LAYERS:
        raise ArtifactError(f"{where}: the model has more than {MAX_LAYERS} layers")
    left_out = exported(config)
    if left_out != config:
        changed = [name for name in type(config).model_fields if getattr(config, name) != getattr(left_out, name)]
        raise ArtifactError(f"{where}: model.{changed[0]} is on; artifacts hold nothing that only training uses")
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in sorted(_empty_model(config).state_dict().items())}
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:  # torch refuses absurd sizes variously
        raise ArtifactError(f"{where}: no model can be built from its settings: {str(error)[:200]}") from None
    if sum(prod(shape) for shape in shapes.values()) > MAX_VALUES:
        raise ArtifactError(f"{where}: the model has more than {MAX_VALUES} values")
    return shapes


def _check_tensors(quantized: Mapping[str, QuantizedTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors to write with those of the model."""
    shapes = {name: tensor.shape for name, tensor in quantized.items()}
    problems = [f"missing '{name}'" for name in expected if name not in shapes]
    problems += [f"extra '{name}'" for name in shapes if name not in expected]
    problems += [
        f"'{name}' has shape {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ArtifactError(f"the tensors do not fit the model to write: {'; '.join(problems[:8])}{more}")


def _empty_model(config: ModelConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)

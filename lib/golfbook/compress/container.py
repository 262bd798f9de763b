"""The artifact: a whole quantised model in one small file that is safe to read.

Layout (integers little-endian): magic ``GOLF``, version u16, name of the coder (8 bytes, zeros after it), header length
u32, raw length u32, stream length u32, SHA-256 of all the rest (32 bytes), then the coded stream. It holds a JSON
header (model and quantiser settings, tokenizer hash, training window, table of tensors) and, in the order of the table:
all integers one byte each, all scales, all float16 values, all float32 values. There is no bit packing: the coder does
it (PR 1166 section 17.5).

Nothing is unpickled, and nothing is believed: sizes are bounded before memory is taken for them, and the table must be
exactly the tensors that the model in the header has.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from golfbook.compress.coders import Coder
from golfbook.compress.quantizer import QuantizedTensor, dequantize
from golfbook.config.architecture import ModelConfig
from golfbook.config.schema import QuantizeConfig
from golfbook.config.tables import CODERS, named
from golfbook.data.tokenizer import Tokenizer
from golfbook.errors import ArtifactError
from golfbook.files import atomic_write_bytes, canonical_json, sha256_bytes, sha256_file
from golfbook.model.gpt import GPT, exported

MAGIC, VERSION = b"GOLF", 2
PREFIX = struct.Struct("<4sH8sIII32s")
MAX_FILE_BYTES = 2**29
MAX_HEADER_BYTES = 2**18
MAX_VALUES = 2**27  # numbers in a model: 134 million, five times the largest published system
MAX_LAYERS = 512
# Code in the table -> dtype of the integers or values, dtype of the scales. "q6" and "s6" are integers of 6 bits with
# float16 row scales, or with one float32 scale; "h" and "f" are plain float16 and float32.
Code = Annotated[str, Field(pattern=r"^(h|f|[qs][3-8])$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,128}$")]
Size = Annotated[int, Field(ge=1, le=MAX_VALUES)]


class Header(BaseModel):
    """What the JSON in an artifact holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: ModelConfig
    quantize: QuantizeConfig
    tokenizer: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    window: Annotated[int, Field(ge=1, le=2**20)]
    tensors: list[tuple[Name, Code, Annotated[list[Size], Field(max_length=4)]]]


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
    ordered = [quantized[name] for name in sorted(quantized)]
    tree = {
        "model": model_config.model_dump(mode="json"),
        "quantize": quantize_config.model_dump(mode="json"),
        "tokenizer": tokenizer_sha256,
        "window": train_window,
        "tensors": [[tensor.name, _code(tensor), list(tensor.shape)] for tensor in ordered],
    }
    text = canonical_json(tree).encode()
    _check_tensors(_parse_header(text, "the model to write"), "the model to write")
    raw = b"".join([text, *_pack(ordered)])
    coder: Coder = named(CODERS, quantize_config.coder)
    stream, name = coder.encode(raw, quantize_config.coder_level), quantize_config.coder.encode()
    lengths = (len(text), len(raw), len(stream))
    digest = hashlib.sha256(PREFIX.pack(MAGIC, VERSION, name, *lengths, b"") + stream).digest()
    data = PREFIX.pack(MAGIC, VERSION, name, *lengths, digest) + stream
    atomic_write_bytes(path, data)
    return len(data)


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
    _, version, name, header_length, raw_length, stream_length, digest = PREFIX.unpack_from(data)
    if version != VERSION:
        raise ArtifactError(f"{path} has artifact version {version}, this golfbook reads version {VERSION}")
    found = len(data) - PREFIX.size
    if found != stream_length:
        raise ArtifactError(f"{path} is damaged: expected {stream_length} bytes after the prefix, found {found}")
    stream = memoryview(data)[PREFIX.size :]
    unsigned = PREFIX.pack(MAGIC, version, name, header_length, raw_length, stream_length, b"")
    hasher = hashlib.sha256(unsigned)
    hasher.update(stream)
    if hasher.digest() != digest:
        raise ArtifactError(f"{path} is damaged: its checksum does not match; copy or make it again")
    if header_length > MAX_HEADER_BYTES or header_length > raw_length:
        raise ArtifactError(f"{path} declares a header of {header_length} bytes (limit {MAX_HEADER_BYTES})")
    decoder = _Decoder(stream, name, path)
    header = _parse_header(decoder.read(header_length), str(path))
    _check_tensors(header, str(path))
    expected = sum(_bytes_of(code, shape) for _, code, shape in header.tensors)
    if expected != raw_length - header_length:
        raise ArtifactError(f"{path}: its tensors need {expected} bytes, it declares {raw_length - header_length}")
    body = decoder.read(expected)
    decoder.finish()
    quantized = _unpack(header, body, str(path))
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


class _Decoder:
    """Reads a coded stream in the bounded pieces that its coder hands out."""

    def __init__(self, stream: memoryview, name: bytes, path: Path) -> None:
        coder = name.rstrip(b"\0").decode("ascii", "replace")
        if coder not in CODERS:
            raise ArtifactError(f"{path} was written with the coder '{coder}', this golfbook has {', '.join(CODERS)}")
        found: Coder = named(CODERS, coder)
        self.path, self.pieces, self.left = path, found.decode(stream), bytearray()

    def read(self, count: int) -> bytearray:
        """Return exactly ``count`` bytes."""
        out = self.left
        while len(out) < count and (piece := self._next()):
            out += piece
        if len(out) < count:
            raise ArtifactError(f"{self.path} is damaged: its data end after {len(out)} of {count} bytes")
        out, self.left = out[:count], out[count:]
        return out

    def finish(self) -> None:
        """Check that the stream ends here."""
        if self.left or self._next():
            raise ArtifactError(f"{self.path} holds more data than it declares")

    def _next(self) -> bytes:
        try:
            return next(self.pieces, b"")
        except ValueError as error:
            raise ArtifactError(f"{self.path} is damaged: {error}") from None


def _parse_header(text: bytes | bytearray, where: str) -> Header:
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


def _check_tensors(header: Header, where: str) -> None:
    """Compare the table with the tensors of a model that is built without memory for its weights."""
    shapes = {name: tuple(shape) for name, _, shape in header.tensors}
    if len(shapes) != len(header.tensors):
        raise ArtifactError(f"{where}: a tensor is listed twice")
    if sum(prod(shape) for shape in shapes.values()) > MAX_VALUES:
        raise ArtifactError(f"{where}: the model has more than {MAX_VALUES} values")
    config = header.model
    lists = (config.recurrence, config.value_embedding.layers, config.xsa if isinstance(config.xsa, tuple) else ())
    if max(config.num_layers, *map(len, lists)) > MAX_LAYERS:
        raise ArtifactError(f"{where}: the model has more than {MAX_LAYERS} layers")
    left_out = exported(config)
    if left_out != config:
        changed = [name for name in type(config).model_fields if getattr(config, name) != getattr(left_out, name)]
        raise ArtifactError(f"{where}: model.{changed[0]} is on; artifacts hold nothing that only training uses")
    try:
        expected = {name: tuple(tensor.shape) for name, tensor in _empty_model(config).state_dict().items()}
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:  # torch refuses absurd sizes variously
        raise ArtifactError(f"{where}: no model can be built from its settings: {str(error)[:200]}") from None
    problems = [f"missing '{name}'" for name in expected if name not in shapes]
    problems += [f"extra '{name}'" for name in shapes if name not in expected]
    problems += [
        f"'{name}' has shape {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ArtifactError(f"{where}: the tensors do not fit the model: {'; '.join(problems[:8])}{more}")


def _empty_model(config: ModelConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def _code(tensor: QuantizedTensor) -> str:
    if tensor.kind == "float16":
        return "h"
    if tensor.kind == "float32":
        return "f"
    assert tensor.scale is not None
    return f"{'s' if tensor.scale.dtype == torch.float32 else 'q'}{tensor.bits}"


def _scale_shape(code: str, shape: list[int]) -> tuple[int, ...]:
    return (shape[0],) if code[0] == "q" and len(shape) == 2 else ()


def _bytes_of(code: str, shape: list[int]) -> int:
    if code in "hf":
        return prod(shape) * (2 if code == "h" else 4)
    return prod(shape) + prod(_scale_shape(code, shape)) * (2 if code[0] == "q" else 4)


def _pack(tensors: Iterable[QuantizedTensor]) -> list[bytes]:
    """Return the bytes of the tensors in the order of the layout."""
    groups: dict[str, list[bytes]] = {"q": [], "scale": [], "float16": [], "float32": []}
    for tensor in tensors:
        if tensor.value is not None:
            groups[tensor.kind].append(_raw(tensor.value))
        elif tensor.q is not None and tensor.scale is not None:
            groups["q"].append(_raw(tensor.q))
            groups["scale"].append(_raw(tensor.scale))
    return [piece for group in groups.values() for piece in group]


def _raw(tensor: Tensor) -> bytes:
    array = tensor.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _unpack(header: Header, body: bytearray, where: str) -> dict[str, QuantizedTensor]:
    position = 0

    def take(kind: str, shape: Iterable[int]) -> Tensor:
        nonlocal position
        dims = tuple(shape)
        array = np.frombuffer(body, dtype=kind, count=prod(dims), offset=position).reshape(dims)
        position += array.nbytes
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True))

    parts: dict[tuple[str, str], Tensor] = {}
    groups: tuple[Literal["q", "scale", "h", "f"], ...] = ("q", "scale", "h", "f")
    for group in groups:
        for name, code, shape in header.tensors:
            if group == code:
                parts[name, "value"] = take("<f2" if code == "h" else "<f4", shape)
            elif group == "q" and code[0] in "qs":
                parts[name, "q"] = take("i1", shape)
            elif group == "scale" and code[0] in "qs":
                parts[name, "scale"] = take("<f2" if code[0] == "q" else "<f4", _scale_shape(code, shape))
    for (name, part), tensor in parts.items():
        if part != "q" and not torch.isfinite(tensor).all():
            raise ArtifactError(f"{where}: tensor '{name}' holds values that are not finite")
    result: dict[str, QuantizedTensor] = {}
    for name, code, _ in header.tensors:
        if code in "hf":
            kind: Literal["float16", "float32"] = "float16" if code == "h" else "float32"
            result[name] = QuantizedTensor(name, kind, 16 if code == "h" else 32, value=parts[name, "value"])
            continue
        q, bits = parts[name, "q"], int(code[1])
        qmax = 2 ** (bits - 1) - 1
        if int(q.min()) < -qmax or int(q.max()) > qmax:
            raise ArtifactError(f"{where}: tensor '{name}' holds integers beyond {bits} bits")
        result[name] = QuantizedTensor(name, "int", bits, q=q, scale=parts[name, "scale"])
    return result

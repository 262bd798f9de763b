"""Checkpoints of the published systems: their names, their banks, their containers; read safely, written exactly.

PR 1166 and PR 1406 keep the matrices of all layers in four banks, PR 1170 and PR 1232 one matrix a tensor; their
quantised files (``*.ptz``) hold integers and scales. Our model uses the one-matrix names, so reading means cutting the
banks and writing means stacking them. Sources: PR 1166 sections 6, 11, 13 and 17.5; PR 1406 sections 3, 16 and 18.
"""

from __future__ import annotations

import io
import lzma
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import zstandard
from torch import Tensor

from golfbook.config.architecture import ModelConfig
from golfbook.config.load import load_config
from golfbook.errors import CheckpointError, nearest
from golfbook.model.component import facts_of
from golfbook.model.gpt import GPT

PRESETS = {"pr1166": "pr1166_11l_base", "pr1170": "pr1232_base", "pr1232": "pr1232_base", "pr1406": "pr1406"}
BANKED = ("pr1166", "pr1406")
LARGEST = 2**31  # bytes a container may unpack to; the published ones need about 30 MB
NO_CHECKPOINTS = {  # how files begin that downloads leave in the place of a checkpoint
    b"<": "a web page and no checkpoint: download the file itself, not the page that shows it",
    b"version https://git-lfs": "a pointer of Git LFS and no checkpoint: fetch the file itself with git lfs pull",
}
BANKS = {
    "qo_bank": ("attn.c_q.weight", "attn.proj.weight"),
    "kv_bank": ("attn.c_k.weight", "attn.c_v.weight"),
    "mlp_up_bank": ("mlp.fc.weight",),
    "mlp_down_bank": ("mlp.proj.weight",),
}
# Constructor arguments of the published scripts whose setting has another name here.
ARGUMENTS = {
    "xsa_last_n": "xsa", "train_seq_len": "rope_train_length", "recur_layers": "recurrence", "dtg": "depth_gate",
    "dtg_enabled": "depth_gate", "trigram": "bigram.trigram", "ve_layers": "value_embedding.layers",
    "ve_dim": "value_embedding.dim", "bigram_vocab_size": "bigram.vocab_size", "bigram_dim": "bigram.dim",
    "canon_delta_gate_init": "canon.gate_init",
} | {
    f"{theirs}_{field}": f"{ours}.{field}"
    for theirs, ours, fields in (
        ("e2e_ttt", "ttt_linear", ("enabled", "num_heads", "mini_batch", "base_lr")),
        ("flow", "flow", ("enabled", "latent_dim", "hidden_dim", "init_scale")),
        ("native_flow", "native_flow", ("enabled", "hidden_dim", "init_scale", "loss_weight")),
        ("mtp", "mtp", ("num_heads", "loss_weight")),
        ("canon", "canon", ("last_n", "kernel")),
    )
    for field in fields
}  # fmt: skip


def load_published(
    source: str | Path | Mapping[str, Tensor], system: str, overrides: Mapping[str, Any] | None = None
) -> GPT:
    """Build our model from a published checkpoint; float32, in evaluation mode, on the CPU.

    ``source`` is a path (``final_model.pt``, a quantised ``*.ptz`` or safetensors, told apart by content) or a state
    dict, banked or not; a prefix of all names, such as ``_orig_mod.`` or ``module.``, is left off. ``system`` is one of
    pr1166, pr1170, pr1232, pr1406. Sizes come from the shapes; ``overrides`` gives what shapes cannot tell, as keys of
    the model section (``{"rope_dims": 8, "xsa": 2}``) or as the published argument names (``xsa_last_n``,
    ``ve_layers``); everything else is the system's published value.

    Raises :class:`CheckpointError` listing missing and extra keys and wrong shapes, and for a damaged file;
    :class:`ConfigError` for an override that does not exist or does not fit.
    """
    name = system_name(system)
    state = read_state(source) if isinstance(source, str | Path) else source
    state = {key: value.detach().to("cpu", torch.float32) for key, value in state.items()}
    state = unbank(_without_prefix(state))
    model = GPT(infer_config(state, name, overrides or {}))
    _require_same(state, model.state_dict(), name)
    model.load_state_dict(state)
    return model.eval()


def published_state(model: GPT, system: str) -> dict[str, Tensor]:
    """Return the model's tensors under a system's own names, order, shapes and storage dtypes.

    The matrices of all layers are stacked for PR 1166 and PR 1406.
    """
    name = system_name(system)
    facts = facts_of(model)
    state = {key: value.detach().to(facts[key].dtype, copy=True) for key, value in model.state_dict().items()}
    return bank(state) if name in BANKED else state


def system_name(system: str) -> str:
    """Return the canonical name of a published system; raises :class:`CheckpointError` for an unknown one."""
    digits = re.fullmatch(r"(?:pr|s)?[ _#]?(\d{4})(?:_.*)?", system.lower())
    name = f"pr{digits[1]}" if digits else system
    if name not in PRESETS:
        raise CheckpointError(f"unknown system '{system}'{nearest(name, PRESETS)} (known: {', '.join(PRESETS)})")
    return name


def unbank(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut banks into one matrix a layer, in place in the key order; a state without banks comes back as it is."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if key not in BANKS:
            result[key] = value
            continue
        kinds = BANKS[key]
        if value.ndim != 3 or len(value) % len(kinds):
            raise CheckpointError(f"'{key}' has shape {tuple(value.shape)}; expected {len(kinds)} matrices a layer")
        layers = len(value) // len(kinds)
        for layer in range(layers):
            for index, kind in enumerate(kinds):
                result[f"blocks.{layer}.{kind}"] = value[index * layers + layer]
    return result


def bank(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack the matrices of all layers into the four banks, which stand right after ``skip_weights``."""
    layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    stacked = {
        name: torch.stack([state[f"blocks.{layer}.{kind}"] for kind in kinds for layer in range(layers)])
        for name, kinds in BANKS.items()
    }
    cut = {f"blocks.{layer}.{kind}" for kinds in BANKS.values() for kind in kinds for layer in range(layers)}
    first = {key: value for key, value in state.items() if key == "skip_weights"}
    return first | stacked | {k: v for k, v in state.items() if k not in cut and k != "skip_weights"}


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a ``.pt``, ``.ptz`` or ``.safetensors`` file; quantised tensors come back decoded. Nothing is executed.

    Raises :class:`CheckpointError` for a file that is missing, damaged, too large when unpacked, or of another kind.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    for sign, kind in NO_CHECKPOINTS.items():
        if data[:1000].lstrip().lower().startswith(sign):
            raise CheckpointError(f"{path} is {kind}")
    try:
        content = _load(_decompress(data))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # torch raises many kinds, with advice to switch its safety off: not repeated here
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise CheckpointError(
                f"{path} is no plain checkpoint of tensors: it holds the Python object {found[1]}, which could run "
                "code and is not read; save the tensors alone, with torch.save(model.state_dict(), ...)"
            ) from None
        raise CheckpointError(
            f"{path} is damaged or no plain checkpoint of tensors; copy or download it again"
        ) from None
    if isinstance(content, dict) and set(content) == {"w", "m"}:
        return _decode(content["w"], content["m"], path)
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        held = f"a mapping with the keys {_some(map(repr, content))}" if isinstance(content, dict) else "something else"
        raise CheckpointError(f"{path} does not hold a mapping of names to tensors, but {held}")
    return content


def _load(data: bytes) -> Any:
    """Load the content of an unpacked file: safetensors (a length, then JSON), or what torch wrote."""
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8:
        return safetensors.torch.load(data)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without what wrappers put before all their names, such as ``_orig_mod.`` or ``module.``."""
    prefix = next((key for key in state if key.endswith("tok_emb.weight")), "").removesuffix("tok_emb.weight")
    other = [key for key in state if not key.startswith(prefix)]
    if other:
        raise CheckpointError(
            f"some names of this state dict begin with '{prefix}' and others do not: {_some(other)}; remove the prefix"
        )
    return {key.removeprefix(prefix): value for key, value in state.items()}


def infer_config(state: Mapping[str, Tensor], system: str, overrides: Mapping[str, Any]) -> ModelConfig:
    """Infer the model section a published, unbanked state dict belongs to; see :func:`load_published`."""
    if not any(key.startswith("blocks.") for key in state) or "tok_emb.weight" not in state:
        raise CheckpointError(
            f"this is no state dict of {system}: no 'tok_emb.weight' or no blocks; has {_some(state)}"
        )
    layers = 1 + max(int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key))
    try:
        found = {"xsa": layers if system in ("pr1170", "pr1232") else min(4, layers), **_sizes(state, layers)}
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"cannot tell the sizes of this {system} state dict: {error!s} is missing or odd"
        ) from None
    config = load_config(PRESETS[system], overrides={f"model.{key}": value for key, value in found.items()}
                         | _translated(overrides))  # fmt: skip
    return config.model


def _sizes(state: Mapping[str, Tensor], layers: int) -> dict[str, Any]:
    vocab, dim = state["tok_emb.weight"].shape
    heads = state["blocks.0.attn.q_gain"].numel()
    found: dict[str, Any] = {
        "vocab_size": vocab,
        "model_dim": dim,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": state["blocks.0.attn.c_k.weight"].shape[0] // (dim // heads),
        "mlp_mult": state["blocks.0.mlp.fc.weight"].shape[0] / dim,
        "tie_embeddings": "lm_head.weight" not in state,
        "unet_skips": "skip_weights" in state,
        "smear": "smear.gate" in state,
        "gated_attention": "blocks.0.attn.attn_gate.weight" in state,
        "depth_gate": "blocks.0.dtg_gate.weight" in state,
        "mtp.num_heads": sum(key.startswith("mtp_heads.") for key in state),
        "canon.last_n": sum(key.endswith("canon_a.weight") for key in state),
        "ttt_linear.enabled": "ttt_refiner.W1" in state,
        "flow.enabled": "flow_refiner.gate" in state,
        "native_flow.enabled": "native_flow.gate" in state,
        "value_residual": "lambda" if any(k.endswith("vr_lambda") for k in state) else
                          "alpha" if any(k.endswith("vrl_alpha") for k in state) else "none",
        "bigram.vocab_size": 0,
    }  # fmt: skip
    if "bigram.embed.weight" in state:
        found["bigram.vocab_size"], found["bigram.dim"] = state["bigram.embed.weight"].shape
    scales = sum(key.startswith("ve_layer_scales.") for key in state)
    found["value_embedding.layers"] = list(range(layers - scales, layers))
    if scales:
        found["value_embedding.dim"] = state["ve_shared.embed.weight"].shape[1]
    if found["ttt_linear.enabled"]:
        found["ttt_linear.num_heads"] = state["ttt_refiner.W1"].shape[0]
    if found["flow.enabled"]:
        found["flow.hidden_dim"], found["flow.latent_dim"] = state["flow_refiner.velocity_net.0.weight"].shape
    if found["native_flow.enabled"]:
        found["native_flow.hidden_dim"] = state["native_flow.v_in.weight"].shape[0]
    if found["canon.last_n"]:
        found["canon.kernel"] = next(v.shape[0] for k, v in state.items() if k.endswith("canon_a.weight"))
    if dim // heads < 16:  # the published 16 rotated dimensions do not fit a narrower head
        found["rope_dims"] = dim // heads
    return found


def _translated(overrides: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in overrides.items():
        name = ARGUMENTS.get(key, key).removeprefix("model.")
        if key == "ve_enabled":  # whether there are value embeddings is told by the tensors
            continue
        if key in ("ve_layers", "recur_layers") and isinstance(value, str):
            value = [int(part) for part in value.split(",") if part.strip()]
        if key == "value_residual" and isinstance(value, bool):
            value = "lambda" if value else "none"
        result[f"model.{name}"] = list(value) if isinstance(value, tuple) else value
    return result


def _require_same(state: Mapping[str, Tensor], template: Mapping[str, Tensor], system: str) -> None:
    missing, extra = [k for k in template if k not in state], [k for k in state if k not in template]
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(template[k].shape)}"
        for k in template
        if k in state and state[k].shape != template[k].shape
    ]
    if missing or extra or shapes:
        raise CheckpointError(
            f"this state dict does not fit {system}: missing {_some(missing)}; extra {_some(extra)}; "
            f"wrong shapes {_some(shapes)}"
        )


def _some(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return (", ".join(names[:12]) or "none") + more


def _decompress(data: bytes) -> bytes:
    if data.startswith(b"\xfd7zXZ\x00"):
        unpacked = lzma.LZMADecompressor().decompress(data, LARGEST)
    elif data.startswith(b"\x28\xb5\x2f\xfd"):
        unpacked = zstandard.ZstdDecompressor().stream_reader(data).read(LARGEST)
    elif data[:1] == b"\x78":
        unpacked = zlib.decompressobj().decompress(data, LARGEST)
    else:
        return data
    if len(unpacked) >= LARGEST:
        raise CheckpointError(f"it unpacks to more than {LARGEST} bytes")
    return unpacked


def _decode(tensors: Any, meta: Any, path: Path) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    try:
        for name, kind in meta.items():
            if isinstance(kind, str):
                result[name] = tensors[name].float()
                continue
            if kind["type"] not in ("int5", "int6", "int8"):
                raise CheckpointError(f"{path}: tensor '{name}' has the unknown type {kind['type']!r}")
            q, scale = tensors[f"{name}.q"].float(), tensors[f"{name}.scale"].float()
            result[name] = q * (scale.view(-1, *[1] * (q.ndim - 1)) if scale.ndim else scale)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no published container of quantised tensors: {error}") from None
    return result

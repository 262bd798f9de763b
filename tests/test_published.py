"""Published checkpoints: key lists, banks, containers, and errors that list what is wrong."""

from __future__ import annotations

import io
import json
import lzma
import pickle
import zlib
from pathlib import Path

import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

from golfbook.config.load import load_config
from golfbook.errors import CheckpointError, ConfigError
from golfbook.model.gpt import GPT, initialise
from golfbook.published.checkpoints import (
    ARGUMENTS,
    bank,
    load_published,
    published_state,
    read_state,
    system_name,
    unbank,
)
from reference import fill_hashed, hashed_batch

GOLDEN = Path(__file__).parent / "golden"
TINY_ARGUMENTS = {"xsa_last_n": 2, "ve_layers": "2,3", "rope_dims": 8, "e2e_ttt_mini_batch": 16, "ve_enabled": True}


def tiny(preset: str, **overrides) -> GPT:
    model = GPT(load_config(preset, scale="tiny", overrides={f"model.{k}": v for k, v in overrides.items()}).model)
    fill_hashed(model)
    return model.eval()


def block_keys(layers: int, names: list[str]) -> list[str]:
    return [f"blocks.{i}.{name}" for i in range(layers) for name in names]


FLOW = ["gate", "down_proj.weight", "velocity_net.0.weight", "velocity_net.0.bias", "velocity_net.2.weight",
        "velocity_net.2.bias", "up_proj.weight"]  # fmt: skip
TTT = ["W1", "b1", "ttt_ln_w", "ttt_ln_b", "gate", "theta_K.weight", "theta_V.weight", "theta_Q.weight",
       "o_proj.weight", "post_norm.weight", "post_norm.bias"]  # fmt: skip
BANKED_KEYS = ["skip_weights", "qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "tok_emb.weight", "bigram.scale",
               "bigram.embed.weight", "bigram.proj.weight", "smear.gate"]  # fmt: skip
VE_KEYS = ["ve_shared.scale", "ve_shared.embed.weight", "ve_shared.proj.weight", "ve_layer_scales.0",
           "ve_layer_scales.1"]  # fmt: skip
SCALES = ["attn_scale", "mlp_scale", "resid_mix", "attn.q_gain"]
PR1232_BLOCK = [*SCALES, "attn.vr_lambda", *(f"attn.{n}.weight" for n in ("c_q", "c_k", "c_v", "proj", "attn_gate")),
                "attn.attn_gate.bias", "mlp.fc.weight", "mlp.proj.weight"]  # fmt: skip
HEAD = [BANKED_KEYS[0], *BANKED_KEYS[5:]]
NFM = ["gate", "time_proj.0.weight", "time_proj.0.bias", "v_in.weight", "v_in.bias", "v_out.weight"]
KEYS = {
    "pr1166_e2e_ttt_flow": ("pr1166", [*BANKED_KEYS, *block_keys(10, SCALES), *VE_KEYS,
                                       *(f"ttt_refiner.{n}" for n in TTT), *(f"flow_refiner.{n}" for n in FLOW)], 73),
    "pr1232_base": ("pr1232", [*HEAD, *block_keys(11, PR1232_BLOCK)], 149),
    "pr1232_flow": ("pr1232", [*HEAD, *block_keys(11, PR1232_BLOCK), *(f"flow_refiner.{n}" for n in FLOW)], 156),
    "pr1170_nfm": ("pr1170", [*HEAD, *block_keys(11, PR1232_BLOCK), *(f"native_flow.{n}" for n in NFM)], 155),
    "pr1406": ("pr1406", [*BANKED_KEYS, *block_keys(11, SCALES), *VE_KEYS], 59),
}  # fmt: skip


@pytest.mark.parametrize("preset", KEYS)
def test_key_lists_shapes_and_dtypes_are_the_published_ones(preset):
    system, expected, count = KEYS[preset]
    with torch.device("meta"):
        state = published_state(GPT(load_config(preset).model), system)
    assert list(state) == expected
    assert len(state) == count
    assert state["tok_emb.weight"].dtype == torch.bfloat16
    assert state["bigram.proj.weight"].dtype == torch.float32
    if "qo_bank" in state:
        layers = load_config(preset).model.num_layers
        assert tuple(state["qo_bank"].shape) == (2 * layers, 512, 512)
        assert tuple(state["mlp_up_bank"].shape) == (layers, 1536, 512)
        assert state["qo_bank"].dtype == torch.float32


def test_golden_key_list_with_shapes_and_dtypes():
    """Keys, shapes and export types of the published PR 1166 model at full size."""
    published = json.loads((GOLDEN / "keys_pr1166.json").read_text())
    with torch.device("meta"):
        state = published_state(GPT(load_config("pr1166_e2e_ttt_flow").model), "S1166")
    assert [[k, list(v.shape)] for k, v in state.items()] == published["keys"]
    assert list(unbank(state)) == published["exported"]


@pytest.mark.parametrize("preset", KEYS)
def test_a_published_state_comes_back_as_the_same_model(preset):
    system = KEYS[preset][0]
    model = tiny(preset)
    tokens, _ = hashed_batch(2, 40)
    state = {k: v.float() for k, v in published_state(model, system).items()}
    exact = {k: v.to(torch.bfloat16).float() if v.dtype == torch.bfloat16 else v for k, v in state.items()}
    again = load_published(exact, system, overrides={"rope_dims": 8})
    for name in ("num_layers", "num_kv_heads", "mlp_mult", "value_residual", "xsa_layers", "recurrent_layers"):
        assert getattr(again.config, name) == getattr(model.config, name), name
    with torch.no_grad():
        torch.testing.assert_close(again(tokens), model(tokens), atol=0.05, rtol=0)  # tables went through bfloat16
        free = load_published(bank(model.state_dict()), system, overrides={"model.rope_dims": 8})
        assert torch.equal(free(tokens), model(tokens))


def test_the_golden_checkpoint_loads_by_its_published_argument_names():
    data = load_file(GOLDEN / "small_pr1166_hot.safetensors")
    meta = json.loads((GOLDEN / "small_pr1166.json").read_text())
    state = {k.removeprefix("state/"): v for k, v in data.items() if k.startswith("state/")}
    for form in (state, bank(state)):
        model = load_published(form, "pr1166", overrides=TINY_ARGUMENTS)
        with torch.no_grad():
            logits = model(data["x"])[:, meta["logit_positions"]]
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, data["logits_at_pos"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["pt", "xz", "zstd", "zlib"])
def test_quantised_containers_are_read_in_every_published_compression(tmp_path, form):
    model = tiny("pr1232_flow")
    weights, meta = {}, {}
    for name, value in model.state_dict().items():
        if value.numel() <= 512:
            weights[name], meta[name] = value.half(), "passthrough"
        else:
            scale = (value.abs().amax(1) / 31).half()
            weights[f"{name}.q"] = (value / scale.float()[:, None]).round().clamp(-31, 31).to(torch.int8)
            weights[f"{name}.scale"], meta[name] = scale, {"type": "int6"}
    buffer = io.BytesIO()
    torch.save({"w": weights, "m": meta}, buffer)
    pack = {"pt": bytes, "xz": lzma.compress, "zstd": zstandard.ZstdCompressor(16).compress, "zlib": zlib.compress}[
        form
    ]
    path = tmp_path / "final_model.int6.ptz"
    path.write_bytes(pack(buffer.getvalue()))
    loaded = load_published(path, "pr1232", {"rope_dims": 8})
    name = "blocks.3.mlp.fc.weight"
    expected = weights[f"{name}.q"].float() * weights[f"{name}.scale"].float()[:, None]
    assert torch.equal(loaded.state_dict()[name], expected)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or no plain checkpoint"):
        load_published(path, "pr1232", {"rope_dims": 8})


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (
        lambda p: torch.save({"tok_emb.weight": Hostile()}, p),
        lambda p: p.write_bytes(pickle.dumps(Hostile())),
    ):
        path = tmp_path / "final_model.pt"
        write(path)
        with pytest.raises(CheckpointError, match="no plain checkpoint"):
            read_state(path)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(CheckpointError, match="cannot read"):
        read_state(tmp_path / "missing.pt")
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="mapping of names"):
        read_state(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n<!doctype HTML><html>not found</html>", "final.pt is a web page and no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "final.pt is a pointer of Git LFS"),
        (b"", "final.pt is damaged or no plain checkpoint"),
        (b"PK\x03\x04 cut", "final.pt is damaged or no plain checkpoint"),
        (torch.nn.Linear(2, 2), r"holds the Python object torch.nn.modules.linear.Linear.*model.state_dict\(\)"),
        ({"model": {"a": torch.zeros(1)}, "step": 3}, "but a mapping with the keys 'model', 'step'"),
        ({1: torch.zeros(1)}, "but a mapping with the keys 1"),
    ],
)
def test_what_is_no_checkpoint_is_told_in_own_words(tmp_path, content, message):
    path = tmp_path / "final.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state(path)
    assert "weights_only" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_safetensors_and_the_prefixes_of_wrappers(tmp_path):
    model = tiny("pr1232_flow")
    state = model.state_dict()
    path = tmp_path / "final_model.pt"  # whatever it is called
    save_file(state, path)
    assert torch.equal(read_state(path)["smear.gate"], state["smear.gate"])
    for prefix in ("_orig_mod.", "module.", "module._orig_mod."):
        loaded = load_published({prefix + key: value for key, value in state.items()}, "pr1232", {"rope_dims": 8})
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    mixed = {("" if key == "smear.gate" else "module.") + key: value for key, value in state.items()}
    with pytest.raises(CheckpointError, match=r"some names .* begin with 'module.' and others do not: smear.gate"):
        load_published(mixed, "pr1232")


def test_wrong_systems_keys_and_shapes_are_listed():
    state = unbank(published_state(tiny("pr1166_e2e_ttt_flow"), "pr1166"))
    with pytest.raises(CheckpointError, match=r"unknown system 'pr1167'; did you mean 'pr"):
        load_published(state, "pr1167")
    bad = {k: v for k, v in state.items() if k != "blocks.2.mlp.fc.weight"} | {"surplus": torch.zeros(3)}
    bad["smear.gate"] = torch.zeros(5)
    with pytest.raises(CheckpointError) as error:
        load_published(bad, "pr1166", {"rope_dims": 8})
    for text in ("missing blocks.2.mlp.fc.weight", "extra surplus", "smear.gate (5,) instead of (64,)"):
        assert text in str(error.value)
    with pytest.raises(CheckpointError, match="no state dict of pr1232"):
        load_published({"a": torch.zeros(2)}, "pr1232")
    with pytest.raises(CheckpointError, match="cannot tell the sizes"):
        load_published({"tok_emb.weight": torch.zeros(4, 8), "blocks.0.attn_scale": torch.zeros(8)}, "pr1232")
    with pytest.raises(ConfigError, match=r"unknown key 'model.rope_dim'; did you mean 'model.rope_dims'"):
        load_published(state, "pr1166", {"rope_dim": 8})


def test_system_names_and_argument_names():
    for name in ("pr1166", "S1166", "1166", "PR 1166", "pr1166_11l_base"):
        assert system_name(name) == "pr1166"
    known = {f"model.{name}" for name in ARGUMENTS.values()}
    from golfbook.config.load import keys

    assert known <= set(keys())


def test_banks_cut_and_stack_exactly():
    model = initialise(tiny("pr1406"), seed=1)
    state = model.state_dict()
    whole = bank(state)
    assert {k: v.sum().item() for k, v in unbank(whole).items()} == {k: v.sum().item() for k, v in state.items()}
    assert torch.equal(whole["qo_bank"][4], state["blocks.4.attn.c_q.weight"])
    assert torch.equal(whole["qo_bank"][11 + 4], state["blocks.4.attn.proj.weight"])
    assert torch.equal(whole["kv_bank"][11 + 2], state["blocks.2.attn.c_v.weight"])

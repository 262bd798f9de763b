"""Configuration: presets, scales and overrides, and errors that name the key."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golfbook.config.load import keys, load_config, preset_names, scale_names, validate
from golfbook.config.schema import Config, MachineConfig
from golfbook.errors import ConfigError
from golfbook.model.gpt import parameter_table

PUBLISHED_TOTALS = {
    "pr1166_e2e_ttt_flow": 25_749_398,
    "pr1166_11l_base": 26_928_220,
    "pr1166_11l_a": 28_110_750,
    "pr1166_11l_c": 28_110_750,
    "pr1166_flow_latent32": 26_928_220 + 49_441,
    "pr1166_flow_hidden128": 26_928_220 + 82_113,
    "pr1170_nfm": 27_530_952,
    "pr1170_nfm_hidden128": 27_334_088,
    "pr1170_nfm_hidden512": 27_924_680,
    "pr1232_base": 27_137_223,
    "pr1232_flow": 27_235_848,
    "pr1406": 26_928_220,
}


def test_every_preset_has_its_published_parameter_total():
    assert set(preset_names()) == {*PUBLISHED_TOTALS, "quickstart"}
    for name, total in PUBLISHED_TOTALS.items():
        assert parameter_table(load_config(name).model)["total"] == total, name
    groups = parameter_table(load_config("pr1166_e2e_ttt_flow").model)
    assert (groups["ttt_refiner"], groups["flow_refiner"]) == (1_083_905, 98_625)


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_scales_fit_every_preset_and_keep_its_structure(name, scale):
    full, small = load_config(name), load_config(name, scale=scale)
    assert small.preset == f"{name}-{scale}"
    assert small.data.source == "pydocs"
    assert small.model.num_layers == full.model.num_layers
    assert small.model.recurrence == full.model.recurrence
    assert small.model.value_embedding_layers == full.model.value_embedding_layers
    for part in ("ttt_linear", "flow", "native_flow"):
        assert getattr(small.model, part).enabled == getattr(full.model, part).enabled
    assert parameter_table(small.model)["total"] < 3_000_000
    assert load_config(name, scale="published") == full


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.xas": 3}, "unknown key 'model.xas'; did you mean 'model.xsa'"),
        ({"trian.steps": 3}, "did you mean 'train.steps'"),
        ({"model": {"flow": {"enabld": True}}}, "unknown key 'model.flow.enabld'; did you mean 'model.flow.enabled'"),
        (
            {"train.optimizer.matrix_lr": "1e-3"},
            "train.optimizer.matrix_lr: expected a number.*YAML reads '1e-3' as text: write 0.001",
        ),
        ({"train.steps": "1e3"}, "write 1000"),
        ({"train.steps": 1.5}, "train.steps"),
        ({"train.steps": True}, "train.steps"),
        ({"train.steps": 0}, "train.steps: input should be greater than 0"),
        ({"model.ttt_linear": 5}, "model.ttt_linear"),
        ({"model.num_heads": 3}, "model.model_dim 128 is not a multiple of model.num_heads 3"),
        ({"model.num_kv_heads": 3}, "not a multiple of model.num_kv_heads 3"),
        ({"model.recurrence": [9]}, "model.recurrence names layer 9 of a model with 4 layers"),
        ({"model.recurrence_place": "in_place"}, "no effect"),
        ({"model.smear": False, "model.smear_document_mask": True}, "no effect"),
        ({"data.path": "x.txt"}, "data.path has no effect with data.source 'pydocs'"),
        ({"data.source": "text"}, "needs data.path"),
        ({"data.source": "shards", "data.path": "x"}, "needs data.tokenizer"),
        ({"train.batch_tokens": 1000}, "train.batch_tokens 1000 must be a multiple of train.sequence_length 256"),
        ({"machine.processes": 3}, "multiple of machine.processes 3"),
        ({"score.stride": 512}, "score.stride 512 is more than the window of 256"),
        ({"train.steps.more": 1}, "'steps' is a value, not a section"),
        ({"train.optimizer.matrix_lr": float("nan")}, "train.optimizer.matrix_lr"),
        ({"data.path": {1, 2}}, "no number, text, list or mapping"),
        ({3: 4}, "override key 3 is not text"),
    ],
)
def test_wrong_settings_name_the_key(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", overrides=overrides)


def test_unknown_preset_and_scale_name_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        load_config("quikstart")
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        load_config("pr1406", scale="tinny")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config("missing.yaml")
    assert scale_names() == ["published", "small", "tiny"]


def test_a_yaml_file_may_extend_a_preset(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: quickstart\nmodel: {xsa: 0}\ntrain: {steps: 5}\n", encoding="utf-8")
    config = load_config(str(mine), seed=3)
    assert (config.preset, config.model.xsa, config.train.steps, config.seed) == ("mine", 0, 5, 3)
    assert config.model.model_dim == 128
    mine.write_text("extends: quickstart\nmodel: [1]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="model"):
        load_config(str(mine))
    other = tmp_path / "other.yaml"
    other.write_text(f"extends: {mine}\n", encoding="utf-8")
    mine.write_text(f"extends: {other}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="in a circle"):
        load_config(str(mine))
    mine.write_text("a: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(str(mine))
    mine.write_bytes(b"\xef\xbb\xbfextends: quickstart\nseed: 4\n")
    assert load_config(str(mine)).seed == 4
    mine.write_text("seed: 4\n", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"mine.yaml is UTF-16; save it as UTF-8"):
        load_config(str(mine))


def test_hash_names_the_settings_and_nothing_else():
    base = load_config("quickstart")
    assert load_config("quickstart", overrides={"train.steps": 300}).hash == base.hash
    assert load_config("quickstart", seed=2).hash != base.hash
    assert load_config("quickstart", overrides={"train.steps": 301}).hash != base.hash
    renamed = base.model_copy(update={"preset": "other"})
    assert renamed.hash == base.hash
    changed = {"checkpoint_activations": True, "compile_warmup_steps": 7, "log_every": 3, "validate_every": 0}
    changed["checkpoint_every"] = 0
    assert set(changed) == MachineConfig.silent, "what computes nothing else, see test_training"
    quiet = load_config("quickstart", overrides={f"machine.{key}": value for key, value in changed.items()})
    assert quiet.hash == base.hash and quiet != base
    for key, value in {"threads": 2, "precision": "float32", "attention": "sdpa", "compile": True}.items():
        assert load_config("quickstart", overrides={f"machine.{key}": value}).hash != base.hash, key
    assert validate(json.loads(base.model_dump_json())) == base


LEAVES = keys()


@settings(max_examples=200, deadline=None)
@given(
    key=st.sampled_from(LEAVES),
    value=st.one_of(
        st.integers(-3, 5000), st.floats(allow_nan=True), st.booleans(), st.text(max_size=8), st.none(),
        st.lists(st.integers(-12, 12), max_size=3),
    ),
)  # fmt: skip
def test_any_value_of_any_key_is_taken_or_refused_by_name(key, value):
    """Either a config with that value comes back and survives JSON, or an error that says something."""
    try:
        config = load_config("quickstart", overrides={key: value})
    except ConfigError as error:
        assert len(str(error)) > 20
        return
    assert isinstance(config, Config)
    assert validate(json.loads(config.model_dump_json())) == config
    found = json.loads(config.model_dump_json())
    for part in key.split("."):
        found = found[part]
    assert found == value

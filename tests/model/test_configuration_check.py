"""Any config.json ends in a configuration, or in a message with file, key and value."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GptOssConfig

from cpt.errors import ConfigError
from cpt.model.configuration import PRESETS, load_config
from cpt.model.parameters import parameter_shapes

YARN = PRESETS["tiny"]["rope_parameters"]
SOUND: dict[str, Any] = {**PRESETS["tiny"], "model_type": "gpt_oss"}
LAYERS = ["sliding_attention", "full_attention"] * 2


def load(folder: Path, /, **changes: Any) -> GptOssConfig:
    (folder / "config.json").write_text(json.dumps({**SOUND, **changes}))
    return load_config(folder, None)


def refusal(folder: Path, /, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, **changes)
    assert caught.value.exit_code == 78
    assert all(str(folder / "config.json") in problem for problem in caught.value.problems)
    return caught.value.problems


ONE_WRONG = [
    ("hidden_size", "32", "hidden_size is '32', must be a whole number"),
    ("hidden_size", True, "hidden_size is true, must be"),
    ("hidden_size", 64.5, "hidden_size is 64.5, must be"),
    ("head_dim", None, "head_dim is null, must be"),
    ("head_dim", 31, "head_dim is 31, must be even"),
    ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, must be"),
    ("vocab_size", 10**30, f"vocab_size is {10**30}, must be"),
    ("num_labels", 10**12, "num_labels is 1000000000000, must be"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps is nan, must be a number"),
    ("rms_norm_eps", "1e-5", "rms_norm_eps is '1e-5', must be a number"),
    ("initializer_range", -1, "initializer_range is -1, must be"),
    ("use_cache", "yes", "use_cache is 'yes', must be true or false"),
    ("dtype", "bf16", "dtype is 'bf16', must be one of bfloat16"),
    ("torch_dtype", ["bfloat16"], "torch_dtype is ['bfloat16'], must be one of"),
    ("attention_dropout", 0.3, "attention_dropout is 0.3, must be 0"),
    ("attention_dropout", False, "attention_dropout is false, must be 0"),
    ("tie_word_embeddings", True, "tie_word_embeddings is true, must be false"),
    ("hidden_act", "gelu", "hidden_act is 'gelu', must be 'silu'"),
    ("num_experts_per_tok", 9, "num_experts_per_tok is 9, must be at most the number of experts"),
    ("num_key_value_heads", 3, "num_key_value_heads is 3, must be a divisor"),
    ("num_experts", 4, "num_experts is 4, must be num_local_experts (8)"),
    ("layer_types", LAYERS[:3], "layer_types names 3 layers, must name num_hidden_layers (4)"),
    ("layer_types", [*LAYERS[:3], "chunked_attention"], "layer_types[3] is 'chunked_attention'"),
    ("layer_types", [*LAYERS[:3], 7], "layer_types[3] is 7"),
    ("layer_types", "full_attention", "layer_types is 'full_attention', must be a list"),
    ("sliding_window", None, "sliding_window is null, but layer_types has sliding layers"),
    ("sliding_window", 0, "sliding_window is 0, must be"),
    ("pad_token_id", 201_088, "pad_token_id is 201088, must be an id of the vocabulary"),
    ("bos_token_id", -1, "bos_token_id is -1, must be an id"),
    ("eos_token_id", [1, 10**7], "eos_token_id is [1, 10000000], must be an id"),
    ("quantization_config", "mxfp4", "quantization_config is 'mxfp4', must be an object or null"),
    ("quantization_config", {"quant_method": "awq"}, "quantized by awq"),
    ("rope_parameters", {**YARN, "rope_type": "spiral"}, "rope_parameters.rope_type is 'spiral'"),
    ("rope_parameters", {"full_attention": YARN}, "has parameters of its own for full_attention"),
    ("rope_parameters", [YARN], "must be an object or null"),
    ("rope_parameters", {**YARN, "factor": "32"}, "rope_parameters.factor is '32', must be"),
    ("rope_parameters", {**YARN, "truncate": 1}, "rope_parameters.truncate is 1, must be"),
    ("rope_parameters", {**YARN, "beta_fast": 0.5}, "rope_parameters.beta_fast is 0.5, must be"),
    ("rope_parameters", {**YARN, "fator": 3}, "rope_parameters.fator is no key of rope_type yarn"),
    ("rope_parameters", {"rope_type": "linear"}, "rope_parameters.factor is missing"),
    ("rope_scaling", {**YARN, "factor": 4.0}, "factor of RoPE is 32.0 in rope_parameters, 4.0 in"),
    ("rope_theta", 10_000.0, "rope_theta of RoPE is 150000.0 in rope_parameters, 10000.0 in"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, must be 1"),
    ("to_dict", 1, "'to_dict' is no key of a configuration"),
    ("auto_map", {"AutoConfig": "x.Y"}, "auto_map names Python files"),
    ("custom_pipelines", {}, "custom_pipelines names Python files"),
    ("attribute_map", {"hidden_size": "vocab_size"}, "attribute_map gives other keys another"),
    ("fusion_config", {}, "fusion_config replaces parts of the model"),
    ("per_layer_config", {"0": {"head_dim": 64}}, "per_layer_config gives single layers"),
    ("transformers_weights", "../x.safetensors", "transformers_weights names another file"),
    ("attn_implementation", "a/b@main:c", "attn_implementation names code that is to be fetched"),
    ("_attn_implementation_internal", "a/b", "_attn_implementation_internal names code"),
    ("experts_implementation", {"": "a/b"}, "experts_implementation names code"),
    ("architectures", ["LlamaForCausalLM"], "architectures is ['LlamaForCausalLM'], must be"),
]


@pytest.mark.parametrize(("key", "value", "told"), ONE_WRONG, ids=lambda value: str(value)[:40])
def test_wrong_value_is_refused_with_file_key_and_value(
    tmp_path: Path, key: str, value: Any, told: str
) -> None:
    problems = refusal(tmp_path, **{key: value})
    assert len(problems) == 1 and told in problems[0], problems


def test_all_problems_are_in_one_message(tmp_path: Path) -> None:
    changes = {"hidden_size": "32", "dtype": "bf16", "attention_dropout": 0.1}
    assert len(refusal(tmp_path, **changes)) == 3


def nested(levels: int) -> str:
    return levels * '{"hidden_size": ' + "1" + levels * "}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (nested(100_000), "nested deeper than 64 levels"),
        (nested(900), "nested deeper than 64 levels"),
        (
            '{"model_type": "gpt_oss", "hidden_size": ' + 5000 * "9" + "}",
            "a number has 5,000 digits",
        ),
        ("[" + 2**22 * " " + "]", "larger than 4,194,304 bytes"),
        ('{"model_type": "gpt_oss", "x": "\\ud800"}', "half a surrogate pair"),
        ("[]", "must be a JSON object"),
    ],
    ids=["deep", "less deep", "digits", "large", "surrogate", "list"],
)
def test_text_that_is_made_to_hurt_is_refused_at_once(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "config.json").write_text(text)
    started = time.process_time()
    with pytest.raises(ConfigError, match=told) as caught:
        load_config(tmp_path, None)
    assert caught.value.exit_code == 78 and str(tmp_path / "config.json") in str(caught.value)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("place", ["/dev/zero", "pipe"])
def test_devices_and_pipes_are_no_configuration(tmp_path: Path, place: str) -> None:
    if place == "pipe":
        os.mkfifo(tmp_path / "config.json")
    else:
        (tmp_path / "config.json").symlink_to(place)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path, None)


def test_sizes_without_end_in_all_are_refused_before_a_model_is_made(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1024, "hidden_size": 2**17, "intermediate_size": 2**18}
    started = time.process_time()
    (told,) = refusal(tmp_path, **sizes, num_local_experts=4096)
    assert "make 4.3e+17 parameters of experts, must be at most 1e+13" in told
    assert time.process_time() - started < 0.5


def test_what_says_nothing_about_the_model_is_left_aside(tmp_path: Path) -> None:
    """Keys that re-uploads carry, and names of attention code that transformers itself has."""
    plain = load(tmp_path).to_dict()
    aside = {
        "unsloth_fixed": True,
        "unsloth_version": "2026.3.3",
        "_name_or_path": "somebody/model",
        "_attn_implementation_autoset": True,
        "attn_implementation": "eager",
        "transformers_version": "4.55.0",
        "architectures": ["GptOssForCausalLM"],
        "_auto_class": "AutoModel",
        "base_model_tp_plan": {"layers.*": "x"},
        "tokenizer_class": "Evil",
        "name_or_path": "somebody/model",
        "id2label": {"0": "a"},
    }
    config = load(tmp_path, **aside)
    assert config.to_dict() == plain and config._attn_implementation is None


def test_unquantized_weights_may_say_so_with_null(tmp_path: Path) -> None:
    assert load(tmp_path, quantization_config=None).hidden_size == 64


def test_window_may_be_null_if_no_layer_slides(tmp_path: Path) -> None:
    config = load(tmp_path, sliding_window=None, layer_types=["full_attention"] * 4)
    assert config.sliding_window is None


def test_both_forms_of_rope_side_by_side_are_read_as_one(tmp_path: Path) -> None:
    scaling = {key: value for key, value in YARN.items() if key != "rope_theta"}
    both = load(tmp_path, rope_scaling=scaling, rope_theta=150_000.0)
    assert both.to_dict() == load(tmp_path).to_dict()


def test_form_of_transformers_4_is_read_alone(tmp_path: Path) -> None:
    scaling = {key: value for key, value in YARN.items() if key != "rope_theta"}
    old = {**SOUND, "rope_scaling": {**scaling, "factor": 4.0}, "rope_theta": 10_000.0}
    old.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(old))
    found = load_config(tmp_path, None).rope_parameters
    assert (found["rope_theta"], found["factor"]) == (10_000.0, 4.0)


def test_released_configuration_passes(tmp_path: Path) -> None:
    released = {key: value for key, value in PRESETS["gpt-oss-20b"].items() if key[:4] != "rope"}
    released.pop("bos_token_id")
    released |= {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "experts_per_token": 4,
        "hidden_act": "silu",
        "initial_context_length": 4096,
        "swiglu_limit": 7.0,
        "use_cache": True,
        "transformers_version": "4.55.0.dev0",
        "rope_scaling": {key: value for key, value in YARN.items() if key != "rope_theta"},
        "rope_theta": 150_000,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    }
    (tmp_path / "config.json").write_text(json.dumps(released))
    assert load_config(tmp_path, None).rope_parameters == YARN


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_pass_the_check(tmp_path: Path, preset: str) -> None:
    values = {**GptOssConfig(**PRESETS[preset]).to_dict(), "model_type": "gpt_oss"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_config(tmp_path, None).to_dict() == GptOssConfig(**PRESETS[preset]).to_dict()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        *GptOssConfig().to_dict(),
        *("quantization_config", "rope_scaling", "rope_theta", "num_experts", "num_labels"),
        *("torch_dtype", "to_dict", "partial_rotary_factor", "attn_implementation", "per_layer"),
    ]
)
ROPE = st.dictionaries(st.sampled_from([*YARN, "type", "short_factor", "low_freq_factor"]), JSON)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(KEYS | st.text(max_size=10), JSON | ROPE, max_size=4))
def test_any_json_ends_in_a_configuration_or_in_such_a_message(changes: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        told = ""
        try:
            config = load(Path(name), **changes)
        except ConfigError as error:
            told = str(error)
    if told:
        assert name in told
    else:
        assert config.num_hidden_layers <= 1024
        assert config.num_hidden_layers >= 8 or parameter_shapes(config)

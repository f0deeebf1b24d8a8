"""An export says the same in the words of transformers 4 and 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GptOssConfig

from cpt.export.reader_forms import generation_config, with_old_keys
from cpt.export.tokenizer import save_tokenizer
from cpt.model.configuration import PRESETS, load_config
from data_pipeline.text.tokenizer import encoding

YARN = {**PRESETS["tiny"]["rope_parameters"], "rope_theta": 10_000.0, "factor": 4.0}
FORMS = [
    YARN,
    {"rope_type": "default", "rope_theta": 5000.0},
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
]


def exported(**changes: Any) -> dict[str, Any]:
    return with_old_keys(GptOssConfig(**{**PRESETS["tiny"], **changes}).to_dict(), "bfloat16")


def test_old_keys_say_what_the_new_ones_say() -> None:
    config = exported(rope_parameters=YARN)
    assert config["rope_theta"] == 10_000.0 and config["rope_scaling"]["factor"] == 4.0
    assert {**config["rope_scaling"], "rope_theta": 10_000.0} == config["rope_parameters"] == YARN
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_plain_rope_is_no_scaling_for_old_readers() -> None:
    config = exported(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    assert config["rope_scaling"] is None and config["rope_theta"] == 5000.0


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["rope_type"])
def test_both_forms_pass_our_check_and_are_read_as_the_new_one_alone(
    tmp_path: Path, form: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(exported(rope_parameters=form)))
    assert load_config(tmp_path, None).rope_parameters == form


def test_a_configuration_in_old_words_alone_keeps_them() -> None:
    old = {"rope_theta": 10_000.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    assert with_old_keys(old, "float32") == {**old, "dtype": "float32", "torch_dtype": "float32"}


@given(st.floats(1, 1e9), st.floats(1, 1e4), st.booleans())
def test_any_theta_and_factor_are_said_alike(theta: float, factor: float, has_theta: bool) -> None:
    new = {"rope_type": "linear", "factor": factor}
    config: dict[str, Any] = {"rope_parameters": new, "rope_theta": theta}
    if has_theta:
        config = {"rope_parameters": {**new, "rope_theta": theta}}
    found = with_old_keys(config, "bfloat16")
    assert found["rope_theta"] == theta and found["rope_scaling"] == new


@pytest.mark.parametrize("bos", [None, 7])
def test_generation_always_has_ids(bos: int | None) -> None:
    found = generation_config({"bos_token_id": bos, "pad_token_id": None})
    start = encoding()._special_tokens["<|startoftext|>"]
    assert found["bos_token_id"] == (start if bos is None else bos) and found["pad_token_id"]
    assert generation_config({})["bos_token_id"] == start


def test_tokenizer_class_is_one_that_transformers_4_and_5_know(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, 4096)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    text = "\u3053\u3093\u306b\u3061\u306f 1234"
    assert tokenizer(text)["input_ids"] == encoding().encode(text)
    assert tokenizer.eos_token == "<|return|>" and tokenizer.model_max_length == 4096

"""An export says which values of its configuration vLLM would not read."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GptOssConfig

from cpt.export.reader_forms import exported_config
from cpt.export.vllm_constants import vllm_differences
from cpt.model.configuration import PRESETS

FULL = "full_attention"


def differences(**changes: Any) -> list[str]:
    config = GptOssConfig(**{**PRESETS["tiny"], **changes})
    return vllm_differences(exported_config(config, "bfloat16"))


def test_a_model_like_the_released_ones_differs_in_nothing() -> None:
    assert differences() == []
    assert vllm_differences({}) == []


@pytest.mark.parametrize(
    ("changes", "key", "fixed", "value"),
    [
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps", "1e-05", "1e-06"),
        ({"swiglu_limit": 5.0}, "swiglu_limit", "7.0", "5.0"),
        ({"layer_types": [FULL] * 4}, "layer_types[0]", "sliding_attention", FULL),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
            "rope_type",
            "yarn",
            "default",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_each_value_that_vllm_has_in_its_code_is_named(
    changes: dict[str, Any], key: str, fixed: str, value: str
) -> None:
    if "layer_types" in changes:
        changes = {"layer_types": [FULL] * PRESETS["tiny"]["num_hidden_layers"]}
    (sentence,) = differences(**changes)
    assert f"computes with {key} {fixed}," in sentence
    assert f"this model has {value}:" in sentence

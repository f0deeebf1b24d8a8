"""What a manifest says about the model is held against the rules of a config.json."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cpt.checkpoint.manifest import Manifest
from cpt.checkpoint.model_config import model_config_of
from cpt.errors import CheckpointError
from cpt.model.configuration import PRESETS, load_config


def manifest_with(model_config: Any) -> Manifest:
    return Manifest(
        step=7, files=(), tensors={}, layout={}, versions={}, state={"model_config": model_config}
    )


def test_configuration_of_our_own_runs_is_taken_as_it_is() -> None:
    config = load_config(None, "tiny")
    assert model_config_of(manifest_with(config.to_dict())).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map names Python files"),
        ({"attn_implementation": "somebody/kernel"}, "attn_implementation names code"),
        ({"model_type": "evil"}, "model_type is 'evil', must be 'gpt_oss'"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000, must be"),
        ({"num_hidden_layers": 30_000_000}, "num_hidden_layers is 30000000, must be"),
        ({"layer_types": {}}, "layer_types is {}, must be a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_configuration_is_refused_at_once(changes: dict[str, Any], told: str) -> None:
    started = time.process_time()
    with pytest.raises(CheckpointError, match="checkpoint of step 7, state") as caught:
        model_config_of(manifest_with({**PRESETS["tiny"], **changes}))
    assert told in str(caught.value)
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("value", [None, [], "x"])
def test_configuration_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="is no JSON object"):
        model_config_of(manifest_with(value))

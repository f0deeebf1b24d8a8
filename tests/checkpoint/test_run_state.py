"""What a checkpoint keeps besides tensors survives as JSON, and missing parts are named."""

from __future__ import annotations

import json

import pytest

from cpt.checkpoint.manifest import Manifest
from cpt.checkpoint.run_state import RunState, quantized_by
from cpt.errors import CheckpointError

STATE = RunState(
    model_config={"hidden_size": 64},
    identity={"seed": 1},
    progress={"step": 3},
    ledger={"segments": []},
    stability={"losses": [1.5]},
    router_load=[[0.5, 0.5]],
)


def test_state_survives_as_json() -> None:
    plain = json.loads(json.dumps(STATE.to_json()))
    assert RunState.from_json(plain, "step-00000003") == STATE


def test_parts_of_a_later_version_are_ignored_and_missing_ones_are_none() -> None:
    state = RunState.from_json({"model_config": {}, "something": 1}, "step-00000003")
    assert state == RunState(model_config={})


def test_state_without_a_model_is_refused_with_the_name_of_the_checkpoint() -> None:
    with pytest.raises(CheckpointError, match=r"step-00000003: .* no state\.model_config"):
        RunState.from_json({"progress": {"step": 3}}, "step-00000003")


def test_part_that_a_run_needs_is_named_when_it_is_missing() -> None:
    assert STATE.part("progress", "step-00000003") == {"step": 3}
    with pytest.raises(CheckpointError, match=r"step-00000003: .* no state\.guard.*--resume"):
        STATE.part("guard", "step-00000003")


def manifest_with(quantize: object) -> Manifest:
    state = {"model_config": {}, "quantize": quantize}
    return Manifest(step=3, files=(), tensors={}, layout={}, versions={}, state=state)


@pytest.mark.parametrize("rule", [None, "floor", "ceil", "least"])
def test_checkpoint_tells_the_rule_by_which_training_rounded(rule: str | None) -> None:
    state = None if rule is None else {"exponent": rule}
    assert quantized_by(manifest_with(state)) == rule


@pytest.mark.parametrize("stored", [{"exponent": "round"}, {}, "ceil", {"exponent": ["ceil"]}])
def test_rule_that_is_not_known_is_refused_by_name(stored: object) -> None:
    with pytest.raises(CheckpointError, match="checkpoint of step 3: its experts were rounded by"):
        quantized_by(manifest_with(stored))

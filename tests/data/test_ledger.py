"""The ledger only grows, and survives JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.ledger import Ledger, mix_hash
from tests.data.inputs import MakeMix, make_texts


def test_a_run_starts_with_one_segment_at_step_0(make_mix: MakeMix) -> None:
    mix = make_mix({"ja": make_texts(3, "j"), "en": make_texts(3, "e")}, sources={"ja": {"max_epochs": 2.5}})
    (segment,) = Ledger.start(mix).segments
    assert segment.start_step == 0 and segment.weights == {"ja": 0.5, "en": 0.5} and segment.max_epochs == {"ja": 2.5}


def test_json_brings_the_same_ledger_back(make_mix: MakeMix) -> None:
    mix = make_mix({"ja": make_texts(3, "j"), "en": make_texts(3, "e")}, weights={"ja": 0.3, "en": 0.7})
    ledger = Ledger.start(mix).append(mix, 10)
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again == ledger and again.ledger_hash == ledger.ledger_hash


@pytest.mark.parametrize("step", [0, -1, 10, 9])
def test_a_segment_that_does_not_come_later_is_refused(make_mix: MakeMix, step: int) -> None:
    mix = make_mix({"en": make_texts(3, "e")})
    with pytest.raises(ConfigError, match="must increase"):
        Ledger.start(mix).append(mix, 10).append(mix, step)


@pytest.mark.parametrize(
    "change", [{"format_version": 2}, {"segments": []}, {"segments": [{"start_step": 0}]}, {"segments": [3]}]
)
def test_a_damaged_ledger_is_refused(make_mix: MakeMix, change: dict[str, Any]) -> None:
    value = Ledger.start(make_mix({"en": make_texts(3, "e")})).to_json()
    with pytest.raises(ConfigError, match="mix ledger"):
        Ledger.from_json(value | change)


def test_weights_that_are_no_shares_are_refused(make_mix: MakeMix) -> None:
    value = Ledger.start(make_mix({"en": make_texts(3, "e")})).to_json()
    value["segments"][0]["weights"]["en"] = 0.5
    with pytest.raises(ConfigError, match="not shares that sum to 1"):
        Ledger.from_json(value)


def test_mix_hash_sees_every_setting_but_not_where_the_files_are(make_mix: MakeMix) -> None:
    texts = {"ja": make_texts(3, "j"), "en": make_texts(3, "e")}
    base = make_mix(texts)
    assert mix_hash(make_mix(texts, folder="elsewhere")) == mix_hash(base)
    assert mix_hash(make_mix(texts, weights={"ja": 0.4, "en": 0.6})) != mix_hash(base)
    changes: list[dict[str, Any]] = [{"seed": 8}, {"seq_len": 64}, {"max_reject_share": 0.1}]
    for change in changes:
        assert mix_hash(dataclasses.replace(base, **change)) != mix_hash(base)

"""A mix whose sources do not say in one way how often they are read is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.config.mix_file import load_mix
from data_pipeline.errors import ConfigError
from tests.data_pipeline.inputs import MakeMix, make_texts

TEXTS = {"ja": make_texts(3, "j"), "en": make_texts(3, "e"), "held": make_texts(3, "h")}


def problems_of(path: Path, sources: dict[str, dict[str, Any]], **keys: Any) -> str:
    """Return the problems of the mix with other keys in its sources, in one text."""
    content = yaml.safe_load(path.read_text()) | keys
    for source in content["sources"]:
        del source["weight"]
        source |= sources[source["name"]]
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_mix(path)
    return "\n".join(caught.value.problems)


@pytest.fixture
def path(make_mix: MakeMix, tmp_path: Path) -> Path:
    make_mix(TEXTS)
    return tmp_path / "in" / "mix.yaml"


def test_epochs_are_read_beside_a_weight_of_zero(make_mix: MakeMix) -> None:
    sources = {"ja": {"epochs": 1}, "en": {"epochs": 2.5}, "held": {"weight": 0}}
    mix = make_mix(TEXTS, sources=sources)
    assert [source.epochs for source in mix.sources] == [1, 2.5, None]
    assert [source.is_trained for source in mix.sources] == [True, True, False]


def test_epochs_beside_weights_are_refused_with_the_sources_and_the_reason(path: Path) -> None:
    sources = {"ja": {"epochs": 1}, "en": {"weight": 0.5}, "held": {"weight": 0}}
    told = problems_of(path, sources)
    assert "sources have epochs (ja) beside weights (en 0.5)" in told
    assert "would follow from the length of the run" in told
    assert "held" not in told


def test_a_source_with_both_or_with_neither_is_named(path: Path) -> None:
    sources = {"ja": {"epochs": 1, "weight": 0.5}, "en": {"weight": 0.5}, "held": {}}
    told = problems_of(path, sources)
    assert "sources[0].weight and epochs are given" in told
    assert "sources[2].weight is missing. It has no default: add it, or epochs in all" in told


def test_epochs_that_cannot_be_are_refused(path: Path) -> None:
    sources = {
        "ja": {"epochs": 0},
        "en": {"epochs": 3, "max_epochs": 2},
        "held": {"epochs": 1, "held_out_share": 1},
    }
    told = problems_of(path, sources)
    assert "sources[0].epochs is 0, must be above 0 and at most 10,000" in told
    assert "sources[1].epochs is 3, must be below max_epochs 2" in told
    assert "sources[2].held_out_share is 1, which leaves nothing to train on" in told


def test_a_ceiling_at_the_epochs_which_no_run_keeps_is_refused(path: Path) -> None:
    told = problems_of(path, {name: {"epochs": 2, "max_epochs": 2} for name in TEXTS})
    assert "sources[0].epochs is 2, must be below max_epochs 2: a run draws whole batches" in told


def test_epochs_of_null_are_no_epochs(path: Path) -> None:
    told = problems_of(path, {"ja": {"weight": 0.5}, "en": {"epochs": None}, "held": {"weight": 0}})
    assert "sources[1].weight is missing" in told


def test_a_schedule_without_a_phase_for_the_epochs_is_refused(path: Path) -> None:
    every = {"ja": 0.5, "en": 0.5, "held": 0.0}
    schedule = [
        {"name": "main", "share": 0.5, "weights": every},
        {"name": "end", "share": "rest", "to": every},
    ]
    told = problems_of(path, {name: {"epochs": 1} for name in TEXTS}, schedule=schedule)
    assert (
        "schedule has weights in every phase, and epochs hold only where a phase has none" in told
    )


def test_floors_wait_for_the_build_and_unknown_languages_do_not(make_mix: MakeMix) -> None:
    sources = {name: {"epochs": 1} for name in TEXTS}
    floors = {"en": {"min_share": 0.9}}
    assert make_mix(TEXTS, sources=sources, languages=floors).languages["en"].min_share == 0.9
    with pytest.raises(ConfigError, match="is not a known language"):
        make_mix(TEXTS, sources=sources, languages={"en": {}, "english": {}})


def test_sources_of_loss_weight_zero_alone_are_refused_with_epochs_too(make_mix: MakeMix) -> None:
    sources = {name: {"epochs": 1, "loss_weight": 0} for name in TEXTS}
    with pytest.raises(ConfigError, match="nothing would be learned"):
        make_mix(TEXTS, sources=sources)

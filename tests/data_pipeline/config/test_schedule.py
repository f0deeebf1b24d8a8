"""A schedule that no run can follow is refused when the mix is read, with all that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from tests.data_pipeline.inputs import MakeMix, make_texts

TEXTS = {"ja": make_texts(3, "j"), "en": make_texts(3, "e")}
HALVES = {"ja": 0.5, "en": 0.5}
GOOD: list[dict[str, Any]] = [
    {"name": "main", "share": 0.9},
    {"name": "anneal", "share": "rest", "weights": HALVES, "to": {"ja": 0.2, "en": 0.8}},
]


def problems(make_mix: MakeMix, schedule: list[Any], **keys: Any) -> list[str]:
    """Return the problems of a schedule, without the names of files."""
    with pytest.raises(ConfigError) as caught:
        make_mix(TEXTS, schedule=schedule, **keys)
    return [problem.split(": ", 1)[1] for problem in caught.value.problems]


def test_a_schedule_is_read(make_mix: MakeMix) -> None:
    main, anneal = make_mix(TEXTS, schedule=GOOD).schedule
    assert (main.share, anneal.share) == (0.9, "rest")
    assert not main.weights and anneal.to == {"ja": 0.2, "en": 0.8}


def test_everything_wrong_in_a_schedule_is_told_at_once(make_mix: MakeMix) -> None:
    schedule = [
        {"name": "a", "share": 0.3, "until_step": 5, "weights": {"ja": 0.5, "eng": 0.5}},
        {"name": "a", "share": 1.5, "weights": {"ja": 0.5, "en": 0.4}},
        {"name": "c", "until_step": 0, "weights": {"ja": -0.5, "en": 1.5}},
    ]
    found = "\n".join(problems(make_mix, schedule))
    for part in (
        "schedule[0].share and until_step: give exactly one",
        "schedule[0].weights.eng is no source of the mix. Did you mean 'en'",
        "schedule[1].name is 'a', which an earlier phase has",
        "schedule[1].share is 1.5, must be above 0 and at most 1",
        "schedule[1].weights has weights that sum to 0.9, must be 1. Scaled to 1: en 0.444444",
        "schedule[2].until_step is 0, must be 1 or more",
        "schedule[2].weights.ja is -0.5, must be a share from 0 to 1",
    ):
        assert part in found


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([{"share": 0.5}, {"share": 0.4}], "has shares that sum to 0.9, must be 1"),
        ([{"share": 0.5}, {"share": 0.6}], "has shares that sum to 1.1, must be 1"),
        ([{"share": "rest"}, {"share": 0.6}], "is rest, but phases follow"),
        ([{"share": 1.0}, {"share": "rest"}], "leaves nothing for the rest"),
        ([{"until_step": 9}, {"share": 0.5}], "must have share: rest"),
        ([{"until_step": 9}, {"until_step": 8}, {"share": "rest"}], "earlier phase ends at step 9"),
        ([{"share": 0.5}, {}], "share and until_step: give exactly one"),
    ],
)
def test_lengths_that_do_not_cover_the_run_are_refused(
    make_mix: MakeMix, lengths: list[dict[str, Any]], message: str
) -> None:
    schedule = []
    for number, length in enumerate(lengths):
        schedule.append({"name": f"p{number}", **length})
    assert message in "\n".join(problems(make_mix, schedule))


def test_floors_hold_at_both_ends_of_a_change_and_a_phase_may_have_its_own(
    make_mix: MakeMix,
) -> None:
    floor = {"ja": {"min_share": 0.4}}
    (problem,) = problems(make_mix, GOOD, languages=floor)
    assert "schedule[1].to gives ja 0.2, but its min_share is 0.4" in problem
    own = [GOOD[0], {**GOOD[1], "languages": {"ja": {"min_share": 0.2}}}]
    assert make_mix(TEXTS, schedule=own, languages=floor).schedule[1].languages["ja"]
    base = [{**GOOD[0], "languages": {"en": {"min_share": 0.6}}}, GOOD[1]]
    (problem,) = problems(make_mix, base)
    assert "schedule[0].weights gives en 0.5, but its min_share is 0.6" in problem


def test_a_source_that_is_all_held_out_cannot_be_scheduled(make_mix: MakeMix) -> None:
    (problem,) = problems(
        make_mix,
        [GOOD[0], {"name": "anneal", "share": "rest", "weights": HALVES}],
        weights={"ja": 1.0, "en": 0.0},
        held_out_share={"en": 1.0},
    )
    assert "schedule[1].weights.en is 0.5, but all documents of this source are held out" in problem


def test_an_empty_schedule_is_refused(make_mix: MakeMix) -> None:
    (problem,) = problems(make_mix, [])
    assert "schedule is an empty list" in problem


def test_ceilings_and_factors_of_phases_that_cannot_be_are_told_at_once(make_mix: MakeMix) -> None:
    schedule = [
        {"name": "a", "share": 0.3, "max_epochs": {"eng": 2, "ja": 0}},
        {"name": "b", "share": 0.3, "lr_factor": -1},
        {"name": "c", "share": 0.3, "lr_factor": 0},
        {"name": "d", "share": "rest", "to_lr_factor": 101},
    ]
    found = "\n".join(problems(make_mix, schedule))
    for part in (
        "schedule[0].max_epochs.eng is no source of the mix. Did you mean 'en'?",
        "schedule[0].max_epochs.ja is 0, must be above 0",
        "schedule[1].lr_factor is -1, must be from 0 to 100",
        "schedule[2].lr_factor is 0 throughout the phase: nothing would be learned",
        "schedule[3].to_lr_factor is 101, must be from 0 to 100",
    ):
        assert part in found


def test_a_phase_may_end_at_a_rate_of_zero(make_mix: MakeMix) -> None:
    (phase,) = make_mix(TEXTS, schedule=[{"name": "a", "share": 1, "to_lr_factor": 0}]).schedule
    assert (phase.lr_factor, phase.last_lr_factor) == (1, 0)

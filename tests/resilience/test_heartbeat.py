"""Who is named when ranks stand still, and who made the others wait."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from cpt.resilience.heartbeat import Beat, Observer, PhaseTimeouts

TIMEOUTS = PhaseTimeouts(step=10.0, long=100.0)


def beat(count: int, phase: str = "backward", step: int = 12, tick: float = 0.0) -> Beat:
    return Beat(count=count, phase=phase, step=step, tick=tick, pid=1, host="node")


def watch(
    looks: Sequence[Sequence[Beat]], *, ratio: float = 2.0, median: float | None = 1.0
) -> Observer:
    """One look a second."""
    observer = Observer(len(looks[0]), TIMEOUTS, ratio)
    for now, beats in enumerate(looks):
        observer.see(float(now), beats, median)
    return observer


def still(seconds: int, *ranks: tuple[int, str, int, bool]) -> Observer:
    """Ranks (count, phase, step, whether the process runs) that do not move."""
    looks = [
        [beat(count, phase, step, tick=now if runs else 0) for count, phase, step, runs in ranks]
        for now in range(seconds + 1)
    ]
    return watch(looks)


def test_stopped_process_is_named_although_all_stand_still_in_the_same_collective() -> None:
    hung = still(11, (40, "backward", 12, True), (40, "backward", 12, False)).find_hang(11.0)
    assert hung is not None and hung.ranks == [1]
    assert hung.text == (
        "rank 1 last seen in phase=backward step=12, not running for 11 s; "
        "other ranks: 1 in phase=backward step=12"
    )


def test_rank_that_runs_but_is_behind_is_named() -> None:
    hung = still(
        11, (41, "forward", 12, True), (40, "data", 12, True), (41, "forward", 12, True)
    ).find_hang(11.0)
    assert hung is not None and hung.ranks == [1]
    assert "rank 1 last seen in phase=data step=12, not moving" in hung.text
    assert "2 in phase=forward step=12" in hung.text


def test_deadlock_of_all_names_no_rank() -> None:
    hung = still(11, (40, "gradient", 3, True), (40, "gradient", 3, True)).find_hang(11.0)
    assert hung is not None and hung.ranks == []
    assert "no rank is behind: all are in phase=gradient step=3" in hung.text


def test_nobody_hangs_within_the_limit_and_long_phases_have_their_own() -> None:
    assert still(10, (40, "data", 1, True), (41, "forward", 1, True)).find_hang(10.0) is None
    assert still(99, (40, "save", 1, True), (40, "save", 1, True)).find_hang(99.0) is None
    assert still(101, (40, "save", 1, True), (40, "save", 1, True)).find_hang(101.0) is not None


def test_rank_at_the_back_that_moves_clears_those_that_wait_for_it() -> None:
    looks = [[beat(50, tick=now), beat(10 + now // 5, tick=now)] for now in range(40)]
    assert watch(looks).find_hang(39.0) is None


def test_observer_that_was_stopped_itself_accuses_nobody() -> None:
    observer = still(5, (40, "backward", 12, True), (40, "backward", 12, True))
    observer.forget()
    observer.see(500.0, [beat(40), beat(40)], 1.0)
    assert observer.find_hang(501.0) is None


@pytest.mark.parametrize(("seconds", "reported"), [(1, False), (3, True)])
def test_straggler_is_reported_with_rank_and_ratio(seconds: int, reported: bool) -> None:
    waiting = [[beat(41, "forward", 12), beat(40, "data", 12), beat(41, "forward", 12)]] * (
        seconds + 1
    )
    done = [[beat(48, "data", 13)] * 3]
    found = watch([[beat(40, "data", 12)] * 3, *waiting, *done], ratio=3.0).take_stragglers()
    assert [(s.rank, s.step, s.phase, s.ratio) for s in found] == (
        [(1, 12, "data", 4.0)] if reported else []
    )
    if reported:
        assert found[0].describe() == (
            "straggler: rank 1 took 4.0 x the median step in step 12 (3.0 s behind in phase=data)"
        )


def test_straggler_is_named_with_the_phase_that_lost_most_of_the_time() -> None:
    """The last one seen was once named: a rank that slept over its data was told to be slow in
    forward.
    """
    ahead = beat(42, "backward", 12)
    looks = [[ahead, beat(40, "data", 12), ahead]] * 6 + [
        [ahead, beat(41, "forward", 12), ahead]
    ] * 3
    (found,) = watch(
        [[beat(40, "data", 12)] * 3, *looks, [beat(48, "data", 13)] * 3], ratio=3.0
    ).take_stragglers()
    assert (found.phase, found.seconds) == ("data", 7.0)


def test_nobody_is_a_straggler_when_half_the_ranks_lag_or_the_ratio_is_off() -> None:
    looks = [[beat(41, "forward", 12), beat(40, "data", 12)]] * 5 + [[beat(48, "data", 13)] * 2]
    assert len(watch(looks).take_stragglers()) == 1
    assert watch(looks, ratio=0).take_stragglers() == []
    lagging = [[beat(41), beat(40), beat(40)]] * 5 + [[beat(48, step=13)] * 3]
    assert watch(lagging).take_stragglers() == []


def test_beat_goes_through_json() -> None:
    record = json.loads(json.dumps(beat(3, tick=1.5).to_record()))
    assert Beat.from_record(record) == beat(3, tick=1.5)


@pytest.mark.parametrize(
    "change",
    [
        {"pid": 0},
        {"pid": -1},
        {"pid": True},
        {"pid": "1"},
        {"pid": 2**31},
        {"count": 1.5},
        {"tick": float("nan")},
        {"tick": None},
        {"step": -1},
        {"phase": "x" * 1000},
        {"host": ["h"]},
        {"wake": 1},
    ],
    ids=lambda change: "-".join(f"{name} {value!r:.9}" for name, value in change.items()),
)
def test_record_that_no_rank_can_have_written_is_no_beat(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Beat.from_record(beat(3).to_record() | change)


def test_rank_whose_beats_are_held_back_does_not_hang_while_the_others_go_on() -> None:
    """Who can write into the store can repeat the newest beat of a rank."""
    looks = [[beat(40 + 6 * now, step=12 + now, tick=now), beat(40, step=12)] for now in range(20)]
    assert watch(looks).find_hang(19.0) is None
    stopped = [[beat(160, step=32, tick=now), beat(40, step=12)] for now in range(20, 40)]
    found = watch(looks + stopped).find_hang(39.0)
    assert found is not None and found.ranks == [1]

"""Steps and batches after rollbacks: no row is repeated, none is lost but those given up."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cpt.checkpoint.given_up_batches import batch_of_step, merged, read_rollbacks
from cpt.job.progress import Progress, write_rollbacks


def test_without_a_rollback_step_and_batch_are_the_same() -> None:
    assert [batch_of_step(step, ()) for step in range(5)] == [0, 1, 2, 3, 4]


def test_batches_given_up_are_passed_over() -> None:
    assert [batch_of_step(step, ((3, 6), (8, 9))) for step in range(8)] == [
        0,
        1,
        2,
        6,
        7,
        9,
        10,
        11,
    ]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))))
def test_batch_of_step_is_the_step_th_batch_that_is_left(pairs: list[tuple[int, int]]) -> None:
    given_up = {batch for first, last in pairs for batch in range(first, last)}
    left = [batch for batch in range(100) if batch not in given_up]
    ranges = merged(pairs)
    assert [batch_of_step(step, ranges) for step in range(50)] == left[:50]
    assert given_up == {batch for first, last in ranges for batch in range(first, last)}


def test_progress_goes_through_json() -> None:
    progress = Progress(step=9, updates=6, tokens=12, batch_chain="ab", skip_ranges=((3, 6),))
    again = Progress.from_json(json.loads(json.dumps(progress.to_json())))
    assert again == progress and again.next_batch == 12


def test_checkpoint_without_skipped_updates_has_applied_all() -> None:
    assert Progress.from_json({"step": 4, "tokens": 8, "batch_chain": "ab"}).updates == 4


def test_rollbacks_are_read_back(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == []
    record = {"from_step": 6, "to_step": 2, "first_batch": 3, "last_batch": 6}
    write_rollbacks(tmp_path, [record])
    assert read_rollbacks(tmp_path) == [record] and [path.name for path in tmp_path.iterdir()] == [
        "rollbacks.json"
    ]

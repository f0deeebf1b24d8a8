"""Tasks on this machine: results never pile up, errors arrive as they are, workers may be lost."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import pytest

from data_pipeline.engine.local import SUBMITTED_PER_WORKER, LocalExecutor
from data_pipeline.errors import CptError, DataError
from tests.data_pipeline.engine import tasks

RESULT_BYTES = 4 * 2**20


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_item_is_done_once(num_workers: int) -> None:
    with LocalExecutor(num_workers) as executor:
        found = sorted(executor.run(tasks.square, range(20)))
        again = sorted(executor.run(tasks.square, [7, 8]))
    assert found == [(number, number * number) for number in range(20)]
    assert again == [(7, 49), (8, 64)]


def test_results_do_not_pile_up_in_the_parent() -> None:
    """F2: all results were kept until the last, also those that the caller had dropped."""
    num_workers = 2
    with LocalExecutor(num_workers) as executor:
        tracemalloc.start()
        try:
            for number, (_, result) in enumerate(executor.run(bytes, [RESULT_BYTES] * 40)):
                if number == 0:
                    time.sleep(1)  # workers go on as far as they may
                assert len(result) == RESULT_BYTES
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    # results that wait, one that the caller holds, and one that is being received, twice
    assert peak < (num_workers * SUBMITTED_PER_WORKER + 3.5) * RESULT_BYTES


def test_a_caller_that_stops_leaves_no_task_behind(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(50)]
    with LocalExecutor(2) as executor:
        for _ in executor.run(tasks.note_and_wait, paths):
            break
    begun = len(list(tmp_path.iterdir()))
    assert begun <= 8, begun


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_of_a_task_arrives_as_itself(num_workers: int) -> None:
    with (
        LocalExecutor(num_workers) as executor,
        pytest.raises(DataError, match=r"^file-3\.jsonl: cannot be used\.$"),
    ):
        list(executor.run(tasks.refuse_three, range(20)))


def test_a_lost_worker_is_named_and_the_next_run_has_workers_again() -> None:
    with LocalExecutor(2) as executor:
        with pytest.raises(CptError, match=r"A worker process died.*use fewer --workers"):
            list(executor.run(os._exit, [1, 1]))
        assert sorted(executor.run(tasks.square, [2, 3])) == [(2, 4), (3, 9)]

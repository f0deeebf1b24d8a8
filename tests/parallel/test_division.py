"""Work is divided among ranks evenly, and only to ranks that can do it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.parallel.division import divide, divide_among_all


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_all_files_evenly(world_size: int) -> None:
    sizes = {Path(f"{n}.safetensors"): size for n, size in enumerate([90, 10, 40, 40, 30, 5])}
    parts = divide_among_all(sizes, world_size)
    assert len(parts) == world_size
    assert sorted(file for part in parts for file in part) == sorted(sizes)
    loads = [sum(sizes[file] for file in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes.values())


def test_work_goes_to_a_rank_that_can_do_it_and_the_rest_evens_out() -> None:
    sizes = {"own": 50, "a": 10, "b": 10, "c": 30}
    ranks_of = {"own": [1], "a": [0, 1], "b": [0, 1], "c": [0, 1]}
    assert divide(sizes, ranks_of, 2) == [["c", "a", "b"], ["own"]]

"""A rank computes on the device of its place, and takes its share of the node's cores."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from cpt.resilience.devices import this_device
from cpt.resilience.environment import LaunchEnvironment


def place(local_rank: int) -> LaunchEnvironment:
    return LaunchEnvironment(
        rank=local_rank,
        world_size=8,
        local_rank=local_rank,
        local_world_size=8,
        master_port=1,
        restarts=0,
        gpu_ids=None,
    )


@pytest.mark.parametrize("has_gpus", [True, False])
@pytest.mark.parametrize(("threads", "expected"), [(None, 12), (3, 3)])
def test_ranks_share_the_cores_of_the_node_on_gpus_too(
    monkeypatch: pytest.MonkeyPatch, has_gpus: bool, threads: int | None, expected: int
) -> None:
    """Offloaded state is updated by the host: 8 ranks with all cores each would wait for each
    other.
    """
    taken: list[object] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)))
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    device = this_device(place(local_rank=5), threads)
    if has_gpus:
        assert device == torch.device("cuda", 5)
        assert taken == [expected, device]
    else:
        assert device == torch.device("cpu")
        assert taken == [expected]


@pytest.mark.parametrize(
    ("cores", "local_world_size", "expected"),
    [
        (16, 1, 16),  # a job with one GPU and a part of the node
        (64, 4, 16),  # four ranks share the part of their job
        (24, 8, 24),  # each rank is bound to cores of its own
        (192, 8, 24),
        (2, 4, 1),
    ],
)
def test_rank_takes_the_cores_that_its_job_may_use(
    monkeypatch: pytest.MonkeyPatch, cores: int, local_world_size: int, expected: int
) -> None:
    taken: list[object] = []
    monkeypatch.setattr(os, "cpu_count", lambda: max(cores, 192) if cores > 2 else 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    this_device(dataclasses.replace(place(local_rank=0), local_world_size=local_world_size))
    assert taken == [expected]

"""A rank computes on the device of its place, and takes its share of the node's cores."""

from __future__ import annotations

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

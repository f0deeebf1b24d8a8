"""A rank that makes the groups of a run, watches, makes more, and tells how long each waits."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch.distributed import distributed_c10d

from cpt.config import WatchdogSection
from cpt.deepspeed_adapter.experts import expert_group_name
from cpt.deepspeed_adapter.groups import create_topology, init_distributed
from cpt.parallel.group_timeout import limit_of
from cpt.resilience.phase import PhaseClock
from cpt.resilience.watchdog import watching


def limits(ep_size: int, **made_now: dist.ProcessGroup) -> dict[str, float]:
    """Return the limits of the groups of a run in seconds, by what each is for."""
    group = {
        "world": dist.group.WORLD,
        "world of DeepSpeed": groups._clone_world_group(),
        "experts": groups._get_expert_parallel_group(expert_group_name(ep_size)),
        "data of experts": groups._get_expert_data_parallel_group(expert_group_name(ep_size)),
        **made_now,
    }
    found = {name: limit_of(one).total_seconds() for name, one in group.items()}
    found["store"] = distributed_c10d._get_default_store().timeout.total_seconds()
    return found


def main(folder: Path) -> None:
    """Write `limits.json`: without a watchdog, then with one that waits for 3 and for 30 hours."""
    device = torch.device("cpu")
    init_distributed(device)
    topology = create_topology(sp_size=1, ep_size=1, device=device)
    found: list[dict[str, Any]] = []
    for hours, is_on in ((3, False), (3, True), (30, True)):
        settings = WatchdogSection(enabled=is_on, long_timeout_seconds=hours * 3600.0)
        watched = watching(
            folder, topology, settings, PhaseClock(), lambda event: None, secret=None
        )
        with watched:
            found.append(
                limits(
                    1,
                    sequence=topology.sp_group,
                    control=topology.control_group,
                    later=dist.new_group(),
                    short=dist.new_group(timeout=timedelta(minutes=1)),
                )
            )
    (folder / "limits.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)

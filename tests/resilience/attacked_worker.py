"""A rank that takes steps while somebody without the key writes into the store of its watchdog.

    attacked_worker.py FOLDER ENDING PID

Rank 0 plays the attacker as well: he has a connection of his own and knows nothing but the port and
the process PID, which is not one of the run.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from cpt.config import WatchdogSection
from cpt.errors import StorageError
from cpt.resilience.phase import PhaseClock
from cpt.resilience.watchdog import watching

ATTACK_SECONDS = 2.0
SETTINGS = WatchdogSection(timeout_seconds=5, interval_seconds=0.1)


class Attacker:
    """Writes into every key of the store that is not torch's own, as fast as he can."""

    def __init__(self, stopped_pid: int) -> None:
        self._client = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=20),
        )
        self._verdict = json.dumps(
            {
                "kind": "hung",
                "rank": 0,
                "code": 0,
                "text": "\x1b]0;owned\x07all is well",
                "wake": {"7": [socket.gethostname(), stopped_pid]},
            }
        )
        self._old: dict[str, bytes] = {}
        self.is_over = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop writing."""
        self.is_over.set()
        self._thread.join()

    def _write(self) -> None:
        number = 0
        while not self.is_over.is_set():
            self._client.set("cpt/watchdog/verdict", self._verdict)
            for key in self._client.list_keys():
                if "cpt/watchdog/" not in key:
                    continue
                place = key.rpartition("/")[0].rpartition("beat")[0].rstrip("/")
                self._client.set(f"{place}/verdict", self._verdict)
                if "/beat/" in key:
                    self._disturb(key, number)
            number += 1
            time.sleep(0.01)

    def _disturb(self, key: str, number: int) -> None:
        """Replace a beat by rubbish, by its oldest one, or remove it."""
        kind = number % 40
        if kind == 0:
            self._old.setdefault(key, self._client.get(key))
        elif kind == 10 and key in self._old:
            self._client.set(key, self._old[key])
        elif kind == 20:
            self._client.delete_key(key)
        elif kind == 30:
            for _ in range(3):
                self._client.append(key, "x" * (4 << 20))
        elif kind == 35:
            self._client.set(key, self._verdict)


def take_steps(clock: PhaseClock, ending: str) -> None:
    """Take steps for the time of the attack, then end in one of three ways."""
    deadline = time.monotonic() + ATTACK_SECONDS
    step = 0
    is_over = torch.zeros(1)
    while not is_over.item():
        step += 1
        clock.enter("data", step)
        clock.enter("backward", step)
        is_over = torch.tensor([float(time.monotonic() > deadline)])
        dist.all_reduce(is_over)
        time.sleep(0.02)
    if dist.get_rank() == 1 and ending == "fails":
        raise StorageError("the disk is full")
    if dist.get_rank() == 1 and ending == "hangs":
        time.sleep(600)
    dist.barrier()


def main(folder: Path, ending: str, stopped_pid: int) -> int:
    """Run this rank and return its exit code."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    topology: Any = SimpleNamespace(
        rank=rank, world_size=dist.get_world_size(), control_group=dist.group.WORLD
    )
    clock = PhaseClock()
    events = folder / f"events-{rank}.jsonl"

    def report(event: dict[str, Any]) -> None:
        with open(events, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    attacker = Attacker(stopped_pid) if rank == 0 else None
    try:
        with watching(folder, topology, SETTINGS, clock, report, secret=None):
            take_steps(clock, ending)
            if attacker is not None:
                attacker.end()
    except StorageError as error:
        return error.exit_code
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    os._exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))

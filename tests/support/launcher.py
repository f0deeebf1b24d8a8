"""Start N processes of a Python file as the launcher would: gloo, one thread each, a free port.

The processes are forked from one that has imported the libraries (see zygote.py).
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment of one rank."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
    }


class _Zygote:
    """The forking process of this test session; started at the first launch."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        atexit.register(self._process.kill)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        assert reply, (
            "the forking process of the tests has died; "
            "run tests/support/zygote.py by hand to see why"
        )
        answer: dict[str, Any] = json.loads(reply)
        return answer


@functools.cache
def _zygote() -> _Zygote:
    return _Zygote()


@dataclass(kw_only=True)
class Launch:
    """The ranks of one launch, which run."""

    pids: list[int]
    """By rank."""
    logs: list[Path]
    """What each rank prints."""

    def wait(self, timeout_seconds: float = 300) -> tuple[list[int], list[str]]:
        """Wait for all ranks.

        Returns:
            Exit codes and outputs by rank.

        Raises:
            AssertionError: the time is up; all ranks are killed and their output is shown.
        """
        answer = _zygote().ask({"pids": self.pids, "timeout_seconds": timeout_seconds})
        codes = [int(code) for code in answer["codes"]]
        outputs = []
        for log in self.logs:
            outputs.append(log.read_text(errors="replace"))
            log.unlink()
        told = ""
        for rank, output in enumerate(outputs):
            told += f"--- rank {rank}\n{output[-4000:]}\n"
        assert not answer["timed_out"] or any(code > 0 for code in codes), f"ranks hung:\n{told}"
        if any(codes):
            print(told)
        return codes, outputs


def start(
    script: Path,
    arguments: list[str],
    environments: list[dict[str, str]],
    folder: Path = ROOT,
) -> Launch:
    """Start a script in a folder, once for each of the environments."""
    logs = []
    for rank in range(len(environments)):
        handle, name = tempfile.mkstemp(prefix=f"cpt-test-rank{rank}-", suffix=".log")
        os.close(handle)
        logs.append(Path(name))
    request = {
        "script": str(script),
        "arguments": arguments,
        "environments": environments,
        "folder": str(folder),
        "logs": [str(log) for log in logs],
    }
    return Launch(pids=_zygote().ask(request)["pids"], logs=logs)


def launch(
    script: Path, world_size: int, arguments: list[str], timeout_seconds: float = 300
) -> list[int]:
    """Run a script on `world_size` ranks and wait.

    Returns:
        Exit codes by rank.

    Raises:
        AssertionError: the time is up; all ranks are killed and their output is shown.
    """
    port = free_port()
    environments = [rank_environment(rank, world_size, port) for rank in range(world_size)]
    codes, _ = start(script, arguments, environments).wait(timeout_seconds)
    return codes

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
    logs: list[Path] = []
    environments = []
    for rank in range(world_size):
        logs.append(Path(tempfile.gettempdir()) / f"cpt-test-{port}-rank{rank}.log")
        environments.append(rank_environment(rank, world_size, port))
    request = {
        "script": str(script),
        "arguments": arguments,
        "environments": environments,
        "logs": [str(log) for log in logs],
        "timeout_seconds": timeout_seconds,
    }
    answer = _zygote().ask(request)
    codes = [int(code) for code in answer["codes"]]
    output = ""
    for rank, log in enumerate(logs):
        output += f"--- rank {rank}\n{log.read_text(errors='replace')[-4000:]}\n"
        log.unlink()
    assert not answer["timed_out"] or any(code > 0 for code in codes), f"ranks hung:\n{output}"
    if any(codes):
        print(output)
    return codes

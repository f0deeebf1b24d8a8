"""Start N processes of a Python file as the launcher would: gloo, one thread each, a free port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Environment of one rank."""
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


def launch(script: Path, world_size: int, arguments: list[str], timeout_seconds: float = 300) -> list[int]:
    """Run a script on `world_size` ranks and wait.

    Returns:
        Exit codes by rank.

    Raises:
        AssertionError: the time is up; all ranks are killed and their output is shown.
    """
    port, processes, logs = free_port(), [], []
    for rank in range(world_size):
        command = [sys.executable, str(script), *arguments]
        log = Path(os.environ.get("PYTEST_LOG_DIR", "/tmp")) / f"cpt-test-{port}-rank{rank}.log"
        logs.append(log)
        with open(log, "wb") as out:
            environment = rank_environment(rank, world_size, port)
            processes.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=ROOT))
    deadline = time.monotonic() + timeout_seconds
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if any(p.poll() not in (None, 0) for p in processes):
                deadline = min(deadline, time.monotonic() + 20)  # the others will not finish; give them time to say so
            time.sleep(0.1)
        timed_out = any(p.poll() is None for p in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [int(p.returncode) for p in processes]
    output = "\n".join(f"--- rank {i}\n{log.read_text(errors='replace')[-4000:]}" for i, log in enumerate(logs))
    for log in logs:
        log.unlink()
    assert not timed_out or any(code > 0 for code in codes), f"ranks hung:\n{output}"
    if any(codes):
        print(output)
    return codes

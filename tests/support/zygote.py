"""A process that has imported the heavy libraries once and forks the ranks of each launch.

Importing torch, transformers and DeepSpeed takes several seconds per process, most of the time of a
small multi-process test. This process imports them, starts no thread and no collective, and forks,
so that a rank begins where its imports would have ended. Requests and replies are JSON lines;
`tests.support.launcher.launch` is the only client.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

GRACE_SECONDS = 20
"""Time that the other ranks get to report after one rank has failed; they will not finish."""


def become_rank(request: dict[str, Any], rank: int) -> NoReturn:
    """Run the script as one rank, in the forked child."""
    code = 1
    try:
        log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(request["environments"][rank])
        sys.argv = [request["script"], *request["arguments"]]
        runpy.run_path(request["script"], run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks, wait for them, and kill those that are left at the deadline."""
    running: dict[int, int] = {}
    codes: list[int | None] = [None] * len(request["environments"])
    for rank in range(len(codes)):
        pid = os.fork()
        if pid == 0:
            become_rank(request, rank)
        running[pid] = rank
    deadline = time.monotonic() + request["timeout_seconds"]
    timed_out = False
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            rank = running.pop(pid)
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank] != 0:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        elif time.monotonic() > deadline:
            timed_out = True
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.02)
    return {"codes": codes, "timed_out": timed_out}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not a reply
    import deepspeed  # noqa: F401
    import torch
    import torch.distributed.checkpoint
    from transformers.models.gpt_oss import modeling_gpt_oss  # noqa: F401

    import cpt.job.job  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for line in sys.stdin:
        replies.write(json.dumps(run(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()

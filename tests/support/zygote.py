"""A process that has imported the heavy libraries once and forks the ranks of each launch.

Importing torch, transformers and DeepSpeed takes several seconds per process, most of the time of a
small multi-process test. This process imports them, starts no thread and no collective, and forks,
so that a rank begins where its imports would have ended.  Requests and replies are JSON lines, one
to start the ranks of a launch and one to wait for them; tests/support/launcher.py is the only
client.
"""

from __future__ import annotations

import contextlib
import gc
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
        os.chdir(request["folder"])
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


def start(request: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks of a launch and return their pids."""
    pids = []
    for rank in range(len(request["environments"])):
        pid = os.fork()
        if pid == 0:
            become_rank(request, rank)
        pids.append(pid)
    return {"pids": pids}


def wait(request: dict[str, Any]) -> dict[str, Any]:
    """Wait for the ranks of a launch, and kill those that are left at the deadline."""
    pids = request["pids"]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + request["timeout_seconds"]
    timed_out = False
    while len(codes) < len(pids):
        for pid in pids:
            if pid in codes:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended == pid:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] != 0:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            elif time.monotonic() > deadline:
                timed_out = True
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return {"codes": [codes[pid] for pid in pids], "timed_out": timed_out}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not a reply
    # the page that a run leaves, with pandas, and what DeepSpeed imports with the first engine:
    # several seconds of each rank
    import bokeh.embed
    import bokeh.plotting  # noqa: F401
    import deepspeed.runtime.superoffload.superoffload_stage3
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import torch
    import torch.distributed.checkpoint
    from transformers.models.gpt_oss import modeling_gpt_oss  # noqa: F401

    import cpt.job.launch  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    # Every engine collects garbage several times, which walks half a million objects of the
    # libraries and so copies their pages into each rank: nobody looks at frozen ones.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        reply = wait(request) if "pids" in request else start(request)
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()

"""The cost of both settings of `model.expert_recompute` under expert parallelism.

The parent starts one process per rank of an expert-parallel group over gloo.  Each holds its
experts of a stack of layers and sends its share of the tokens through it: x = x + mlp(x), every
layer checkpointed as the engine does it.  The ways take turns in the same processes.

Peak memory is that of a pass whose shapes have been seen before.  A parameter's gradient is dropped
when it is complete, because ZeRO-3 keeps only a share of it.  What one rank sends is counted by the
same counters as in training.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

if __name__ == "__main__":
    ROOT = Path(__file__).resolve().parent.parent.parent
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import measuring

from cpt.model.recomputation import context_fn
from cpt.parallel.traffic import Traffic
from experts_parts.contenders import OURS, Layer, build

RANKS = 2
LAYERS = 4
WAYS = ("no checkpointing", "recompute", "keep")


def compare(layer: Layer, *, rounds: int, threads: int, clock: str) -> dict[str, Any]:
    """Return the first rank's median seconds, peak bytes and sent bytes for each way.

    Peaks come from processes of their own, because the allocator settings that they need would cost
    the others time.
    """
    given = {**asdict(layer), "device": "cpu", "threads": threads, "clock": clock}
    memory = _ranks({**given, "rounds": 0}, measuring.RETURN_MEMORY)
    times = _ranks({**given, "rounds": rounds}, {})
    return {way: {**memory[way], **times[way]} for way in WAYS}


def _ranks(given: dict[str, Any], extra_environment: dict[str, str]) -> dict[str, Any]:
    """Run all ranks, and return what the first of them printed.

    Raises:
        RuntimeError: a rank failed.
    """
    command = [sys.executable, __file__, json.dumps(given)]
    shared = {
        **os.environ,
        **extra_environment,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": measuring.free_port(),
        "WORLD_SIZE": str(RANKS),
    }
    processes = []
    for rank in range(RANKS):
        environment = {**shared, "RANK": str(rank)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        processes.append(process)
    outputs = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    if any(codes):
        raise RuntimeError(f"the ranks ended with the exit codes {codes}")
    return json.loads(outputs[0].splitlines()[-1])


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class Stack:
    """The layers of one rank."""

    def __init__(self, layer: Layer, rank: int) -> None:
        self.traffic = Traffic()
        topology: Any = SimpleNamespace(
            ep_size=RANKS, ep_rank=rank, ep_group=dist.group.WORLD, traffic=self.traffic
        )
        self._layers = nn.ModuleList(build(OURS, layer, topology) for _ in range(LAYERS))
        for parameter in self._layers.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        generator = torch.Generator().manual_seed(1 + rank)
        shape = (2, 1, layer.tokens // RANKS, layer.hidden)
        self._hidden, self._d_out = torch.randn(shape, generator=generator).bfloat16()

    def run(self, way: str) -> None:
        """Do one forward and backward pass."""
        x = self._hidden.detach().requires_grad_()
        out = x
        for mlp in self._layers:
            if way == "no checkpointing":
                out = out + mlp(out)[0]
            else:
                contexts = context_fn(keep=way == "keep")
                out = out + checkpoint(mlp, out, use_reentrant=False, context_fn=contexts)[0]
        out.backward(self._d_out)


def _memory(stack: Stack, layer: Layer) -> dict[str, Any]:
    """Return peak and sent bytes for each way."""
    found = {}
    for way in WAYS:
        stack.run(way)
        stack.traffic.take()
        peak, _ = measuring.peak_bytes(partial(stack.run, way), layer.device)
        found[way] = {"peak_bytes": peak, "sent_bytes": stack.traffic.take()["experts"]}
    return found


def _times(stack: Stack, layer: Layer, rounds: int, clock: str) -> dict[str, Any]:
    """Return median seconds and the median ratio to `recompute` for each way."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way in WAYS:
            dist.barrier()
            seconds = measuring.seconds(partial(stack.run, way), layer.device, clock)
            if number > 0:  # the first pass of each way sees its shapes for the first time
                times[way].append(seconds)
    ratios = measuring.median_ratios(times, "recompute")
    found = {}
    for way in WAYS:
        found[way] = {"ratio": ratios[way], "seconds": statistics.median(times[way])}
    return found


def main() -> None:
    """Measure as one rank, and print one line of JSON."""
    given = json.loads(sys.argv[1])
    rounds = given.pop("rounds")
    threads = given.pop("threads")
    clock = given.pop("clock")
    layer = Layer(**{**given, "device": torch.device("cpu")})
    torch.set_num_threads(threads)
    dist.init_process_group("gloo")
    stack = Stack(layer, dist.get_rank())
    found = _times(stack, layer, rounds, clock) if rounds else _memory(stack, layer)
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

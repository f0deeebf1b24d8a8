"""Compare a training step of this project with the Hugging Face Trainer under DeepSpeed ZeRO-3.

    python bench/step.py [--lengths 1024 4096 8192] [--ranks 1 2] [--rounds 5] [--lora]
        [--json FILE] [--svg FILE]

A step is forward, backward and AdamW of a small gpt-oss in bf16 with fp32 master weights under
ZeRO-3, with one packed row per process and the same rows for all.  The contenders are this project,
the Trainer with eager attention and eager experts, and the Trainer with transformers' grouped_mm
experts.  The Trainer lets packed documents see each other.

All contenders are alive at once and take turns, one step each per round, so that a noisy machine
disturbs all alike.  Figures are medians, and ratios are medians of the rounds' ratios.

Peak memory is the first rank's largest resident size during a step, weights and optimizer state
included.  It is measured in other processes, one contender after another, because glibc must hand
freed memory back at once there, which costs time.

With several processes, a contender is left out and named if the machine has too little memory for
its processes, going by the peaks of one process.  `--only` chooses the contenders.

With `--lora` all train adapters on attention and on every expert, the Trainer those of PEFT
(bench/adapters.py).

On a machine that others use at the same time, `--clock cpu --threads 1` counts the CPU seconds of
the first rank.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import measuring  # noqa: E402
from step_parts import drawing  # noqa: E402
from step_parts.cases import EXPERT_RANK, NAMES, OURS, RANK, WARM_UP_STEPS, Case  # noqa: E402

WORKER = ROOT / "bench" / "step_parts" / "worker.py"
STEP_LIMIT_SECONDS = 1200
MEMORY_SHARE = 0.8
"""Share of the free memory that all contenders together may take."""


class Contender:
    """The processes of one contender."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self._folder = folder
        folder.mkdir()
        shared = {
            **os.environ,
            "WORLD_SIZE": str(case.ranks),
            "LOCAL_WORLD_SIZE": str(case.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": measuring.free_port(),
            "OMP_NUM_THREADS": str(case.threads),
        }
        if case.measures_memory:
            shared |= measuring.RETURN_MEMORY
        command = [sys.executable, str(WORKER), case.dump(), str(folder)]
        self._processes = []
        with open(folder / "log.txt", "w", encoding="utf-8") as log:
            for rank in range(case.ranks):
                environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
                self._processes.append(process)

    def step(self, number: int) -> dict[str, Any]:
        """Let the processes do one step, and return what the first of them measured.

        Raises:
            RuntimeError: a process ended, or the step took longer than STEP_LIMIT_SECONDS.
        """
        (self._folder / f"go-{number}").touch()
        done = self._folder / f"done-{number}"
        deadline = time.monotonic() + STEP_LIMIT_SECONDS
        while not done.exists():
            ended = any(process.poll() is not None for process in self._processes)
            if (ended or time.monotonic() > deadline) and not done.exists():
                tail = (self._folder / "log.txt").read_text(encoding="utf-8")[-2000:]
                raise RuntimeError(f"{self.case.contender} gave no step {number}:\n{tail}")
            time.sleep(0.02)
        return json.loads(done.read_text())

    def end(self) -> None:
        """Stop the processes."""
        for process in self._processes:
            process.kill()
            process.wait()


def main(arguments: list[str] | None = None) -> None:
    """Print a table, and write the figures and the plot if asked."""
    options = parse(arguments)
    results = []
    for ranks in options.ranks:
        for tokens in options.lengths:
            names = those_that_fit(options, ranks, tokens, results)
            results.append(measure(options, ranks, tokens, names))
            print(line_of(results[-1]), flush=True)
    growth = growth_per_doubling(results)
    for key, text in growth.items():
        print(f"{key}: {text}")
    report = {
        "machine": machine(options),
        "results": results,
        "growth per doubling of the row": growth,
    }
    measuring.publish(report, options, drawing.draw)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 4096, 8192], help="tokens of a row"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--only", nargs="*", choices=NAMES, default=NAMES, help="contenders besides this project"
    )
    parser.add_argument("--lora", action="store_true", help="train adapters in place of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of each process; default: cores / processes")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: CPU seconds of the first rank",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    return parser.parse_args(arguments)


def those_that_fit(
    options: argparse.Namespace, ranks: int, tokens: int, results: list[dict[str, Any]]
) -> list[str]:
    """Return the contenders whose processes fit beside each other.

    Each process is taken to need what it needed alone.  What contenders free between their steps
    stays with the allocators of their processes.
    """
    room = MEMORY_SHARE * measuring.free_bytes(torch.device("cpu"))
    peaks: dict[str, float] = {}
    for result in results:
        if (result["ranks"], result["tokens"]) == (1, tokens):
            peaks = result["peak MiB"]
    fitting = []
    used = 0.0
    for name in NAMES:
        if name != OURS and name not in options.only:
            continue
        needed = ranks * peaks.get(name, 0) * 2**20
        if name == OURS or used + needed <= room:
            fitting.append(name)
            used += needed
        else:
            left_out = f"{name} left out, it needs {needed / 2**30:.0f} GiB"
            print(f"{ranks} ranks, {tokens} tokens: {left_out}", flush=True)
    return fitting


def measure(
    options: argparse.Namespace, ranks: int, tokens: int, names: list[str]
) -> dict[str, Any]:
    """Return medians and ratios of all contenders in one setting."""
    shared = {
        "tokens": tokens,
        "ranks": ranks,
        "steps": options.rounds,
        "experts": options.experts,
        "layers": options.layers,
        "clock": options.clock,
        "lora": options.lora,
        "threads": options.threads or max(1, (os.cpu_count() or 1) // ranks),
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        contenders = {}
        for index, name in enumerate(names):
            contenders[name] = Contender(Case(contender=name, **shared), Path(folder) / str(index))
            running.callback(contenders[name].end)
        for number in range(WARM_UP_STEPS + options.rounds):
            for name, contender in contenders.items():
                result = contender.step(number)
                if number >= WARM_UP_STEPS:
                    times[name].append(result["seconds"])
    peaks = {}
    for name in names:
        case = Case(contender=name, measures_memory=True, **{**shared, "steps": 1})
        peaks[name] = peak_bytes(case)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "ranks": ranks,
        "tokens": tokens,
        "seconds": median,
        "tokens/s": {name: ranks * tokens / value for name, value in median.items()},
        "ratio to ours": measuring.median_ratios(times, OURS),
        "peak MiB": measuring.in_mib(peaks),
    }


def peak_bytes(case: Case) -> int:
    """Return the first rank's largest resident size during one step."""
    with tempfile.TemporaryDirectory() as folder:
        contender = Contender(case, Path(folder) / "0")
        try:
            for number in range(WARM_UP_STEPS):
                contender.step(number)
            return contender.step(WARM_UP_STEPS)["peak_bytes"]
        finally:
            contender.end()


def growth_per_doubling(results: list[dict[str, Any]]) -> dict[str, str]:
    """Say by which factors time and peak memory grow when the row doubles.

    The factors are means from the shortest row to the longest.
    """
    growth = {}
    for ranks in dict.fromkeys(result["ranks"] for result in results):
        own = sorted((r for r in results if r["ranks"] == ranks), key=lambda r: r["tokens"])
        if len(own) < 2:
            continue
        shortest = own[0]
        longest = own[-1]
        doublings = math.log2(longest["tokens"] / shortest["tokens"])
        processes = "1 rank" if ranks == 1 else f"{ranks} ranks"
        for name, seconds in shortest["seconds"].items():
            if name not in longest["seconds"]:
                continue
            time_ratio = longest["seconds"][name] / seconds
            memory_ratio = longest["peak MiB"][name] / shortest["peak MiB"][name]
            time_factor = time_ratio ** (1 / doublings)
            memory_factor = memory_ratio ** (1 / doublings)
            text = f"time {time_factor:.2f}, peak memory {memory_factor:.2f}"
            growth[f"{name}, {processes}"] = text
    return growth


def line_of(result: dict[str, Any]) -> str:
    """Return a row of the table."""
    parts = []
    for name, rate in result["tokens/s"].items():
        ratio = "" if name == OURS else f" ({result['ratio to ours'][name]:.2f}x the time)"
        parts.append(f"{name} {rate:.0f} tokens/s{ratio} {result['peak MiB'][name]:.0f} MiB")
    return f"{result['ranks']} ranks, {result['tokens']:>6} tokens: " + ", ".join(parts)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Return where the figures come from."""
    import deepspeed
    import transformers

    shape = f"{options.layers} layers, hidden 512, {options.experts} experts of 384, top 4"
    if options.lora:
        shape += f", LoRA of rank {RANK} on attention and {EXPERT_RANK} on every expert"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": measuring.device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepspeed": deepspeed.__version__,
        "rounds": options.rounds,
        "clock": options.clock,
        "threads": options.threads or "cores / processes",
        "model": f"{shape}, vocabulary 8192",
    }


if __name__ == "__main__":
    main()

"""One full training step of a small gpt-oss: this project against the Hugging Face Trainer with
DeepSpeed ZeRO-3.

    python bench/step.py [--lengths 1024 4096 8192] [--ranks 1 2] [--rounds 5] [--json FILE] [--svg
    FILE]

Forward, backward and AdamW in bf16 with fp32 master weights, ZeRO-3, one packed row per process,
the same rows for all: this project; the Trainer with eager attention and eager experts; the Trainer
with transformers' grouped_mm experts. All contenders are alive at once and take turns, one step
each per round, so that a noisy machine disturbs all alike; figures are medians, ratios are medians
of the rounds' ratios.  The Trainer lets packed documents see each other. Peak memory is the first
rank's largest resident size during a step, weights and optimizer state included, in other
processes, one contender after another: there glibc hands freed memory back at once, which costs
time. With several processes, a contender for whose processes the machine has too little memory,
going by the peaks of one process, is left out and named; `--only` chooses those to be measured.

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
from step_parts.cases import NAMES, OURS, WARM_UP_STEPS, Case  # noqa: E402

WORKER = ROOT / "bench" / "step_parts" / "worker.py"
STEP_LIMIT_SECONDS = 1200
MEMORY_SHARE = 0.8
"""Of what is free."""


class Contender:
    """The processes of one contender."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self._folder = case, folder
        folder.mkdir()
        port = measuring.free_port()
        shared = {"WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"LOCAL_WORLD_SIZE": str(case.ranks), "OMP_NUM_THREADS": str(case.threads)}
        self._log = open(folder / "log.txt", "w", encoding="utf-8")
        self._processes = []
        for rank in range(case.ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, str(WORKER), case.dump(), str(folder)]
            environment = {
                **os.environ,
                **(measuring.RETURN_MEMORY if case.measures_memory else {}),
                **shared,
                **own,
            }
            process = subprocess.Popen(
                command, env=environment, stdout=self._log, stderr=subprocess.STDOUT
            )
            self._processes.append(process)

    def step(self, number: int) -> dict[str, Any]:
        """Have one step done.

        Raises:
            RuntimeError: a process ended, or the step took longer than STEP_LIMIT_SECONDS.
        """
        (self._folder / f"go-{number}").touch()
        done, deadline = self._folder / f"done-{number}", time.monotonic() + STEP_LIMIT_SECONDS
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
        self._log.close()


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
    """The contenders for whose processes there is room beside each other, if each needs what one
    process alone did.

    What they free between their steps stays with the allocators of their processes.
    """
    room = MEMORY_SHARE * measuring.free_bytes(torch.device("cpu"))
    alone = [
        result["peak MiB"]
        for result in results
        if (result["ranks"], result["tokens"]) == (1, tokens)
    ]
    fitting, used = [], 0.0
    for name in (name for name in NAMES if name == OURS or name in options.only):
        needed = ranks * max((peaks.get(name, 0) for peaks in alone), default=0) * 2**20
        if name == OURS or used + needed <= room:
            fitting.append(name)
            used += needed
        else:
            print(
                f"{ranks} ranks, {tokens} tokens: {name} left out, it needs {needed / 2**30:.0f} GiB",
                flush=True,
            )
    return fitting


def measure(
    options: argparse.Namespace, ranks: int, tokens: int, names: list[str]
) -> dict[str, Any]:
    """Medians and ratios of all contenders in one setting."""
    shared = {"tokens": tokens, "ranks": ranks, "steps": options.rounds, "experts": options.experts}
    shared |= {"layers": options.layers, "clock": options.clock}
    shared["threads"] = options.threads or max(1, (os.cpu_count() or 1) // ranks)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        contenders = {}
        for index, name in enumerate(names):
            contenders[name] = Contender(Case(contender=name, **shared), Path(folder) / str(index))
            running.callback(contenders[name].end)
        for number in range(WARM_UP_STEPS + options.rounds):
            for name, contender in contenders.items():
                result = contender.step(number)
                found[name] += [result] if number >= WARM_UP_STEPS else []
    peaks = {
        name: peak_bytes(Case(contender=name, measures_memory=True, **{**shared, "steps": 1}))
        for name in names
    }
    times = {name: [result["seconds"] for result in results] for name, results in found.items()}
    return {
        "ranks": ranks,
        "tokens": tokens,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "tokens/s": {
            name: ranks * tokens / statistics.median(values) for name, values in times.items()
        },
        "ratio to ours": {
            name: statistics.median(
                other / mine for other, mine in zip(values, times[OURS], strict=True)
            )
            for name, values in times.items()
        },
        "peak MiB": {name: peak / 2**20 for name, peak in peaks.items()},
    }


def peak_bytes(case: Case) -> int:
    """The first rank's largest resident size during one step."""
    with tempfile.TemporaryDirectory() as folder:
        contender = Contender(case, Path(folder) / "0")
        try:
            return [contender.step(number) for number in range(WARM_UP_STEPS + 1)][-1]["peak_bytes"]
        finally:
            contender.end()


def growth_per_doubling(results: list[dict[str, Any]]) -> dict[str, str]:
    """How often time and peak memory multiply when the row doubles, from the shortest to the
    longest.
    """
    growth = {}
    for ranks in dict.fromkeys(result["ranks"] for result in results):
        own = sorted((r for r in results if r["ranks"] == ranks), key=lambda r: r["tokens"])
        if len(own) < 2:
            continue
        doublings = math.log2(own[-1]["tokens"] / own[0]["tokens"])
        for name in (name for name in own[0]["seconds"] if name in own[-1]["seconds"]):
            time_ratio, memory_ratio = (
                own[-1][key][name] / own[0][key][name] for key in ("seconds", "peak MiB")
            )
            text = f"time {time_ratio ** (1 / doublings):.2f}, peak memory {memory_ratio ** (1 / doublings):.2f}"
            growth[f"{name}, {ranks} rank{'s' * (ranks > 1)}"] = text
    return growth


def line_of(result: dict[str, Any]) -> str:
    """A row of the table."""
    parts = []
    for name, rate in result["tokens/s"].items():
        ratio = "" if name == OURS else f" ({result['ratio to ours'][name]:.2f}x the time)"
        parts.append(f"{name} {rate:.0f} tokens/s{ratio} {result['peak MiB'][name]:.0f} MiB")
    return f"{result['ranks']} ranks, {result['tokens']:>6} tokens: " + ", ".join(parts)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Where the figures come from."""
    import deepspeed
    import transformers

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
        "model": f"{options.layers} layers, hidden 512, {options.experts} experts of 384, top 4, vocabulary 8192",
    }


if __name__ == "__main__":
    main()

"""Stages that start what a user starts: the front door, benchmarks, tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from typing import Any

from gpu.stages import Options, Planned, run_within

TAIL = 3000
"""Characters of a program's output that go to the results."""


def front_door(options: Options) -> dict[str, Any]:
    """Train the small model with the default command, then continue the run to its end."""
    run_dir = options.out / "front_door"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1"]
    if options.tiny:
        command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    command += ["cpt/run.py", "--ds_config", "ds_configs/z3_ulysses.json"]
    command += ["--run_dir", str(run_dir), "--set", "checkpoint.interval_steps=10"]
    found = _run(options, "front_door", command, seconds=120)
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines()
        found["metrics"] = [line[:400] for line in (lines[:2] + lines[-3:])]
    shutil.rmtree(run_dir, ignore_errors=True)
    return found


def gpu_tests(options: Options) -> dict[str, Any]:
    """Run the tests that reach a GPU where there is one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail", "12"]
    command += ["tests/model/kernels", "tests/model/attention/test_gpu_backends.py"]
    return _run(options, "gpu_tests", command, seconds=150)


def attention_bench(options: Options) -> dict[str, Any]:
    """Compare attention with what a user would pick instead."""
    command = [sys.executable, "bench/attention.py", "--rounds", "3"]
    command += ["--json", str(options.out / "attention.json")]
    command += ["--lengths", *(("128",) if options.tiny else ("4096", "32768"))]
    return _run(options, "attention_bench", command, seconds=150)


def experts_bench(options: Options) -> dict[str, Any]:
    """Compare the expert layer with transformers' own."""
    command = [sys.executable, "bench/experts.py", "--rounds", "3", "--no_memory"]
    command += ["--experts", "4" if options.tiny else "32"]
    command += ["--json", str(options.out / "experts.json")]
    if options.tiny:
        command += ["--tokens", "128", "--hidden", "64", "--expert_size", "64"]
    return _run(options, "experts_bench", command, seconds=100)


def _run(options: Options, name: str, command: list[str], seconds: float) -> dict[str, Any]:
    """Run a program, its output in NAME.txt, and return its exit code and the end of it."""
    log = options.out / f"{name}.txt"
    started = time.monotonic()
    limit = max(10.0, min(seconds, options.seconds_left - 5))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "w", encoding="utf-8") as file:
        found = run_within(command, limit, stdout=file, stderr=subprocess.STDOUT, env=environment)
    code = f"stopped after {limit:.0f} s" if found is None else found
    text = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
    print(text, flush=True)
    return {"code": code, "seconds": time.monotonic() - started, "end": text[-1200:]}


STAGES = (
    Planned(front_door, 40),
    Planned(gpu_tests, 30),
    Planned(experts_bench, 25),
    Planned(attention_bench, 40),
)

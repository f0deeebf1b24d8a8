"""Starts the product's commands with the small vocabulary, each once: what is done is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring
import yaml

ROOT = Path(__file__).resolve().parents[3]
PARTS = ROOT / "bench" / "prove" / "guard_parts"
EXIT_REQUEUE = 75
ENGINE = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 1},
}
"""The DeepSpeed JSON of every run."""


def train(run_dir: Path, run: dict[str, Any]) -> Path:
    """Train through the launcher unless that is done, and return the run directory.

    Args:
        run_dir: The run directory; the YAML, the JSON and the log stand beside it.
        run: Content of the run YAML.

    Raises:
        SystemExit: the run failed.
    """
    if (run_dir / "done").exists():
        return run_dir
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    config = run_dir.with_suffix(".run.yaml")
    config.write_text(yaml.safe_dump(run, sort_keys=False))
    engine = run_dir.with_suffix(".engine.json")
    engine.write_text(json.dumps(ENGINE))
    command = ["deepspeed", "--num_gpus", "1", "--master_port", measuring.free_port()]
    command += [str(PARTS / "worker.py"), "--ds_config", str(engine), "--config", str(config)]
    command += ["--run_dir", str(run_dir)]
    code = EXIT_REQUEUE
    while code == EXIT_REQUEUE:  # the guard paused: start again, as slurm/train.sbatch does
        code = _run(command, run_dir.with_suffix(".log"))
    if code:
        raise SystemExit(f"{run_dir} ended with {code}; see {run_dir.with_suffix('.log')}")
    (run_dir / "done").touch()
    return run_dir


def exported(run_dir: Path) -> Path:
    """Return the Hugging Face directory that a run ended with."""
    return next((run_dir / "export").glob("step-*"))


def run_script(name: str, arguments: Sequence[str], log: Path) -> None:
    """Run a script of this folder.

    Raises:
        SystemExit: the script failed.
    """
    code = _run([sys.executable, str(PARTS / name), *arguments], log)
    if code:
        raise SystemExit(f"{name} ended with {code}; see {log}")


def _run(command: list[str], log: Path) -> int:
    """Run a command with one thread, so that every core can have one, and return its exit code."""
    print(f"{time.strftime('%H:%M:%S')} {log.stem}", flush=True)
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": programs}
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=file, env=environment, check=False
        )
    return done.returncode

"""Runs started as users start them, through the `deepspeed` launcher, with planned faults."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cpt.resilience.processes import (
    command_of,
    environment_of,
    parent_of,
    process_ids,
    start_ticks_of,
)
from cpt.telemetry.metrics import read_events
from tests.support.launcher import ROOT, free_port

SAMPLE = ROOT / "data_pipeline" / "sample"
SECRETS = {
    name: f"canary-of-{name.lower()}"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
}
"""Secrets in the environment of every run, which must be found nowhere."""
SMALL_GUARD = {"min_documents": 1, "min_tokens": 1}
"""A guard with one document a domain, which shows that the guard runs and measures nothing."""
STEPS = 6
"""Planned steps of a run in a workplace."""


def make_workplace(folder: Path) -> Path:
    """Fill a folder with mix.yaml, run.yaml, ds.json and built data.

    The run has rows of 256 tokens, two a step, and a checkpoint every two steps.
    """
    sources = []
    for name, language, weight in (("ja_essay", "ja", 0.6), ("en_web", "en", 0.4)):
        sources.append(
            {
                "name": name,
                "language": language,
                "path": str(SAMPLE / f"{name}.jsonl"),
                "weight": weight,
                "domain": name,
                "held_out_share": 0.1,
            }
        )
    run: dict[str, Any] = {
        "model": {"init": "tiny"},
        "data": {"mix": "mix.yaml", "build_dir": "built"},
        "train": {
            "seq_len": 256,
            "global_batch_size": 2,
            "total_steps": STEPS,
            "lr": 1e-3,
            "warmup_steps": 2,
            "dtype": "bf16",
            "threads": 1,
        },
        "guard": {"enabled": False, "max_documents": 1},
        # synchronous, so that a test knows which checkpoints are there
        "checkpoint": {"interval_steps": 2, "async_save": False},
    }
    zero = {"stage": 3, "stage3_param_persistence_threshold": "auto", "reduce_bucket_size": "auto"}
    ds = {"zero_optimization": zero, "expert_parallel": {"enabled": True, "autoep_size": "auto"}}
    (folder / "mix.yaml").write_text(
        yaml.safe_dump({"seq_len": 256, "seed": 1, "guard": SMALL_GUARD, "sources": sources})
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "ds.json").write_text(json.dumps(ds))
    build = [sys.executable, "-m", "data_pipeline", "build", "mix.yaml", "--out", "built"]
    subprocess.run(
        build,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    return folder


@dataclass(kw_only=True)
class Service:
    """A run that was started."""

    process: subprocess.Popen[bytes]
    """The `deepspeed` command."""
    log: Path
    """Output of the launcher and the ranks."""
    run_dir: Path
    tag: str
    """Value of CPT_TEST_RUN in every process of this run, orphans included."""

    @property
    def output(self) -> str:
        """Output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def pids(self) -> dict[int, dict[str, str]]:
        """Return the environment of every living process of this run, by pid."""
        found = {}
        for pid in process_ids():
            variables = environment_of(pid)
            is_alive = start_ticks_of(pid) != ""
            if is_alive and f"CPT_TEST_RUN={self.tag}" in variables:
                pairs = [variable.partition("=") for variable in variables]
                found[pid] = {key: value for key, _, value in pairs}
        return found

    def rank_pids(self) -> dict[int, int]:
        """Return the pid of each rank; processes that a rank has started are not listed."""
        pids = self.pids()
        ranks: dict[int, int] = {}
        for pid in sorted(pids):
            parent_variables = pids.get(parent_of(pid) or 0, {})
            if "RANK" in pids[pid] and "RANK" not in parent_variables:
                ranks[int(pids[pid]["RANK"])] = pid
        return ranks

    def wait(self, timeout_seconds: float = 300) -> int:
        """Wait for the launcher and return its exit code.

        Raises:
            AssertionError: the launcher is still running; the output is shown.
        """
        try:
            return self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {timeout_seconds} s:\n{self.output[-6000:]}"
            ) from None

    def wait_for(self, text: str, timeout_seconds: float = 240) -> None:
        """Wait until the output holds a text."""
        deadline = time.monotonic() + timeout_seconds
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < deadline, (
                f"no '{text}':\n{self.output[-6000:]}"
            )
            time.sleep(0.05)

    def check_nothing_left(self, within_seconds: float = 10) -> None:
        """Check that no process of this run is alive.

        Raises:
            AssertionError: some are; their commands are shown.
        """
        deadline = time.monotonic() + within_seconds
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.1)
        commands = {pid: _command(pid) for pid in left}
        assert not left, f"orphans after {within_seconds} s: {commands}\n{self.output[-3000:]}"

    def check_no_secret(self) -> None:
        """Check that no file of the run directory and no output holds a value of `SECRETS`."""
        for path in [self.log, *self.run_dir.rglob("*")]:
            if not path.is_file():
                continue
            content = path.read_bytes()
            found = [name for name, value in SECRETS.items() if value.encode() in content]
            assert not found, f"{path} holds the value of {found}"

    def steps(self) -> list[dict[str, Any]]:
        """Return the step events of metrics.jsonl."""
        return self.events("step")

    def step_numbers(self) -> list[int]:
        """Return the numbers of the steps in metrics.jsonl, in the order of the lines."""
        return [event["step"] for event in self.steps()]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of one name in metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        if not path.exists():
            return []
        return [event for event in read_events(path) if event["event"] == name]


def _command(pid: int) -> str:
    return " ".join(command_of(pid))[:200] or "gone"


@contextlib.contextmanager
def service(
    workplace: Path,
    run_dir: str,
    *arguments: str,
    ranks: int = 2,
    fault: str = "",
    environment: dict[str, str] | None = None,
) -> Iterator[Service]:
    """Start a run through the launcher; processes that are left of it in the end are killed.

    Args:
        workplace: A folder from `make_workplace`.
        run_dir: The run directory, relative to the workplace.
        arguments: Further options of cpt/run.py.
        ranks: Number of processes.
        fault: Value of CPT_FAULT; faults are allowed if it is not empty.
        environment: Further variables.
    """
    bin_dir = Path(sys.executable).parent
    tag = uuid.uuid4().hex
    command = [
        str(bin_dir / "deepspeed"),
        "--master_port",
        str(free_port()),
        "--num_gpus",
        str(ranks),
    ]
    command += [
        str(ROOT / "cpt" / "run.py"),
        "--ds_config",
        "ds.json",
        "--config",
        "run.yaml",
        "--run_dir",
        run_dir,
    ]
    variables = {
        **os.environ,
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "CPT_TEST_RUN": tag,
        **SECRETS,
        **(environment or {}),
    }
    if fault:
        variables |= {"CPT_FAULT": fault, "CPT_ALLOW_FAULTS": "1"}
    # The log is not in the run directory, which may lie on a full disk.
    log = workplace / f"{run_dir.replace('/', '-')}-{tag[:6]}.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=workplace,
            env=variables,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    started = Service(process=process, log=log, run_dir=workplace / run_dir, tag=tag)
    try:
        yield started
    finally:
        for pid in started.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def run_to_end(
    workplace: Path, run_dir: str, *arguments: str, **options: Any
) -> tuple[int, Service]:
    """Start a run, wait for it, and check that it leaves no process behind."""
    with service(workplace, run_dir, *arguments, **options) as run:
        code = run.wait()
        run.check_nothing_left()
    return code, run

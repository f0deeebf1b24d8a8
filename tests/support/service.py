"""The product started as users start it, through the `deepspeed` launcher, with faults planned for
its ranks.
"""

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
"""In the environment of every run; must be found nowhere."""
SMALL_GUARD = {"min_documents": 1, "min_tokens": 1}
"""One document a domain shows that the guard runs; it measures nothing."""
STEPS = 6
"""Planned steps of a run in a workplace."""


def make_workplace(folder: Path) -> Path:
    """A folder with mix.yaml, run.yaml and ds.json: rows of 256 tokens, two a step, a checkpoint
    every two steps.
    """
    shares = {"ja_essay": ("ja", 0.6), "en_web": ("en", 0.4)}
    sources = [
        {
            "name": name,
            "language": language,
            "path": str(SAMPLE / f"{name}.jsonl"),
            "weight": weight,
        }
        for name, (language, weight) in shares.items()
    ]
    sources = [{**source, "domain": source["name"], "held_out_share": 0.1} for source in sources]
    run: dict[str, Any] = {
        "model": {"init": "tiny"},
        "data": {"mix": "mix.yaml", "build_dir": "built"},
        "train": {
            "seq_len": 256, "global_batch_size": 2, "total_steps": STEPS, "lr": 1e-3, "warmup_steps": 2,
            "dtype": "bf16", "threads": 1,
        },
        "guard": {"enabled": False, "max_documents": 1},
        "checkpoint": {"interval_steps": 2, "async_save": False},  # so that a test knows which are there
    }  # fmt: skip
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
    """One started run."""

    process: subprocess.Popen[bytes]
    """The `deepspeed` command."""
    log: Path
    """What launcher and ranks print."""
    run_dir: Path
    tag: str
    """In the environment of every process of this run, orphans included."""

    @property
    def output(self) -> str:
        """Everything printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def pids(self) -> dict[int, dict[str, str]]:
        """Environment of every living process of this run, by pid."""
        found = {}
        for pid in process_ids():
            variables = environment_of(pid)
            is_alive = start_ticks_of(pid) != ""
            if is_alive and f"CPT_TEST_RUN={self.tag}" in variables:
                pairs = [variable.partition("=") for variable in variables]
                found[pid] = {key: value for key, _, value in pairs}
        return found

    def rank_pids(self) -> dict[int, int]:
        """Pid of each rank; processes that a rank has started are not listed."""
        pids = self.pids()
        ranks: dict[int, int] = {}
        for pid in sorted(pids):
            parent_variables = pids.get(parent_of(pid) or 0, {})
            if "RANK" in pids[pid] and "RANK" not in parent_variables:
                ranks[int(pids[pid]["RANK"])] = pid
        return ranks

    def wait(self, timeout_seconds: float = 300) -> int:
        """Exit code of the launcher.

        Raises:
            AssertionError: it is still running; the output is shown.
        """
        try:
            return self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {timeout_seconds} s:\n{self.output[-6000:]}"
            ) from None

    def wait_for(self, text: str, timeout_seconds: float = 240) -> None:
        """Until the output holds a text."""
        deadline = time.monotonic() + timeout_seconds
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < deadline, (
                f"no '{text}':\n{self.output[-6000:]}"
            )
            time.sleep(0.05)

    def check_nothing_left(self, within_seconds: float = 10) -> None:
        """No process of this run lives any more.

        Raises:
            AssertionError: some do; their commands are shown.
        """
        deadline = time.monotonic() + within_seconds
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.1)
        commands = {pid: _command(pid) for pid in left}
        assert not left, f"orphans after {within_seconds} s: {commands}\n{self.output[-3000:]}"

    def check_no_secret(self) -> None:
        """No value of `SECRETS` is in any file of the run directory or in what was printed."""
        for path in [self.log, *(path for path in self.run_dir.rglob("*") if path.is_file())]:
            content = path.read_bytes()
            found = [name for name, value in SECRETS.items() if value.encode() in content]
            assert not found, f"{path} holds the value of {found}"

    def steps(self) -> list[dict[str, Any]]:
        """Step events of metrics.jsonl."""
        return self.events("step")

    def events(self, name: str) -> list[dict[str, Any]]:
        """Events of one name in metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        return (
            [event for event in read_events(path) if event["event"] == name]
            if path.exists()
            else []
        )


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
    """Start a run through the launcher; whatever is left of it in the end is killed.

    Args:
        workplace: From `make_workplace`.
        run_dir: Relative to the workplace.
        arguments: Further options of cpt/run.py.
        ranks: Processes.
        fault: CPT_FAULT; allowed if not empty.
        environment: Further variables.
    """
    bin_dir, tag = Path(sys.executable).parent, uuid.uuid4().hex
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
        **({"CPT_FAULT": fault, "CPT_ALLOW_FAULTS": "1"} if fault else {}),
        **(environment or {}),
    }
    log = (
        workplace / f"{run_dir.replace('/', '-')}-{tag[:6]}.log"
    )  # the run directory may lie on a full disk
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

"""A real Slurm on the loopback: munged, slurmctld and two slurmd with two make-believe GPUs each,
in one folder.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.reader import step_folder
from tests.support.launcher import ROOT, free_port
from tests.support.service import STEPS, make_workplace

MISSING = "no Slurm on this machine"

SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "scancel",
    "squeue",
    "sinfo",
)
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
NODES = ("n1", "n2")

# cred_expire: a requeued job waits for the old credentials to end, two minutes unless told
# otherwise
CONFIGURATION = """
ClusterName=cpt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=10
GresTypes=gpu
{nodes}
PartitionName=test Nodes=ALL Default=YES State=UP MaxTime=2-0
"""


def missing_programs() -> list[str]:
    """Return the programs that this machine lacks to run Slurm."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


@dataclass(kw_only=True)
class Cluster:
    """A running Slurm."""

    folder: Path
    """Configuration, logs, state, and the output of jobs as <job>.out."""

    def command(self, *words: str, check: bool = True, **variables: str) -> str:
        """Run a Slurm command in the repository and return what it prints."""
        environment = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": SEARCH,
            **variables,
        }
        done = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert not check or done.returncode == 0, (
            f"{words}: {done.stdout}{done.stderr}\n{self.logs()}"
        )
        return done.stdout

    def submit(self, *words: str, **variables: str) -> int:
        """Submit a job with sbatch and return its number."""
        output = f"--output={self.folder}/%j.out"
        return int(self.command("sbatch", "--parsable", output, *words, **variables).split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """Return the fields that scontrol shows of a job."""
        line = self.command("scontrol", "--oneliner", "show", "job", str(number))
        return dict(re.findall(r"(\S+?)=(\S*)", line))

    def output(self, number: int) -> str:
        """Return what the job has printed so far, over all its starts."""
        path = self.folder / f"{number}.out"
        if not path.exists():
            return ""
        return path.read_text(encoding="utf-8", errors="replace")

    def wait_for(
        self, number: int, text: str, times: int = 1, timeout_seconds: float = 400
    ) -> None:
        """Wait until the job has printed a text so many times."""
        deadline = time.monotonic() + timeout_seconds
        while self.output(number).count(text) < times:
            fields = self.job(number)
            alive = fields["JobState"] not in FINAL and time.monotonic() < deadline
            assert alive, f"no '{text}' (x{times}): {fields}\n{self.output(number)[-8000:]}"
            time.sleep(0.2)

    def wait(self, number: int, timeout_seconds: float = 400) -> dict[str, str]:
        """Wait until the job has ended for good, and return its fields."""
        deadline = time.monotonic() + timeout_seconds
        while (fields := self.job(number))["JobState"] not in FINAL:
            assert time.monotonic() < deadline, (
                f"still there: {fields}\n{self.output(number)[-8000:]}\n{self.logs()}"
            )
            time.sleep(0.5)
        return fields

    def logs(self) -> str:
        """Return the last lines of the daemons' logs."""
        tails = []
        for log in sorted(self.folder.glob("*.log")):
            tails.append(f"--- {log.name}\n{log.read_text()[-1500:]}")
        return "\n".join(tails)


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start everything, wait until both nodes are idle, and take everything down again."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # the path of munge's socket must be short
    cluster = Cluster(folder=folder)
    _configure(folder)
    munge = [
        "--key-file",
        "munge.key",
        "--socket",
        "munge.sock",
        "--pid-file",
        "munged.pid",
        "--seed-file",
        "seed",
    ]
    munge = [word if word.startswith("--") else str(folder / word) for word in munge]
    log = f"--log-file={folder}/munged.log"
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for words in (
            ["munged", "--foreground", "--force", *munge, log],
            ["slurmctld", "-D"],
            *(["slurmd", "-D", "-N", node] for node in NODES),
        ):
            daemons.append(_start(folder, words))
            if words[0] == "munged":
                _wait_until((folder / "munge.sock").exists, cluster)
        states = ("sinfo", "-h", "-N", "-o", "%t")
        _wait_until(
            lambda: cluster.command(*states, check=False).split() == ["idle"] * len(NODES), cluster
        )
        yield cluster
    finally:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            cluster.command(
                "scancel", "--user", getpass.getuser(), "--full", "--signal=KILL", check=False
            )
            cluster.command("scancel", "--user", getpass.getuser(), check=False)
            _wait_until(lambda: not cluster.command("squeue", "-h", check=False), cluster)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> None:
    host = socket.gethostname().split(".")[0]
    (folder / "munge.key").write_bytes(os.urandom(256))
    (folder / "munge.key").chmod(0o400)
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(mode=0o755)
    gpus = [folder / f"gpu{index}" for index in range(2)]
    for gpu in gpus:
        gpu.touch()
    cores = os.cpu_count() or 1
    nodes = []
    for node in NODES:
        nodes.append(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} "
            f"CPUs={cores} Gres=gpu:{len(gpus)}"
        )
    text = CONFIGURATION.format(
        folder=folder,
        host=host,
        user=getpass.getuser(),
        controller_port=free_port(),
        nodes="\n".join(nodes),
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(
        f"NodeName={','.join(NODES)} Name=gpu File={folder}/gpu[0-1]\n"
    )


def _start(folder: Path, words: list[str]) -> subprocess.Popen[bytes]:
    program = shutil.which(words[0], path=SEARCH)
    assert program is not None
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH}
    with open(folder / "daemons.log", "ab") as out:
        return subprocess.Popen(
            [program, *words[1:]], env=environment, stdout=out, stderr=out, start_new_session=True
        )


def _wait_until(
    condition: Callable[[], bool], cluster: Cluster, timeout_seconds: float = 30
) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"Slurm does not start:\n{cluster.logs()}"
        time.sleep(0.2)


def require_slurm() -> None:
    """Skip the test on a machine without Slurm; fail it where CI has promised to install it."""
    if missing := missing_programs():
        reason = (
            f"{MISSING} ({', '.join(missing)} not found). Debian: apt-get install slurm-wlm munge"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


def make_slurm_workplace(folder: Path) -> Path:
    """A workplace whose env.sh the job templates read; all paths absolute, because jobs start in
    the repository.
    """
    make_workplace(folder)
    ds = json.loads((folder / "ds.json").read_text())
    ds["expert_parallel"]["autoep_size"] = (
        2  # `auto` stays within a node, and jobs differ in their nodes
    )
    (folder / "ds.json").write_text(json.dumps(ds))
    run = {
        "CPT_CONFIG": folder / "run.yaml",
        "CPT_DS_CONFIG": folder / "ds.json",
        "CPT_SAVE_SECONDS": 120,
        "CPT_VENV": Path(sys.prefix),
    }
    lines = [f': "${{{name}:={value}}}"' for name, value in run.items()]
    lines += [
        f"source {ROOT}/slurm/env.example.sh",
        f"CPT_RUN_ARGUMENTS=(--set data.build_dir={folder}/built)",
    ]
    lines += ["export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore::FutureWarning", ""]
    (folder / "env.sh").write_text("\n".join(lines))
    return folder


def submit_training(
    cluster: Cluster, workplace: Path, run_dir: str, *options: str, **variables: str
) -> int:
    """sbatch slurm/train.sbatch in the repository, as docs/slurm.md says; faults are allowed if
    there are any.
    """
    variables = {
        "CPT_ENV": f"{workplace}/env.sh",
        "CPT_RUN_DIR": f"{workplace}/{run_dir}",
        **variables,
    }
    if "CPT_FAULT" in variables:
        variables["CPT_ALLOW_FAULTS"] = "1"
    return cluster.submit(*options, "slurm/train.sbatch", **variables)


def tensor_hashes(run_dir: Path) -> dict[str, str]:
    """Hashes of the tensor files of the last step."""
    files = read_manifest(step_folder(run_dir, STEPS)).files
    hashes = {record.name: record.xxh3_128 for record in files if record.name.endswith(".distcp")}
    assert hashes
    return hashes

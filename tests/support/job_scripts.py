"""Job templates under bash, with stand-ins for what a machine without a cluster lacks.

A stand-in writes its words to `calls`, one call a line.  The stand-in for `deepspeed` ends with
DEEPSPEED_EXIT.  With DEEPSPEED_OBEYS it waits for the STOP file first and removes it, as the real
run does.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.launcher import ROOT

RECORD = 'echo "$(basename "$0") $*" >>"$CALLS"\n'
DEEPSPEED = (
    RECORD
    + r"""
echo "host file $(tr "\n" " " <"$2")" >>"$CALLS"
echo "staged ${CPT_STAGED:-nothing}" >>"$CALLS"
echo "caches ${TRITON_CACHE_DIR:-unset} $(stat -c %a "${TRITON_CACHE_DIR:-/}/..")" >>"$CALLS"
echo "job_of_lock ${CPT_JOB:-unset}" >>"$CALLS"
echo "gpus ${CPT_VISIBLE_DEVICES:-unset}" >>"$CALLS"
echo $$ >"$CALLS.pid"
stop_file="${DEEPSPEED_OBEYS:-}/STOP"
while [[ -n "${DEEPSPEED_OBEYS:-}" && ! -f "$stop_file" ]]; do sleep 0.1; done
[[ -z "${DEEPSPEED_OBEYS:-}" ]] || { cat "$stop_file" >>"$CALLS"; rm "$stop_file"; }
if [[ -n "${FAILURE:-}" ]]; then
    mkdir -p "$CPT_RUN_DIR"
    echo "$FAILURE" >"$CPT_RUN_DIR/last_failure.json"
fi
exit "${DEEPSPEED_EXIT:-75}"
"""
)
PYTHON = (
    RECORD
    + """
[[ "$3" == stage ]] || exit "${STATUS_EXIT:-0}"
[[ "${STAGE_EXIT:-0}" == 0 ]] || exit "$STAGE_EXIT"
mkdir -p "${!#}" && touch "${!#}/copy" && echo '{"/shared/a": "/local/a"}'
"""
)
# like the real ones: skips its own options and runs the rest, on "nodes" one after another
SRUN = (
    RECORD
    + """
while [[ "$1" == -* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
)
MPIRUN = (
    'if [[ "$1" == --version ]]; then echo "${MPI_VERSION-mpirun (Open MPI) 4.1.7a1}"; exit; fi\n'
    + RECORD
    + """
nodes=$2
while [[ "$1" == -* ]]; do shift 2; done
for ((i = 0; i < nodes; i++)); do PATH=${REMOTE_PATH:-$PATH} OMPI_COMM_WORLD_RANK=$i "$@" & done
code=0
for job in $(jobs -p); do wait $job || code=$?; done
exit $code
"""
)
CONTAINER = (
    RECORD
    + """
while [[ "$1" != *.sif ]]; do shift; done
shift
exec "$@"
"""
)
SCONTROL = (
    RECORD
    + """
case "$*" in
    "show node"*) echo "  NodeAddr=10.0.0.7 X=1" ;;
    "show hostnames"*) tr , "\\n" <<<"$3" ;;
    *"show job"*) echo "JobId=17 ExcNodeList=${EXCLUDED:-(null)} NodeList=n1" ;;
esac
"""
)


@dataclass(kw_only=True)
class Bench:
    """A folder of stand-ins and what they were called with."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def calls(self, program: str) -> list[str]:
        """Return the words of each call of a stand-in."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        name = f"{program} "
        return [line.removeprefix(name) for line in lines if line.startswith(name)]

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(ROOT / "slurm" / script), *arguments],
            cwd=ROOT,
            env={**self.variables, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, program: str) -> None:
        """Wait until a stand-in was called."""
        deadline = time.monotonic() + 30
        while not self.calls(program):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def run(self, script: str, *arguments: str, **variables: str) -> tuple[int, str]:
        """Run a template, and return its exit code and output."""
        process = self.start(script, *arguments, **variables)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output


def make_bench(folder: Path) -> Bench:
    """Make stand-ins for a Slurm job with one node and two GPUs."""
    programs = {
        "srun": SRUN,
        "mpirun": MPIRUN,
        "apptainer": CONTAINER,
        "scontrol": SCONTROL,
    }
    for name, text in programs.items():
        write_program(folder / "bin" / name, text)
    write_program(folder / "venv" / "bin" / "deepspeed", DEEPSPEED)
    write_program(folder / "venv" / "bin" / "python", PYTHON)
    (folder / "env.sh").write_text("CPT_RUN_ARGUMENTS=(--set 'data.note=two words')\n")
    variables = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "CALLS": str(folder / "calls"),
        "CPT_ENV": str(folder / "env.sh"),
        "CPT_RUN_DIR": str(folder / "run"),
        "CPT_CONFIG": "run.yaml",
        "CPT_DS_CONFIG": "ds.json",
        "CPT_VENV": str(folder / "venv"),
        "SLURM_JOB_ID": "17",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_ON_NODE": "4",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURMD_NODENAME": "n1",
        "HOSTNAME": "login",
    }
    return Bench(folder=folder, variables=variables)


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)

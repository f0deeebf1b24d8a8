"""The job templates work under bash, with stand-ins for what a machine without a cluster lacks.

A stand-in writes its words to `calls`, one call a line.  The stand-in for `deepspeed` ends with
DEEPSPEED_EXIT.  With DEEPSPEED_OBEYS it waits for the STOP file first and removes it, as the real
run does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.launcher import ROOT

SCRIPTS = sorted(
    path for path in (ROOT / "slurm").rglob("*") if path.suffix in (".sh", ".sbatch", ".pbs")
)

RECORD = 'echo "$(basename "$0") $*" >>"$CALLS"\n'
DEEPSPEED = (
    RECORD
    + r"""
echo "host file $(tr "\n" " " <"$2")" >>"$CALLS"
echo "gpus ${CPT_VISIBLE_DEVICES:-unset}" >>"$CALLS"
echo $$ >"$CALLS.pid"
stop_file="${DEEPSPEED_OBEYS:-}/STOP"
while [[ -n "${DEEPSPEED_OBEYS:-}" && ! -f "$stop_file" ]]; do sleep 0.1; done
[[ -z "${DEEPSPEED_OBEYS:-}" ]] || { cat "$stop_file" >>"$CALLS"; rm "$stop_file"; }
exit "${DEEPSPEED_EXIT:-75}"
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
    RECORD
    + """
nodes=$2
shift 4
for ((i = 0; i < nodes; i++)); do OMPI_COMM_WORLD_RANK=$i "$@" & done
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
if [[ "$1" == show ]]; then echo "  NodeAddr=10.0.0.7 X=1"; fi
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

    def run(self, script: str, *arguments: str, **variables: str) -> tuple[int, str]:
        """Run a template, and return its exit code and output."""
        process = self.start(script, *arguments, **variables)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    programs = {
        "srun": SRUN,
        "mpirun": MPIRUN,
        "apptainer": CONTAINER,
        "qsub": RECORD,
        "scontrol": SCONTROL,
    }
    for name, text in programs.items():
        write_program(tmp_path / "bin" / name, text)
    write_program(tmp_path / "venv" / "bin" / "deepspeed", DEEPSPEED)
    write_program(tmp_path / "venv" / "bin" / "python", RECORD + 'exit "${STATUS_EXIT:-0}"\n')
    (tmp_path / "env.sh").write_text("CPT_RUN_ARGUMENTS=(--set 'data.note=two words')\n")
    variables = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "CPT_ENV": str(tmp_path / "env.sh"),
        "CPT_RUN_DIR": str(tmp_path / "run"),
        "CPT_CONFIG": "run.yaml",
        "CPT_DS_CONFIG": "ds.json",
        "CPT_VENV": str(tmp_path / "venv"),
        "SLURM_JOB_ID": "17",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_ON_NODE": "4",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURMD_NODENAME": "n1",
        "HOSTNAME": "login",
    }
    return Bench(folder=tmp_path, variables=variables)


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_script_is_sound_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        command = ["shellcheck", "-x", str(path)]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def test_there_is_a_template_for_every_scheduler() -> None:
    names = {path.relative_to(ROOT / "slurm").as_posix() for path in SCRIPTS}
    assert {
        "evaluate.sbatch",
        "guard.sbatch",
        "train.sbatch",
        "export.sbatch",
        "prepare_data.sbatch",
        "pbs/train.pbs",
        "age/train.sh",
    } <= names


@pytest.mark.parametrize(
    ("code", "restarts", "queued", "word"),
    [
        ("75", "1", True, "saved and queued again"),
        ("75", "2", False, "2 restarts used of CPT_MAX_RESTARTS=2"),
        ("78", "0", False, "exit code 78: not queued again"),
        ("71", "0", False, "exit code 71: not queued again"),
        ("0", "0", False, "done"),
    ],
)
def test_only_75_within_the_cap_is_queued_again(
    bench, code: str, restarts: str, queued: bool, word: str
) -> None:
    variables = {"DEEPSPEED_EXIT": code, "SLURM_RESTART_COUNT": restarts, "CPT_MAX_RESTARTS": "2"}
    ended, output = bench.run("train.sbatch", **variables)
    assert (ended, "requeue 17" in bench.calls("scontrol")) == (int(code), queued), output
    assert word in output


@pytest.mark.parametrize(
    ("ids", "kept"), [("GPU-ab,GPU-cd", "GPU-ab,GPU-cd"), ("MIG-ab", "MIG-ab"), ("4,5", "unset")]
)
def test_uuids_of_gpus_reach_the_ranks_though_the_launcher_counts(
    bench: Bench, ids: str, kept: str
) -> None:
    bench.run("train.sbatch", CUDA_VISIBLE_DEVICES=ids)
    assert bench.calls("gpus") == [kept]


def test_launcher_is_told_nodes_ranks_and_address_without_ssh(bench: Bench) -> None:
    bench.run("train.sbatch", SLURM_NNODES="2", CUDA_VISIBLE_DEVICES="4,5")
    (call,) = bench.calls("deepspeed")
    nodes = "--include node0:4,5@node1:0,1 --no_ssh --node_rank 0"
    assert f"{nodes} --master_addr 10.0.0.7 --master_port " in call
    run = f"cpt/run.py --ds_config ds.json --config run.yaml --run_dir {bench.run_dir}"
    assert call.endswith(f"{run} --set data.note=two words")
    assert bench.calls("host") == ["file node0 slots=1024 node1 slots=1024 "]
    (srun,) = bench.calls("srun")
    assert srun.startswith(
        "--nodes=2 --ntasks=2 --ntasks-per-node=1 --export=ALL --kill-on-bad-exit=0"
    )


def test_exit_0_is_not_believed_without_the_last_step(bench: Bench) -> None:
    code, output = bench.run("train.sbatch", DEEPSPEED_EXIT="0", STATUS_EXIT="70")
    assert code == 70 and "the launcher ended with 0, but the run is not finished" in output
    assert bench.calls("python") == [f"-m cpt.cli status --run_dir {bench.run_dir}"]


def test_signal_to_the_job_script_becomes_a_stop_file_and_reaches_no_launcher(bench: Bench) -> None:
    process = bench.start("train.sbatch", DEEPSPEED_OBEYS=str(bench.run_dir))
    wait_for_call(bench, "deepspeed")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and "saved and queued again" in output, output
    assert bench.calls("job") == ["17: got SIGTERM"]


def test_own_stop_file_of_an_earlier_start_is_removed_and_that_of_a_person_obeyed(
    bench: Bench,
) -> None:
    bench.run_dir.mkdir()
    (bench.run_dir / "STOP").write_text("job 17: got SIGUSR1\n")
    code, output = bench.run("train.sbatch", DEEPSPEED_EXIT="0")
    assert code == 0 and not (bench.run_dir / "STOP").exists(), output
    (bench.run_dir / "STOP").write_text("job 171: somebody\n")
    code, output = bench.run("train.sbatch", DEEPSPEED_OBEYS=str(bench.run_dir))
    assert code == 75 and bench.calls("job") == ["171: somebody"], output


def test_ranks_without_launcher_that_do_not_stop_are_killed(bench: Bench) -> None:
    write_program(
        bench.folder / "venv" / "bin" / "deepspeed", 'sleep 600 &\necho $! >"$CALLS.pid"\nexit 0\n'
    )
    code, output = bench.run("train.sbatch", STATUS_EXIT="70", CPT_SAVE_SECONDS="1")
    assert code == 70 and "ranks still run after CPT_SAVE_SECONDS=1: killing them" in output, output
    orphan = int((bench.folder / "calls.pid").read_text())
    process = Path(f"/proc/{orphan}")
    assert not process.exists() or " Z " in (process / "stat").read_text()
    assert not (bench.run_dir / "STOP").exists()


@pytest.mark.parametrize(
    ("script", "scheduler"),
    [
        ("pbs/train.pbs", {"PBS_JOBID": "17.server", "PBS_NODEFILE": "nodes"}),
        ("age/train.sh", {"JOB_ID": "17", "NHOSTS": "2"}),
    ],
)
def test_pbs_and_age_stop_before_the_limit_and_submit_themselves_again(
    bench: Bench, script: str, scheduler
) -> None:
    (bench.folder / "nodes").write_text("a\nb\na\nb\n")
    scheduler = {**scheduler, "PBS_NODEFILE": str(bench.folder / "nodes"), "SLURMD_NODENAME": ""}
    variables = {
        "CPT_RANKS_PER_NODE": "4",
        "CPT_STOP_AFTER_SECONDS": "2",
        "CPT_SUBMIT": "qsub -g us",
    }
    # both "nodes" share the folder, and one of them removes the STOP file, so only one may wait for
    # it
    write_program(
        bench.folder / "venv" / "bin" / "deepspeed",
        DEEPSPEED.replace("while", '[[ "$*" == *"--node_rank 1"* ]] && exit 75\nwhile'),
    )
    code, output = bench.run(script, **variables, **scheduler, DEEPSPEED_OBEYS=str(bench.run_dir))
    assert code == 75 and "got SIGUSR1" in output and "saved and queued again" in output, output
    calls = sorted(bench.calls("deepspeed"), key=lambda call: call.split(" --node_rank ")[1])
    assert len(calls) == 2
    for node_rank, call in enumerate(calls):
        assert f" --node_rank {node_rank} --master_addr login " in call
        assert "node0:0,1,2,3@node1:0,1,2,3" in call
    assert bench.calls("mpirun")[0].startswith("-n 2 --map-by ppr:1:node env ")
    again = f"CPT_RESTARTS=1,CPT_ENV={bench.folder}/env.sh,CPT_RUN_DIR={bench.run_dir}"
    again += ",CPT_CONFIG=run.yaml,CPT_DS_CONFIG=ds.json"
    assert bench.calls("qsub") == [f"-g us -v {again} slurm/{script}"]


def test_apptainer_and_pyxis_get_repository_binds_and_image(bench: Bench) -> None:
    shared = {"CPT_IMAGE": "cpt.sif", "CPT_BINDS": "/data /scratch", "DEEPSPEED_EXIT": "0"}
    # the container brings its own
    inside = {"PATH": f"{bench.folder}/venv/bin:{bench.variables['PATH']}"}
    code, output = bench.run("train.sbatch", CPT_CONTAINER="apptainer", **shared, **inside)
    assert code == 0, output
    binds = f"--bind {ROOT} --bind /data --bind /scratch"
    words = f"exec --nv --pwd {ROOT} {binds} cpt.sif env CPT_ENV="
    assert bench.calls("apptainer")[0].startswith(words)
    code, output = bench.run("train.sbatch", CPT_CONTAINER="pyxis", **shared, **inside)
    assert code == 0, output
    mounts = f"{ROOT}:{ROOT},/data:/data,/scratch:/scratch"
    options = f"--container-image=cpt.sif --container-mounts={mounts} --container-workdir={ROOT}"
    assert options in bench.calls("srun")[1]


def test_guard_job_measures_one_step_and_asks_nothing_of_the_run(bench: Bench) -> None:
    assert bench.run("guard.sbatch", "4")[0] == 78  # there is no run yet
    bench.run_dir.mkdir(parents=True, exist_ok=True)
    code, output = bench.run("guard.sbatch", "4", DEEPSPEED_EXIT="0")
    (call,) = bench.calls("deepspeed")
    assert code == 0 and call.endswith("--measure --resume 4"), output
    assert not bench.calls("scontrol requeue") and not (bench.run_dir / "STOP").exists()
    assert bench.run("guard.sbatch", "newest")[0] == 78


def test_offline_job_gives_its_words_to_all_ranks_and_stops_them_beside_the_result(
    bench: Bench,
) -> None:
    words = (
        "kl_targets",
        "--model",
        "a model",
        "--source",
        "en",
        "--out",
        f"{bench.folder}/targets",
    )
    code, output = bench.run("offline.sbatch", *words, DEEPSPEED_EXIT="75")
    (call,) = bench.calls("deepspeed")
    assert call.endswith(f"cpt/cli.py {' '.join(words)}"), call
    assert code == 75 and "requeue 17" in bench.calls("scontrol"), output
    (bench.folder / "calls").unlink()
    partial = bench.folder / "targets.partial"
    process = bench.start("offline.sbatch", *words, DEEPSPEED_OBEYS=str(partial))
    wait_for_call(bench, "deepspeed")
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and bench.calls("job") == ["17: got SIGUSR1"], output


def test_offline_job_is_done_when_its_result_is_there_and_its_pieces_are_gone(
    bench: Bench,
) -> None:
    words = ("evaluate", f"--out={bench.folder}/now.json")
    code, output = bench.run("offline.sbatch", *words, DEEPSPEED_EXIT="0")
    assert code == 70 and "the launcher ended with 0, but" in output
    (bench.folder / "now.json").touch()
    (bench.folder / "now.json.partial").mkdir()
    assert bench.run("offline.sbatch", *words, DEEPSPEED_EXIT="0")[0] == 70
    (bench.folder / "now.json.partial").rmdir()
    assert bench.run("offline.sbatch", *words, DEEPSPEED_EXIT="0")[0] == 0
    assert bench.run("offline.sbatch", "evaluate")[0] == 78
    assert bench.run("offline.sbatch", "train", "--out", "x")[0] == 78


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("merge --base a --tuned b", 78),
        ("merge --base a --tuned b --mix mix.yaml", 0),
        ("merge --base a --tuned b --mix=mix.yaml --score_only", 0),
        ("export --run_dir r --format mxfp4", 78),
        ("export --run_dir r --format mxfp4 --score auto", 78),
        ("export --run_dir r --format bf16 --score always", 78),
        ("export --run_dir r --format mxfp4 --score always", 0),
        ("export --score=always --format=mxfp4 --run_dir r", 0),
    ],
)
def test_offline_job_of_which_one_rank_would_do_all_is_refused(
    bench: Bench, words: str, code: int
) -> None:
    out = bench.folder / "result"
    out.touch()
    found, output = bench.run(
        "offline.sbatch", *words.split(), "--out", str(out), DEEPSPEED_EXIT="0"
    )
    assert found == code, output
    assert ("only one rank works" in output) == (code == 78)
    assert bool(bench.calls("deepspeed")) == (code == 0)


def test_export_and_data_jobs_run_in_the_same_environment(bench: Bench) -> None:
    assert bench.run("export.sbatch", "out", "--format", "mxfp4")[0] == 0
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0"}
    build = ("prepare_data.sbatch", "mix.yaml", "out")
    code, output = bench.run(*build, **array, SLURM_ARRAY_TASK_MAX="3")
    assert code == 0, output
    code, output = bench.run(*build, **array, SLURM_ARRAY_TASK_MAX="7")
    assert code == 78 and "--array must be 0-N without gaps, is 0-7 with 4 tasks" in output
    assert bench.calls("python") == [
        f"-m cpt.cli export --run_dir {bench.run_dir} --out out --format mxfp4",
        "-m data_pipeline build mix.yaml --out out --workers 1 --share 3/4",
    ]
    assert bench.run("export.sbatch", "--step")[0] == 78
    assert bench.run("prepare_data.sbatch", "mix.yaml")[0] == 78


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"CPT_ENV": "/no/env.sh"},
            "/no/env.sh is not there. Run  cp slurm/env.example.sh slurm/env.sh  and edit it.",
        ),
        ({"CPT_RUN_DIR": ""}, "CPT_RUN_DIR is empty"),
        ({"CPT_MAX_RESTARTS": "many"}, "CPT_MAX_RESTARTS is 'many', must be a whole number."),
        (
            {"CPT_CONTAINER": "docker"},
            "CPT_CONTAINER is 'docker', must be none, apptainer, singularity or pyxis.",
        ),
        ({"CPT_CONTAINER": "pyxis"}, "CPT_CONTAINER=pyxis needs CPT_IMAGE."),
        ({"CPT_VENV": "/no/venv"}, "CPT_VENV=/no/venv has no bin/python"),
        ({"SLURM_GPUS_ON_NODE": ""}, "the job has no GPUs and CPT_RANKS_PER_NODE is not set."),
    ],
)
def test_settings_that_cannot_be_right_are_refused_and_not_queued_again(
    bench: Bench, settings, said: str
) -> None:
    code, output = bench.run("train.sbatch", **settings)
    assert code == 78 and said in output
    assert not bench.calls("srun") and not bench.calls("scontrol")


def wait_for_call(bench: Bench, program: str) -> None:
    deadline = time.monotonic() + 30
    while not bench.calls(program):
        assert time.monotonic() < deadline
        time.sleep(0.1)

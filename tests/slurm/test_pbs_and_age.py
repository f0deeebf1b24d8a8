"""A PBS or AGE job stops before its limit, and asks for the same again, of stand-ins that reject
what the real schedulers would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.job_scripts import DEEPSPEED, Bench, write_program
from tests.support.launcher import ROOT

FAKE = ROOT / "tests" / "support" / "fake_schedulers.py"
SELECT = "select=2:ncpus=192:ngpus=8:mpiprocs=8:mem=1800gb:ompthreads=24:vntype=h200"
"""So long that qstat breaks its line."""
PBS = (
    *("-P", "gaa50000", "-q", "rt_HF", "-N", "ja-20b", "-l", "walltime=48:00:00"),
    *("-l", SELECT, "-l", "filesystems=home:groups"),
)
AGE = (
    *("-g", "tga-team", "-l", "node_f=2", "-l", "h_rt=24:00:00", "-ar", "7083", "-p", "-4"),
    *("-N", "ja-20b"),
)


@dataclass(kw_only=True)
class Scheduler:
    """A stand-in scheduler, and the one job that a person has submitted."""

    bench: Bench
    kind: str
    script: str

    @property
    def folder(self) -> Path:
        return self.bench.folder / "jobs"

    def job(self, number: int) -> dict[str, Any]:
        """Return what a job asked for; its own variables apart."""
        job = json.loads((self.folder / f"{number}.json").read_text())
        del job["given"]["-v"]
        job["given"].pop("-l")
        return job

    def variables_of(self, number: int) -> dict[str, str]:
        """Return what a job got with -v."""
        job = json.loads((self.folder / f"{number}.json").read_text())
        return dict(pair.split("=", 1) for pair in job["given"]["-v"][-1].split(","))

    def num_jobs(self) -> int:
        return len(list(self.folder.glob("*.json")))

    def submit(self, *words: str) -> None:
        """Submit the template as a person does."""
        command = ["qsub", *words, "-v", "USE_SSH=1", f"slurm/{self.script}"]
        environment = {**os.environ, **self.bench.variables}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)

    def run(self, *, nodes: int = 2, **variables: str) -> tuple[int, str]:
        """Run the submitted job on its first node, in the clean shell that it gets."""
        names = "".join(f"n{node}\n" * 8 for node in range(nodes))
        (self.bench.folder / "nodes").write_text(names)
        of_job = {"PBS_JOBID": "1.server", "PBS_NODEFILE": str(self.bench.folder / "nodes")}
        of_job |= {"PBS_O_QUEUE": "rt_HF"}
        if self.kind == "age":
            of_job = {"JOB_ID": "1", "NHOSTS": str(nodes), "USER": "root"}
        of_job |= {"SLURMD_NODENAME": "", "CPT_RANKS_PER_NODE": "8"}
        return self.bench.run(self.script, **{**of_job, **variables})


@pytest.fixture
def make_scheduler(bench: Bench) -> Callable[[str], Scheduler]:
    def make(kind: str) -> Scheduler:
        script = {"pbs": "pbs/train.pbs", "age": "age/train.sh"}[kind]
        scheduler = Scheduler(bench=bench, kind=kind, script=script)
        scheduler.folder.mkdir()
        for program in ("qsub", "qstat"):
            command = f'exec {sys.executable} {FAKE} {scheduler.folder} {kind} {program} "$@"\n'
            write_program(bench.folder / "bin" / program, command)
        return scheduler

    return make


@pytest.mark.parametrize(("kind", "words"), [("pbs", PBS), ("age", AGE)], ids=["pbs", "age"])
def test_job_that_queues_itself_again_asks_for_what_a_person_asked_for(
    make_scheduler, kind: str, words: tuple[str, ...]
) -> None:
    scheduler = make_scheduler(kind)
    scheduler.submit(*words)
    code, output = scheduler.run(USE_SSH="1")
    assert code == 75 and "saved and queued again" in output, output
    first, second = scheduler.job(1), scheduler.job(2)
    if kind == "pbs":
        # told in full, though it is what the queue would have chosen
        assert second["resources"].pop("place") == "scatter:excl"
    else:
        first["resources"]["h_rt"] = "86400"
    assert second == first
    passed = scheduler.variables_of(2)
    assert passed.pop("USE_SSH") == "1"
    assert passed == {
        "CPT_RESTARTS": "1",
        "CPT_FIRST_JOB": {"pbs": "1.server", "age": "1"}[kind],
        "CPT_ENV": f"{scheduler.bench.folder}/env.sh",
        "CPT_RUN_DIR": str(scheduler.bench.run_dir),
        "CPT_CONFIG": "run.yaml",
        "CPT_DS_CONFIG": "ds.json",
    }


@pytest.mark.parametrize(
    ("group", "field"), [(("-W", "group_list=gaa50000"), "-W"), (("-P", "gaa50000"), "-P")]
)
def test_group_of_a_pbs_job_stays_the_kind_of_group_that_it_was(
    make_scheduler, group: tuple[str, str], field: str
) -> None:
    scheduler = make_scheduler("pbs")
    scheduler.submit(*group, "-A", "account-7", "-q", "rt_HG")
    assert scheduler.run(PBS_O_QUEUE="rt_HG", nodes=1)[0] == 75
    given = scheduler.job(2)["given"]
    assert given[field] == [group[1]] and given["-A"] == ["account-7"]
    assert ("-P" in given) == (field == "-P")


def test_own_command_of_a_person_is_used_as_it_stands(make_scheduler) -> None:
    scheduler = make_scheduler("age")
    scheduler.submit(*AGE)
    own = "qsub -g tga-team -l node_f=1 -l h_rt=1:00:00"
    assert scheduler.run(CPT_SUBMIT=own)[0] == 75
    assert scheduler.job(2)["resources"] == {"node_f": "1", "h_rt": "1:00:00"}
    assert "-ar" not in scheduler.job(2)["given"]


@pytest.mark.parametrize("kind", ["pbs", "age"])
def test_job_on_several_nodes_whose_request_is_unknown_does_not_start(
    make_scheduler, kind: str
) -> None:
    scheduler = make_scheduler(kind)
    code, output = scheduler.run()
    assert code == 78 and "Set CPT_SUBMIT to the whole qsub command" in output, output
    assert "would ask for other nodes than these 2" in output
    assert not scheduler.bench.calls("deepspeed") and scheduler.num_jobs() == 0
    own = "qsub -g tga-team -P gaa50000 -q rt_HF -l h_rt=1:00:00"
    assert scheduler.run(CPT_SUBMIT=own, DEEPSPEED_EXIT="0")[0] == 0
    code, output = scheduler.run(nodes=1, DEEPSPEED_EXIT="0")
    assert code == 0 and "the next start asks for what the template's head says" in output


def test_resubmission_that_the_scheduler_refuses_is_told(make_scheduler) -> None:
    scheduler = make_scheduler("pbs")
    scheduler.submit(*PBS)
    code, output = scheduler.run(CPT_SUBMIT="qsub -q rt_HF")
    assert code == 75 and "no group with points" in output
    assert "saved, but could not be queued again" in output and scheduler.num_jobs() == 1


@pytest.mark.parametrize(
    ("kind", "words", "settings", "said"),
    [
        ("pbs", PBS, {"FAKE_USED": "47:00:00"}, "stops after 3000 s, 600 s before the time limit"),
        ("pbs", PBS, {"FAKE_USED": "47:55:00"}, "stops after 150 s, 150 s before the time limit"),
        ("age", AGE, {}, "stops after 85800 s, 600 s before the time limit"),
        ("age", AGE, {"CPT_STOP_MARGIN_SECONDS": "1800"}, "stops after 84600 s, 1800 s before"),
        ("age", AGE, {"CPT_STOP_AFTER_SECONDS": "0"}, "nothing makes the run save before its time"),
    ],
)
def test_stop_follows_the_time_limit_and_none_is_warned_about(
    make_scheduler, kind: str, words: tuple[str, ...], settings: dict[str, str], said: str
) -> None:
    scheduler = make_scheduler(kind)
    scheduler.submit(*words)
    code, output = scheduler.run(DEEPSPEED_EXIT="0", **settings)
    assert code == 0 and said in output, output


def test_run_is_stopped_before_the_walltime_and_knows_it(make_scheduler) -> None:
    scheduler = make_scheduler("pbs")
    scheduler.submit(*PBS[:-4], "-l", "select=2")
    bench = scheduler.bench
    # both "nodes" share the folder, and one of them removes the STOP file, so only one may wait for
    # it
    alone = DEEPSPEED.replace("while", '[[ "$*" == *"--node_rank 1"* ]] && exit 75\nwhile')
    alone += 'echo "job_end ${SLURM_JOB_END_TIME:-unset}" >>"$CALLS"\n'
    alone = alone.replace('exit "${DEEPSPEED_EXIT:-75}"\n', "") + "exit 75\n"
    write_program(bench.folder / "venv" / "bin" / "deepspeed", alone)
    settings = {"FAKE_USED": "47:59:56", "DEEPSPEED_OBEYS": str(bench.run_dir)}
    code, output = scheduler.run(**settings)
    assert code == 75 and "got SIGUSR1" in output and "saved and queued again" in output, output
    (job_end,) = bench.calls("job_end")
    assert job_end.isdigit()
    calls = sorted(bench.calls("deepspeed"), key=lambda call: call.split(" --node_rank ")[1])
    assert len(calls) == 2
    for node_rank, call in enumerate(calls):
        assert f" --node_rank {node_rank} --master_addr login " in call
        assert "node0:0,1,2,3,4,5,6,7@node1:0,1,2,3,4,5,6,7" in call


@pytest.mark.parametrize(
    ("version", "start"),
    [
        ("mpirun (Open MPI) 4.1.7a1", "-n 2 --map-by ppr:1:node --hostfile {hosts} env PATH="),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.10", "-n 2 -ppn 1 -f {hosts} env PATH="),
        ("HYDRA build details:", "-n 2 -ppn 1 -f {hosts} env PATH="),
    ],
    ids=["open-mpi", "intel-mpi", "mpich"],
)
def test_mpirun_is_told_in_its_own_words_and_carries_the_path(
    make_scheduler, version: str, start: str
) -> None:
    scheduler = make_scheduler("pbs")
    scheduler.submit(*PBS)
    scheduler.run(MPI_VERSION=version, LD_LIBRARY_PATH="/opt/nccl/lib")
    (call,) = scheduler.bench.calls("mpirun")
    assert call.startswith(start.format(hosts=scheduler.bench.folder / "nodes")), call
    assert " LD_LIBRARY_PATH=/opt/nccl/lib env CPT_ENV=" in call


def test_unknown_mpirun_is_refused_and_an_own_command_taken(make_scheduler) -> None:
    scheduler = make_scheduler("pbs")
    scheduler.submit(*PBS)
    code, output = scheduler.run(MPI_VERSION="")
    assert code == 78 and "set CPT_MPIRUN" in output, output
    scheduler.run(MPI_VERSION="", CPT_MPIRUN="mpirun -np NODES -x PATH")
    assert scheduler.bench.calls("mpirun")[0].startswith("-np 2 -x PATH env PATH=")


@pytest.mark.parametrize("kind", ["pbs", "age"])
def test_ranks_of_a_node_are_its_gpus_unless_they_are_given(make_scheduler, kind: str) -> None:
    scheduler = make_scheduler(kind)
    scheduler.submit(*{"pbs": PBS, "age": AGE}[kind])
    listed = "GPU 0: NVIDIA H100 (UUID: GPU-0)\n  MIG 1g (UUID: MIG-0)\nGPU 1: NVIDIA H100\n"
    write_program(scheduler.bench.folder / "bin" / "nvidia-smi", f"printf '{listed}'\n")
    none = {"CPT_RANKS_PER_NODE": ""}
    for visible, ranks in (("", 2), ("4,5,6", 3), ("GPU-a1", 1), ("NoDevFiles", 2)):
        code, output = scheduler.run(**none, CUDA_VISIBLE_DEVICES=visible)
        assert code == 75 and f"restarts: 2 nodes x {ranks} ranks" in output, output
    code, output = scheduler.run(CPT_RANKS_PER_NODE="4", CUDA_VISIBLE_DEVICES="0,1")
    assert "restarts: 2 nodes x 4 ranks" in output, output
    write_program(scheduler.bench.folder / "bin" / "nvidia-smi", "echo no driver; exit 9\n")
    code, output = scheduler.run(**none)
    assert code == 78 and "CPT_RANKS_PER_NODE is not set" in output, output


def failure(node: str) -> str:
    return json.dumps({"exit_code": 71, "rank": 9, "node": node, "signal": 0}, indent=2)


def test_age_job_that_failed_asks_for_other_nodes(
    make_scheduler,
) -> None:
    scheduler = make_scheduler("age")
    scheduler.submit(*AGE)
    settings = {"CPT_RESTART_ON_FAILURE": "2", "DEEPSPEED_EXIT": "71"}
    code, output = scheduler.run(**settings, FAILURE=failure("r1n3"))
    assert code == 71 and "failed with 71 on r1n3 and queued again" in output, output
    asked = {"node_f": "2", "h_rt": "86400"}
    assert scheduler.job(2)["resources"] == {**asked, "hostname": "!(r1n3)"}
    again = scheduler.variables_of(2)
    code, output = scheduler.run(**settings, **again, FAILURE=failure("r1n4"), JOB_ID="2")
    assert scheduler.job(3)["resources"] == {**asked, "hostname": "!(r1n3|r1n4)"}, output
    assert scheduler.variables_of(3)["CPT_RESTARTS"] == "2"
    assert scheduler.variables_of(3)["CPT_FIRST_JOB"] == "1"
    # one job to the lock of the run directory
    assert set(scheduler.bench.calls("job_of_lock")) == {"1"}


def test_pbs_job_that_failed_is_submitted_again_and_names_the_node(make_scheduler) -> None:
    scheduler = make_scheduler("pbs")
    scheduler.submit(*PBS)
    settings = {"CPT_RESTART_ON_FAILURE": "1", "DEEPSPEED_EXIT": "71"}
    code, output = scheduler.run(**settings, FAILURE=failure("hnode042"))
    assert code == 71 and "PBS cannot be told to avoid node hnode042" in output, output
    assert scheduler.num_jobs() == 2


@pytest.fixture
def modules(bench: Bench) -> dict[str, str]:
    """A module system that a clean shell does not know yet; one module brings apptainer."""
    write_program(
        bench.folder / "modules" / "init" / "bash",
        # as Lmod's: it reads a variable that is not set
        'echo "$NOT_SET" >/dev/null\n'
        "module() {\n"
        '    echo "module $*" >>"$CALLS"\n'
        '    [[ "$2" != absent ]] || return 1\n'
        f'    [[ "$2" != apptainer ]] || PATH={bench.folder}/opt:$PATH\n'
        "}\n",
    )
    (bench.folder / "opt").mkdir()
    (bench.folder / "bin" / "apptainer").rename(bench.folder / "opt" / "apptainer")
    return {"MODULESHOME": str(bench.folder / "modules")}


def test_modules_are_loaded_on_every_node_of_shells_without_a_module_command(
    make_scheduler, modules: dict[str, str]
) -> None:
    scheduler = make_scheduler("age")
    scheduler.submit(*AGE)
    code, output = scheduler.run(
        **modules, CPT_MODULES="cuda nccl", CPT_MODULE_PATHS="/apps/modules", DEEPSPEED_EXIT="0"
    )
    assert code == 0, output
    loads = scheduler.bench.calls("module")
    # the job script, and node.sh on both nodes
    assert sorted(loads) == ["load cuda nccl"] * 3 + ["use /apps/modules"] * 3
    code, output = scheduler.run(**modules, CPT_MODULES="absent")
    assert code == 78 and "module load absent failed" in output, output
    code, output = scheduler.run(CPT_MODULES="cuda")
    assert code == 78 and "has no module command" in output, output


def test_apptainer_of_a_module_runs_on_every_node(
    make_scheduler, bench: Bench, modules: dict[str, str]
) -> None:
    scheduler = make_scheduler("age")
    scheduler.submit(*AGE)
    image = {"CPT_CONTAINER": "apptainer", "CPT_IMAGE": "cpt.sif", "CPT_MODULES": "apptainer"}
    clean = f"{bench.folder}/venv/bin:{bench.variables['PATH']}"
    code, output = scheduler.run(
        **modules, **image, PATH=clean, REMOTE_PATH=clean, DEEPSPEED_EXIT="0"
    )
    assert code == 0 and len(bench.calls("apptainer")) == 2, output
    assert bench.calls("module") == ["load apptainer"]

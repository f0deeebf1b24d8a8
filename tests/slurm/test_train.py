"""The shipped train.sbatch finishes under a real Slurm despite stops and lost launchers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from cpt.checkpoint.reader import list_steps
from cpt.telemetry.metrics import read_events
from tests.support.service import STEPS
from tests.support.slurm_cluster import Cluster, submit_training, tensor_hashes

pytestmark = pytest.mark.dist

SECRETS = {
    "HF_TOKEN": "hf_canary_4711",
    "WANDB_API_KEY": "wandb_canary_4711",
    "AWS_SECRET_ACCESS_KEY": "aws_canary_4711",
    "AWS_SESSION_TOKEN": "session_canary_4711",
}


def processes(run_dir: Path, module: str = "") -> dict[int, str]:
    """Return the command lines of living processes that name a run directory."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if f"{run_dir} " in command and module in command:
                found[int(entry.name)] = command
    return found


def ending(fields: dict[str, str]) -> tuple[str, str, str]:
    """Return state, exit code and number of restarts of a job that has ended."""
    return fields["JobState"], fields["ExitCode"], fields["Restarts"]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, slurm_workplace: Path) -> int:
    """A job on one node with two GPUs and the guard on.

    The two jobs that nothing waits for share its time.
    """
    guarded = slurm_workplace / "guarded.yaml"
    run = (slurm_workplace / "run.yaml").read_text()
    guarded.write_text(run.replace("enabled: false", "enabled: true"))
    settings = {"CPT_CONFIG": str(guarded)}
    return submit_training(cluster, slurm_workplace, "undisturbed", "--gpus-per-node=2", **settings)


@pytest.fixture(scope="module")
def robbed(cluster: Cluster, slurm_workplace: Path, undisturbed: int) -> int:
    """A job that may not restart, and sleeps in step 3 so that something can happen to it there."""
    faults = {"CPT_FAULT": "forward:*:3:sleep=6", "CPT_MAX_RESTARTS": "0"}
    return submit_training(cluster, slurm_workplace, "robbed", "--gpus-per-node=2", **faults)


@pytest.mark.slow
@pytest.mark.case(
    "S6",
    "all ranks save and stop, no orphan, the job is not called done; the cap on restarts holds",
)
def test_ranks_that_lost_their_launcher_save_and_nothing_is_left(
    cluster, slurm_workplace, robbed
) -> None:
    run_dir = slurm_workplace / "robbed"
    cluster.wait_for(robbed, "step=3 action=sleep", times=2)
    (launcher,) = processes(run_dir, "bin/deepspeed")
    os.kill(launcher, signal.SIGTERM)
    fields = cluster.wait(robbed)
    output = cluster.output(robbed)
    assert "the launcher of node 0 ended with 143 and left its ranks behind" in output, output
    assert "saved, but not queued again: 0 restarts used of CPT_MAX_RESTARTS=0" in output
    assert ending(fields) == ("FAILED", "75:0", "0")
    assert 3 <= list_steps(run_dir)[0] < STEPS and not (run_dir / "STOP").exists()
    assert not processes(run_dir)


@pytest.mark.slow
def test_finished_job_is_called_done(cluster, slurm_workplace, undisturbed) -> None:
    fields = cluster.wait(undisturbed)
    output = cluster.output(undisturbed)
    assert ending(fields) == ("COMPLETED", "0:0", "0"), output
    assert f"finished, step {STEPS} of {STEPS} is saved" in output and "1 nodes x 2 ranks" in output
    assert (slurm_workplace / "undisturbed").stat().st_mode & 0o077 == 0


@pytest.mark.slow
@pytest.mark.case("S5", "USR1: save, exit 75, one requeue, finished; final weights bit-identical")
@pytest.mark.case(
    "S8", "launcher ended with 0, run not called done: ranks save, requeue, same final weights"
)
@pytest.mark.case(
    "X4", "in no line of a job's output, no file of the run directory, no command line"
)
def test_job_on_two_nodes_survives_a_signal_and_a_killed_launcher(
    cluster, slurm_workplace, undisturbed
) -> None:
    """Start 0 is asked to stop in step 2, start 1 loses a launcher in step 4, start 2 finishes."""
    run_dir = slurm_workplace / "two-nodes"
    settings = {
        "CPT_FAULT": "forward:*:2:sleep=3,forward:*:4:sleep=6",
        "CPT_RANKS_PER_NODE": "1",
        "CPT_MAX_RESTARTS": "2",
    }
    options = ("--nodes=2", "--gpus-per-node=1")
    job = submit_training(cluster, slurm_workplace, "two-nodes", *options, **settings, **SECRETS)
    cluster.wait_for(job, "step=2 action=sleep", times=2)
    commands = " ".join(processes(run_dir).values())
    cluster.command("scancel", "--batch", "--signal=USR1", str(job))
    cluster.wait_for(job, "step=4 action=sleep", times=2)
    launchers = processes(run_dir, "deepspeed.launcher.launch")
    (victim,) = [pid for pid, command in launchers.items() if "--node_rank=1" in command]
    os.kill(victim, signal.SIGKILL)
    fields = cluster.wait(job)
    output = cluster.output(job)
    assert ending(fields) == ("COMPLETED", "0:0", "2"), output
    assert "got SIGUSR1: wrote" in output and output.count("saved and queued again") == 2
    assert "the launcher ended with 0, but the run is not finished" in output
    assert "the launcher of node 1 ended with 0 and left its ranks behind" in output
    assert "'node0': [0], 'node1': [1]" in output
    assert tensor_hashes(run_dir) == tensor_hashes(slurm_workplace / "undisturbed")
    assert not processes(run_dir)
    check_no_secret(output, commands, run_dir)


def check_no_secret(output: str, commands: str, run_dir: Path) -> None:
    files = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert commands.count("cpt/run.py") >= 2 and files
    for name, secret in SECRETS.items():
        assert secret not in output and secret not in commands, name
        assert not [path for path, content in files.items() if secret.encode() in content], name


@pytest.mark.case("S5", "exit 78 is not queued again")
def test_bad_configuration_is_not_queued_again(cluster, slurm_workplace) -> None:
    (slurm_workplace / "typo.json").write_text('{"zero_optimisation": {"stage": 3}}')
    settings = {"CPT_DS_CONFIG": str(slurm_workplace / "typo.json"), "CPT_RANKS_PER_NODE": "1"}
    job = submit_training(cluster, slurm_workplace, "typo", "--gpus-per-node=1", **settings)
    fields = cluster.wait(job)
    output = cluster.output(job)
    assert ending(fields) == ("FAILED", "78:0", "0"), output
    assert "exit code 78: not queued again" in output
    assert "zero_optimisation is not a known key" in output


@pytest.mark.slow
def test_data_array_export_and_guard_jobs_do_what_one_process_does(
    cluster, slurm_workplace, undisturbed
) -> None:
    small = ("--cpus-per-task=1", "--mem=0")
    variables = {
        "CPT_ENV": f"{slurm_workplace}/env.sh",
        "CPT_RUN_DIR": f"{slurm_workplace}/undisturbed",
    }
    cluster.wait(undisturbed)
    mix = f"{slurm_workplace}/mix.yaml"
    build = ("slurm/prepare_data.sbatch", mix, f"{slurm_workplace}/by-array")
    array = cluster.submit("--array=0-1", *small, *build, **variables)
    last = cluster.submit(f"--dependency=afterok:{array}", *small, *build, **variables)
    out = slurm_workplace / "exported"
    exporting = ("slurm/export.sbatch", str(out), "--format", "fp32")
    export = cluster.submit(*small, *exporting, **variables)
    measuring = {**variables, "CPT_CONFIG": f"{slurm_workplace}/guarded.yaml"}
    guard = cluster.submit("--gpus-per-node=1", "slurm/guard.sbatch", str(STEPS), **measuring)
    for job in (export, last, guard):
        fields = cluster.wait(job)
        assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), cluster.output(job)
    built = slurm_workplace / "built" / "manifest.json"
    assert (slurm_workplace / "by-array" / "manifest.json").read_bytes() == built.read_bytes()
    assert "weights after step 6" in cluster.output(guard)
    run_dir = slurm_workplace / "undisturbed"
    measured = json.loads((run_dir / "guard" / f"measured-{STEPS:08d}.json").read_text())["domains"]
    events = read_events(run_dir / "metrics.jsonl")
    logged = {event["domain"]: event for event in events if event["event"] == "guard"}
    for name, found in measured.items():  # on one rank, what training measured on two, in bf16
        assert found["bits_per_byte"] == pytest.approx(logged[name]["bits_per_byte"], rel=1e-3)
    assert {"config.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert list(out.glob("*.safetensors"))


@pytest.mark.slow
def test_run_whose_rank_was_killed_goes_on_from_copies_on_another_node(
    cluster, slurm_workplace, undisturbed, tmp_path
) -> None:
    """The first start loses a rank in step 3, and its node; both read from a disk of their node."""
    run_dir = slurm_workplace / "avoiding"
    settings = {
        "CPT_FAULT": "forward:*:3:sleep=6",
        "CPT_RESTART_ON_FAILURE": "1",
        "CPT_STAGE_DIR": str(tmp_path),
    }
    options = ("--nodes=1", "--gpus-per-node=2")
    job = submit_training(cluster, slurm_workplace, "avoiding", *options, **settings)
    cluster.wait_for(job, "step=3 action=sleep", times=2)
    first_node = cluster.job(job)["NodeList"]
    ranks = processes(run_dir, "cpt/run.py")
    of_launcher = processes(run_dir, "deepspeed")
    victim = max(set(ranks) - set(of_launcher))
    os.kill(victim, signal.SIGKILL)
    fields = cluster.wait(job)
    output = cluster.output(job)
    assert ending(fields) == ("COMPLETED", "0:0", "1"), output
    assert f"on {first_node} and queued again" in output, output
    assert fields["ExcNodeList"] == first_node != fields["NodeList"]
    assert output.count(f"is read from {tmp_path}/gpt-oss-cpt-{job}/built-") == 2, output
    assert list(tmp_path.iterdir()) == []
    cluster.wait(undisturbed)
    assert tensor_hashes(run_dir) == tensor_hashes(slurm_workplace / "undisturbed")

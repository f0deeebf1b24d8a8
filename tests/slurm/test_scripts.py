"""The job templates work under bash, with stand-ins for what a machine without a cluster lacks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.job_scripts import Bench, write_program
from tests.support.launcher import ROOT

SCRIPTS = sorted(
    path for path in (ROOT / "slurm").rglob("*") if path.suffix in (".sh", ".sbatch", ".pbs")
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_script_is_sound_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        command = ["shellcheck", "-x", str(path)]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def answers_as_own(port: int) -> bool:
    """Return whether slurm/lib.sh takes the listener of a port for one of this user."""
    command = f"source slurm/lib.sh; is_own_port {port}"
    return subprocess.run(["bash", "-c", command], cwd=ROOT).returncode == 0


def test_a_server_of_another_user_is_not_taken_for_ones_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mine:
        port = mine.getsockname()[1]
        assert answers_as_own(port)
    assert not answers_as_own(port), "nobody listens"
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            taken = socket.create_server(("127.0.0.1", 0))
            os.write(writing, str(taken.getsockname()[1]).encode())
            signal.pause()
        os._exit(1)
    try:
        assert not answers_as_own(int(os.read(reading, 16)))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def ask_to_stop(run_dir: Path) -> str:
    """Ask a run to stop as the job templates do, and return what is said."""
    command = "source slurm/lib.sh; JOB=7 CPT_RUN_DIR=$1 STOP_FILE=$1/STOP; ask_to_stop 'got USR1'"
    done = subprocess.run(
        ["bash", "-c", command, "test", str(run_dir)], cwd=ROOT, capture_output=True, text=True
    )
    return done.stderr


def test_request_to_stop_is_said_to_be_written_only_if_it_is(tmp_path: Path) -> None:
    stop = tmp_path / "run" / "STOP"
    assert f"wrote {stop}; the run saves and stops" in ask_to_stop(tmp_path / "run")
    assert stop.read_text() == "job 7: got USR1\n"
    stop.unlink()
    stop.mkdir()
    told = ask_to_stop(tmp_path / "run")
    assert "wrote" not in told
    assert f"got USR1: {stop} cannot be written, so the run goes on" in told


def test_server_does_not_get_the_secret_of_the_job(tmp_path: Path) -> None:
    write_program(tmp_path / "bin" / "vllm", "env")
    command = "source slurm/lib.sh; start_server . 1 $1"
    variables = {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "CPT_JOB_SECRET": "s" * 32,
        "CPT_VLLM": "vllm",
        "CPT_VLLM_CONTEXT": "800",
        "CPT_VLLM_START_SECONDS": "20",
    }
    log = tmp_path / "log"
    subprocess.run(["bash", "-c", command, "test", str(log)], cwd=ROOT, env=variables)
    assert f"PATH={tmp_path}/bin" in log.read_text(), "the server has run"
    assert "CPT_JOB_SECRET" not in log.read_text()


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


def test_output_of_every_job_goes_to_a_folder_that_a_clone_has() -> None:
    for path in SCRIPTS:
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        if any(line.startswith(("#SBATCH", "#PBS", "#$")) for line in head):
            outputs = [line for line in head if "output=" in line or " -o " in line]
            assert len(outputs) == 1 and "logs/" in outputs[0], path
    # Slurm fails a job without a word if the folder is not there
    assert (ROOT / "logs" / ".gitignore").is_file()


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


def test_node_without_temporary_files_begins_no_run_of_its_own(bench: Bench) -> None:
    code, output = bench.run("train.sbatch", TMPDIR="/no/such/folder")
    assert code == 78 and "no file can be written in /no/such/folder" in output, output
    # a disk that is full takes a name and no content
    full = 'file=$(dirname "$CALLS")/full; ln -sf /dev/full "$file"; echo "$file"\n'
    write_program(bench.folder / "bin" / "mktemp", full)
    code, output = bench.run("train.sbatch")
    assert code == 78 and "no file can be written in" in output, output
    assert not bench.calls("deepspeed")


def test_exit_0_is_not_believed_without_the_last_step(bench: Bench) -> None:
    code, output = bench.run("train.sbatch", DEEPSPEED_EXIT="0", STATUS_EXIT="70")
    assert code == 70 and "the launcher ended with 0, but the run is not finished" in output
    assert bench.calls("python") == [f"-m cpt.cli status --run_dir {bench.run_dir}"]


def test_signal_to_the_job_script_becomes_a_stop_file_and_reaches_no_launcher(bench: Bench) -> None:
    process = bench.start("train.sbatch", DEEPSPEED_OBEYS=str(bench.run_dir))
    bench.wait_for("deepspeed")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and "saved and queued again" in output, output
    assert bench.calls("job") == ["17: got SIGTERM"]


def test_link_in_place_of_the_stop_file_is_not_written_through(bench: Bench) -> None:
    bench.run_dir.mkdir()
    (bench.run_dir / "STOP").symlink_to(bench.folder / "victim")
    process = bench.start("train.sbatch", DEEPSPEED_OBEYS=str(bench.run_dir))
    bench.wait_for("deepspeed")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75 and bench.calls("job") == ["17: got SIGTERM"]
    assert not (bench.folder / "victim").exists()


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
    # a step that names no cores may be bound to one of them, with all workers of a build
    pyxis = {**shared, **inside, "CPT_CONTAINER": "pyxis", "SLURM_CPUS_PER_TASK": "16"}
    code, output = bench.run("prepare_data.sbatch", "mix.yaml", "out", **pyxis)
    assert code == 0, output
    assert "--cpus-per-task=16 --cpu-bind=none --container-image=cpt.sif" in bench.calls("srun")[2]


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
    bench.wait_for("deepspeed")
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
        ("export --run_dir r --format mxfp4 --score_rules", 0),
        ("export --run_dir r --score_rules", 78),
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

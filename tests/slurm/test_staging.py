"""node.sh copies the input of a run to the node's disk first, and the run goes on without."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support.job_scripts import Bench


def run(bench: Bench, disk: Path, **variables: str) -> str:
    """Run a job that copies; return what it said."""
    code, output = bench.run(
        "train.sbatch", CPT_STAGE_DIR=str(disk), DEEPSPEED_EXIT="0", **variables
    )
    assert code == 0, output
    return output


def test_ranks_get_the_copies_of_their_node_which_go_at_the_end(
    bench: Bench, tmp_path: Path
) -> None:
    run(bench, tmp_path / "disk")
    (call,) = [call for call in bench.calls("python") if " stage " in call]
    words = f"-m cpt.cli stage --config run.yaml --run_dir {bench.run_dir}"
    assert call == f"{words} --set data.note=two words --to {tmp_path}/disk/gpt-oss-cpt-17"
    assert bench.calls("staged") == ['{"/shared/a": "/local/a"}']
    assert list((tmp_path / "disk").iterdir()) == []


def test_copies_that_are_kept_lie_where_the_next_job_finds_them(
    bench: Bench, tmp_path: Path
) -> None:
    run(bench, tmp_path, CPT_STAGE_KEEP="1")
    assert (tmp_path / f"gpt-oss-cpt-uid-{os.getuid()}" / "copy").exists()


def test_job_compiles_into_a_private_folder_that_goes_with_it(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir(mode=0o777)
    run(bench, tmp_path / "disk", CPT_JOB_CACHES="1", TMPDIR=str(folder))
    ((cache, mode),) = [call.split() for call in bench.calls("caches")]
    assert Path(cache).is_relative_to(folder / Path(cache).parts[-2])
    assert Path(cache).parts[-2].startswith("cpt-caches-") and mode == "700"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("keep", ["0", "1"])
def test_node_that_cannot_copy_reads_from_shared_storage(
    bench: Bench, tmp_path: Path, keep: str
) -> None:
    said = run(bench, tmp_path / "disk", STAGE_EXIT="74", CPT_STAGE_KEEP=keep)
    assert "this node reads from shared storage" in said
    assert bench.calls("staged") == ["nothing"]


def test_container_without_the_folder_on_the_first_node_reads_from_shared_storage(
    bench: Bench, tmp_path: Path
) -> None:
    inside = {"PATH": f"{bench.folder}/venv/bin:{bench.variables['PATH']}"}
    inside |= {"CPT_CONTAINER": "apptainer", "CPT_IMAGE": "cpt.sif"}
    # as a line of env.sh has it, which every node reads again
    with (bench.folder / "env.sh").open("a") as file:
        file.write(f': "${{CPT_STAGE_DIR:={tmp_path}/disk}}"\n')
    code, output = bench.run("train.sbatch", DEEPSPEED_EXIT="0", **inside)
    assert code == 0 and "disk is not on this node" in output, output
    assert not [call for call in bench.calls("python") if " stage " in call]
    (tmp_path / "disk").mkdir()
    (bench.folder / "calls").unlink()
    code, output = bench.run("train.sbatch", DEEPSPEED_EXIT="0", **inside)
    assert code == 0 and [call for call in bench.calls("python") if " stage " in call], output
    assert f"--bind {tmp_path}/disk" in bench.calls("apptainer")[0]


def test_nothing_is_copied_without_the_setting_or_for_one_look(
    bench: Bench, tmp_path: Path
) -> None:
    assert bench.run("train.sbatch", DEEPSPEED_EXIT="0")[0] == 0
    (bench.folder / "calls").unlink()
    bench.run_dir.mkdir(exist_ok=True)
    code, output = bench.run("guard.sbatch", DEEPSPEED_EXIT="0", CPT_STAGE_DIR=str(tmp_path))
    assert code == 0, output
    assert not [call for call in bench.calls("python") if " stage " in call]
    assert bench.calls("staged") == ["nothing"]


def test_ranks_start_once_all_nodes_have_copied(bench: Bench, tmp_path: Path) -> None:
    settings = {"CPT_STAGE_DIR": str(tmp_path / "disk"), "JOB": "17", "CPT_STAGE_SECONDS": "30"}
    nodes = []
    for node in ("0", "1"):
        words = ("10.0.0.7", "20000", "2", "2")
        nodes.append(
            bench.start("node.sh", *words, SLURM_NODEID=node, DEEPSPEED_EXIT="0", **settings)
        )
        if node == "0":
            bench.wait_for("python")
            time.sleep(1.5)
            assert not bench.calls("deepspeed")
    assert [process.wait(60) for process in nodes] == [0, 0]
    assert len(bench.calls("deepspeed")) == 2


def test_node_does_not_wait_for_another_forever(bench: Bench, tmp_path: Path) -> None:
    settings = {"CPT_STAGE_DIR": str(tmp_path / "disk"), "JOB": "17", "CPT_STAGE_SECONDS": "1"}
    words = ("10.0.0.7", "20000", "2", "2")
    process = bench.start("node.sh", *words, SLURM_NODEID="0", DEEPSPEED_EXIT="0", **settings)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "nodes 1 still copy after CPT_STAGE_SECONDS=1" in output

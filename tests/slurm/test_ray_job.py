"""A data job on Ray: one cluster on the job's nodes, with a token, that ends with the job."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from data_pipeline.build.build import build
from data_pipeline.config.mix_file import load_mix
from tests.support.job_scripts import RECORD, Bench, write_program
from tests.support.slurm_cluster import Cluster

RAY = (
    RECORD
    + f"""
echo "token ${{#RAY_AUTH_TOKEN}} $RAY_AUTH_MODE" >>"$CALLS"
echo "folder $RAY_TMPDIR $(stat -c %a "$RAY_TMPDIR")" >>"$CALLS"
[[ "${{RAY_EXIT:-}}" == "" ]] || {{ echo "Ray says no"; exit "$RAY_EXIT"; }}
port=$(sed -n 's/.* --port=\\([0-9]*\\).*/\\1/p' <<<"$*")
echo $$ >"$CALLS.pid"
exec {sys.executable} -c '
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
    while True:
        server.accept()
' "$port"
"""
)
PYTHON = (
    RECORD
    + """
[[ "$1" != -c ]] || exit 0
echo "address $RAY_ADDRESS" >>"$CALLS"
echo "nodes $CPT_RAY_NODES" >>"$CALLS"
[[ -z "${BUILD_WAITS:-}" ]] || exec sleep 600
exit "${BUILD_EXIT:-0}"
"""
)
ON_RAY = {"CPT_DATA_ENGINE": "ray", "SLURM_CPUS_PER_TASK": "4", "SLURM_MEM_PER_NODE": "32768"}
BUILD = ("prepare_data.sbatch", "mix.yaml", "out")


@pytest.fixture
def bench(bench: Bench) -> Bench:
    write_program(bench.folder / "venv" / "bin" / "ray", RAY)
    write_program(bench.folder / "venv" / "bin" / "python", PYTHON)
    write_program(bench.folder / "bin" / "scontrol", 'echo "  NodeAddr=127.0.0.1 X=1"\n')
    return bench


def assert_ray_is_gone(bench: Bench) -> None:
    """Check that no process and no folder of the stand-in is left."""
    pid = int((bench.folder / "calls.pid").read_text())
    process = Path(f"/proc/{pid}")
    assert not process.exists() or " Z " in (process / "stat").read_text()
    (folder,) = bench.calls("folder")
    path, mode = folder.split()
    assert mode == "700"
    assert not Path(path).exists()


@pytest.mark.parametrize("code", ["0", "65"])
def test_ray_starts_before_the_build_and_ends_with_it_however_it_ends(
    bench: Bench, code: str
) -> None:
    ended, output = bench.run(*BUILD, **ON_RAY, BUILD_EXIT=code)
    assert ended == int(code), output
    (ray,) = bench.calls("ray")
    (address,) = bench.calls("address")
    port = re.fullmatch(r"127\.0\.0\.1:(\d+)", address)
    assert port is not None
    assert f"--head --port={port[1]} --include-dashboard=false" in ray
    assert "--num-cpus=4" in ray
    assert f"--memory={(32768 - 3072) * 2**20}" in ray
    assert "--disable-usage-stats" in ray
    assert bench.calls("token") == ["64 token"]
    assert "-m data_pipeline build mix.yaml --out out --engine ray" in bench.calls("python")
    assert bench.calls("nodes") == ["1"]
    assert_ray_is_gone(bench)


def test_token_is_in_no_command_line_and_new_in_each_job(bench: Bench) -> None:
    write_program(
        bench.folder / "venv" / "bin" / "python", 'echo "$RAY_AUTH_TOKEN" >>"$CALLS.token"\n'
    )
    for _ in range(2):
        assert bench.run(*BUILD, **ON_RAY)[0] == 0
    tokens = set((bench.folder / "calls.token").read_text().split())
    assert len(tokens) == 2
    calls = (bench.folder / "calls").read_text()
    assert not any(token in calls for token in tokens)


def test_signal_to_the_job_ends_the_build_and_ray(bench: Bench) -> None:
    process = bench.start(*BUILD, **ON_RAY, BUILD_WAITS="1")
    bench.wait_for("address")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    assert_ray_is_gone(bench)


def test_ray_that_does_not_start_ends_the_job_with_its_words(bench: Bench) -> None:
    ended, output = bench.run(*BUILD, **ON_RAY, RAY_EXIT="1")
    assert ended == 70, output
    assert "Ray says no" in output
    assert "Ray ended while it started" in output
    assert not bench.calls("address")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"CPT_DATA_ENGINE": "dask"}, "CPT_DATA_ENGINE is 'dask', must be local or ray"),
        (
            {
                **ON_RAY,
                "SLURM_ARRAY_TASK_ID": "0",
                "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_MAX": "1",
            },
            "submit with --nodes=N and without --array",
        ),
    ],
)
def test_what_cannot_run_on_ray_is_refused(
    bench: Bench, settings: dict[str, str], said: str
) -> None:
    ended, output = bench.run(*BUILD, **settings)
    assert ended == 78
    assert said in output
    assert not bench.calls("ray")


def test_without_the_extra_the_job_says_what_to_install(bench: Bench) -> None:
    os.unlink(bench.folder / "venv" / "bin" / "ray")
    path = f"{bench.folder}/bin:/usr/bin:/bin"
    ended, output = bench.run(*BUILD, **ON_RAY, PATH=path)
    assert ended == 70
    assert "has no program ray. Install gpt-oss-cpt[ray] there" in output


@pytest.mark.slow
def test_real_ray_on_two_slurm_nodes_builds_the_bytes_of_one_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    texts = [f"document {number} of a small source " * 9 for number in range(200)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "en.jsonl").write_text("".join(lines))
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        "seq_len: 256\nseed: 1\n"
        "sources: [{name: en, language: en, domain: web, path: en.jsonl, weight: 1.0}]\n"
    )
    (tmp_path / "env.sh").write_text(
        f"CPT_RUN_DIR={tmp_path}/run\nCPT_CONFIG=none\nCPT_DS_CONFIG=none\n"
        "CPT_DATA_ENGINE=ray\nexport PYTHONPATH=$PWD\n"
    )
    job = cluster.submit(
        "--nodes=2",
        "--cpus-per-task=1",
        "--mem=0",
        "slurm/prepare_data.sbatch",
        str(mix),
        f"{tmp_path}/by-ray",
        CPT_ENV=f"{tmp_path}/env.sh",
    )
    fields = cluster.wait(job)
    output = cluster.output(job)
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), output
    assert "2 nodes, 2 CPUs" in output
    assert output.count("Ray has ended on node") == 2, output
    build(load_mix(mix), tmp_path / "alone", progress=False)
    manifest = (tmp_path / "alone" / "manifest.json").read_bytes()
    assert (tmp_path / "by-ray" / "manifest.json").read_bytes() == manifest

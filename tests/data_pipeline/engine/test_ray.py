"""Two Ray nodes make the bytes that local processes make, also if they lose workers."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.__main__ import main
from data_pipeline.build.build import build
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.engine import ray_cluster
from data_pipeline.engine.choice import open_executor
from data_pipeline.engine.ray_cluster import RayExecutor
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.parts.cache_folder import open_cache
from data_pipeline.reading import input_files
from data_pipeline.store.manifest import FILE_NAME, read_manifest
from tests.data_pipeline.engine import tasks
from tests.data_pipeline.inputs import MakeMix, make_texts, mix_of_several_units

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
LAUNCH_SECONDS = 120

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="the package ray is not installed (the extra `ray`)",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[int]:
    """Start two nodes, name them in the environment, and return the process id of their parent."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # the paths of its sockets must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("PYTHONPATH", str(ROOT))
        log = (folder / "log").open("wb")
        child = subprocess.Popen(
            [sys.executable, str(HERE / "two_ray_nodes.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            address = child.stdout.readline().strip()
            assert address, (folder / "log").read_text()
            patch.setenv("RAY_ADDRESS", address)
            yield child.pid
        finally:
            child.stdin.close()
            child.wait(LAUNCH_SECONDS)
            log.close()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def mix(make_mix: MakeMix, monkeypatch: pytest.MonkeyPatch) -> MixConfig:
    return mix_of_several_units(make_mix, monkeypatch)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the manifest and all files that it lists; notes about the files are left out."""
    found = {}
    for name in (FILE_NAME, *read_manifest(folder).files):
        found[name] = (folder / name).read_bytes()
    return found


def ray_workers(ancestor: int) -> list[int]:
    """Return the process ids of the workers that descend from a process."""
    parents = {}
    workers = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int(
                (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            )
            name = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if name.startswith((b"ray::make_part", b"ray::IDLE")):
            workers.append(int(entry.name))
    own = []
    for pid in workers:
        above = pid
        while above in parents and above != ancestor:
            above = parents[above]
        if above == ancestor:
            own.append(pid)
    return own


@pytest.mark.usefixtures("cluster")
def test_two_nodes_build_the_bytes_that_local_processes_build(
    mix: MixConfig, tmp_path: Path
) -> None:
    build(mix, tmp_path / "one", progress=False, workers=1)
    build(mix, tmp_path / "three", progress=False, workers=3)
    build(mix, tmp_path / "ray", progress=False, workers=None, engine="ray")
    expected = files_of(tmp_path / "one")
    assert len(expected) > 20
    assert files_of(tmp_path / "three") == expected
    assert files_of(tmp_path / "ray") == expected


@pytest.mark.slow
def test_a_build_whose_workers_are_killed_ends_with_the_same_manifest(
    cluster: int, make_mix: MakeMix, tmp_path: Path
) -> None:
    make_mix({"ja": make_texts(3000, "ja"), "en": make_texts(3000, "en")}, held_out_share=0.01)
    code = (
        "import sys; from data_pipeline.reading import units; units.MIN_UNIT_BYTES = 10_000\n"
        "from data_pipeline.__main__ import main; sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "build", str(tmp_path / "in" / "mix.yaml"), "--out"]
    alone = subprocess.run(
        [*command, str(tmp_path / "one")], cwd=ROOT, check=True, capture_output=True, text=True
    )
    child = subprocess.Popen(
        [*command, str(tmp_path / "ray"), "--engine", "ray"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    parts = tmp_path / ".ray.building" / "parts"
    num_killed = 0
    for wanted in (2, 12, 30):  # parts that are there when a worker is killed
        while child.poll() is None and len(list(parts.rglob("*.json"))) < wanted:
            time.sleep(0.01)
        while child.poll() is None and not (found := ray_workers(cluster)):
            time.sleep(0.01)
        if child.poll() is None:
            os.kill(found[0], signal.SIGKILL)
            num_killed += 1
    stdout, stderr = child.communicate(timeout=300)
    assert num_killed == 3, stderr
    assert child.returncode == 0, stderr
    assert stdout.split("manifest ")[1] == alone.stdout.split("manifest ")[1]


@pytest.mark.usefixtures("cluster")
def test_a_lost_task_runs_again_and_an_error_of_ours_arrives_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / str(number) for number in range(6)]
    with open_executor("ray", None, tmp_path) as executor:
        assert executor.num_workers == 4
        names = sorted(name for _, name in executor.run(tasks.die_once, paths[:2]))
        assert names == ["0", "1"]
        with pytest.raises(DataError, match=r"^file-3\.jsonl: cannot be used\.$"):
            list(executor.run(tasks.refuse_three, range(20)))
        assert len(list(executor.run(tasks.square, range(30)))) == 30
        monkeypatch.setattr(ray_cluster, "TASK_MEMORY_BYTES", 2**36)
        with pytest.raises(ConfigError, match=r"a task needs 64\.0 GiB.*has 3\.0 GiB"):
            list(executor.run(tasks.square, [1, 2]))
    assert not list(tmp_path.glob(".seen-*"))


@pytest.mark.usefixtures("cluster")
def test_a_node_without_the_folder_or_with_other_code_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RayExecutor(tmp_path) as executor:
        missing = tmp_path / "elsewhere" / ".seen-0"
        marks = {missing: "in which this build is made. Choose an --out"}
        problems = executor._problems_of_nodes(executor._living_nodes(), marks, "0")
    assert len(problems) == 2
    for problem in problems:
        assert f"does not see {missing.parent}, in which this build is made" in problem
        assert socket.gethostname() in problem
    monkeypatch.setattr(ray_cluster, "digest_of_code", lambda: "0")
    with pytest.raises(ConfigError, match=r"has other code of data_pipeline than this process"):
        RayExecutor(tmp_path)


@pytest.mark.usefixtures("cluster")
def test_a_node_that_does_not_see_the_part_cache_is_named(
    mix: MixConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(tmp_path)
    original = RayExecutor._problems_of_nodes

    def ask_without_cache(
        self: RayExecutor, nodes: Sequence[Any], marks: Mapping[Path, str], token: str
    ) -> list[str]:
        for path in marks:
            if path.parent == cache:
                path.unlink()  # as if the node had another folder there
        return original(self, nodes, marks, token)

    monkeypatch.setattr(RayExecutor, "_problems_of_nodes", ask_without_cache)
    with pytest.raises(ConfigError, match=r"does not see .*part-cache, the part cache") as refusal:
        build(mix, tmp_path / "out", progress=False, workers=None, engine="ray", cache_dir=cache)
    assert len(refusal.value.problems) == 2  # one for each node, and none about --out
    assert not list(tmp_path.rglob(".seen-*"))


def test_an_engine_that_cannot_be_used_is_refused_before_the_input_is_read(
    mix: MixConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: Any, **keys: Any) -> None:
        raise AssertionError("the input is read")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(input_files, "look_at_inputs", read)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refusal:
        build(mix, tmp_path / "out", progress=False, engine="ray")
    assert len(refusal.value.problems) == 3  # address, mode and package
    monkeypatch.chdir(tmp_path)
    for extra in ([], ["--share", "0/2"]):
        command = ["build", str(tmp_path / "in" / "mix.yaml"), "--engine", "ray", *extra]
        assert main(command) == ConfigError.exit_code


def test_a_cluster_that_is_not_named_or_not_protected_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for address in ("", "auto", "local", "ray://host:10001", "host"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=r"RAY_ADDRESS is .*, must be HOST:PORT.*--engine"):
            open_executor("ray", None, tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "host:6379")
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(ConfigError, match=r"RAY_AUTH_MODE is '', must be 'token'"):
        open_executor("ray", None, tmp_path)

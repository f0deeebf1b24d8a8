"""The environment of a rank is read once, and what cannot be right is told with its value."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.errors import ConfigError
from cpt.resilience.environment import (
    LaunchEnvironment,
    job_end,
    rank_of_environment,
    read_environment,
    restarts_of_job,
    restore_gpu_ids,
    speaks_for_node,
)

ROOT = Path(__file__).resolve().parents[2]
NOW = 1_800_000_000.0
RIGHT = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def read(**changed: str | None) -> LaunchEnvironment:
    variables = {}
    for name, value in {**RIGHT, **changed}.items():
        if value is not None:
            variables[name] = value
    return read_environment(variables, NOW)


def test_environment_of_a_launcher_is_read() -> None:
    found = read(CUDA_VISIBLE_DEVICES="4,5", SLURM_RESTART_COUNT="2")
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (1, 2, 1, 2)
    assert (found.restarts, found.gpu_ids, found.master_port) == (2, ("4", "5"), 29500)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "one", "RANK is 'one', must be a whole number"),
        ("RANK", "", "no RANK. Start with"),
        ("RANK", "-1", "RANK is '-1'"),
        ("RANK", "\u00b2", "must be a whole number"),
        ("RANK", "2", "RANK is '2', but WORLD_SIZE is 2"),
        ("RANK", "0", "LOCAL_RANK is '1', but RANK is 0 and all 2 ranks"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is '0'"),
        ("WORLD_SIZE", "9" * 5000, "must be a whole number"),
        ("LOCAL_RANK", "2", "but this node has 2 ranks"),
        ("LOCAL_RANK", "0.0", "LOCAL_RANK is '0.0'"),
        ("LOCAL_WORLD_SIZE", "4", "but WORLD_SIZE is 2"),
        ("LOCAL_WORLD_SIZE", "all", "LOCAL_WORLD_SIZE is 'all'"),
        ("MASTER_PORT", "70000", "from 1 to 65535"),
        ("MASTER_PORT", "tcp", "MASTER_PORT is 'tcp'"),
        ("MASTER_ADDR", " ", "no MASTER_ADDR"),
        ("SLURM_RESTART_COUNT", "x", "SLURM_RESTART_COUNT is 'x'"),
        ("SLURM_JOB_END_TIME", "tomorrow", "must be seconds since 1970"),
        ("SLURM_JOB_END_TIME", "1799900000", "28 hours ago: it is left over"),
        ("CUDA_VISIBLE_DEVICES", "0,x", "'x' is no number, GPU-UUID or MIG-UUID"),
        ("CUDA_VISIBLE_DEVICES", "0,,1", "'' is no number"),
        ("CUDA_VISIBLE_DEVICES", "3,3", "names a GPU twice"),
        ("CUDA_VISIBLE_DEVICES", "MIG-1234-ab,MIG-5678-cd", "names MIG slices, but 2 ranks"),
    ],
)
def test_variable_that_cannot_be_right_is_told(name: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**{name: value})
    assert words in str(caught.value)


def test_all_variables_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        read(RANK="a", WORLD_SIZE="b", MASTER_PORT="c", CUDA_VISIBLE_DEVICES="d")
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        (None, None),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("4, 5", ("4", "5")),
        ("0,-1,1", ("0",)),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",)),
    ],
)
def test_gpus_are_named_by_number_or_uuid(value: str | None, ids: tuple[str, ...] | None) -> None:
    assert read(CUDA_VISIBLE_DEVICES=value).gpu_ids == ids


def test_uuids_that_the_launcher_replaced_by_numbers_are_given_back() -> None:
    variables = {"CUDA_VISIBLE_DEVICES": "0,1", "CPT_VISIBLE_DEVICES": "GPU-ab,GPU-cd"}
    restore_gpu_ids(variables)
    assert variables["CUDA_VISIBLE_DEVICES"] == "GPU-ab,GPU-cd"
    variables = {"CUDA_VISIBLE_DEVICES": "0,1"}
    restore_gpu_ids(variables)
    assert variables["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(
    ("rank", "local_rank", "speaks"),
    [("0", "0", True), ("8", "0", True), ("9", "1", False), ("9", "x", True), ("9", "", False)],
)
def test_refusals_are_told_once_on_each_node(rank: str, local_rank: str, speaks: bool) -> None:
    assert speaks_for_node({"RANK": rank, "LOCAL_RANK": local_rank}) == speaks


def test_one_rank_may_use_a_mig_slice() -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name in ("MIG-63feeb45-94c6-5cb9-bb7f-0a9c8b1b4b6f", "MIG-GPU-8932f937/1/0"):
        assert read(**alone, CUDA_VISIBLE_DEVICES=name).gpu_ids == (name,)


def test_empty_optional_variables_count_as_not_set() -> None:
    found = read(LOCAL_RANK="", LOCAL_WORLD_SIZE="", LOCAL_SIZE="", SLURM_RESTART_COUNT="")
    assert (found.local_rank, found.local_world_size, found.restarts) == (0, 2, 0)
    assert read(LOCAL_WORLD_SIZE=None, LOCAL_SIZE="2").local_world_size == 2
    assert read(SLURM_JOB_END_TIME="1799999000").rank == 1


NUMBERS = st.sampled_from(["", "0", "1", "2", "-1", " 1 ", "1.0", "\u0661", "1e3", "0x1", "nan"])
IDS = st.sampled_from(["0", "0,1", "GPU-ab", "MIG-1/2", "-1", "all", "NoDevFiles", ","])
WORDS = NUMBERS | IDS | st.text(max_size=6) | st.integers().map(str)
NAMES = [*RIGHT, "LOCAL_SIZE", "CUDA_VISIBLE_DEVICES", "SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME"]


@settings(max_examples=300, deadline=None)
@given(
    changed=st.dictionaries(st.sampled_from(NAMES), WORDS), missing=st.sets(st.sampled_from(NAMES))
)
def test_any_environment_ends_in_a_value_or_a_message(
    changed: dict[str, str], missing: set[str]
) -> None:
    variables = {**RIGHT, **changed}
    for name in missing:
        variables.pop(name, None)
    assert rank_of_environment(variables) >= 0 and restarts_of_job(variables) >= 0
    assert (job_end(variables) or 0) >= 0
    found: LaunchEnvironment | None
    problems: list[str] = []
    try:
        found = read_environment(variables, NOW)
    except ConfigError as error:
        problems = error.problems
        found = None
    if found is None:
        assert problems and all(len(text) < 500 for text in problems)
        return
    assert 0 <= found.rank < found.world_size
    assert 0 <= found.local_rank < found.local_world_size <= found.world_size


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_terminal_without_a_character_shows_its_number(variables: dict[str, str]) -> None:
    code = """
import sys
from data_pipeline.commands import prepare_process
prepare_process()
print("\\u3042")
print("\\ud83d lone", file=sys.stderr)
"""
    done = run_python(code, **variables)
    assert done.returncode == 0, done.stderr
    assert "\\u3042" in done.stdout and "\\ud83d lone" in done.stderr


def test_limit_on_open_files_is_raised_to_the_hard_one() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard < 256:
        pytest.skip("the hard limit is not one that can be reached")
    code = """
import resource
from data_pipeline.commands import prepare_process
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
prepare_process()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_command_line_with_an_ascii_terminal_does_not_crash() -> None:
    code = """
import sys
from cpt.cli import main
sys.exit(main(["report", "--run_dir", "/nowhere-\\u3042"]))
"""
    done = run_python(code, PYTHONIOENCODING="ascii")
    assert "Traceback" not in done.stderr and "\\u3042" in done.stderr

"""A disk that is full, read-only or limited costs one clear line, never a complete checkpoint."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpt.checkpoint.reader import list_steps, refusal_of, step_folder
from tests.support.service import Service, run_to_end

pytestmark = pytest.mark.dist


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int, options: str = "") -> Iterator[None]:
    """Mount a small file system inside the block; the test is skipped where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}{options}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def checkpoint_bytes(undisturbed: Service) -> int:
    return sum(entry.stat().st_size for entry in step_folder(undisturbed.run_dir, 6).iterdir())


@pytest.mark.case(
    "D1",
    "periodic save: one error line, training goes on; final save: 74; the previous one is intact",
)
def test_disk_that_fills_up(workplace, checkpoint_bytes) -> None:
    with small_disk(workplace / "disk", int(2.1 * checkpoint_bytes)):
        code, run = run_to_end(workplace, "disk/run")
        told = "training goes on (at step 4): a checkpoint needs"
        assert code == 74 and told in run.output, run.output
        assert "free at disk/run/checkpoints" in run.output
        assert run.step_numbers() == [1, 2, 3, 4, 5, 6]
        assert list_steps(run.run_dir) == [2] and refusal_of(step_folder(run.run_dir, 2)) is None
        assert not list((run.run_dir / "checkpoints").glob(".*"))


@pytest.mark.case(
    "D1", "a write that fails in the middle: named, temporary folder removed, training goes on"
)
def test_write_that_fails_in_the_middle_of_a_periodic_save(workplace) -> None:
    code, run = run_to_end(workplace, "enospc", fault="save_hash:1:2:enospc")
    assert code == 0 and "no space left" in run.output, run.output
    assert list_steps(run.run_dir) == [6, 4]


@pytest.mark.case("D2", "exit 74 before weights are loaded")
def test_too_little_space_at_start(workplace, checkpoint_bytes) -> None:
    with small_disk(workplace / "tiny-disk", checkpoint_bytes):
        code, run = run_to_end(workplace, "tiny-disk/run")
        assert code == 74 and "a checkpoint needs" in run.output, run.output
        assert "patched" not in run.output, run.output


@pytest.mark.case(
    "D3", "exit 74 before weights are loaded, with the path; missing folders are made"
)
@pytest.mark.parametrize("kind", ["file", "below a file", "read-only"])
def test_run_directory_that_cannot_be_used(workplace, kind) -> None:
    place = workplace / f"bad-{kind.replace(' ', '-')}"
    if kind == "read-only":
        with small_disk(place, 10**6, ",ro"):
            code, run = run_to_end(workplace, f"{place.name}/run")
    else:
        place.write_text("not a directory", encoding="utf-8")
        code, run = run_to_end(workplace, place.name if kind == "file" else f"{place.name}/run")
    words = "Read-only file system" if kind == "read-only" else "is not a directory"
    assert code == 74 and words in run.output and place.name in run.output, run.output
    assert "patched" not in run.output, run.output


@pytest.mark.case("D4", "exit 74 before weights are loaded, naming the limit")
def test_limit_on_file_sizes(workplace, checkpoint_bytes) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The run inherits the limit.
    resource.setrlimit(resource.RLIMIT_FSIZE, (checkpoint_bytes // 4, before[1]))
    try:
        code, run = run_to_end(workplace, "limited")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 74 and "ulimit -f" in run.output and "patched" not in run.output, run.output


@pytest.mark.case(
    "X7", "the run directory is 0700; one that its group may write to is refused with 78"
)
def test_run_directory_is_private_and_one_that_others_may_write_to_is_refused(workplace) -> None:
    code, run = run_to_end(workplace, "private", "--set", "train.stop_at_step=1")
    assert code == 0 and run.run_dir.stat().st_mode & 0o777 == 0o700
    run.run_dir.chmod(0o770)
    code, run = run_to_end(workplace, "private", "--set", "train.stop_at_step=2")
    assert code == 78 and "may be written to by its group" in run.output, run.output

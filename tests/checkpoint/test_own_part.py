"""Frozen parameters are written once and linked, and each checkpoint is whole whatever happens."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.manifest import TensorRecord, read_manifest
from cpt.checkpoint.own_part import OwnPart, Ranges
from cpt.checkpoint.pruning import prune
from cpt.checkpoint.reader import list_steps, read_weights, refusal_of, step_folder
from cpt.checkpoint.save_in_progress import SaveInProgress
from cpt.checkpoint.staging import Staging, Way
from cpt.checkpoint.writer import Written, complete_folder, publish_folder
from cpt.errors import StorageError

FROZEN = "__0_1.distcp"
LAYOUT = {"world_size": 1, "sp_size": 1, "ep_size": 1, "zero_stage": 3}


class State:
    """Two parameters of a run in one process, of which the second is frozen."""

    def __init__(self) -> None:
        self.trained = torch.arange(40.0)
        self.frozen = torch.arange(50.0).bfloat16()

    def ranges(self) -> tuple[Ranges, Ranges]:
        moving = {}
        for part in ("master", "exp_avg", "exp_avg_sq"):
            moving[f"{part}/a"] = FlatRange(tensor=self.trained, offset=0, global_numel=40)
        frozen = {"master/b": FlatRange(tensor=self.frozen, offset=0, global_numel=50)}
        return moving, frozen


def part_of_rank() -> OwnPart:
    return OwnPart(0, 2**20, torch.device("cpu"))


def save(
    run_dir: Path,
    own: OwnPart,
    state: State,
    step: int,
    way: Way = "wait",
    when_read: Callable[[], None] = lambda: None,
) -> list[Written]:
    """Save a step as a run of one process does."""
    final = step_folder(run_dir, step)
    temporary = final.with_name(f".tmp-{final.name}")
    temporary.mkdir(parents=True)
    moving, frozen = state.ranges()
    written = own.write(temporary, moving, frozen, step, way, ready=None, when_read=when_read)
    tensors = {
        "a": TensorRecord(shape=(40,), dtype="float32"),
        "b": TensorRecord(shape=(50,), dtype="float32", trained=False),
    }
    parts = [one.to_json() for one in written]
    complete_folder(temporary, parts, step=step, layout=LAYOUT, tensors=tensors, state={})
    publish_folder(temporary, final)
    own.note_published(final)
    return written


def inode(run_dir: Path, step: int) -> int:
    return (step_folder(run_dir, step) / FROZEN).stat().st_ino


def check_whole(run_dir: Path, step: int, state: State) -> None:
    folder = step_folder(run_dir, step)
    assert refusal_of(folder) is None
    weights = read_weights(folder, ["a", "b"], read_manifest(folder))
    assert torch.equal(weights["b"], state.frozen.float())


def test_frozen_parameters_are_written_once_and_each_checkpoint_is_whole(tmp_path: Path) -> None:
    own = part_of_rank()
    state = State()
    first = save(tmp_path, own, state, 1)
    state.trained += 1
    second = save(tmp_path, own, state, 2)
    assert [one.is_linked for one in first + second] == [False, False, False, True]
    assert inode(tmp_path, 1) == inode(tmp_path, 2)
    prune(
        tmp_path,
        newest=2,
        keep_last=1,
        keep_every_steps=0,
        protected=(),
        is_sound=lambda step: True,
    )
    assert list_steps(tmp_path) == [2]
    check_whole(tmp_path, 2, state)
    save(tmp_path, own, state, 3)
    check_whole(tmp_path, 3, state)
    assert inode(tmp_path, 2) == inode(tmp_path, 3)


def test_next_start_links_to_the_checkpoint_that_it_came_from(tmp_path: Path) -> None:
    state = State()
    save(tmp_path, part_of_rank(), state, 1)
    again = part_of_rank()
    again.note_loaded(step_folder(tmp_path, 1))
    written = save(tmp_path, again, state, 2)
    assert written[1].is_linked and inode(tmp_path, 1) == inode(tmp_path, 2)
    check_whole(tmp_path, 2, state)


def test_next_start_with_other_values_writes_them(tmp_path: Path) -> None:
    state = State()
    save(tmp_path, part_of_rank(), state, 1)
    again = part_of_rank()
    again.note_loaded(step_folder(tmp_path, 1))
    state.frozen = state.frozen + 1
    assert not save(tmp_path, again, state, 2)[1].is_linked
    check_whole(tmp_path, 2, state)


def test_run_that_went_back_does_not_link_to_what_it_wrote_before(tmp_path: Path) -> None:
    own = part_of_rank()
    state = State()
    save(tmp_path, own, state, 1)
    save(tmp_path, own, state, 2)
    own.note_loaded(step_folder(tmp_path, 1))
    state.frozen = state.frozen * 2
    assert not save(tmp_path, own, state, 3)[1].is_linked
    check_whole(tmp_path, 3, state)


def test_file_of_a_save_that_failed_is_not_linked_to(tmp_path: Path) -> None:
    """What was loaded has other frozen values, and the save that wrote the new ones was removed."""
    state = State()
    save(tmp_path, part_of_rank(), state, 1)
    again = part_of_rank()
    again.note_loaded(step_folder(tmp_path, 1))
    state.frozen = state.frozen + 1
    lost = tmp_path / "lost"
    lost.mkdir()
    again.write(lost, *state.ranges(), 2, "wait", ready=None, when_read=lambda: None)
    assert not save(tmp_path, again, state, 3)[1].is_linked
    check_whole(tmp_path, 3, state)


def test_file_system_without_hard_links_gets_the_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    own = part_of_rank()
    state = State()
    save(tmp_path, own, state, 1)
    monkeypatch.setattr(os, "link", refuse)
    assert not save(tmp_path, own, state, 2)[1].is_linked
    assert inode(tmp_path, 1) != inode(tmp_path, 2)
    check_whole(tmp_path, 2, state)


@pytest.mark.parametrize("way", ["copy", "stream"])
def test_update_may_change_the_state_once_it_is_told_so(tmp_path: Path, way: Way) -> None:
    state = State()
    expected = state.trained.clone()
    calls = []

    def update() -> None:
        calls.append(1)
        state.trained.fill_(-1.0)

    save(tmp_path, part_of_rank(), state, 1, way, when_read=update)
    folder = step_folder(tmp_path, 1)
    weights = read_weights(folder, ["a"], read_manifest(folder))
    assert calls and torch.equal(weights["a"], expected)


def test_disk_that_is_full_is_told_with_the_cause(tmp_path: Path) -> None:
    save_of_step = SaveInProgress(3, {}, tmp_path / "step-00000003", "stream")
    save_of_step.temporary.mkdir()

    def write() -> None:
        raise OSError(28, "No space left on device")

    save_of_step.beside_training(write)
    assert save_of_step.thread is not None
    save_of_step.thread.join()
    with pytest.raises(StorageError, match="no space left"):
        save_of_step.check()


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory: 1\n2"), MemoryError()])
def test_a_rank_without_memory_for_a_copy_writes_the_state_as_it_lies_from_then_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    own = part_of_rank()
    state = State()
    attempts = []

    def fail(staging: Staging, ranges: Ranges) -> Ranges:
        attempts.append(len(ranges))
        raise error

    monkeypatch.setattr(Staging, "copy", fail)
    when_read = []

    def note(shard: Path) -> None:
        when_read.append(shard.exists())

    for step in (1, 2):
        folder = step_folder(tmp_path, step)
        shard = folder.with_name(f".tmp-{folder.name}") / "__0_0.distcp"
        save(tmp_path, own, state, step, "copy", partial(note, shard))
        check_whole(tmp_path, step, state)
    assert attempts == [3] and when_read == [True, True], "one attempt; updates wait for the file"
    (warning,) = caplog.messages
    assert "rank 0 has no host memory for a copy" in warning and "\n" not in warning


@pytest.mark.parametrize("way", ["copy", "stream", "wait"])
def test_a_save_beside_training_never_touches_the_gpu_of_another_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Way
) -> None:
    """A new thread is on GPU 0, and torch goes back to the GPU that a stream's block began on."""
    on_device = threading.local()
    visited: list[object] = []

    def set_device(device: torch.device) -> None:
        on_device.now = device
        visited.append(device)

    @contextmanager
    def stream_block(stream: SimpleNamespace) -> Iterator[None]:
        before = getattr(on_device, "now", torch.device("cuda", 0))
        set_device(stream.device)
        yield
        set_device(before)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "stream", stream_block)
    own = part_of_rank()
    own._stream = SimpleNamespace(device=torch.device("cuda", 3))  # type: ignore[assignment]
    thread = threading.Thread(target=save, args=(tmp_path, own, State(), 1, way))
    thread.start()
    thread.join()
    assert list_steps(tmp_path) == [1]
    assert set(visited) == {torch.device("cuda", 3)}

"""A save beside training is what the state was when it began, and the update waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cpt.checkpoint import own_part, pruning, saver, writer
from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.manifest import TensorRecord, read_manifest
from cpt.checkpoint.reader import list_steps, read_weights, refusal_of, step_folder
from cpt.checkpoint.save_in_progress import Published
from cpt.checkpoint.saver import Saver
from cpt.config import CheckpointSection
from cpt.deepspeed_adapter.state_reading import StateReading
from cpt.errors import InternalError, StorageError
from cpt.parallel.agreement import gather_json
from cpt.parallel.topology import Topology
from tests.support.checkpoints import EndlessReading

BEGIN = 1.0
"""All values of the trained parameter when a save begins."""
LONG = 60.0
"""Seconds after which a thread is taken to hang."""


class Engine:
    """A trained parameter `a` and a frozen one `b`."""

    def __init__(self) -> None:
        self.state_reading = StateReading()
        self.trained = torch.full((40,), BEGIN)
        self.frozen = torch.arange(50.0).bfloat16()

    def zero_optimization_stage(self) -> int:
        return 3

    def update(self) -> None:
        """Change the state as an update does."""
        self.state_reading.wait()
        self.trained += 1


def ranges_of(engine: Engine, topology: Topology) -> dict[str, FlatRange]:
    ranges = {"master/b": FlatRange(tensor=engine.frozen, offset=0, global_numel=50)}
    for part in ("master", "exp_avg", "exp_avg_sq"):
        ranges[f"{part}/a"] = FlatRange(tensor=engine.trained, offset=0, global_numel=40)
    return ranges


def records_of(engine: Engine, topology: Topology) -> dict[str, TensorRecord]:
    return {
        "a": TensorRecord(shape=(40,), dtype="float32"),
        "b": TensorRecord(shape=(50,), dtype="float32", trained=False),
    }


@contextmanager
def saver_of(
    run_dir: Path,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    async_save: Any,
    keep_last: int = 2,
) -> Iterator[Saver]:
    """Yield what saves a run of one process."""
    monkeypatch.setattr(saver, "stored_ranges", ranges_of)
    monkeypatch.setattr(saver, "tensor_records", records_of)
    store = dist.FileStore(str(run_dir / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        topology: Any = SimpleNamespace(
            rank=0,
            world_size=1,
            sp_size=1,
            ep_size=1,
            device=torch.device("cpu"),
            control_group=dist.group.WORLD,
        )
        section = CheckpointSection(interval_steps=1, async_save=async_save, keep_last=keep_last)
        made = Saver(run_dir, engine, topology, section)
        yield made
        made.close()
    finally:
        dist.destroy_process_group()


class HeldBack:
    """Lets the thread of a save stand still at a fault point until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, point: str) -> None:
        self.may_go_on = threading.Event()
        self._point = point
        monkeypatch.setattr(module, "fault_point", self._visit)

    def _visit(self, point: str, step: int) -> None:
        if point == self._point:
            assert self.may_go_on.wait(LONG)


def in_thread(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def values_of(published: Published | None) -> torch.Tensor:
    assert published is not None and refusal_of(published.folder) is None
    return read_weights(published.folder, ["a"], read_manifest(published.folder))["a"]


@pytest.mark.parametrize(
    ("async_save", "module", "point"),
    [(True, own_part, "save_copy"), ("stream", writer, "save_write")],
)
def test_update_waits_until_the_state_is_read_and_the_checkpoint_has_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: Any, module: Any, point: str
) -> None:
    engine = Engine()
    held = HeldBack(monkeypatch, module, point)
    with saver_of(tmp_path, engine, monkeypatch, async_save) as made:
        made.start(1, {})
        assert not made.own_part_is_settled() and made.advance(0) is None
        updating = in_thread(engine.update)
        updating.join(0.2)
        assert updating.is_alive(), "the update does not begin before the state was read"
        held.may_go_on.set()
        updating.join(LONG)
        published = made.finish()
        assert values_of(published).unique().tolist() == [BEGIN]
        assert engine.trained.unique().tolist() == [BEGIN + 1]
        assert published is not None and published.asynchronous
        assert 0.1 < published.update_wait_seconds <= published.blocked_seconds


def test_copy_that_is_being_written_holds_up_no_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    held = HeldBack(monkeypatch, writer, "save_write")
    with saver_of(tmp_path, engine, monkeypatch, True) as made:
        made.start(1, {})
        updating = in_thread(engine.update)
        updating.join(LONG)
        assert not updating.is_alive() and not made.own_part_is_settled()
        with pytest.raises(InternalError, match="still in flight"):
            made.start(2, {})
        held.may_go_on.set()
        assert values_of(made.finish()).unique().tolist() == [BEGIN]


def test_steps_publish_a_save_once_all_ranks_have_settled_their_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    with saver_of(tmp_path, engine, monkeypatch, "stream") as made:
        steps = []
        for step in (1, 2):
            made.start(step, {})
            published = None
            while published is None:
                engine.update()
                published = made.advance(int(made.own_part_is_settled()))
            steps.append(published)
        assert list_steps(tmp_path) == [2, 1]
        assert [one.linked_bytes > 0 for one in steps] == [False, True]
        first, second = (one.folder / "__0_1.distcp" for one in steps)
        assert first.stat().st_ino == second.stat().st_ino


def test_failed_save_is_told_when_ranks_meet_and_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()

    def fail(point: str, step: int) -> None:
        raise OSError(28, "No space left on device")

    with saver_of(tmp_path, engine, monkeypatch, "stream") as made:
        with monkeypatch.context() as failing:
            failing.setattr(writer, "fault_point", fail)
            made.start(1, {})
            updating = in_thread(engine.update)
            updating.join(LONG)
            assert not updating.is_alive()
            with pytest.raises(StorageError, match="no space left"):
                made.finish()
        assert list(step_folder(tmp_path, 1).parent.iterdir()) == []
        made.start(2, {})
        assert values_of(made.finish()).unique().tolist() == [BEGIN + 1]


def test_the_rank_whose_update_waited_longest_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beside_another_rank(value: Any, group: Any) -> list[Any]:
        is_part = isinstance(value, tuple)
        return [*gather_json(value, group), *([([], 5.0)] if is_part else [])]

    with saver_of(tmp_path, Engine(), monkeypatch, True) as made:
        monkeypatch.setattr(saver, "gather_json", beside_another_rank)
        made.start(1, {})
        published = made.finish()
        assert published is not None and published.update_wait_seconds == 5.0
        assert published.blocked_seconds > 5.0


def test_a_checkpoint_is_kept_until_another_that_is_to_be_kept_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(point: str, step: int) -> None:
        raise OSError(28, "No space left on device")

    with saver_of(tmp_path, Engine(), monkeypatch, True) as made:
        made.start(1, {}, keep=True)
        made.finish()
        for step in (2, 3, 4):
            made.start(step, {})
            made.finish()
        made.close()
        assert made.kept == 1 and list_steps(tmp_path) == [4, 3, 1]
        with monkeypatch.context() as failing:
            failing.setattr(writer, "fault_point", fail)
            made.start(5, {}, keep=True)
            assert made.step_in_flight == 5
            with pytest.raises(StorageError, match="no space left"):
                made.finish()
        assert made.kept == 1 and made.step_in_flight is None
        made.save_now(6, {})
        made.close()
        assert list_steps(tmp_path) == [6, 4, 1], "a save that failed takes no protection away"
        made.save_now(7, {}, keep=True)
        made.save_now(8, {})
        made.close()
        assert made.kept == 7 and list_steps(tmp_path) == [8, 7]


def test_a_later_start_keeps_what_it_is_told_to_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with saver_of(tmp_path, Engine(), monkeypatch, False) as first:
        first.save_now(1, {}, keep=True)
        first.save_now(2, {})
        first.save_now(3, {})
    (tmp_path / "store").unlink(missing_ok=True)
    with saver_of(tmp_path, Engine(), monkeypatch, False) as second:
        second.trust(3)
        second.keep(1)
        second.save_now(4, {})
        second.close()
    assert list_steps(tmp_path) == [4, 3, 1]


def test_a_system_without_threads_fails_the_save_and_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    engine = Engine()
    with saver_of(tmp_path, engine, monkeypatch, "stream") as made:
        with monkeypatch.context() as crowded:
            crowded.setattr(threading.Thread, "start", refuse)
            made.start(1, {})
            assert made.own_part_is_settled()
            engine.update()  # nobody reads the state, so it does not wait
            with pytest.raises(StorageError, match="can't start new thread"):
                made.advance(1)
            made.save_now(2, {})
            made.close()
        assert list_steps(tmp_path) == [2]


def test_a_save_in_haste_does_not_wait_until_an_older_checkpoint_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with saver_of(tmp_path, Engine(), monkeypatch, False) as first:
        for step in (1, 2, 3):
            first.save_now(step, {})
    (tmp_path / "store").unlink(missing_ok=True)
    reading = EndlessReading()
    monkeypatch.setattr(pruning, "refusal_of", reading)
    with saver_of(tmp_path, Engine(), monkeypatch, False, keep_last=3) as second:
        second.trust(3)
        second.save_now(4, {})
        assert reading.began.wait(LONG)
        saving = in_thread(lambda: second.save_now(5, {}, in_haste=True))
        saving.join(LONG)
        assert not saving.is_alive(), "it waits for a reading that does not end"
        second.close_in_haste(LONG)
    assert list_steps(tmp_path) == [5, 4, 3], "three are known to be sound, so 2 goes unread"

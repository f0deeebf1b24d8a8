"""`--resume` of a job that is queued again stands until a start of it has carried it out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.errors import ConfigError
from cpt.job import assembly, run_dir
from cpt.job.resume_order import FILE, note_carried_out, resume_word
from cpt.job.run_dir import held_run_dir
from cpt.resilience.lock import LOCK_TOKEN


@pytest.fixture(autouse=True)
def job_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPT_JOB", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv(LOCK_TOKEN, "")
    for module in (assembly, run_dir):
        monkeypatch.setattr(module, "on_first_rank", lambda _, do: do())
    monkeypatch.setattr(run_dir, "check_run_space", lambda *_: None)


def hold(folder: Path, resume: str) -> Any:
    topology: Any = SimpleNamespace(control_group=None)
    return held_run_dir(folder, resume, None, {}, topology)  # type: ignore[arg-type]


def load(folder: Path, resume: str, monkeypatch: pytest.MonkeyPatch, *, observe: bool) -> None:
    """Load the checkpoint of a step as a start does."""
    monkeypatch.setattr(assembly, "load_checkpoint", lambda *_, **__: SimpleNamespace(step=40))
    context: Any = SimpleNamespace(
        run_dir=folder, resume=resume, topology=None, control_group=None, observe=observe
    )
    assembly.load_newest(context, SimpleNamespace(deepspeed=None))  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["never", "40"])
def test_order_that_no_start_has_carried_out_stands_after_a_requeue(
    tmp_path: Path, order: str
) -> None:
    """The first start died before it held the run directory."""
    (tmp_path / "metrics.jsonl").write_text("of an earlier run", encoding="utf-8")
    assert resume_word(order, 1, tmp_path) == order
    assert resume_word("auto", 1, tmp_path) == "auto"


def test_step_stands_until_its_checkpoint_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold(tmp_path, "40"):  # this start dies while it loads
        assert resume_word("40", 1, tmp_path) == "40"
    with hold(tmp_path, "40"):
        load(tmp_path, "40", monkeypatch, observe=False)
    assert resume_word("40", 2, tmp_path) == "auto"
    with hold(tmp_path, "auto"):
        load(tmp_path, "auto", monkeypatch, observe=False)
    assert resume_word("40", 3, tmp_path) == "auto"


def test_never_stands_until_the_earlier_run_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text("of an earlier run", encoding="utf-8")

    def die(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "move_aside", die)
        with pytest.raises(OSError), hold(tmp_path, "never"):
            pass
    assert resume_word("never", 1, tmp_path) == "never"
    with hold(tmp_path, "never"):
        assert not (tmp_path / "metrics.jsonl").exists()
    assert resume_word("never", 2, tmp_path) == "auto"


def test_order_of_a_first_start_stands_whatever_was_carried_out_before(tmp_path: Path) -> None:
    note_carried_out(tmp_path, "40")
    assert resume_word("40", 0, tmp_path) == "40"
    with hold(tmp_path, "40"):  # dies while it loads: what an earlier job did does not count
        pass
    assert resume_word("40", 1, tmp_path) == "40"


def test_note_counts_for_its_job_and_its_order_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note_carried_out(tmp_path, "40")
    assert resume_word("60", 1, tmp_path) == "60"
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert resume_word("40", 1, tmp_path) == "40"


@pytest.mark.parametrize("order", ["60", "never"])
def test_order_of_another_job_lets_no_job_that_waits_carry_its_own_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    with hold(tmp_path, "40"):
        load(tmp_path, "40", monkeypatch, observe=False)
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    with hold(tmp_path, order):
        load(tmp_path, order, monkeypatch, observe=False)
    assert resume_word(order, 1, tmp_path) == "auto"
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert resume_word("40", 1, tmp_path) == "auto"


def test_look_at_a_run_carries_out_no_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tmp_path, "40", monkeypatch, observe=True)
    assert not (tmp_path / FILE).exists()


def test_note_that_cannot_be_read_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="Submit the job anew: without --resume"):
        resume_word("never", 1, tmp_path)

"""Trackers show numbers as series, and continuations as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cpt.telemetry.shown import scalars
from cpt.telemetry.tensorboard_tracker import TensorBoardTracker


def test_tensorboard_shows_a_continuation_as_text(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path)
    tracker.log(
        {
            "event": "sample",
            "step": 4,
            "number": 1,
            "prompt": "Once",
            "text": " upon",
            "tokens": [1],
        }
    )
    tracker.log({"event": "step", "step": 4, "loss": 2.5})
    tracker.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert found.Tags()["scalars"] == ["train/loss"]
    (event,) = found.Tensors("sample/1/text_summary")
    assert event.step == 4 and event.tensor_proto.string_val[0] == b"**Once** upon"


def show(run_dir: Path, *events: dict[str, Any]) -> None:
    tracker = TensorBoardTracker(run_dir)
    for event in events:
        tracker.log(event)
    tracker.close()


def start(step: int) -> dict[str, Any]:
    return {"event": "start", "step": step, "time": 1.0}


def steps(first: int, last: int, loss: float) -> list[dict[str, Any]]:
    events = []
    for number in range(first, last + 1):
        events.append({"event": "step", "step": number, "loss": loss, "total_tokens": 10 * number})
    return events


def series(run_dir: Path, name: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_restart_draws_no_line_back_and_forth(tmp_path: Path) -> None:
    show(tmp_path, start(0), *steps(1, 5, 3.0))
    show(tmp_path, start(2), *steps(3, 4, 2.0))
    expected = [(1, 3.0), (2, 3.0), (3, 2.0), (4, 2.0)]
    assert series(tmp_path, "train/loss") == expected
    assert series(tmp_path, "train/total_tokens")[-1] == (4, 40.0)


def test_rollback_draws_no_line_back_and_forth(tmp_path: Path) -> None:
    rollback = {"event": "rollback", "step": 2, "from_step": 4, "to_step": 2, "seconds": 1.0}
    show(tmp_path, start(0), *steps(1, 4, 3.0), rollback, *steps(3, 4, 2.0))
    assert series(tmp_path, "train/loss") == [(1, 3.0), (2, 3.0), (3, 2.0), (4, 2.0)]


def test_tensorboard_has_the_routers_as_histograms_over_layers(tmp_path: Path) -> None:
    show(tmp_path, {"event": "router", "step": 3, "aux_loss": 1.0, "entropy": [1.0, 2.0, 3.0]})
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = found.Histograms("router/entropy")
    assert event.step == 3
    assert (event.histogram_value.num, event.histogram_value.sum) == (3, 6.0)
    assert series(tmp_path, "router/entropy/max") == [(3, 3.0)]


def test_tensorboard_has_the_guards_table(tmp_path: Path) -> None:
    guard = {"event": "guard", "step": 4, "domain": "english", "bits_per_byte": 0.9}
    show(tmp_path, guard, {"event": "evaluation", "step": 4, "seconds": 1.0})
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = found.Tensors("guard/table/text_summary")
    assert b"| english | text |" in event.tensor_proto.string_val[0]


def test_memory_is_shown_beside_its_prediction() -> None:
    event = {
        "event": "memory",
        "step": 2,
        "predicted": {"weights": 10},
        "measured_by_rank": [{"weights": 9}, {"weights": 11}],
    }
    assert scalars(event) == {"memory/predicted/weights": 10, "memory/largest_rank/weights": 11}

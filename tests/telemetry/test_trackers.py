"""Trackers show numbers as series, and continuations as text."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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

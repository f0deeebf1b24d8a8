"""Traces that are gone are noticed when a run goes on, not at its next look."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.errors import ConfigError
from cpt.guard.traces import sampling, yardstick
from cpt.guard.traces.yardstick import OwnTraces
from data_pipeline.config.traces_config import TraceDomain


def test_missing_traces_are_refused_when_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sampling, yardstick):
        monkeypatch.setattr(module, "on_first_rank", lambda _, do: do())
    monkeypatch.setattr(yardstick, "untouched_weights", lambda *_: "w")
    monkeypatch.setattr(yardstick, "asked_prompts", lambda _: SimpleNamespace(prompts=["a"]))
    domain = TraceDomain(name="maths", language="en", path="prompts.jsonl")
    mix: Any = SimpleNamespace(guard=SimpleNamespace(traces=(domain,)))
    config: Any = SimpleNamespace(micro_batch_size=1, measured_seq_len=64)
    topology: Any = SimpleNamespace(rank=0, control_group=None)
    clock: Any = None
    traces = OwnTraces(mix, config, topology, tmp_path, clock)
    traces.open_untouched(0)
    with pytest.raises(ConfigError, match="at step 5 the untouched model is gone"):
        traces.open_untouched(5)

"""A run that goes on needs no plan of a run that would begin with its configuration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.checkpoint.run_state import RunState
from cpt.errors import ConfigError
from cpt.job import assembly, job
from cpt.job.assembly import beginning, check_expected_plan, starting_model
from cpt.job.progress import Progress
from cpt.job.resumption import RunIdentity, planned_stages
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.config.stage_config import StageConfig
from data_pipeline.mixture.ledger import Ledger

MIX = MixConfig(
    seed=1,
    stages=(StageConfig(seq_len=64, share=0.99), StageConfig(seq_len=256, share=0.01)),
    sources=(SourceConfig(name="ja", language="ja", domain="web", format="mock", weight=1.0),),
)
ROWS = {"ja": "a hash"}
BEFORE, NOW, DONE = 400, 45, 10
"""Steps of the run when it began, those it is given now, and those that it has done."""


def context_of(run_dir: Path, total_steps: int) -> Any:
    """Return a start of a run whose second stage is a hundredth of it."""
    config = SimpleNamespace(
        measured_seq_len=64,
        stages=(
            SimpleNamespace(seq_len=64, global_batch_size=8),
            SimpleNamespace(seq_len=256, global_batch_size=2),
        ),
        train=SimpleNamespace(total_steps=total_steps, seed=1, global_batch_size=8),
        data=SimpleNamespace(accept_mix_change=False),
    )
    model_config = SimpleNamespace(to_json_string=lambda use_diff: "{}")
    return SimpleNamespace(
        config=config,
        model_config=model_config,
        mix=MIX,
        run_dir=run_dir,
        resume="auto",
        plan=None,
        control_group=None,
    )


def checkpoint_of(context: Any) -> Any:
    """Return a checkpoint that the run has written, as it is found and as it is loaded."""
    stages = planned_stages(context.config, MIX)
    state = RunState(
        model_config={},
        identity=RunIdentity.of(context.config).to_json(stages),
        progress=Progress(step=DONE).to_json(),
        ledger=Ledger.start(MIX, ROWS, context.config.train.total_steps).to_json(),
    )
    return SimpleNamespace(name="step-10", folder=Path("step-10"), step=DONE, state=state)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(job, "on_first_rank", lambda _, do: do())
    return SimpleNamespace(manifest=SimpleNamespace(row_hashes=lambda: ROWS))


def test_new_run_that_has_no_step_for_a_stage_is_refused(tmp_path: Path, data: Any) -> None:
    with pytest.raises(ConfigError, match="needs one at least"):
        beginning(context_of(tmp_path, NOW), data, None)


def test_shortened_run_goes_on_with_the_stages_that_it_has(tmp_path: Path, data: Any) -> None:
    loaded = checkpoint_of(context_of(tmp_path, BEFORE))
    start = beginning(context_of(tmp_path, NOW), data, loaded)
    assert start.stages is not None and start.stages.spans[1].first_batch == 396
    assert start.progress.step == DONE


def test_plan_of_a_mix_built_after_the_gate_is_that_of_the_run_that_goes_on(
    tmp_path: Path, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = checkpoint_of(context_of(tmp_path, BEFORE))
    planned = []

    def plan_of(config: Any, data: Any, mix: Any, start: Any) -> Any:
        planned.append(start)
        return SimpleNamespace(warnings=())

    monkeypatch.setattr(assembly, "expected_checkpoint", lambda *_: expected)
    monkeypatch.setattr(assembly, "plan_of", plan_of)
    monkeypatch.setattr(assembly, "check_plan", lambda *_: None)
    check_expected_plan(context_of(tmp_path, NOW), data)
    assert planned[0].progress.step == DONE


def test_a_run_keeps_what_its_first_weights_were_known_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "on_first_rank", lambda _, do: do())
    known = SimpleNamespace(hash="tensors:1", sums=None)
    monkeypatch.setattr(assembly, "base_of", lambda *_: known)
    context = context_of(tmp_path, NOW)
    context.config.model = SimpleNamespace(path=Path("base"))
    context.config.adapter = SimpleNamespace(is_on=False)
    recorded = starting_model(context, None)
    assert recorded == {"hash": "tensors:1", "sums": None}
    known.hash = "tensors:2"
    loaded: Any = SimpleNamespace(state=RunState(model_config={}, starting_model=recorded))
    assert starting_model(context, loaded) == recorded, "whatever lies there now"
    context.config.model.path = None
    assert starting_model(context, None) is None

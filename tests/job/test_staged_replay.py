"""A raise of replay in one stage of sequence length leaves each later stage rows enough."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cpt.guard.ladder import GuardState
from cpt.guard.lever_limits import LeverLimits
from cpt.guard.replay_share import EPOCH_MARGIN, ReplayShares, Stretch
from cpt.job.guard_levers import lever_limits
from cpt.job.job import Job
from cpt.job.stretches import capped_phases
from data_pipeline.config.mix_config import GuardConfig, GuardDomain, MixConfig
from data_pipeline.config.schedule_config import SchedulePhase
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.config.stage_config import StageConfig
from data_pipeline.errors import DataError
from data_pipeline.mixture.ledger import Ledger
from data_pipeline.mixture.mixture import Mixture
from data_pipeline.mixture.stages import StagePlan, StageSpan
from tests.job.test_micro_batches import make_job

PLAN = StagePlan(
    (
        StageSpan(first_batch=0, seq_len=8, global_batch_size=12),
        StageSpan(first_batch=20, seq_len=16, global_batch_size=6),
    )
)
TOTAL_STEPS = 30
ENGLISH_ROWS = (400, 24)
"""Full rows of English in each stage; the second takes 60 rows of all sources."""
SHARE = 0.3


def mix_of(max_epochs: float | None) -> MixConfig:
    return MixConfig(
        seed=3,
        stages=(StageConfig(seq_len=8, share=2 / 3), StageConfig(seq_len=16, share=1 / 3)),
        sources=(
            SourceConfig(
                name="en",
                language="en",
                domain="web",
                format="mock",
                weight=SHARE,
                held_out_share=0.1,
                max_epochs=max_epochs,
            ),
            SourceConfig(name="ja", language="ja", domain="web", format="mock", weight=1 - SHARE),
        ),
        guard=GuardConfig(domains=(GuardDomain(name="english", language="en", sources=("en",)),)),
    )


class StagedData:
    """A build of two sources with the rows of one stage."""

    source_names = ("en", "ja")

    def __init__(self, stage: int, learned: float = 1.0) -> None:
        """Take the share of the tokens of Japanese that is learned."""
        self.stage = stage
        self.learned = {"en": 1.0, "ja": learned}
        self.seq_len = PLAN.spans[stage].seq_len
        entries = []
        for name in self.source_names:
            stages = []
            for number, span in enumerate(PLAN.spans):
                rows = self.rows(name, number)
                tokens = int(rows * span.seq_len * self.learned[name])
                stages.append(SimpleNamespace(rows=rows, predicted_tokens=tokens))
            entries.append(SimpleNamespace(name=name, stages=tuple(stages)))
        self.manifest = SimpleNamespace(sources=tuple(entries))

    @staticmethod
    def rows(name: str, stage: int) -> int:
        return ENGLISH_ROWS[stage] if name == "en" else 1000

    def of_stage(self, stage: int) -> StagedData:
        return StagedData(stage)

    def row_tokens(self, source: int) -> Any:
        name = self.source_names[source]
        return np.full(self.rows(name, self.stage), int(self.seq_len * self.learned[name]))


def staged_job(mix: MixConfig, step: int, learned: float = 1.0) -> Job:
    """Return a run that has done some steps of its first stage."""
    data: Any = StagedData(0, learned)
    job = make_job(data, total_steps=TOTAL_STEPS)
    context: Any = job.context
    context.mix = mix
    context.config.stage = 0
    context.config.train.warmup_steps = 0
    context.config.train.kl_weight = None
    job.stages = PLAN
    data.manifest.row_lengths = (8, 16)
    job.progress.step = step
    job.replay = ReplayShares(mix, data, 0.75)
    guard: Any = SimpleNamespace(domain_names=("english",), state=GuardState())
    job.guard = guard
    job._follow(Ledger.start(mix, total_steps=TOTAL_STEPS))
    return job


def later_stage(english_rows: int) -> Stretch:
    """Return a stage of 60 rows of 16 tokens."""
    rows = {"en": english_rows, "ja": 1000}
    tokens = {name: 16 * count for name, count in rows.items()}
    return Stretch(rows=60, source_rows=rows, source_tokens=tokens, mean_shares={})


def limits_at(step: int, max_epochs: float | None) -> tuple[Job, LeverLimits]:
    job = staged_job(mix_of(max_epochs), step)
    return job, lever_limits(job)


@pytest.mark.parametrize("step", [5, 15, 19])
def test_raise_is_limited_by_the_epochs_of_a_later_stage(step: int) -> None:
    job, limits = limits_at(step, max_epochs=1.0)
    largest = limits.shares["english"][1]
    assert largest == pytest.approx(EPOCH_MARGIN * 24 / 60)
    assert limits.sources["en"].largest == pytest.approx(largest)
    job.reweigh(GuardState(shares={"english": largest}))
    second: Any = StagedData(1)
    mixture = Mixture(second, job.ledger, 3, first_step=20)
    batch = mixture.global_batch(TOTAL_STEPS - 1, 6)  # the last one of the run: rows are left
    assert int(batch.epochs.max()) == 0
    job.reweigh(GuardState(shares={"english": 0.45}))
    beyond = Mixture(second, job.ledger, 3, first_step=20)
    with pytest.raises(DataError, match="max_epochs"):
        beyond.global_batch(TOTAL_STEPS - 1, 6)


def test_raise_beside_conversations_goes_as_far_as_the_rows_of_a_later_stage() -> None:
    """A quarter of the Japanese tokens is learned, so English has few rows to give for a share."""
    job = staged_job(mix_of(max_epochs=1.0), 5, learned=0.25)
    largest = lever_limits(job).shares["english"][1]
    assert largest > 2 * SHARE
    second: Any = StagedData(1, learned=0.25)
    job.reweigh(GuardState(shares={"english": largest}))
    mixture = Mixture(second, job.ledger, 3, first_step=20)
    assert mixture.position(TOTAL_STEPS, 6).drawn_rows[0] in (23, 24)


def test_source_that_may_repeat_is_not_limited_by_a_later_stage() -> None:
    _, limits = limits_at(5, max_epochs=None)
    assert limits.shares["english"][1] == 1.0


def test_schedule_that_takes_less_in_a_later_stage_leaves_more_for_a_raise() -> None:
    mix = mix_of(max_epochs=1.0)
    data: Any = StagedData(0)
    later = later_stage(english_rows=24)
    drawn = SimpleNamespace(drawn_rows=(0, 0))
    mixture: Any = SimpleNamespace(position=lambda batch, batch_size: drawn)
    for mean, left in ((0.1, 0.292), (0.35, 0.042), (0.5, 0.0)):
        limits = ReplayShares(mix, data, 0.75).limits(
            GuardState(),
            ["english"],
            mixture,
            0,
            batches_left=20,
            batch_size=12,
            stretches=[replace(later, mean_shares={"en": mean, "ja": 1 - mean})],
        )
        assert limits.shares["english"][1] == pytest.approx(SHARE + left)


def test_source_without_rows_in_a_later_stage_is_not_raised() -> None:
    mix = mix_of(max_epochs=None)
    data: Any = StagedData(0)
    plan = {"en": 0.0, "ja": 1.0}
    later = replace(later_stage(english_rows=0), mean_shares=plan)
    drawn = SimpleNamespace(drawn_rows=(0, 0))
    mixture: Any = SimpleNamespace(position=lambda batch, batch_size: drawn)
    shares = ReplayShares(mix, data, 0.75).at(plan, {})
    limits = shares.limits(
        GuardState(), ["english"], mixture, 0, batches_left=20, batch_size=12, stretches=[later]
    )
    assert limits.shares["english"] == (0.0, 0.0)


CAREFUL = replace(
    mix_of(max_epochs=None),
    schedule=(
        SchedulePhase(name="main", until_step=10),
        SchedulePhase(
            name="careful",
            share="rest",
            weights={"en": 0.1, "ja": 0.9},
            max_epochs={"en": 0.5},
        ),
    ),
)
"""Its second phase lies in both stages: 120 rows of the first one and 60 of the second."""


@pytest.mark.parametrize("step", [5, 15])
def test_phase_that_limits_epochs_is_looked_at_in_each_stage_that_it_lies_in(step: int) -> None:
    job = staged_job(CAREFUL, step)
    here, later = capped_phases(job)
    left = 20 - max(step, 10)
    assert (here.rows, later.rows) == (12 * left, 60)
    assert (here.source_rows["en"], later.source_rows["en"]) == ENGLISH_ROWS
    assert here.max_epochs == later.max_epochs == {"en": 0.5}
    assert later.mean_shares == pytest.approx({"en": 0.1, "ja": 0.9})
    assert later.drawn == {}
    if step == 5:
        assert here.drawn == {}, "the phase has not begun"
    else:
        assert here.drawn["en"] == pytest.approx(0.1 * 60, abs=1)


def test_raise_leaves_a_phase_the_epochs_that_it_allows_in_a_later_stage() -> None:
    job = staged_job(CAREFUL, 15)
    largest = lever_limits(job).shares["english"][1]
    assert largest == pytest.approx(EPOCH_MARGIN * 0.5 * 24 / 60)
    second: Any = StagedData(1)
    job.reweigh(GuardState(shares={"english": largest}))
    Mixture(second, job.ledger, 3, first_step=20).global_batch(TOTAL_STEPS - 1, 6)
    job.reweigh(GuardState(shares={"english": 0.25}))
    beyond = Mixture(second, job.ledger, 3, first_step=20)
    with pytest.raises(DataError, match="max_epochs"):
        beyond.global_batch(TOTAL_STEPS - 1, 6)

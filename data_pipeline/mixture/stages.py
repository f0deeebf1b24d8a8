"""Stages of a run: rows of several lengths, one after the other.

    batch -> stage (`StagePlan`) -> rows of that stage (`mixture_of`)

Decisions
    The borders are batches. They follow from the shares, the tokens of a step and the steps of the
    run when the run begins. Every checkpoint keeps them, so a run that is given more steps goes on
    longer in its last stage.
    A stage is a mixture of its own over its own rows, with the segments of the ledger that hold in
    it. So at every prefix of a stage every source is within one of its rows of its share, and a
    batch is a pure function of (ledger, stage plan, seed, number of the batch).
    A document is in one stage only (`data_pipeline.fates.stage_choice`), so no stage repeats what
    another one has taught.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.config.stage_config import StageConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import ConfigError
from data_pipeline.mixture.ledger import Ledger
from data_pipeline.mixture.mixture import Mixture


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpan:
    """One stage of a run, from its first batch until that of the next stage."""

    first_batch: int
    """Number of its first batch; without a rollback that is its first step, counted from 0."""
    seq_len: int
    """Tokens of a packed row."""
    global_batch_size: int
    """Packed rows of one optimizer step."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The stages of a run, in the order of their batches."""

    spans: tuple[StageSpan, ...]

    def __post_init__(self) -> None:
        starts = [span.first_batch for span in self.spans]
        if not starts or starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts)):
            raise ConfigError(f"stages: their first batches are {starts}, must rise from 0.")

    def stage_of(self, batch: int) -> int:
        """Return the number of the stage of a batch, counted from 0."""
        starts = [span.first_batch for span in self.spans]
        return bisect.bisect_right(starts, batch) - 1

    def batches_of(self, stage: int, total_batches: int) -> tuple[int, int]:
        """Return the batches [first, last) of a stage in a run of `total_batches` batches."""
        first = self.spans[stage].first_batch
        last = total_batches
        if stage + 1 < len(self.spans):
            last = min(last, self.spans[stage + 1].first_batch)
        return first, max(first, last)

    def to_json(self) -> list[dict[str, int]]:
        """Return the stages as JSON values."""
        return [dataclasses.asdict(span) for span in self.spans]

    @classmethod
    def from_json(cls, value: Sequence[Mapping[str, Any]]) -> StagePlan:
        """Return the stages that `to_json` wrote.

        Raises:
            ConfigError: the value is none that it writes.
        """
        try:
            return cls(tuple(StageSpan(**span) for span in value))
        except TypeError as error:
            raise ConfigError(f"stages of the run: lack or misname a key: {error}.") from error


def plan_stages(
    stages: Sequence[StageConfig], global_batch_sizes: Sequence[int], total_batches: int
) -> StagePlan:
    """Return where the stages of a run begin, so that each has its share of the run's tokens.

    Args:
        stages: The stages of the mix.
        global_batch_sizes: Packed rows of one step in each stage.
        total_batches: Steps of the run.

    Raises:
        ConfigError: a stage has not a single step.
    """
    # steps of a stage, up to a factor: tokens of the stage / tokens of one of its steps
    lengths = []
    for stage, rows in zip(stages, global_batch_sizes, strict=True):
        lengths.append(stage.share / (stage.seq_len * rows))
    ends = [math.fsum(lengths[: number + 1]) for number in range(len(lengths))]
    starts = [0] + [round(total_batches * end / ends[-1]) for end in ends[:-1]]
    problems = []
    for number, (first, last) in enumerate(itertools.pairwise([*starts, total_batches])):
        if first >= last:
            wanted = total_batches * lengths[number] / ends[-1]
            problems.append(
                f"stages[{number}] (rows of {stages[number].seq_len}): a share of "
                f"{stages[number].share:g} is {wanted:.2f} of {total_batches} steps, and it needs "
                "one at least. Raise its share or train.total_steps, or lower its "
                "global_batch_size."
            )
    if problems:
        raise ConfigError(problems)
    spans = []
    for stage, rows, first in zip(stages, global_batch_sizes, starts, strict=True):
        spans.append(StageSpan(first_batch=first, seq_len=stage.seq_len, global_batch_size=rows))
    return StagePlan(tuple(spans))


def rows_of_equal_tokens(stages: Sequence[StageConfig], global_batch_size: int) -> list[int]:
    """Return the packed rows of a step of each stage that have as many tokens as in the first.

    Raises:
        ConfigError: that is no whole number of rows.
    """
    tokens = stages[0].seq_len * global_batch_size
    sizes = []
    problems = []
    for number, stage in enumerate(stages):
        rows, rest = divmod(tokens, stage.seq_len)
        if rest:
            problems.append(
                f"stages[{number}]: the {tokens} tokens of {global_batch_size} rows of "
                f"{stages[0].seq_len} are no whole number of rows of {stage.seq_len}. Take another "
                "number of rows a step."
            )
        sizes.append(rows)
    if problems:
        raise ConfigError(problems)
    return sizes


def mixture_of(built: BuiltData, ledger: Ledger, seed: int, plan: StagePlan | None) -> Mixture:
    """Return the mixture of a run, or of one of its stages.

    That of a stage knows its batches by their numbers in the run, and none of another stage.

    Args:
        built: The build, of the stage (`BuiltData.of_stage`).
        ledger: The weights over the whole run.
        seed: Decides the order of the rows.
        plan: The stages; None for a run without them.

    Raises:
        ConfigError, DataError: see `Mixture`.
    """
    first_step = 0 if plan is None else plan.spans[built.stage].first_batch
    return Mixture(built, ledger, seed, first_step=first_step)

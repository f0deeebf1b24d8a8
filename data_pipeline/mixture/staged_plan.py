"""The data plan of a run with stages of sequence length: one plan for each stage, and their sum."""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass
from typing import Any

from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.data_plan import (
    DataPlan,
    PlannedLimit,
    PlannedPhase,
    language_shares_of,
    make_data_plan,
    read_and_asked,
    steps_of_epochs,
)
from data_pipeline.mixture.epochs import has_epochs, has_own_weights
from data_pipeline.mixture.ledger import Ledger
from data_pipeline.mixture.phases import phase_problems, phases_of
from data_pipeline.mixture.stages import StagePlan, plan_stages, rows_of_equal_tokens
from data_pipeline.tables import table

MAX_STEPS = 2**33
"""Steps of the longest run that epochs are laid over."""
_COLUMNS = ("stage", "rows of", "steps", "rows per step", "drawn tokens", "share")


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedPlan:
    """A run over a built mix with stages."""

    stages: StagePlan
    plans: tuple[DataPlan, ...]
    """The plan of each stage. Epochs are of the rows of the stage, since no other one has them."""
    own_warnings: tuple[str, ...] = ()
    """Warnings of the run that are of no stage."""

    @property
    def drawn_tokens(self) -> int:
        """Predicted tokens of the run."""
        return sum(plan.drawn_tokens for plan in self.plans)

    @property
    def problems(self) -> tuple[str, ...]:
        """Reasons why the run cannot be done, by stage; empty if it can."""
        return self._lines("problems")

    @property
    def warnings(self) -> tuple[str, ...]:
        """Things that a person should think about, those of a stage with its name."""
        return (*self._lines("warnings"), *self.own_warnings)

    def _lines(self, kind: str) -> tuple[str, ...]:
        lines = []
        for number, plan in enumerate(self.plans):
            for line in getattr(plan, kind):
                lines.append(f"{self._name(number)}: {line}")
        return tuple(lines)

    def _name(self, number: int) -> str:
        return f"stage {number + 1} (rows of {self.stages.spans[number].seq_len:,})"

    def whole(self) -> DataPlan:
        """Return the plans of all stages added up; epochs are means over the tokens of a source."""
        sources = []
        total = max(self.drawn_tokens, 1)
        for parts in zip(*(plan.sources for plan in self.plans), strict=True):
            tokens = sum(part.tokens for part in parts)
            drawn = sum(part.drawn_tokens for part in parts)
            curve: list[float] = []
            drawn_before = 0.0
            for part in parts:
                weight = part.tokens / max(tokens, 1)
                curve += [drawn_before + weight * epochs for epochs in part.epoch_curve]
                drawn_before += weight * part.epochs
            sources.append(
                dataclasses.replace(
                    parts[0],
                    documents=sum(part.documents for part in parts),
                    tokens=tokens,
                    slots=sum(part.slots for part in parts),
                    rows=sum(part.rows for part in parts),
                    drawn_tokens=drawn,
                    epochs=drawn_before,
                    share=drawn / total,
                    read_once_at_step=None,
                    epoch_curve=tuple(curve),
                )
            )
        curve_steps: list[int] = []
        for plan in self.plans:
            curve_steps += plan.curve_steps
        shares = language_shares_of(sources)
        by_language: dict[str, PlannedLimit] = {}
        of_phases = []
        phases: list[PlannedPhase] = []
        for plan in self.plans:
            phases += plan.phases
            for limit in plan.limits:
                if limit.phase:
                    of_phases.append(limit)
                    continue
                share = shares.get(limit.language, 0.0)
                before = by_language.get(limit.language, limit)
                met = limit.met and before.met
                by_language[limit.language] = dataclasses.replace(limit, share=share, met=met)
        return dataclasses.replace(
            self.plans[0],
            limits=(*by_language.values(), *of_phases),
            phases=tuple(phases),
            steps=sum(plan.steps for plan in self.plans),
            sources=tuple(sources),
            curve_steps=tuple(curve_steps),
            problems=self.problems,
            warnings=self.warnings,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values: that of the whole run, and that of each stage."""
        stages = []
        for span, plan in zip(self.stages.to_json(), self.plans, strict=True):
            stages.append({**span, **plan.to_json()})
        return {**self.whole().to_json(), "stages": stages}

    def describe(self) -> str:
        """Return a table of the stages for people, then the plan of each of them."""
        rows = []
        for number, (span, plan) in enumerate(zip(self.stages.spans, self.plans, strict=True), 1):
            last = span.first_batch + plan.steps
            rows.append(
                (
                    str(number),
                    f"{span.seq_len:,}",
                    f"{span.first_batch + 1:,} to {last:,}",
                    f"{span.global_batch_size:,}",
                    f"{plan.drawn_tokens:,}",
                    f"{plan.drawn_tokens / max(self.drawn_tokens, 1):.2%}",
                )
            )
        parts = [table(_COLUMNS, rows)]
        for number, plan in enumerate(self.plans):
            parts.append(f"\n{self._name(number)}\n{plan.describe()}")
        parts += [f"warning: {line}" for line in self.own_warnings]
        return "\n".join(parts)


def plan_mix(
    built: BuiltData,
    mix: MixConfig,
    steps: int,
    global_batch_size: int,
    ledger: Ledger | None = None,
) -> DataPlan | StagedPlan:
    """Plan a run over a mix with or without stages; arguments as for `make_data_plan`.

    With stages, `global_batch_size` are the rows of a step in the first one, and a step of the
    others has as many tokens.

    Raises:
        ConfigError: a stage has no step, or its steps no whole number of rows.
    """
    if not mix.stages:
        return make_data_plan(built, mix, steps, global_batch_size, ledger)
    sizes = rows_of_equal_tokens(mix.stages, global_batch_size)
    return make_staged_plan(built, mix, plan_stages(mix.stages, sizes, steps), steps, ledger)


def steps_of_one_pass(built: BuiltData, mix: MixConfig, global_batch_size: int) -> int:
    """Return the number of steps that draw as many rows as the build has, or as its epochs take.

    Args:
        built: The build of `mix`.
        mix: The mix.
        global_batch_size: Packed rows of a step, in the first stage if there are several.

    Raises:
        ConfigError: as `plan_mix`.
    """
    sizes = [global_batch_size]
    if mix.stages:
        sizes = rows_of_equal_tokens(mix.stages, global_batch_size)
    if has_epochs(mix):
        of_stages = [built.of_stage(number) for number in range(len(sizes))]
        return _steps_with_phases(mix, steps_of_epochs(of_stages, mix, sizes))
    steps = 0
    for number, size in enumerate(sizes):
        rows = built.of_stage(number)
        num_rows = sum(rows.num_rows(source) for source in range(len(rows.source_names)))
        steps += max(-(-num_rows // size), 1)
    return steps


def _steps_with_phases(mix: MixConfig, asked_steps: int) -> int:
    """Return the length of a run whose phases without weights of their own have enough steps.

    Where no length gives them so many, because they end at fixed steps, it is `asked_steps`.
    """
    if not any(map(has_own_weights, mix.schedule)):
        return asked_steps
    enough = asked_steps
    while _steps_by_epochs(mix, enough) < asked_steps:
        enough *= 2
        if enough > MAX_STEPS:
            return asked_steps
    return bisect.bisect_left(
        range(enough + 1), asked_steps, lo=asked_steps, key=lambda n: _steps_by_epochs(mix, n)
    )


def _steps_by_epochs(mix: MixConfig, total_steps: int) -> int:
    """Return the steps of a run in phases that draw by the epochs; 0 if it cannot have them all."""
    if phase_problems(mix, total_steps):
        return 0
    steps = 0
    for phase, span in zip(mix.schedule, phases_of(mix, total_steps), strict=True):
        if not has_own_weights(phase):
            steps += span.stop_step - span.start_step
    return steps


def make_staged_plan(
    built: BuiltData,
    mix: MixConfig,
    stages: StagePlan,
    total_batches: int,
    ledger: Ledger | None = None,
) -> StagedPlan:
    """Plan a run with stages without reading a token.

    Args:
        built: The build of `mix`.
        mix: The mix.
        stages: Where the stages begin.
        total_batches: Steps of the run.
        ledger: As for `make_data_plan`.
    """
    ledger = ledger or Ledger.start(mix, total_steps=total_batches)
    plans = []
    for number, span in enumerate(stages.spans):
        first, last = stages.batches_of(number, total_batches)
        plans.append(
            make_data_plan(
                built.of_stage(number),
                mix,
                last - first,
                span.global_batch_size,
                ledger,
                first_step=first,
            )
        )
    plan = StagedPlan(stages=stages, plans=tuple(plans))
    if not has_epochs(mix):
        return plan
    of_stages = [built.of_stage(number) for number in range(len(stages.spans))]
    rows = [span.global_batch_size for span in stages.spans]
    warnings = read_and_asked(plan.whole(), mix, steps_of_epochs(of_stages, mix, rows))
    return dataclasses.replace(plan, own_warnings=tuple(warnings))

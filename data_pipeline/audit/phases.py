"""What a mix makes of its sources over a run: phases, and weights that follow from epochs.

    mix, its build, steps -> data plan -> a table of phases for terminal and page, and a figure

Without a build the phases are shown as the mix has them, with their weights and no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.schedule_config import REST, SchedulePhase
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.mixture.data_plan import PHASE_COLUMNS, DataPlan, change_text, phase_rows
from data_pipeline.mixture.epochs import describe_weights, has_epochs, with_weights
from data_pipeline.mixture.staged_plan import StagedPlan, plan_mix, steps_of_one_pass
from data_pipeline.tables import table

UNPLANNED_COLUMNS = ("phase", "length", "source", "weight", "max epochs", "lr factor")
"""Columns of the phases of a mix that is not built."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseTable:
    """The phases of a run, or of one of its stages, as rows of a table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    plan: DataPlan | None
    """The plan that the rows are of; None for those of the mix alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditedPhases:
    """What an audit shows of a mix that follows a schedule, or has epochs."""

    weights: str
    """The weights that follow from epochs, or that they will follow; empty without epochs."""
    tables: tuple[PhaseTable, ...]
    """One, or one for each stage of sequence length; none without a schedule."""
    note: str = ""
    """Why no tokens are known; empty if they are."""

    def describe(self) -> str:
        """Return all of it for people; empty if the mix has neither a schedule nor epochs."""
        parts = [self.weights] if self.weights else []
        for shown in self.tables:
            parts.append(f"{shown.title}\n{table(shown.columns, shown.rows)}")
        if self.note:
            parts.append(self.note)
        return "\n".join(parts)


def audited_phases(
    mix: MixConfig, built: BuiltData | None, steps: int | None, global_batch_size: int
) -> AuditedPhases:
    """Return what the phases of a mix draw.

    Args:
        mix: The mix.
        built: Its build; None if none was found.
        steps: Steps of the run; None for one pass over the rows, or for the epochs of the mix.
        global_batch_size: Packed rows of a step, in the first of several stages.
    """
    if built is None:
        note = "" if not mix.schedule else "tokens and epochs of the phases are known with a build"
        return AuditedPhases(weights=describe_weights(mix), tables=written_phases(mix), note=note)
    try:
        mix = with_weights(mix, built.manifest)
        if not mix.schedule:
            return AuditedPhases(weights=describe_weights(mix), tables=())
        length = steps or steps_of_one_pass(built, mix, global_batch_size)
        plan = plan_mix(built, mix, length, global_batch_size)
    except (ConfigError, DataError) as error:
        why = (
            f"{error}\nSo nothing is known of tokens and epochs in phases. Another length of the "
            "run is given with --steps."
        )
        return AuditedPhases(weights=describe_weights(mix), tables=written_phases(mix), note=why)
    of_steps = f"{length:,} steps of {global_batch_size:,} rows"
    if steps is None:
        of_steps += ", the epochs of the mix" if has_epochs(mix) else ", one pass over the rows"
    return AuditedPhases(weights=describe_weights(mix), tables=_planned(plan, of_steps))


def _planned(plan: DataPlan | StagedPlan, of_steps: str) -> tuple[PhaseTable, ...]:
    plans = [plan] if isinstance(plan, DataPlan) else list(plan.plans)
    tables = []
    for number, part in enumerate(plans):
        title = f"phases over {of_steps}"
        if isinstance(plan, StagedPlan):
            title += f"; stage {number + 1}, rows of {plan.stages.spans[number].seq_len:,}"
        tables.append(
            PhaseTable(
                title=title, columns=PHASE_COLUMNS, rows=tuple(phase_rows(part.phases)), plan=part
            )
        )
    return tuple(tables)


def written_phases(mix: MixConfig) -> tuple[PhaseTable, ...]:
    """Return the phases as the mix has them, without tokens; none without a schedule."""
    rows = []
    for phase in mix.schedule:
        for source in mix.sources:
            first = _weight(source, phase.weights)
            last = _weight(source, phase.to) if phase.to else first
            if first == last == "0.00%":
                continue
            limit = phase.max_epochs.get(source.name)
            rows.append(
                (
                    phase.name,
                    _length(phase),
                    source.name,
                    change_text(first, last),
                    "-" if limit is None else f"{limit:g}",
                    change_text(f"{phase.lr_factor:g}", f"{phase.last_lr_factor:g}"),
                )
            )
    if not rows:
        return ()
    shown = PhaseTable(
        title="phases of the schedule", columns=UNPLANNED_COLUMNS, rows=tuple(rows), plan=None
    )
    return (shown,)


def _weight(source: SourceConfig, weights: dict[str, float]) -> str:
    """Return the weight of a source as a phase has it, or that it follows from epochs."""
    if weights:
        return f"{weights.get(source.name, 0.0):.2%}"
    if source.epochs is not None and not source.weight:
        return f"by {source.epochs:g} epochs"
    return f"{source.weight:.2%}"


def _length(phase: SchedulePhase) -> str:
    if phase.until_step is not None:
        return f"until step {phase.until_step:,}"
    return "the rest" if phase.share == REST else f"{phase.share:.0%} of the steps"

"""The rows that a run draws from each source, computed by the function that training uses.

Decisions
    An impossible run fails here, not at step 40,000: every reason is in `DataPlan.problems`.
    What is unwise but possible is a warning: a source read more than WARN_EPOCHS times teaches
    little more (Muennighoff et al., arXiv 2305.16264: up to 4 epochs are nearly as good as new
    text).
    Tokens are not content. The same text costs about JAPANESE_PREMIUM times the tokens in Japanese,
    so half of the tokens is less than half of the content.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.epochs import (
    epochs_warning,
    has_epochs,
    has_own_weights,
    rows_of_epochs,
)
from data_pipeline.mixture.ledger import Ledger
from data_pipeline.mixture.mixture import Mixture, RowNumbers
from data_pipeline.mixture.phases import RateFactor, rate_factor_at, rate_factors
from data_pipeline.store.packing import Integers
from data_pipeline.tables import table

WARN_EPOCHS = 4.0
JAPANESE_PREMIUM = 1.32
"""Tokens of a Japanese text over those of the same text in English.

Debian's parallel documentation gives 1.27 to 1.38.
"""
_CURVE_POINTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSource:
    """One source over a whole run."""

    name: str
    language: str
    documents: int
    """Documents to train on."""
    tokens: int
    """Predicted tokens in one epoch."""
    slots: int
    """Slots in one epoch that hold a token of a document; more than `tokens` with loss masks."""
    loss_weight: float
    """How much the loss of each of its predicted tokens counts."""
    rows: int
    """Rows in one epoch."""
    bytes_per_token: float
    """UTF-8 bytes per token of its documents."""
    drawn_tokens: int
    """Predicted tokens that the run takes."""
    epochs: float
    """Rows drawn over rows in one epoch: how often the text is read, on average."""
    share: float
    """Share of the run's predicted tokens, 0 to 1."""
    read_once_at_step: int | None
    """Step, within one, at which every row was drawn once; None if the run ends before."""
    max_epochs: float | None
    """Limit that the mix sets."""
    epoch_curve: tuple[float, ...]
    """Epochs at `DataPlan.curve_steps`."""
    weight: float
    """Share of the predicted tokens that the mix gives to it, or that follows from its epochs."""
    asked_epochs: float | None
    """Epochs that the mix asks for; None if it gives a weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedLimit:
    """Bounds that the mix sets for a language, and whether the run keeps them."""

    language: str
    min_share: float
    max_share: float
    share: float
    """Share of the run's or the phase's predicted tokens that the language has, 0 to 1."""
    met: bool
    phase: str = ""
    """Phase that has the bounds; empty for those of the whole run."""

    def to_json(self) -> dict[str, Any]:
        """Return the limit as JSON values; the shares of all languages stand beside it."""
        plain = {
            "language": self.language,
            "min_share": self.min_share,
            "max_share": self.max_share,
            "met": self.met,
        }
        return {**plain, "phase": self.phase, "share": self.share} if self.phase else plain


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedPhase:
    """What one phase of a schedule draws from each source."""

    name: str
    start_step: int
    """First step, counted from 0."""
    stop_step: int
    """Step after the last one."""
    weights: Mapping[str, float]
    """Share of the predicted tokens by source at the beginning."""
    end_weights: Mapping[str, float]
    """The shares at the end; the same unless they change."""
    drawn_tokens: Mapping[str, int]
    """Predicted tokens by source."""
    epochs: Mapping[str, float]
    """Rows drawn over rows in one epoch, by source."""
    end_epochs: Mapping[str, float]
    """The same from the beginning of the run to the end of the phase."""
    lr_factor: float
    """Factor on the learning rate at the first step."""
    last_lr_factor: float
    """Factor on the learning rate at the last step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPlan:
    """A run over a built mix."""

    steps: int
    global_batch_size: int
    """Packed rows per step."""
    sources: tuple[PlannedSource, ...]
    limits: tuple[PlannedLimit, ...]
    """One for each language that the mix bounds."""
    curve_steps: tuple[int, ...]
    """Steps at which the epochs of the sources are known."""
    problems: tuple[str, ...]
    """Reasons why the run cannot be done; empty if it can."""
    warnings: tuple[str, ...]
    """Things that a person should think about."""
    phases: tuple[PlannedPhase, ...] = ()
    """Phases of the schedule in their order; empty without one."""

    @property
    def drawn_tokens(self) -> int:
        """Predicted tokens of the run."""
        return sum(source.drawn_tokens for source in self.sources)

    def whole(self) -> DataPlan:
        """Return the plan of the whole run, which this is; one with stages adds them up."""
        return self

    def language_shares(self) -> dict[str, float]:
        """Return the share of the predicted tokens by language, 0 to 1."""
        return language_shares_of(self.sources)

    def content_shares(self) -> dict[str, float]:
        """Return the share of the content by language, 0 to 1.

        A Japanese token counts as 1 / JAPANESE_PREMIUM of a token in another language.
        """
        worth = self.language_shares()
        if "ja" in worth:
            worth["ja"] /= JAPANESE_PREMIUM
        total = sum(worth.values()) or 1.0
        return {name: value / total for name, value in worth.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        plain = {
            "steps": self.steps,
            "global_batch_size": self.global_batch_size,
            "curve_steps": self.curve_steps,
            "problems": self.problems,
            "warnings": self.warnings,
            "drawn_tokens": self.drawn_tokens,
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "language_shares": self.language_shares(),
            "content_shares": self.content_shares(),
            "limits": [limit.to_json() for limit in self.limits],
        }
        if self.phases:
            plain["phases"] = [dataclasses.asdict(phase) for phase in self.phases]
        return plain

    def describe(self) -> str:
        """Return a table for people, then shares, limits and warnings."""
        shares = self.language_shares()
        lines = [
            self._source_table(),
            *self._phase_tables(),
            f"{self.steps:,} steps of {self.global_batch_size:,} rows: {self.drawn_tokens:,} "
            "predicted tokens",
            "languages: " + ", ".join(f"{name} {share:.2%}" for name, share in shares.items()),
        ]
        if 0 < shares.get("ja", 0) < 1:
            content = [f"{name} {share:.1%}" for name, share in self.content_shares().items()]
            lines.append(
                f"the same text costs about {JAPANESE_PREMIUM:g} times the tokens in Japanese: by "
                f"content {', '.join(content)}"
            )
        for source in self.sources:
            if source.tokens < source.slots:
                lines.append(
                    f"{source.name}: {source.tokens / source.slots:.1%} of its tokens bear loss; "
                    "weights and shares are of these"
                )
            if source.loss_weight != 1:
                lines.append(
                    f"{source.name}: each of its tokens counts {source.loss_weight:g} times in the "
                    "loss"
                )
        for limit in self.limits:
            verdict = "met" if limit.met else "NOT MET"
            lines.append(
                f"limit: {_name_of(limit)} from {limit.min_share:.0%} to {limit.max_share:.0%}: "
                f"{verdict}"
            )
        lines += [f"warning: {line}" for line in self.warnings]
        return "\n".join(lines)

    def _source_table(self) -> str:
        """Return a table of the sources, with the epochs that they ask for if any do."""
        columns = list(_COLUMNS)
        rows = [_table_row(source) for source in self.sources]
        if any(source.asked_epochs is not None for source in self.sources):
            columns += ["asked epochs", "weight from them"]
            rows = [[*row, *_asked(source)] for row, source in zip(rows, self.sources, strict=True)]
        return table(columns, rows)

    def _phase_tables(self) -> list[str]:
        """Return a table of what each phase draws from each source, if there are phases."""
        rows = phase_rows(self.phases)
        return [table(PHASE_COLUMNS, rows)] if rows else []

    @property
    def changes_rate(self) -> bool:
        """Whether any phase has a factor on the learning rate."""
        return any(not phase.lr_factor == phase.last_lr_factor == 1 for phase in self.phases)


_COLUMNS = (
    "source",
    "language",
    "documents",
    "tokens",
    "rows",
    "bytes/token",
    "drawn tokens",
    "share",
    "epochs",
    "read once at step",
)


def _table_row(source: PlannedSource) -> list[str]:
    step = source.read_once_at_step
    return [
        source.name,
        source.language,
        f"{source.documents:,}",
        f"{source.tokens:,}",
        f"{source.rows:,}",
        f"{source.bytes_per_token:.2f}",
        f"{source.drawn_tokens:,}",
        f"{source.share:.2%}",
        f"{source.epochs:.2f}",
        "-" if step is None else f"{step:,}",
    ]


def _asked(source: PlannedSource) -> tuple[str, str]:
    if source.asked_epochs is None:
        return "-", "-"
    return f"{source.asked_epochs:g}", f"{source.weight:.2%}"


PHASE_COLUMNS = (
    "phase",
    "steps",
    "source",
    "weight",
    "drawn tokens",
    "epochs",
    "epochs at its end",
    "lr factor",
)
"""Columns of `phase_rows`."""


def phase_rows(phases: Sequence[PlannedPhase]) -> list[tuple[str, ...]]:
    """Return a row for each phase and source that it draws from, in the order of the steps."""
    rows = []
    for phase in phases:
        for name, tokens in phase.drawn_tokens.items():
            if tokens:
                rows.append(_phase_row(phase, name))
    return rows


def _phase_row(phase: PlannedPhase, source: str) -> tuple[str, ...]:
    first = f"{phase.weights[source]:.2%}"
    last = f"{phase.end_weights[source]:.2%}"
    return (
        phase.name or "-",
        f"{phase.start_step + 1:,} to {phase.stop_step:,}",
        source,
        change_text(first, last),
        f"{phase.drawn_tokens[source]:,}",
        f"{phase.epochs[source]:.2f}",
        f"{phase.end_epochs[source]:.2f}",
        change_text(f"{phase.lr_factor:.3g}", f"{phase.last_lr_factor:.3g}"),
    )


def change_text(first: str, last: str) -> str:
    """Return how a figure of a phase changes from its first step to its last, for a table."""
    return first if first == last else f"{first} -> {last}"


def _name_of(limit: PlannedLimit) -> str:
    return f"{limit.language} in phase {limit.phase}" if limit.phase else limit.language


def language_shares_of(sources: Sequence[PlannedSource]) -> dict[str, float]:
    """Return the share of the predicted tokens by language, 0 to 1."""
    shares: dict[str, float] = {}
    for source in sources:
        shares[source.language] = shares.get(source.language, 0.0) + source.share
    return shares


def make_data_plan(
    built: BuiltData,
    mix: MixConfig,
    steps: int,
    global_batch_size: int,
    ledger: Ledger | None = None,
    first_step: int = 0,
) -> DataPlan:
    """Plan a run of `steps` steps, or a stage of one, without reading a token.

    Args:
        built: The build of `mix`.
        mix: The mix; gives limits and seed.
        steps: Number of steps of the run.
        global_batch_size: Packed rows per step.
        ledger: The mix over the run, if it was edited on the way; None: `mix` from start to end.
        first_step: Step of the run at which the rows of `built` begin to be drawn.
    """
    end = first_step + steps
    ledger = ledger or Ledger.start(mix, total_steps=end)
    mixture = Mixture(built, ledger, mix.seed, first_step=first_step)
    num_points = min(steps, _CURVE_POINTS) + 1
    points = set((first_step + np.linspace(0, steps, num_points).astype(int)).tolist())
    if ledger.has_phases:
        points.update(segment.start_step for segment in ledger.segments)
    curve_steps = tuple(sorted(point for point in points if first_step <= point <= end))
    positions = [mixture.position(step, global_batch_size) for step in curve_steps]
    drawn_rows = np.array([position.drawn_rows for position in positions])  # [points, sources]
    sources = _plan_sources(built, mix, mixture, curve_steps, drawn_rows)
    longest_row = _longest_row(built, sources)
    limits = _check_limits(mix, ledger, sources, longest_row)
    phases: tuple[PlannedPhase, ...] = ()
    if ledger.has_phases:
        factors = rate_factors(mix, ledger.segments[-1].total_steps or end)
        phases = _plan_phases(built, mixture, ledger, factors, curve_steps, drawn_rows)
        limits += _check_phase_limits(mix, ledger, sources, phases, longest_row)
    problems = []
    warnings = []
    for source in sources:
        problems += _too_many_epochs(source, curve_steps)
        warnings += _many_epochs(source, curve_steps)
    problems += _too_many_in_phases(mix, phases)
    for limit in limits:
        problems += _broken_limit(limit)
    plan = DataPlan(
        steps=steps,
        global_batch_size=global_batch_size,
        sources=sources,
        limits=limits,
        curve_steps=curve_steps,
        problems=tuple(problems),
        warnings=tuple(warnings),
        phases=phases,
    )
    if built.num_stages > 1 or not has_epochs(mix):  # the epochs are of all stages together
        return plan
    of_epochs = read_and_asked(plan, mix, steps_of_epochs([built], mix, [global_batch_size]))
    return dataclasses.replace(plan, warnings=(*plan.warnings, *of_epochs))


def steps_of_epochs(stages: Sequence[BuiltData], mix: MixConfig, rows: Sequence[int]) -> int:
    """Return the steps after which every source was read as often as it asks for; 0 without epochs.

    Args:
        stages: The build, of each stage of sequence length.
        mix: The mix.
        rows: Packed rows of a step in each stage.
    """
    steps = 0
    for built, rows_of_step in zip(stages, rows, strict=True):
        num_rows = [built.num_rows(source) for source in range(len(built.source_names))]
        steps += math.ceil(rows_of_epochs(mix, num_rows) / rows_of_step)
    return steps


def read_and_asked(plan: DataPlan, mix: MixConfig, asked_steps: int) -> list[str]:
    """Return the warning of a run that does not read its sources as often as they ask for.

    Args:
        plan: The plan of the whole run.
        mix: The mix, with epochs.
        asked_steps: As `steps_of_epochs` returns them.
    """
    own = {phase.name for phase in mix.schedule if has_own_weights(phase)}
    steps = plan.steps
    tokens = {source.name: source.drawn_tokens for source in plan.sources}
    for phase in plan.phases:
        if phase.name in own:
            steps -= phase.stop_step - phase.start_step
            for name, drawn in phase.drawn_tokens.items():
                tokens[name] -= drawn
    epochs = {}
    for source in plan.sources:
        epochs[source.name] = tokens[source.name] / max(source.tokens, 1)
    return epochs_warning(mix, epochs, steps, asked_steps)


def _plan_phases(
    built: BuiltData,
    mixture: Mixture,
    ledger: Ledger,
    factors: Sequence[RateFactor],
    curve_steps: tuple[int, ...],
    drawn_rows: Integers,
) -> tuple[PlannedPhase, ...]:
    """Return what each segment of a scheduled ledger draws.

    Args:
        built: As in `_plan_sources`.
        mixture: As in `_plan_sources`.
        ledger: The mix over the run.
        factors: Those of the phases on the learning rate.
        curve_steps: As in `_plan_sources`.
        drawn_rows: As in `_plan_sources`.
    """
    starts = [segment.start_step for segment in ledger.segments]
    phases = []
    for segment, next_start in zip(ledger.segments, [*starts[1:], curve_steps[-1]], strict=True):
        start = max(segment.start_step, curve_steps[0])
        stop = min(next_start, curve_steps[-1])
        if start >= stop:
            continue
        before = drawn_rows[curve_steps.index(start)]
        after = drawn_rows[curve_steps.index(stop)]
        tokens = {}
        epochs = {}
        end_epochs = {}
        for number, name in enumerate(built.source_names):
            row_tokens = built.row_tokens(number)
            until = []
            for num_rows in (before, after):
                num_drawn = int(num_rows[number])
                until.append(_count_drawn_tokens(mixture, row_tokens, number, num_drawn))
            tokens[name] = until[1] - until[0]
            epochs[name] = int(after[number] - before[number]) / max(len(row_tokens), 1)
            end_epochs[name] = int(after[number]) / max(len(row_tokens), 1)
        names = tokens.keys()
        phases.append(
            PlannedPhase(
                name=segment.phase,
                start_step=start,
                stop_step=stop,
                weights=_of_all(names, segment.weights_at(start)),
                end_weights=_of_all(names, segment.weights_at(stop)),
                drawn_tokens=tokens,
                epochs=epochs,
                end_epochs=end_epochs,
                lr_factor=rate_factor_at(start, factors),
                last_lr_factor=rate_factor_at(stop - 1, factors),
            )
        )
    return tuple(phases)


def _of_all(names: Iterable[str], weights: Mapping[str, float]) -> dict[str, float]:
    return {name: weights.get(name, 0.0) for name in names}


def _plan_sources(
    built: BuiltData,
    mix: MixConfig,
    mixture: Mixture,
    curve_steps: tuple[int, ...],
    drawn_rows: Integers,
) -> tuple[PlannedSource, ...]:
    """Return what the run draws from each source.

    Args:
        built: The build of `mix`.
        mix: The mix.
        mixture: Gives the order in which rows are drawn.
        curve_steps: Steps of the curve, [points]; the last one is the end of the run.
        drawn_rows: Rows drawn from each source before each of these steps, [points, sources].
    """
    end_rows: list[int] = drawn_rows[-1].tolist()
    drawn_tokens = []
    for number, num_drawn in enumerate(end_rows):
        drawn_tokens.append(
            _count_drawn_tokens(mixture, built.row_tokens(number), number, num_drawn)
        )
    total_tokens = max(sum(drawn_tokens), 1)
    sources = []
    for number, config in enumerate(mix.sources):
        entry = built.train_entry(number)
        num_rows = built.num_rows(number)
        read_once_at_step = None
        if num_rows and end_rows[number] >= num_rows:
            step = np.interp(num_rows, drawn_rows[:, number], curve_steps)
            read_once_at_step = int(np.ceil(step))
        curve = drawn_rows[:, number] / max(num_rows, 1)
        sources.append(
            PlannedSource(
                name=config.name,
                language=built.languages[number],
                documents=entry.documents,
                tokens=entry.predicted_tokens,
                slots=entry.used_slots,
                loss_weight=config.loss_weight,
                rows=num_rows,
                bytes_per_token=entry.bytes / max(entry.tokens, 1),
                drawn_tokens=drawn_tokens[number],
                epochs=end_rows[number] / max(num_rows, 1),
                share=drawn_tokens[number] / total_tokens,
                read_once_at_step=read_once_at_step,
                max_epochs=config.max_epochs,
                weight=config.weight,
                asked_epochs=config.epochs,
                epoch_curve=tuple(curve.round(6).tolist()),
            )
        )
    return tuple(sources)


def _count_drawn_tokens(
    mixture: Mixture, row_tokens: RowNumbers, source: int, num_drawn: int
) -> int:
    """Return the predicted tokens in the first `num_drawn` rows that are drawn from a source."""
    if not len(row_tokens):
        return 0
    epochs, rest = divmod(num_drawn, len(row_tokens))
    whole_epochs = epochs * int(row_tokens.sum(dtype=np.int64))
    return whole_epochs + mixture.epoch_tokens(source, epochs, rest)


def _longest_row(built: BuiltData, sources: Sequence[PlannedSource]) -> int:
    """Return the most predicted tokens in a row that the run may draw; few, if few are learned."""
    longest = 0
    for number, source in enumerate(sources):
        if source.drawn_tokens:
            longest = max(longest, int(built.row_tokens(number).max()))
    return longest


def _check_limits(
    mix: MixConfig, ledger: Ledger, sources: Sequence[PlannedSource], longest_row: int
) -> tuple[PlannedLimit, ...]:
    """Return the bounds of each language, and whether the run keeps them up to whole rows."""
    shares = language_shares_of(sources)
    drawn_tokens = sum(source.drawn_tokens for source in sources)
    of_phases = {language for phase in mix.schedule for language in phase.languages}
    limits = []
    for language, bounds in mix.languages.items():
        if ledger.has_phases and language in of_phases:
            continue  # each phase keeps its own
        share = shares.get(language, 0.0)
        slack = ledger.slack_rows(language) * longest_row / max(drawn_tokens, 1)
        limits.append(
            PlannedLimit(
                language=language,
                min_share=bounds.min_share,
                max_share=bounds.max_share,
                share=share,
                met=bounds.min_share - slack <= share <= bounds.max_share + slack,
            )
        )
    return tuple(limits)


def _check_phase_limits(
    mix: MixConfig,
    ledger: Ledger,
    sources: Sequence[PlannedSource],
    phases: Sequence[PlannedPhase],
    longest_row: int,
) -> tuple[PlannedLimit, ...]:
    """Return the bounds of each phase that has its own, and whether it keeps them."""
    languages = {source.name: source.language for source in sources}
    own = {phase.name: phase.languages for phase in mix.schedule}
    limits = []
    for phase in phases:
        total = max(sum(phase.drawn_tokens.values()), 1)
        for language, bounds in own.get(phase.name, {}).items():
            tokens = 0
            for name, count in phase.drawn_tokens.items():
                if languages[name] == language:
                    tokens += count
            rows = ledger.segment_at(phase.start_step).slack_rows(language)
            slack = rows * longest_row / total
            is_met = bounds.min_share - slack <= tokens / total <= bounds.max_share + slack
            limits.append(
                PlannedLimit(
                    language=language,
                    min_share=bounds.min_share,
                    max_share=bounds.max_share,
                    share=tokens / total,
                    met=is_met,
                    phase=phase.name,
                )
            )
    return tuple(limits)


def _broken_limit(limit: PlannedLimit) -> list[str]:
    """Return the problem of a limit that is not met."""
    if limit.met:
        return []
    return [
        f"language '{_name_of(limit)}': has {limit.share:.2%} of the tokens, must have from "
        f"{limit.min_share:.2%} to {limit.max_share:.2%}. Change the weights."
    ]


def _too_many_epochs(source: PlannedSource, curve_steps: tuple[int, ...]) -> list[str]:
    """Return the problem of a source that is read more often than the mix allows."""
    if source.max_epochs is None or source.epochs <= source.max_epochs:
        return []
    step = int(np.interp(source.max_epochs, source.epoch_curve, curve_steps))
    return [
        f"source '{source.name}': {curve_steps[-1]} steps take {source.epochs:.2f} epochs, "
        f"max_epochs is {source.max_epochs:g}, which is used up near step {step:,}. Train fewer "
        "steps, add data, lower its weight, or raise max_epochs."
    ]


def _too_many_in_phases(mix: MixConfig, phases: Sequence[PlannedPhase]) -> list[str]:
    """Return a problem for each source that a phase reads more often than it allows."""
    read: dict[tuple[str, str], float] = {}
    for phase in phases:  # one that an edit or the guard has cut is one phase
        for name, epochs in phase.epochs.items():
            read[phase.name, name] = read.get((phase.name, name), 0.0) + epochs
    problems = []
    for allowed in mix.schedule:
        for name, limit in allowed.max_epochs.items():
            epochs = read.get((allowed.name, name), 0.0)
            if epochs > limit:
                problems.append(
                    f"source '{name}': phase '{allowed.name}' takes {epochs:.2f} epochs of it, and "
                    f"its max_epochs for the source is {limit:g}. Shorten the phase, lower the "
                    f"source's weight in it, add data, or raise schedule[{allowed.name}]."
                    "max_epochs."
                )
    return problems


def _many_epochs(source: PlannedSource, curve_steps: tuple[int, ...]) -> list[str]:
    """Return the warning about a source that is read often, but not more than the mix allows."""
    if source.epochs <= WARN_EPOCHS or _too_many_epochs(source, curve_steps):
        return []
    step = int(np.interp(WARN_EPOCHS, source.epoch_curve, curve_steps))
    return [
        f"source '{source.name}' is read {source.epochs:.1f} times, more than {WARN_EPOCHS:g} from "
        f"step {step:,} on. Add data or lower its weight."
    ]

"""Two data plans side by side: what an edit of the mix changes, before it is made."""

from __future__ import annotations

from collections.abc import Mapping

from data_pipeline.mixture.data_plan import DataPlan, PlannedSource
from data_pipeline.mixture.settings import union_of_names
from data_pipeline.tables import table

_SOURCE_COLUMNS = (
    "source",
    "tokens before",
    "after",
    "change",
    "epochs before",
    "after",
    "share before",
    "after",
)
_PHASE_COLUMNS = (
    "phase",
    "source",
    "steps before",
    "after",
    "tokens before",
    "after",
    "change",
)
_LANGUAGE_COLUMNS = ("language", "share before", "after", "change")


def compare_plans(old: DataPlan, new: DataPlan) -> str:
    """Return a table of tokens, epochs and shares of every source and language, old and new."""
    old_sources = {source.name: source for source in old.sources}
    new_sources = {source.name: source for source in new.sources}
    rows = []
    for name in union_of_names(old_sources, new_sources):
        rows.append(_source_row(name, old_sources.get(name), new_sources.get(name)))
    lines = [
        table(_SOURCE_COLUMNS, rows),
        _language_table(old.language_shares(), new.language_shares()),
    ]
    if old.phases or new.phases:
        lines.append(_phase_table(old, new))
    lines += [f"problem after: {line}" for line in new.problems]
    lines += [f"warning after: {line}" for line in new.warnings if line not in old.warnings]
    return "\n".join(lines)


def _source_row(name: str, old: PlannedSource | None, new: PlannedSource | None) -> tuple[str, ...]:
    old_tokens, old_epochs, old_share = _figures(old)
    new_tokens, new_epochs, new_share = _figures(new)
    return (
        name,
        f"{old_tokens:,}",
        f"{new_tokens:,}",
        f"{new_tokens - old_tokens:+,}",
        f"{old_epochs:.2f}",
        f"{new_epochs:.2f}",
        f"{old_share:.2%}",
        f"{new_share:.2%}",
    )


def _figures(source: PlannedSource | None) -> tuple[int, float, float]:
    """Return (drawn tokens, epochs, share) of a source; zeros if the mix does not have it."""
    if source is None:
        return 0, 0.0, 0.0
    return source.drawn_tokens, source.epochs, source.share


def _phase_table(old: DataPlan, new: DataPlan) -> str:
    """Return the steps and tokens of every phase and source, old and new."""
    old_figures = _phase_figures(old)
    new_figures = _phase_figures(new)
    rows = []
    for key in dict.fromkeys([*old_figures, *new_figures]):
        old_steps, old_tokens = old_figures.get(key, ("-", 0))
        new_steps, new_tokens = new_figures.get(key, ("-", 0))
        change = f"{new_tokens - old_tokens:+,}"
        rows.append((*key, old_steps, new_steps, f"{old_tokens:,}", f"{new_tokens:,}", change))
    return table(_PHASE_COLUMNS, rows)


def _phase_figures(plan: DataPlan) -> dict[tuple[str, str], tuple[str, int]]:
    """Return (steps, drawn tokens) by phase and source."""
    figures: dict[tuple[str, str], tuple[int, int]] = {}
    last_steps: dict[tuple[str, str], int] = {}
    for phase in plan.phases:
        for name, tokens in phase.drawn_tokens.items():
            if not tokens:
                continue
            # a phase that was cut, by an edit for example, is one again
            key = (phase.name or "-", name)
            first_step, before = figures.get(key, (phase.start_step + 1, 0))
            figures[key] = (first_step, before + tokens)
            last_steps[key] = phase.stop_step
    shown = {}
    for key, (first_step, tokens) in figures.items():
        shown[key] = (f"{first_step:,} to {last_steps[key]:,}", tokens)
    return shown


def _language_table(old: Mapping[str, float], new: Mapping[str, float]) -> str:
    rows = []
    for name in union_of_names(old, new):
        old_share = old.get(name, 0.0)
        new_share = new.get(name, 0.0)
        change = 100 * (new_share - old_share)
        rows.append((name, f"{old_share:.2%}", f"{new_share:.2%}", f"{change:+.2f} points"))
    return table(_LANGUAGE_COLUMNS, rows)

"""Two plans side by side: what an edit of the mix changes, before it is made."""

from __future__ import annotations

from collections.abc import Mapping

from data_pipeline.mixture.data_plan import DataPlan
from data_pipeline.tables import table


def compare_plans(old: DataPlan, new: DataPlan) -> str:
    """Tokens, epochs and shares of every source and language, old and new."""
    before, after = ({source.name: source for source in plan.sources} for plan in (old, new))
    rows = []
    for name in [*before, *(name for name in after if name not in before)]:
        one, other = before.get(name), after.get(name)
        tokens = (one.drawn_tokens if one else 0, other.drawn_tokens if other else 0)
        epochs = (one.epochs if one else 0.0, other.epochs if other else 0.0)
        shares = (one.share if one else 0.0, other.share if other else 0.0)
        rows.append(
            (
                *(name, f"{tokens[0]:,}", f"{tokens[1]:,}", f"{tokens[1] - tokens[0]:+,}"),
                *(f"{epochs[0]:.2f}", f"{epochs[1]:.2f}", f"{shares[0]:.2%}", f"{shares[1]:.2%}"),
            )
        )
    header = (
        "source",
        "tokens before",
        "after",
        "change",
        "epochs before",
        "after",
        "share before",
        "after",
    )
    lines = [table(header, rows), _languages(old.language_shares(), new.language_shares())]
    lines += [f"problem after: {line}" for line in new.problems]
    lines += [f"warning after: {line}" for line in new.warnings if line not in old.warnings]
    return "\n".join(lines)


def _languages(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    rows = []
    for name in [*before, *(name for name in after if name not in before)]:
        was, now = before.get(name, 0.0), after.get(name, 0.0)
        rows.append((name, f"{was:.2%}", f"{now:.2%}", f"{100 * (now - was):+.2f} points"))
    return table(("language", "share before", "after", "change"), rows)

"""The tokens that a run had seen after each step, so that the page can count in tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpt.telemetry.report.history import Run

MAX_KNOTS = 600
"""Points between which the tokens of a step are interpolated."""


UNITS = {12: "trillion", 9: "billion", 6: "million", 3: "thousand"}
"""Names of powers of ten, the largest first."""


def token_axis(run: Run) -> dict[str, Any] | None:
    """Return knots of the map from steps to predicted tokens; None if the log has no tokens."""
    tokens = np.nan_to_num(run.column("tokens"))
    if len(run.steps) < 2 or tokens.sum() <= 0:
        return None
    steps = np.append(run.steps[0] - 1, run.steps)
    seen = np.append(0.0, np.cumsum(tokens))
    # a log without lines for the first steps: they are taken to be like the others
    seen += max(0.0, steps[0]) * tokens.mean()
    kept = np.unique(np.linspace(0, len(steps) - 1, MAX_KNOTS).astype(int))
    power = next((power for power in UNITS if seen[-1] >= 10.0**power), 0)
    unit = f"{UNITS[power]} predicted tokens" if power else "predicted tokens"
    return {
        "steps": steps[kept].tolist(),
        "tokens": (seen[kept] / 10.0**power).tolist(),
        "unit": unit,
    }

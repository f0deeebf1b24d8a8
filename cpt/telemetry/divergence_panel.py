"""The plot of `kl_by_source`: how far the model has gone from the base model on the rows of
replay.
"""

from __future__ import annotations

from cpt.telemetry.history import Run
from cpt.telemetry.panels import STEP_LABEL, panel, short, source_languages, source_shades
from cpt.telemetry.plot import Plot, Scale, bin_series, legend, scale_over


def divergence_panel(run: Run, x: Scale, colors: dict[str, str]) -> str:
    """One line per source that has targets; nothing if the run has none (`train.kl_targets`)."""
    lines = {
        name: bin_series(run.steps, column) for name, column in run.columns("kl_by_source").items()
    }
    lines = {name: series for name, series in lines.items() if len(series)}
    if not lines:
        return ""
    shades = source_shades(list(lines), source_languages(run), colors)
    ends = [end for series in lines.values() for end in (series.low, series.high)]
    y = scale_over(ends, include=[0.0], log_beyond=1000.0)
    plot = Plot(size=(1376, 200), x=x, y=y, labels=(STEP_LABEL, "nats per predicted token"))
    for name, series in lines.items():
        plot.line(series, shades[name], width=1.5, dots=len(series) < 12)
    entries = [
        (shades[name], "", f"{short(name)} {series.mean[-1]:.4g}") for name, series in lines.items()
    ]
    body = legend(entries) + plot.svg("Divergence from the base model over steps")
    return panel(
        "Divergence from the base model", "w12", body, "on rows with targets; 0: as the base model"
    )

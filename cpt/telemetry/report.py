"""report.html: one run on one screen, from metrics.jsonl and config.resolved.yaml.

The page holds everything it shows: no script, no font, no picture, nothing that a browser would
fetch.  Every name in it comes from a file and is escaped.  Stages:

    metrics.jsonl  ->  history (columns over steps)  ->  tiles and panels (drawn with plot)  ->
    page
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cpt.errors import ConfigError, StorageError
from cpt.telemetry.divergence_panel import divergence_panel
from cpt.telemetry.history import Run, number, read_run
from cpt.telemetry.panels import (
    action_of,
    change,
    guard_panel,
    language_colors,
    loss_panel,
    mixture_panel,
    norm_panel,
    rate_panel,
    throughput_panel,
    time_panel,
    traffic_panel,
)
from cpt.telemetry.plot import Array, clean, step_scale
from cpt.telemetry.router_panel import router_panel
from data_pipeline.store.files import write_text

STYLE = """
*{box-sizing:border-box}
body{margin:0;background:#f3f4f6;color:#1f2937;font:13px/1.35 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1420px;margin:0 auto;padding:14px 16px}
header{display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 14px;margin-bottom:10px}
h1{font-size:19px;margin:0}
header p{margin:0;color:#6b7280}
header .note{flex-basis:100%;color:#a33c00}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:0 0 10px}
.tile,section{background:#fff;border:1px solid #e5e7eb;border-radius:8px}
.tile{padding:8px 12px 7px}
.tile dt{color:#6b7280;font-size:11.5px}
.tile dd{margin:0}
.tile .value{font-size:21px;font-weight:600;letter-spacing:-.01em;white-space:nowrap}
.tile .detail{color:#6b7280;font-size:11.5px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.alarm .value{color:#b84a00}
.grid{display:grid;grid-template-columns:repeat(12,minmax(0,1fr));gap:10px}
section{padding:9px 12px 6px;display:flex;flex-direction:column}
h2{font-size:13.5px;margin:0 0 2px;font-weight:600}
h2 small,h3 small{font-weight:400;color:#6b7280;font-size:12px}
h3{font-size:12px;margin:3px 0 0 4px;font-weight:600;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
ul{list-style:none;display:flex;flex-wrap:wrap;gap:0 12px;margin:0 0 2px;padding:0;font-size:12px}
li{white-space:nowrap}
li svg{display:inline-block;width:20px;height:10px;margin-right:4px;vertical-align:0}
section>svg,.small svg{display:block;width:100%;height:auto;margin-top:auto}
svg text{font-size:11px}
.small{display:grid;gap:0 8px;margin-top:auto}
.empty{margin:auto;color:#6b7280;padding:30px 10px;text-align:center}
.w5{grid-column:span 5}.w7{grid-column:span 7}.w4{grid-column:span 4}.w12{grid-column:span 12}.tall{grid-row:span 2}
@media(max-width:900px){.w4,.w5,.w7,.w12{grid-column:span 12}.w4>svg{max-width:500px}}
"""


def write_report(run_dir: Path) -> Path:
    """Make <run_dir>/report.html from the metrics of the run; an older report is replaced in one
    move.

    Raises:
        ConfigError: the directory holds no metrics.jsonl.
        StorageError: the page cannot be written.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(
            f"{run_dir} holds no metrics.jsonl, so it is no run directory. Give another with --run_dir."
        )
    written = datetime.fromtimestamp(metrics.stat().st_mtime, UTC)
    text = page(
        read_run(run_dir), run_dir.resolve().name, f"metrics up to {written:%Y-%m-%d %H:%M} UTC"
    )
    target = run_dir / "report.html"
    try:
        write_text(target, text)
    except OSError as error:
        raise StorageError(
            f"{target}: {error.strerror}. Free space or make the directory writable."
        ) from error
    return target


def page(run: Run, name: str, freshness: str) -> str:
    """The whole document."""
    colors = language_colors(run)
    x = step_scale(np.append(run.steps, [event["step"] for event in run.guard_events]))
    panels = [
        time_panel(run),
        loss_panel(run, x, colors),
        guard_panel(run, x, colors),
        mixture_panel(run, x, colors),
        rate_panel(run, x),
        norm_panel(run, x),
        throughput_panel(run, x),
        traffic_panel(run, x),
        divergence_panel(run, x, colors),
        router_panel(run, x, colors),
    ]
    notes = "".join(f'<p class="note">{clean(note, 200)}</p>' for note in run.notes)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{clean(name)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        f"<header><h1>{clean(name, 60)}</h1><p>{clean(subtitle(run), 200)}</p><p>{clean(freshness, 60)}</p>{notes}"
        "</header>\n"
        f'<dl class="tiles">{"".join(tiles(run))}</dl>\n<div class="grid">\n{chr(10).join(panels)}\n</div>\n'
        "</main></body></html>\n"
    )


def subtitle(run: Run) -> str:
    """What was trained, and on how many ranks."""
    parts = [
        run.setting("model", "path") or run.setting("model", "init"),
        run.setting("train", "dtype"),
    ]
    world_size, rows, seq_len = (
        run.config.get("world_size"),
        run.setting("train", "global_batch_size"),
        run.setting("train", "seq_len"),
    )
    parts.append(f"{world_size} rank{'s' if world_size != 1 else ''}" if world_size else None)
    for key, name in (("sp_size", "sequence parallel"), ("ep_size", "expert parallel")):
        parts.append(f"{name} {run.config[key]}" if run.config.get(key, 1) != 1 else None)
    parts.append(f"{rows} rows of {seq_len} tokens per step" if rows and seq_len else None)
    return " | ".join(str(part) for part in parts if part)


def tiles(run: Run) -> list[str]:
    """Headline numbers."""
    losses, rates, tokens = (
        run.column("loss"),
        run.column("tokens_per_second"),
        run.column("tokens"),
    )
    last = int(run.steps[-1]) if len(run.steps) else 0
    planned = run.setting("train", "total_steps")
    found = [
        tile("Steps", f"{last:,}", f"of {planned:,} planned" if isinstance(planned, int) else ""),
        tile(
            "Tokens",
            amount(float(np.nansum(tokens))),
            f"{amount(middle(tokens))} per step, predicted",
        ),
    ]
    if len(losses):
        found.append(
            tile("Last loss", f"{losses[-1]:.3f}", f"from {losses[0]:.3f}, nats per token")
        )
        found.append(
            tile(
                "Tokens/s, median",
                amount(middle(rates)),
                f"{middle(run.column('seconds')):.3g} s per step",
            )
        )
    worst = max(
        latest_by_domain(run), key=lambda event: number(event.get("delta_percent")), default=None
    )
    if worst is not None:
        alarm = action_of(worst) != "none"
        found.append(
            tile(
                "Worst held-out domain",
                change(worst),
                f"{worst.get('domain')}, step {worst['step']:,}",
                alarm,
            )
        )
    if run.checkpoint_events:
        newest = run.checkpoint_events[-1]
        seconds = middle(
            np.asarray([number(event.get("seconds")) for event in run.checkpoint_events])
        )
        detail = f"step {newest['step']:,}; {seconds:.3g} s each"
        found.append(tile("Checkpoints", f"{len(run.checkpoint_events):,}", detail))
    else:
        found.append(tile("Checkpoints", "0", "none saved"))
    if run.num_repeated_steps:
        found.append(tile("Repeated steps", f"{run.num_repeated_steps:,}", "again after resumes"))
    return found


def tile(name: str, value: str, detail: str, alarm: bool = False) -> str:
    """One headline number."""
    return (
        f'<div class="tile{" alarm" if alarm else ""}"><dt>{clean(name)}</dt><dd class="value">{clean(value)}</dd>'
        f'<dd class="detail" title="{clean(detail, 200)}">{clean(detail, 60)}</dd></div>'
    )


def latest_by_domain(run: Run) -> list[dict[str, Any]]:
    """The newest measurement of every held-out domain that has a number."""
    latest = {str(event.get("domain")): event for event in run.guard_events}
    return [event for event in latest.values() if math.isfinite(number(event.get("delta_percent")))]


def amount(value: float) -> str:
    """A number in three digits: 950, 12.3 k, 4.56 M."""
    if not math.isfinite(value):
        return "-"
    power = min(5, max(0, math.floor(math.log10(max(abs(value), 1.0)) / 3 + 1e-9)))
    if power == 0:
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return f"{value / 1000.0**power:.3g} {' kMBTP'[power]}"


def middle(values: Array) -> float:
    """The median of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan

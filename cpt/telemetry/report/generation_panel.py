"""The panel of what the model does: rates of its replies to prompts, and those that changed.

One small chart per domain shows good form and right answers against the untouched model; a table
has every measure at the last look; the replies that lost the most stand before and after, side by
side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpt.telemetry.report.chart import StepChart
from cpt.telemetry.report.history import Run
from cpt.telemetry.report.panel import Cell, LegendEntry, Panel, Table, TableRow, TextPair, clean
from cpt.telemetry.report.series import AxisRange, Series, bin_series
from cpt.telemetry.run_tally import number
from data_pipeline.bounded.files import MalformedInput
from data_pipeline.bounded.json_text import read_json
from data_pipeline.charts import MUTED, PALETTE

if TYPE_CHECKING:
    from bokeh.models import Range1d

QUANTITIES = {"format": "in good form", "accuracy": "right answers"}
"""The quantities that are judged, in the order of their colors."""
NAMES = {
    **QUANTITIES,
    "parses": "follows Harmony",
    "thinks": "thinks",
    "closes_thinking": "closes its thinking",
    "final": "gives a final answer",
    "ends": "ends by itself",
    "in_language": "in the language asked for",
    "no_loop": "does not loop",
    "thinking_tokens": "mean tokens of thinking",
}
"""Names of measures for people; any other is shown under its own."""
LENGTH = "thinking_tokens"
ARROW = "\N{RIGHTWARDS ARROW}"
MAX_CHARACTERS = 1600
"""Characters of a text; those of a file of the run are shortened already."""
MAX_COMPARISONS = 24
MAX_EXAMPLES_BYTES = 64 * 2**20


def generation_panel(run: Run, steps: Range1d) -> Panel | None:
    """Show the replies of a run; None if no prompt was asked."""
    if not run.generation_events:
        return None
    by_domain: dict[str, list[dict[str, Any]]] = {}
    for event in run.generation_events:
        by_domain.setdefault(str(event.get("domain")), []).append(event)
    cells = []
    for domain, events in by_domain.items():
        cells.append(_domain_cell(domain, events, steps))
    legend = []
    for index, name in enumerate(QUANTITIES.values()):
        legend.append(LegendEntry(text=name, color=PALETTE[index]))
    legend.append(LegendEntry(text="untouched model", color=MUTED, dash="dashed"))
    last = max(event["step"] for event in run.generation_events)
    return Panel(
        title="Replies to prompts against the untouched model",
        detail=f"% of the prompts of each look; table and texts: step {last:,}",
        legend=tuple(legend),
        cells=tuple(cells),
        num_columns=min(4, len(cells)),
        table=_table(by_domain),
        comparisons=_comparisons(run),
    )


def _domain_cell(domain: str, events: Sequence[dict[str, Any]], steps: Range1d) -> Cell:
    """Draw the rates of one domain."""
    chart = StepChart(
        height=190,
        steps=steps,
        values=AxisRange(low=-4.0, high=104.0, log=False),
        unit="%",
        title=f"Replies of {clean(domain, 60)}",
        step_label="step",
    )
    told = []
    for index, (measure, name) in enumerate(QUANTITIES.items()):
        of_measure = [event for event in events if event.get("measure") == measure]
        now = _series(of_measure, "rate")
        if not len(now):
            continue
        color = PALETTE[index]
        before = _series(of_measure, "baseline")
        chart.curve(f"{name}, untouched", before, color, dash="dashed", width=1.0)
        chart.curve(name, now, color, dots=True)
        told.append(f"{name} {now.mean[-1]:.0f} %")
    return Cell(chart=chart, heading=clean(domain, 60), detail=", ".join(told))


def _series(events: Sequence[dict[str, Any]], key: str) -> Series:
    values = [100 * number(event.get(key)) for event in events]
    at = [event["step"] for event in events]
    return bin_series(np.asarray(at, dtype=np.float64), np.asarray(values, dtype=np.float64))


def _table(by_domain: dict[str, list[dict[str, Any]]]) -> Table:
    """Return every measure at the last look: a row for each, a column for each domain."""
    columns = []
    for events in by_domain.values():
        last = max(event["step"] for event in events)
        columns.append({str(e.get("measure")): e for e in events if e["step"] == last})
    measures = list(dict.fromkeys(measure for column in columns for measure in column))
    rows = []
    for measure in measures:
        texts = [_rates(measure, column.get(measure)) for column in columns]
        is_judged = measure in QUANTITIES
        rows.append(
            TableRow(texts=(NAMES.get(measure, clean(measure)), *texts), is_strong=is_judged)
        )
        if is_judged:
            rows.append(_verdicts([column.get(measure) for column in columns]))
    return Table(headings=("measure", *map(clean, by_domain)), rows=tuple(rows))


def _rates(measure: str, event: dict[str, Any] | None) -> str:
    """Return a measure before and now; empty if the domain does not have it."""
    if event is None:
        return ""
    before = number(event.get("baseline"))
    now = number(event.get("rate"))
    if measure == LENGTH:
        return f"{before:.0f} {ARROW} {now:.0f}"
    changed = f"{clean(event.get('lost'))} lost, {clean(event.get('won'))} won"
    return f"{100 * before:.1f} {ARROW} {100 * now:.1f} %; {changed}"


def _verdicts(events: Sequence[dict[str, Any] | None]) -> TableRow:
    """Return the row that says what was concluded from a quantity."""
    texts = ["loss (at most), state"]
    tones = {}
    for place, event in enumerate(events, 1):
        if event is None:
            texts.append("")
            continue
        loss = number(event.get("delta"))
        at_most = number(event.get("upper_bound"))
        state = clean(event.get("state"))
        texts.append(f"{loss:+.1f} ({at_most:+.1f}) points, {state}")
        if state == "red":
            tones[place] = "alarm"
    return TableRow(texts=tuple(texts), tones=tones)


def _comparisons(run: Run) -> tuple[TextPair, ...]:
    """Return the replies that lost the most at the last look, before and after."""
    last = run.generation_events[-1]["step"]
    files = []
    for event in run.generation_events:
        name = event.get("examples")
        if event["step"] == last and isinstance(name, str) and name and name not in files:
            files.append(name)
    found: list[TextPair] = []
    for name in files:
        # a name, never a path: the log must not make the page show other files
        content = _read_examples(run.run_dir / "guard" / "generation" / Path(name).name)
        for domain, examples in content.items():
            for example in examples if isinstance(examples, list) else []:
                if isinstance(example, dict):
                    found.append(_comparison(str(domain), example))
    return tuple(found[:MAX_COMPARISONS])


def _read_examples(path: Path) -> dict[str, Any]:
    """Return the examples of a look by domain; none if the file is not there or damaged."""
    try:
        content = read_json(path, MAX_EXAMPLES_BYTES, lone_surrogates=True, follow_links=False)
    except (OSError, MalformedInput):
        return {}
    domains = content.get("domains") if isinstance(content, dict) else None
    return domains if isinstance(domains, dict) else {}


def _comparison(domain: str, example: dict[str, Any]) -> TextPair:
    lost = example.get("lost")
    names = []
    for measure in lost if isinstance(lost, list) else []:
        names.append(NAMES.get(str(measure), clean(measure)))
    return TextPair(
        heading=f"{clean(domain)}, lost: {', '.join(names)}",
        question=_text(example.get("prompt")),
        before=_text(example.get("before")),
        now=_text(example.get("now")),
    )


def _text(value: object) -> str:
    """Return a text of a file, its line ends kept and other unprintable characters replaced."""
    lines = [clean(line, MAX_CHARACTERS) for line in str(value).split("\n")]
    return "\n".join(lines)[: 2 * MAX_CHARACTERS]

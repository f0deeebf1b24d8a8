"""Replies in the report: rates, the table, and texts before and after, whatever they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bokeh.models import Range1d

from cpt.telemetry.report.generation_panel import generation_panel
from cpt.telemetry.report.history import read_run
from cpt.telemetry.report.page import write_report
from cpt.telemetry.report.panel import Panel

HOSTILE = "<script>alert(1)</script><img src=x onerror=y>&\"'\u202e\ud800"


def line(step: int, measure: str, domain: str = "maths", **changes: Any) -> dict[str, Any]:
    event = {
        "event": "guard",
        "kind": "generation",
        "step": step,
        "domain": domain,
        "language": "en",
        "measure": measure,
        "rate": 0.75,
        "baseline": 1.0,
        "prompts": 60,
        "lost": 15,
        "won": 0,
        "state": "red",
        "action": "none",
    }
    if measure in ("format", "accuracy"):
        event |= {"delta": 25.0, "upper_bound": 35.5, "examples": f"examples-{step:08d}.json"}
    return {**event, **changes}


EVENTS = [
    line(0, "format", rate=1.0, lost=0, delta=0.0, state="green"),
    line(0, "accuracy", rate=1.0, lost=0, delta=0.0, state="green"),
    line(40, "format"),
    line(40, "accuracy", state="amber"),
    line(40, "thinks"),
    line(40, "thinking_tokens", rate=12.4, baseline=99.6),
]


def write(folder: Path, events: list[dict[str, Any]], examples: Any = None) -> Path:
    lines = [json.dumps(event) + "\n" for event in events]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    if examples is not None:
        path = folder / "guard" / "generation" / "examples-00000040.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"step": 40, "domains": examples}), encoding="utf-8")
    return folder


def panel(folder: Path) -> Panel:
    found = generation_panel(read_run(folder), Range1d(start=0, end=50))
    assert found is not None
    return found


def example(**changes: Any) -> dict[str, Any]:
    texts = {"prompt": "What is 1 + 1?", "before": "It is 2.", "now": "It is\n3."}
    return {"measure": "accuracy", "lost": ["accuracy", "thinks"], **texts, **changes}


def test_measures_of_the_last_look_stand_in_the_table(tmp_path: Path) -> None:
    table = panel(write(tmp_path, [*EVENTS, line(40, "format", "chat", state="green")])).table
    assert table is not None
    assert table.headings == ("measure", "maths", "chat")
    rows = [row.texts for row in table.rows]
    arrow = "\u2192"
    form = f"100.0 {arrow} 75.0 %; 15 lost, 0 won"
    loss = "+25.0 (+35.5) points"
    assert rows == [
        ("in good form", form, form),
        ("loss (at most), state", f"{loss}, red", f"{loss}, green"),
        ("right answers", form, ""),
        ("loss (at most), state", f"{loss}, amber", ""),
        ("thinks", form, ""),
        ("mean tokens of thinking", f"100 {arrow} 12", ""),
    ]
    assert [row.tones for row in table.rows] == [{}, {1: "alarm"}, {}, {}, {}, {}]
    assert [row.is_strong for row in table.rows] == [True, False, True, False, False, False]


def test_every_domain_has_a_chart_of_its_rates(tmp_path: Path) -> None:
    cells = panel(write(tmp_path, [*EVENTS, line(40, "format", "chat", rate=0.5)])).cells
    assert [(cell.heading, cell.detail) for cell in cells] == [
        ("maths", "in good form 75 %, right answers 75 %"),
        ("chat", "in good form 50 %"),
    ]


def test_replies_stand_side_by_side_before_and_after(tmp_path: Path) -> None:
    folder = write(tmp_path, EVENTS, {"maths": [example()]})
    (found,) = panel(folder).comparisons
    assert found.heading == "maths, lost: right answers, thinks"
    assert (found.question, found.before, found.now) == ("What is 1 + 1?", "It is 2.", "It is\n3.")
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<pre>It is 2.</pre>" in text and "<pre>It is\n3.</pre>" in text


def test_whatever_a_reply_holds_is_text(tmp_path: Path) -> None:
    hostile = example(prompt=HOSTILE, before=HOSTILE, now=HOSTILE * 500, lost=[HOSTILE])
    events = [*EVENTS, line(40, HOSTILE, HOSTILE, lost=HOSTILE, rate=HOSTILE)]
    folder = write(tmp_path, events, {HOSTILE: [hostile]})
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<img" not in text and "\u202e" not in text
    assert "&lt;script&gt;alert" in text
    (found,) = panel(folder).comparisons
    assert len(found.now) < 4000


def test_missing_damaged_and_foreign_files_leave_the_rates(tmp_path: Path) -> None:
    assert panel(write(tmp_path, EVENTS)).comparisons == ()
    path = tmp_path / "guard" / "generation" / "examples-00000040.json"
    path.parent.mkdir(parents=True)
    for content in ("{", "[]", '{"domains": []}', '{"domains": {"maths": [1]}}'):
        path.write_text(content)
        assert panel(tmp_path).comparisons == ()
    outside = tmp_path / "secret.json"
    outside.write_text(json.dumps({"domains": {"maths": [example()]}}))
    write(tmp_path, [line(40, "format", examples="../../secret.json")])
    assert panel(tmp_path).comparisons == ()


def test_a_run_without_prompts_has_no_panel(tmp_path: Path) -> None:
    write(tmp_path, [{"event": "step", "step": 1, "loss": 2.0}])
    assert generation_panel(read_run(tmp_path), Range1d(start=0, end=2)) is None

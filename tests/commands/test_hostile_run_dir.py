"""A run directory that somebody else filled: every command tells it safely, in bounded time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from cpt.cli import main
from cpt.config.sections import TrainSection
from cpt.errors import ConfigError
from cpt.telemetry.report.history import read_run
from cpt.telemetry.report.panel import source_languages
from data_pipeline.config.strict_yaml import parse_yaml, read_file
from tests.support.bombs import alias_bomb
from tests.support.checkpoints import write_checkpoint
from tests.support.run_events import checkpoint, end, guard, start, step
from tests.support.run_folders import make_run

HOSTILE = "x\x1b]0;owned\x07\x1b[2J\nFAKE: verified ok\r\x9b\u202e\ud800"
"""A title for the terminal, an erased screen, a forged line, an order of letters, no Unicode."""
SHOWN_RAW = set("\x1b\x07\r\x9b\u202e\ud800")
"""What may reach no terminal and no page."""


def hostile_run(folder: Path) -> Path:
    """Make a run directory with control characters wherever a text can stand."""
    decision = {"event": "guard_decision", "step": 2, "action": "pause", "reason": HOSTILE}
    events = [
        {**start(0), "host": HOSTILE, "version": HOSTILE},
        step(1, loss_by_language={HOSTILE: 3.0}, tokens_by_source={HOSTILE: 5}),
        step(2, loss_by_language={HOSTILE: 3.0}, tokens_by_source={HOSTILE: 5}),
        guard(2, HOSTILE, language=HOSTILE, action=HOSTILE, state=HOSTILE),
        decision,
        {**checkpoint(2), "path": HOSTILE},
        {"event": "sample", "step": 2, "number": 0, "prompt": HOSTILE, "text": HOSTILE},
        end(2, exit_code=70, cause=HOSTILE),
    ]
    config = json.dumps({"model": {"path": HOSTILE[:-1]}, "train": {"total_steps": 3}})
    make_run(folder, *events, config=config)
    (write_checkpoint(folder, 2) / HOSTILE[:-1]).write_text("")
    return folder


@pytest.mark.parametrize(
    "command",
    [["checkpoints"], ["checkpoints", "--verify"], ["status"], ["guard", "audit"]],
    ids=" ".join,
)
def test_no_text_of_a_run_steers_the_terminal_or_forges_a_line(
    command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = hostile_run(tmp_path / "run")
    main([*command, "--run_dir", str(run_dir)])
    told = "".join(capfd.readouterr())
    assert not set(told) & SHOWN_RAW
    assert not [line for line in told.splitlines() if line.strip().startswith("FAKE")]
    if command == ["checkpoints"]:
        assert r"x\x1b]0;owned\x07\x1b[2J\nFAKE: verified ok\r\x9b\u202e" in told


def test_no_text_of_a_run_gets_into_a_page_unseen(tmp_path: Path) -> None:
    run_dirs = [hostile_run(tmp_path / name) for name in ("a", "b")]
    pages = {run_dirs[0] / "report.html": ["report", "--run_dir", str(run_dirs[0])]}
    pages[tmp_path / "both.html"] = ["compare", *map(str, run_dirs), "--out"]
    for page, command in pages.items():
        assert main([*command, *([str(page)] if command[-1] == "--out" else [])]) == 0
        text = page.read_text(encoding="utf-8")
        shown = set(text) & SHOWN_RAW
        assert not shown, f"{page.name} holds {shown}"


CONFIGS = {
    "deep JSON": "[" * 100_000,
    "deep YAML": "- " * 100_000,
    "digits": "train: {total_steps: " + "9" * 5000 + "}",
    "no UTF-8": "train: \udcff",
    "aliases": alias_bomb(),
    "endless mix": "data: {mix: /dev/zero}",
    "pipe as a mix": "data: {mix: pipe}",
    "no map": "[1]",
    "NUL in a path": 'data: {mix: "a\\0b"}',
    "no number": "train: {total_steps: [1], stop_at_step: {a: b}}",
}
EVENTS: dict[str, Any] = {
    "deep": "[" * 100_000,
    "deep object": '{"event": "step", "step": 3, "a": ' + "[" * 500 + "]" * 500 + "}",
    "digits": '{"event": "step", "step": 3, "loss": ' + "9" * 5000 + "}",
    "overflow": '{"event": "step", "step": 3, "loss": 1e999, "time": 1e300, "seconds": -1e300}',
    "many objects": '{"event": "step", "step": 3, "a": [' + "{}," * 300_000 + "{}]}",
    "long line": '{"event": "sample", "step": 3, "text": "' + "a" * 3_000_000 + '"}',
    "no UTF-8": "\udcff\udcfe",
}


def bounded(command: list[str], capfd: pytest.CaptureFixture[str], *, seconds: float) -> str:
    """Run a command, and return what it tells; it may refuse, but neither fail nor take long."""
    started = time.process_time()
    code = main(command)
    taken = time.process_time() - started
    told = "".join(capfd.readouterr())
    assert "internal error" not in told and "Traceback" not in told, told
    assert taken < seconds, f"{taken:.1f} s of processor time"
    assert code in (0, 65, 70, 74, 78), "70: `cpt status` of a run that is not finished"
    return told


@pytest.mark.parametrize("bomb", CONFIGS)
def test_no_configuration_is_a_bomb(
    bomb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run", start(0), step(1))
    content = CONFIGS[bomb].encode("utf-8", "surrogateescape")
    (run_dir / "config.resolved.yaml").write_bytes(content)
    bounded(["status", "--run_dir", str(run_dir)], capfd, seconds=5.0)
    assert source_languages(read_run(run_dir)) == {}


@pytest.mark.parametrize("bomb", EVENTS)
def test_no_line_of_a_log_is_a_bomb(
    bomb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run", start(0), step(1), step(2))
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(EVENTS[bomb].encode("utf-8", "surrogateescape") + b"\n")
    bounded(["status", "--run_dir", str(run_dir)], capfd, seconds=5.0)
    assert list(read_run(run_dir).steps)[:2] == [1, 2]


def test_a_report_is_drawn_of_a_log_and_a_configuration_of_bombs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run", start(0), step(1), step(2))
    with (run_dir / "metrics.jsonl").open("ab") as file:
        for content in EVENTS.values():
            file.write(content.encode("utf-8", "surrogateescape") + b"\n")
    (run_dir / "config.resolved.yaml").write_text(CONFIGS["endless mix"])
    bounded(["report", "--run_dir", str(run_dir)], capfd, seconds=15.0)


def test_of_a_log_of_ten_gigabytes_only_the_end_is_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run", start(0), step(1))
    log = run_dir / "metrics.jsonl"
    with log.open("r+b") as file:
        file.truncate(10 * 2**30)
        file.seek(0, 2)
        file.write(b"\n" + json.dumps(step(7)).encode() + b"\n")
    told = bounded(["status", "--run_dir", str(run_dir)], capfd, seconds=10.0)
    assert "7 of 30" in told
    told = bounded(["guard", "audit", "--run_dir", str(run_dir)], capfd, seconds=10.0)
    assert "larger than" in told


def test_of_many_checkpoints_the_newest_are_listed_and_the_command_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpt.checkpoint.listing.MAX_LISTED", 3)
    run_dir = make_run(tmp_path / "run", start(0))
    for number in range(1, 9):
        (run_dir / "checkpoints" / f"step-{number:08d}").mkdir(parents=True)
    told = bounded(["checkpoints", "--run_dir", str(run_dir)], capfd, seconds=10.0)
    steps = [line.split()[0] for line in told.splitlines() if "incomplete" in line]
    assert steps == ["8", "7", "6"] and "Only the newest 3 folders" in told


def test_a_run_of_more_steps_than_any_is_refused_before_they_are_counted() -> None:
    sizes = "seq_len: 8, global_batch_size: 1, lr: 1.0e-5"
    run = parse_yaml(f"{{{sizes}, total_steps: 9000000000000000000}}", "run.yaml")
    with pytest.raises(ConfigError, match="total_steps is 9000000000000000000, must be <="):
        read_file(TrainSection, run)

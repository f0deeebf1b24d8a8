"""The acceptance run on a GPU tells what is wrong, and what hangs does not take the others' time.

Nothing here needs a GPU: the groups are stand-ins.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import acceptance

stages: Any = sys.modules["gpu.stages"]
"""The module under the name by which the program knows it."""
stages_variants: Any = importlib.import_module("gpu.stages_variants")


def options(out: Path, group: str | None = None) -> Any:
    return stages.Options(out=out, deadline=time.time() + 100, tiny=True, group=group)


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / acceptance.RESULTS).read_text().splitlines()]


def test_every_kind_of_wrong_result_is_named_by_its_place() -> None:
    result = {
        "torch_flash": {"passed": True, "largest error": 5e-3},
        "flex": "FAILED RuntimeError: no kernel",
        "flash_attn_4": "not here: it is not installed",
        "rows": {"same bits": False},
        "losses": [12.2, float("nan")],
        "code": 0,
        "steps": {"code": "stopped after 120 s"},
    }
    assert list(stages.wrong_places(result)) == [
        "flex: FAILED RuntimeError: no kernel",
        "rows/same bits: False",
        "losses[1]: nan",
        "steps/code: stopped after 120 s",
    ]


def test_stage_whose_result_is_wrong_is_written_as_wrong_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disagrees(_: Any) -> dict[str, bool]:
        return {"agrees": False}

    def raises(_: Any) -> None:
        raise ValueError("no such thing")

    def is_right(_: Any) -> dict[str, bool]:
        return {"agrees": True}

    planned = [stages.Planned(one, 0) for one in (disagrees, raises, is_right)]
    stand_in = type(sys)("gpu.stages_stand_in")
    stand_in.STAGES = planned  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gpu.stages_stand_in", stand_in)
    assert not stages.run_stages(options(tmp_path, "some"), "stand_in", ())
    assert [line["state"] for line in results(tmp_path)] == ["WRONG", "FAILED", "ok"]
    assert not acceptance.summarize(options(tmp_path))
    assert stages.run_stages(options(tmp_path, "some"), "stand_in", ("is_right",))


def test_what_a_stopped_program_has_started_is_killed_with_it(tmp_path: Path) -> None:
    """Also in sessions of their own, as a group of stages starts its commands."""
    note = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 60 & echo $! > {note}; wait"]
    program = f"""
import signal, sys
sys.path.insert(0, {str(stages.ROOT / "bench")!r})
from gpu.stages import run_within
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
run_within({command!r}, 60)
"""
    outer = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    wait_until(lambda: note.is_file() and note.read_text().endswith("\n"))
    pid = int(note.read_text())
    stages.end_with_all_it_started(outer)
    wait_until(lambda: not is_alive(pid))
    assert outer.returncode == 143


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.time() + 60
    while not holds():
        assert time.time() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that is dead may wait for its new parent."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize(
    ("code", "state"), [(None, "stopped"), (-9, "FAILED"), (1, "FAILED"), (0, None), (3, None)]
)
def test_group_that_hangs_or_dies_is_in_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None, state: str | None
) -> None:
    limits = []

    def run_within(_: list[str], seconds: float, **__: Any) -> int | None:
        limits.append(seconds)
        return code

    monkeypatch.setattr(acceptance, "run_within", run_within)
    acceptance.run_group(acceptance.Group("some", "some", 7), options(tmp_path))
    assert limits == [7]
    assert acceptance.summarize(options(tmp_path)) == (state is None)
    if state is not None:
        assert [(line["group"], line["state"]) for line in results(tmp_path)] == [("some", state)]


def test_way_that_gives_nan_does_not_agree() -> None:
    plain = [12.0, 11.5, 11.2]
    assert stages_variants.agreement([12.0, 11.5001, 11.2], plain)["agrees"]
    assert not stages_variants.agreement([12.0, float("nan"), float("nan")], plain)["agrees"]
    assert not stages_variants.agreement([12.0, 11.6, 11.2], plain)["agrees"]

"""Commands that read a run directory back, or write to it, take only one that is the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt import cli
from data_pipeline.store.ownership import SHARED_VARIABLE

TRUSTING = (
    ["export", "--out", "x"],
    ["sample", "--prompt", "a"],
    ["report"],
    ["guard", "divergence", "--model", "model"],
)


@pytest.fixture
def open_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory that its group may write to."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(0o2770)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    return run


@pytest.mark.parametrize("words", TRUSTING, ids=lambda words: words[0])
def test_command_refuses_a_run_directory_that_its_group_may_write_to(
    open_run: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert cli.main([*words, "--run_dir", str(open_run)]) == 78
    assert f"run directory {open_run} may be written to by its group" in capsys.readouterr().err
    assert list(open_run.iterdir()) == []


def test_commands_that_show_a_run_take_one_of_others_and_a_shared_one_is_written_to(
    open_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["checkpoints", "--run_dir", str(open_run)]) == 0
    (open_run / "metrics.jsonl").write_text('{"event": "start", "time": 1.0}\n', encoding="utf-8")
    monkeypatch.setenv(SHARED_VARIABLE, str(open_run))
    assert cli.main(["report", "--run_dir", str(open_run)]) == 0
    assert (open_run / "report.html").is_file()
    assert "may be written to" not in capsys.readouterr().err

"""An export on several ranks is scored by all of them, or by none; its card never costs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.errors import ConfigError
from cpt.export import run_export
from cpt.export.run_export import ExportForm, export_run

BF16 = ExportForm(format_name="bf16")


def test_ranks_do_not_decide_alone_whether_they_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"--score auto on 2 ranks.*Give --score always"):
        export_run(tmp_path, tmp_path, tmp_path / "out", ExportForm(format_name="mxfp4"), "auto")


def test_export_without_scores_needs_no_deepspeed() -> None:
    code = (
        "import sys, cpt.commands.export, cpt.export.run_export, cpt.offline.rank_options; "
        "sys.exit('deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stand for the writing of weights by an empty directory; holds those that were completed."""
    written: list[Path] = []

    def write(folder: Path, out: Path, format_name: str, complete: Any, *others: Any) -> None:
        out.mkdir()
        written.append(out)
        complete(out)

    monkeypatch.setattr(run_export, "export_checkpoint", write)
    return written


@pytest.mark.parametrize("log", ["missing", "a folder", "of somebody else's program"])
def test_export_is_whole_whatever_became_of_the_log_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: list[Path], log: str
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    if log == "a folder":
        metrics.mkdir()
    elif log != "missing":
        metrics.write_text(
            '{"event": "step", "step": "a"}\n{"event": "guard", "step": 3}\n[]\n{}\n'
        )
    monkeypatch.setattr(run_export, "read_manifest", lambda folder: manifest({}))
    export_run(tmp_path, tmp_path, tmp_path / "out", BF16)
    assert (weights[0] / "README.md").read_text().startswith("---\nlibrary_name: transformers")


def test_card_that_cannot_be_made_is_noticed_before_the_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: list[Path]
) -> None:
    monkeypatch.setattr(run_export, "read_manifest", lambda folder: manifest({"segments": [{}]}))
    with pytest.raises(KeyError):
        export_run(tmp_path, tmp_path, tmp_path / "out", BF16)
    assert weights == []


def manifest(ledger: dict[str, Any]) -> Any:
    state = {"model_config": {}, "ledger": ledger}
    return SimpleNamespace(state=state, step=8, layout={}, versions={})

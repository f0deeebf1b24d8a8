"""An export on several ranks is scored by all of them, or by none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cpt.errors import ConfigError
from cpt.export.run_export import export_run


def test_ranks_do_not_decide_alone_whether_they_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"--score auto on 2 ranks.*Give --score always"):
        export_run(tmp_path, tmp_path, tmp_path / "out", "mxfp4", "auto")


def test_export_without_scores_needs_no_deepspeed() -> None:
    code = (
        "import sys, cpt.commands.export, cpt.export.run_export, cpt.offline.rank_options; "
        "sys.exit('deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0

"""An export on several ranks is scored by all of them, or by none."""

from __future__ import annotations

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

"""What ended a run is told even where nothing can be written or looked up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.errors import ConfigError
from cpt.job import ending as module
from cpt.job.ending import Ending


def test_folder_that_cannot_be_looked_into_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(run_dir: Path) -> list[int]:
        raise PermissionError(13, "Permission denied", str(run_dir))

    monkeypatch.setattr(module, "list_steps", fail)
    first_rank: Any = SimpleNamespace(rank=0)
    with (
        pytest.raises(ConfigError, match="seed 1234, now 7"),
        Ending(tmp_path, first_rank, observe=False).recording(),
    ):
        raise ConfigError("seed 1234, now 7")
    assert "the end of the run could not be written down" in caplog.text

"""docs/standalone-attention.md: its code runs as printed, without DeepSpeed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.launcher import ROOT

PAGE = ROOT / "docs" / "standalone-attention.md"


def blocks() -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert len(found) == 2
    return found


def run(code: str, folder: Path) -> str:
    """Run code in a process of its own, in an empty folder, and return what it printed."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def test_importing_the_attention_imports_no_deepspeed(tmp_path: Path) -> None:
    code = "import cpt.model.attention\nprint(sorted({n.split('.')[0] for n in sys.modules}))"
    loaded = run(code, tmp_path)
    assert "'torch'" in loaded and "'deepspeed'" not in loaded


def test_first_block_registers_the_attention(tmp_path: Path) -> None:
    assert run(blocks()[0] + "print(attention)", tmp_path) == "sink\n"


def test_trainer_of_the_page_learns_and_moves_the_sinks(tmp_path: Path) -> None:
    check = "\nassert losses[-1] < losses[0] - 1, losses\nassert sinks_moved > 0, sinks_moved\n"
    assert "largest change of a sink" in run(blocks()[1] + check, tmp_path)

"""`cpt` with the small vocabulary of the guard's proof."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "prove")]

from guard_parts.small_vocabulary import shrink  # noqa: E402

shrink()

from cpt.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

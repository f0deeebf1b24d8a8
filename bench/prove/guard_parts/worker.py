"""`cpt/run.py` with the small vocabulary, as the launcher starts it in the guard's proof."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "prove")]

from guard_parts.small_vocabulary import shrink  # noqa: E402

shrink()

from cpt.errors import EXIT_DONE  # noqa: E402
from cpt.resilience.stop import StopRequest  # noqa: E402
from cpt.run import main  # noqa: E402

if __name__ == "__main__":
    request = StopRequest()
    request.listen()
    code = main(sys.argv[1:], request)
    if code == EXIT_DONE:
        sys.exit(code)
    sys.stdout.flush()
    os._exit(code)

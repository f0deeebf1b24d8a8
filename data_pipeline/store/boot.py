"""What tells this machine, since it was started, from all others."""

from __future__ import annotations

from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Random text of the kernel (proc(5)), another one at each start of the machine."""


def this_boot() -> str:
    """Return the id of this boot, which no other machine has; empty if nothing tells it."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""

"""A limit on the time of work that may never end, because a disk or a terminal does not answer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable


def at_most(seconds: float, work: Callable[[], None], name: str) -> bool:
    """Do work in a thread of its own, and wait for it no longer than a limit.

    An `OSError` of the work is dropped. Work that takes longer goes on by itself, or stays where it
    is, and does not keep the process from ending.

    Args:
        seconds: The limit.
        work: What to do; it must let go of the interpreter while it waits, as `os.write` does.
        name: Name of the thread, as stacks show it.

    Returns:
        Whether the work has ended. If the system gives no thread, it was not begun.
    """

    def run() -> None:
        with contextlib.suppress(OSError):
            work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return False
    thread.join(seconds)
    return not thread.is_alive()

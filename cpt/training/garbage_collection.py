"""Control of Python's garbage collector: every rank collects at the same step.

Left alone, each process collects when its own count of objects says so, and in a large job some
rank is always the one that all others wait for. The reference recipes (torchtitan, NeMo) collect
every so many steps, on all ranks at once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collecting(interval_steps: int) -> Iterator[Callable[[int], None]]:
    """Turn automatic collection off inside the block, and yield a function that the caller calls
    after every step.

    Args:
        interval_steps: Steps between collections, counted from step 0 so that all ranks agree; 0
            leaves automatic collection on.
    """
    if interval_steps == 0:
        yield lambda step: None
        return
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()

    def after_step(step: int) -> None:
        if step % interval_steps == 0:
            gc.collect()

    try:
        yield after_step
    finally:
        if was_enabled:
            gc.enable()

"""A thread that reads this rank's state while training goes on, and what waits for it.

A save reads master weights, moments and frozen weights. In training only the update changes them,
so a thread may read while the next step goes forward and backward. Gradients and the working
weights of trained parameters are not read, and may change at any time.

Whoever is about to change what is read calls `wait` first:
    an update                       cpt/training/engine.py, apply_update of gradients.py
    a load, hence a rollback        cpt/checkpoint/loading.py
    the first weights of a run      cpt/job/engine_setup.py
An update that is skipped changes nothing and waits for nothing. Rounding, the levers of the guard
and evaluation change working weights and rates only. Another stage, and the end of a run, come
after a save at which training waits.
"""

from __future__ import annotations

import threading
import time


class StateReading:
    """Whether a thread reads the state of this rank; there is one of an engine."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._ended.set()
        self.waited_seconds = 0.0
        """How long the last reading was waited for."""
        self.is_open = False
        """Whether a reading was begun that nobody has waited for since. All ranks begin and wait
        at the same steps, so it is the same on all of them."""

    def begin(self) -> None:
        """Note that a thread is about to read; the main thread calls it."""
        assert self._ended.is_set(), "two threads would read the state at once"
        self._ended.clear()
        self.waited_seconds = 0.0
        self.is_open = True

    def end(self) -> None:
        """Note that everything was read, or that nothing more will be; may be called twice."""
        self._ended.set()

    def wait(self) -> None:
        """Wait until nothing is read; the main thread calls it before it changes the state."""
        if not self.is_open:
            return
        began = time.perf_counter()
        self._ended.wait()
        self.waited_seconds += time.perf_counter() - began
        self.is_open = False

"""DeepSpeed's list of the modules that are in their forward pass, under ZeRO-3.

A hook before a module's forward puts it on the list, and one after it takes the last one off.
torch's non-reentrant checkpoint leaves the forward that it runs again as soon as it has all that
the backward needs, by an exception.  The second hook of the modules inside does not run then, so
they stay on the list: one of each layer and micro step, which is never looked at again, and holds
memory as long as the run goes on.

Read in deepspeed 0.19.8: runtime/zero/parameter_offload.py; torch 2.11 and 2.13:
utils/checkpoint.py (`early_stop`).  This file can go once DeepSpeed takes them off: its test says
so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deepspeed.runtime.zero import parameter_offload


@contextmanager
def recomputed_modules_forgotten() -> Iterator[None]:
    """Take off the list, after a forward and backward, what they have left there."""
    running = parameter_offload.FWD_MODULE_STACK
    depth = len(running)
    yield
    del running[depth:]

"""The files in which ranks leave their stacks before they end: <run_dir>/stacks/rank-N.txt.

They are opened without following a link, and what they say is escaped.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.escaping import escaped_text
from data_pipeline.store.files import make_folder, no_links


def append_text(folder: Path, rank: int, text: str) -> None:
    """Add lines about a rank to its file.

    Raises:
        OSError: the file cannot be written, or is a link.
    """
    with _opened(folder, rank) as descriptor:
        os.write(descriptor, f"{escaped_text(text)}\n".encode())


def append_stacks(folder: Path, rank: int, heading: str) -> None:
    """Add the stacks of all threads of this process to its file, below a heading.

    `faulthandler` keeps the interpreter while it writes. Written to a disk that does not answer,
    stacks would stop every thread, so they go by way of memory.

    Raises:
        OSError: as from `append_text`.
    """
    with os.fdopen(os.memfd_create("stacks"), "rb") as memory:
        faulthandler.dump_traceback(memory, all_threads=True)
        memory.seek(0)
        stacks = memory.read()
    with _opened(folder, rank) as descriptor:
        os.write(descriptor, f"{escaped_text(heading)}\n".encode() + stacks)


@contextlib.contextmanager
def _opened(folder: Path, rank: int) -> Iterator[int]:
    """Open the file of a rank to append to it; make it, and its folder, if need be."""
    make_folder(folder)
    # without O_NONBLOCK a pipe of that name would keep a hung run alive
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
    path = folder / f"rank-{rank}.txt"
    descriptor = no_links(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no plain file")
        yield descriptor
    finally:
        os.close(descriptor)

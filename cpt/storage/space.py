"""Free space: checked before anything is written, and named as the cause where a write fails."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path

from cpt.errors import StorageError

MARGIN = 1.2
"""Free space that a checkpoint must find, as a multiple of its size."""


def check_space(folder: Path, num_bytes: int, *, claim: str, margin: float, cure: str) -> None:
    """Refuse to start writing what will not fit.

    Args:
        folder: Where it will be written; exists.
        num_bytes: Size of what will be written.
        claim: How the message starts: "the weights need".
        margin: Free space to ask for, as a multiple of the size.
        cure: What to do if there is too little.

    Raises:
        StorageError: Too little space is free.
    """
    wanted = int(margin * num_bytes)
    free = shutil.disk_usage(folder).free
    if free >= wanted:
        return
    times = "" if margin == 1 else f" ({margin} times its size)"
    raise StorageError(
        f"{claim} {size_text(wanted)}{times}, {size_text(free)} are free at {folder}. {cure}"
    )


def check_checkpoint_space(folder: Path, num_bytes: int, *, largest_file_bytes: int = 0) -> None:
    """Refuse to start a checkpoint that will not fit.

    Args:
        folder: Where it will be written; exists.
        num_bytes: Size of the checkpoint.
        largest_file_bytes: Size of its largest file.

    Raises:
        StorageError: Too little space is free, or files may not become that large.
    """
    check_space(
        folder,
        num_bytes,
        claim="a checkpoint needs",
        margin=MARGIN,
        cure="Free some space, lower checkpoint.keep_last, or give another --run_dir.",
    )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if 0 <= limit < largest_file_bytes:
        raise StorageError(
            f"a checkpoint has files of {size_text(largest_file_bytes)}, this process may write "
            f"{size_text(limit)} per file (ulimit -f). Raise the limit."
        )


def size_text(count: int) -> str:
    """Return a size of any order in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def write_error(error: BaseException, folder: Path) -> StorageError:
    """Return what a failed write means, even where the library that wrote has lost the cause."""
    number = _errno_of(error)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return StorageError(
            f"writing {folder} failed: {type(error).__name__}: {error}; the folder is gone."
        )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if number in (errno.ENOSPC, errno.EDQUOT):
        cause = f"no space left ({size_text(free)} free, or a quota is used up)"
    elif number == errno.EFBIG:
        cause = f"a file grew beyond the limit of {size_text(limit)} per file (ulimit -f)"
    elif number is not None:
        cause = os.strerror(number)
    else:
        cause = f"{type(error).__name__}: {error} ({size_text(free)} free)"
    return StorageError(f"writing {folder} failed: {cause}.")


def _errno_of(error: BaseException | None) -> int | None:
    """Return the number of the first OSError in the chain of causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None

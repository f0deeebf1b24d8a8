"""Caches of compiled code, which every rank loads and runs: they must be this user's alone.

Decisions
    Only caches that somebody has named in the environment, and those whose default place is a fixed
    name in the common temporary folder, are looked at.  The other defaults lie in the home
    directory.
    A cache that is not there yet is made here, for its user only.  Otherwise another user could
    make it between this check and the first kernel.
    A default that another user could have filled is no reason to refuse a run: anybody can make
    that folder.  The process compiles into a new folder of its own then.
    Caches lie on the node, so every rank looks at those of its own.  A dry run is not on the nodes
    of the run: it makes nothing, and judges only what the environment names.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from cpt.errors import ConfigError
from data_pipeline.store.files import make_folder
from data_pipeline.store.ownership import foreign_problems

log = logging.getLogger("cpt.caches")

INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
VARIABLES = ("TRITON_CACHE_DIR", "TRITON_HOME", INDUCTOR, "TORCH_EXTENSIONS_DIR", "CUDA_CACHE_PATH")
"""Environment variables that name a folder of compiled code."""
CACHE_MODE = 0o700


def check_caches(variables: MutableMapping[str, str], *, is_dry_run: bool = False) -> None:
    """Refuse caches of compiled code that another user could have filled.

    Args:
        variables: The environment.  TORCHINDUCTOR_CACHE_DIR is set in it if it is not there and the
            default is not this user's alone.
        is_dry_run: Make no folder and set nothing.

    Raises:
        ConfigError: naming every such cache.
    """
    problems = []
    for name, folder in _named_folders(variables).items():
        if not is_dry_run:
            _make(folder)
        for problem in foreign_problems(folder, f"cache {name}"):
            problems.append(
                f"{problem}\nIn the job templates, CPT_JOB_CACHES=1 in slurm/env.sh takes a new "
                "private folder of the job instead."
            )
    if problems:
        raise ConfigError(problems)
    if not is_dry_run and not variables.get(INDUCTOR):
        _avoid_open_default(variables)


def _named_folders(variables: Mapping[str, str]) -> dict[str, Path]:
    """Return the folders that the environment names, by variable."""
    folders = {}
    for name in VARIABLES:
        if not variables.get(name):
            continue
        folder = Path(variables[name]).expanduser()
        # as triton.knobs has it: the variable names what stands for the home directory
        folders[name] = folder / ".triton" if name == "TRITON_HOME" else folder
    return folders


def _avoid_open_default(variables: MutableMapping[str, str]) -> None:
    """Set another cache of TorchInductor than its default, if that is not this user's alone."""
    default = _default_folder()
    _make(default)
    try:
        problems = foreign_problems(default, "cache of TorchInductor")
    except OSError as error:
        problems = [f"cache of TorchInductor {default}: {error.strerror}."]
    if not problems:
        return
    private = tempfile.mkdtemp(prefix="cpt-torchinductor-")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    variables[INDUCTOR] = private
    log.warning(
        "%s This process compiles into %s instead, which is removed at its end.",
        problems[0].partition("\n")[0],
        private,
    )


def _default_folder() -> Path:
    """Return the default of TORCHINDUCTOR_CACHE_DIR.

    As `torch._inductor.runtime.cache_dir_utils.default_cache_dir` has it, whose import takes
    seconds.
    """
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = f"uid_{os.getuid()}"
    cleaned = re.sub(r'[\\/:*?"<>|]', "_", name)
    return Path(tempfile.gettempdir()) / f"torchinductor_{cleaned}"


def _make(folder: Path) -> None:
    """Make a folder for this user only, unless it is there or cannot be made."""
    with contextlib.suppress(OSError):
        make_folder(folder, CACHE_MODE)

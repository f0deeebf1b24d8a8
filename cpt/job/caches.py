"""Caches of compiled code, which every rank loads and runs: they must be this user's alone.

Decisions
    Only caches that somebody has named in the environment, and those whose default place is a fixed
    name in the common temporary folder, are looked at.  The other defaults lie in the home
    directory.
    A cache that is not there yet is made here, for its user only.  Otherwise another user could
    make it between this check and the first kernel.
    Caches lie on the node, so every rank looks at those of its own.
"""

from __future__ import annotations

import contextlib
import getpass
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cpt.errors import ConfigError
from data_pipeline.store.files import make_folder
from data_pipeline.store.ownership import foreign_problems

VARIABLES = (
    "TRITON_CACHE_DIR",
    "TRITON_HOME",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR",
    "CUDA_CACHE_PATH",
)
"""Environment variables that name a folder of compiled code."""
CACHE_MODE = 0o700


def check_caches(variables: Mapping[str, str]) -> None:
    """Refuse caches of compiled code that another user could have filled.

    Args:
        variables: The environment.

    Raises:
        ConfigError: naming every such cache.
    """
    problems = []
    for name, folder in _folders(variables).items():
        with contextlib.suppress(OSError):
            make_folder(folder, CACHE_MODE)
        for problem in foreign_problems(folder, f"cache {name}"):
            problems.append(f"{problem} A folder that the job makes with mktemp -d is always safe.")
    if problems:
        raise ConfigError(problems)


def _folders(variables: Mapping[str, str]) -> dict[str, Path]:
    """Return the folders by name of their variable."""
    folders = {}
    for name in VARIABLES:
        if variables.get(name):
            folders[name] = Path(variables[name]).expanduser()
    if "TORCHINDUCTOR_CACHE_DIR" not in folders:
        # as torch._inductor.runtime.cache_dir_utils.default_cache_dir has it
        with contextlib.suppress(KeyError, OSError):
            name = f"torchinductor_{getpass.getuser()}"
            folders["TORCHINDUCTOR_CACHE_DIR (its default)"] = Path(tempfile.gettempdir()) / name
    return folders

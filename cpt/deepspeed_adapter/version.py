"""The version of DeepSpeed whose inside has been read; another one is refused."""

from __future__ import annotations

import deepspeed

from cpt.errors import ConfigError

TESTED_VERSIONS = ("0.19.8",)


def check_version() -> None:
    """Refuse a DeepSpeed whose inside has not been read.

    Raises:
        ConfigError: another version is installed.
    """
    if deepspeed.__version__ not in TESTED_VERSIONS:
        raise ConfigError(
            f"deepspeed {deepspeed.__version__} is installed; expert parallelism and checkpoints rely on the inside "
            f"of {', '.join(TESTED_VERSIONS)}. Install that version (constraints.txt), or run the tests under "
            "tests/dist with yours and add it to TESTED_VERSIONS in cpt/deepspeed_adapter/version.py."
        )

"""Check what the command line and the launcher alone tell, before any library is imported."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cpt.errors import ConfigError
from cpt.job.findings import Findings, joined
from cpt.planning.hardware import gpu_problems
from cpt.resilience import faults
from cpt.resilience.environment import LAUNCHER_VARIABLES, LaunchEnvironment, read_environment


def check_start(options: argparse.Namespace) -> LaunchEnvironment:
    """Return what the launcher tells this rank.

    Args:
        options: The command line of cpt/run.py.

    Raises:
        ConfigError: everything that is wrong with the environment and the command line.
    """
    found = Findings()
    found.attempt(faults.check_environment)
    environment = found.attempt(lambda: check_launcher(options.ds_config))
    found.add(command_line_problems(options))
    error = joined(found)
    if error is not None:
        raise error
    assert environment is not None
    return environment


def check_launcher(ds_config: Path) -> LaunchEnvironment:
    """Return what the launcher tells this rank.

    Raises:
        ConfigError: naming the variables that are missing, and the command to start with; or those
            that cannot be right.
    """
    missing = [name for name in LAUNCHER_VARIABLES if not os.environ.get(name, "").strip()]
    if missing:
        raise ConfigError(
            f"no launcher: {', '.join(missing)} not set. Start with  deepspeed cpt/run.py "
            f"--ds_config {ds_config}  (on a machine without GPU add --num_gpus N for N processes)."
        )
    return read_environment()


def command_line_problems(options: argparse.Namespace) -> list[str]:
    """Return what is wrong with the command line alone."""
    problems = []
    for item in options.set:
        if "=" not in item:
            problems.append(f"--set {item} has no '='. Write --set section.key=value.")
    is_step = options.resume.isascii() and options.resume.isdigit()
    if options.resume not in ("auto", "never") and not is_step:
        problems.append(f"--resume {options.resume} must be auto, never or a step.")
    return problems + gpu_problems(options.gpu)

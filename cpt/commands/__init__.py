"""The subcommands of `cpt`, one file each.

A file holds `add_parser(commands)`, which declares the options and sets `run=` to the handler that
stands below it. The handler imports what it needs when it is called: `cpt --help` and `cpt status`
must answer without loading torch.
"""

from __future__ import annotations

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The object that a subcommand adds its parser to."""

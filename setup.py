"""Puts the templates of a project into the wheel; all metadata stands in setup.cfg.

The templates keep their places at the top level of the repository, where people edit them, and
`cpt init` copies them from `cpt/project` where there is no repository.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PATTERNS = (
    "configs/**/*",
    "ds_configs/*.json",
    "slurm/**/*",
    "docs/*.schema.json",
    "constraints.txt",
)
SETTINGS_OF_A_SITE = "slurm/env.sh"


class BuildWithTemplates(build_py):
    """Copies the templates beside the modules."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the repository is there
            return
        for pattern in PATTERNS:
            for path in sorted(ROOT.glob(pattern)):
                name = path.relative_to(ROOT)
                if path.is_file() and name.as_posix() != SETTINGS_OF_A_SITE:
                    target = Path(self.build_lib, "cpt", "project", name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, target)


setup(cmdclass={"build_py": BuildWithTemplates})

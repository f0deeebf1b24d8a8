"""The templates of a project: run YAMLs, mixes, DeepSpeed JSON, job scripts, and the sample text.

repository        configs/ ds_configs/ slurm/ docs/*.schema.json
installed wheel   the same below cpt/project/ (setup.py puts them there)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cpt
import data_pipeline


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectFiles:
    """The folder that holds the templates."""

    folder: Path
    is_repository: bool
    """Whether it is a clone of the repository, which holds much else."""


def project_files() -> ProjectFiles:
    """Return where the templates are."""
    package = Path(cpt.__path__[0])
    packed = package / "project"
    if packed.is_dir():
        return ProjectFiles(folder=packed, is_repository=False)
    return ProjectFiles(folder=package.parent, is_repository=True)


def sample_folder() -> Path:
    """Return the folder of the sample text."""
    return Path(data_pipeline.__path__[0]) / "sample"

"""The scores that a run keeps in <run_dir>/guard: the baseline, and those of every measurement.

baseline.json holds the scores of the untouched model, with a hash of the text and one of the
weights. It is written before step 0 and never again; a run that is resumed reads it. The scores of
later steps lie beside it, so that `cpt guard audit` can compute every bound again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from cpt.errors import ConfigError
from cpt.guard.score import DomainScore, Floats, as_floats
from cpt.model.weights.checksums import is_identity
from cpt.parallel.agreement import on_first_rank
from cpt.resilience.best_effort import best_effort
from data_pipeline.bounded.json_text import LARGE_BYTES, read_json
from data_pipeline.store.files import make_folder, write_json
from data_pipeline.store.packing import Integers

BASELINE_FILE = "baseline.json"

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainBaseline:
    """The scores of the untouched model on one domain."""

    panel: DomainScore
    """Scores of the documents that every look measures."""
    clusters: Integers
    """(documents,) cluster of each document of the panel."""
    fresh: Floats
    """(documents,) nats of the documents that one look each measures, those of look 1 first."""
    fresh_per_look: int
    """Fresh documents of one look; 0 if there are none."""

    def fresh_at(self, look_number: int) -> Floats:
        """Return the scores of the fresh documents of a look."""
        first = (look_number - 1) * self.fresh_per_look
        return self.fresh[first : first + self.fresh_per_look]

    def to_json(self) -> Json:
        """Return the scores as JSON values."""
        return {
            "language": self.panel.language,
            "nats": self.panel.nats.tolist(),
            "bytes": self.panel.bytes.tolist(),
            "clusters": self.clusters.tolist(),
            "fresh": self.fresh.tolist(),
            "fresh_per_look": self.fresh_per_look,
        }

    @classmethod
    def from_json(cls, name: str, plain: Mapping[str, Any]) -> DomainBaseline:
        """Read the output of `to_json`; before 0.2 there were no clusters and fresh documents."""
        count = len(plain["nats"])
        return cls(
            panel=DomainScore.from_json(name, plain),
            clusters=np.asarray(plain.get("clusters", range(count)), dtype=np.int64),
            fresh=as_floats(plain.get("fresh", [])),
            fresh_per_look=plain.get("fresh_per_look", 0),
        )


def read_baseline(path: Path) -> Json:
    """Return the content of baseline.json; empty if there is no file."""
    if not path.is_file():
        return {}
    content: Json = read_json(path, LARGE_BYTES, follow_links=False)
    return content


def stored_baselines(stored: Json) -> dict[str, DomainBaseline]:
    """Return the scores in the content of baseline.json, by domain."""
    baselines = {}
    for name, plain in stored.items():
        baselines[name] = DomainBaseline.from_json(name, plain)
    return baselines


def missing_baseline(path: Path, step: int) -> ConfigError:
    """Return the refusal of a run whose scores of the untouched model are gone."""
    return ConfigError(
        f"{path} is missing, and at step {step} the untouched model is gone. Restore the file, or "
        "go on with --set guard.enabled=false."
    )


def check_same_text(path: Path, stored: Json, hashes: Mapping[str, Json]) -> None:
    """Refuse a baseline that was measured on other documents.

    Args:
        path: The file, for the message.
        stored: Its content.
        hashes: Hashes of the documents as they are now, by domain and field.

    Raises:
        ConfigError: a domain holds other text than the one that was measured.
    """
    changed = []
    old = []
    for name, present in hashes.items():
        if "fresh_per_look" not in stored[name]:
            old.append(name)
        elif any(stored[name].get(field) != value for field, value in present.items()):
            changed.append(name)
    if old:
        raise ConfigError(
            f"{path} was measured by a version before 0.2, on the first documents of "
            f"{', '.join(old)} instead of a random panel. Use a new --run_dir, or go on with "
            "--set guard.enabled=false."
        )
    if changed:
        raise ConfigError(
            f"{path} was measured on other held-out text of {', '.join(changed)} than the data "
            "holds now. Change the data back, or use a new --run_dir."
        )


def check_same_weights(path: Path, stored: Json, model: str, weights: str) -> None:
    """Refuse a baseline of another model than the one that the run starts from.

    Raises:
        ConfigError: the weights are not those that were measured.
    """
    others = set()
    for domain in stored.values():
        if not is_identity(domain.get("weights"), weights):
            others.add(domain["model"])
    if others:
        names = ", ".join(sorted(others))
        raise ConfigError(
            f"{path} holds the scores of another untouched model: {names}, as it was then. This "
            f"run starts from {model}, whose weights are others. Change the model back, or use a "
            "new --run_dir."
        )


def check_finite(baselines: Mapping[str, DomainBaseline], where: str, cure: str) -> None:
    """Refuse scores that are not finite: nothing can be compared with them.

    Args:
        baselines: Scores of the untouched model, by domain.
        where: The file or the model that they are of.
        cure: What to do, as a sentence.

    Raises:
        ConfigError: naming the domains.
    """
    broken = []
    for name, baseline in baselines.items():
        nats = np.concatenate([baseline.panel.nats, baseline.fresh])
        num_bad = int((~np.isfinite(nats)).sum())
        if num_bad:
            broken.append(f"{name} ({num_bad} of {len(nats)} documents)")
    if broken:
        raise ConfigError(
            f"{where}: the scores of the untouched model are not finite on the held-out domains "
            f"{', '.join(broken)}; no baseline is kept, because every later score would be "
            f"compared with it. {cure}"
        )


def _stem(what: str, step: int) -> str:
    return f"{what}-{step:08d}"


def free_file(folder: Path, what: str, step: int) -> Path:
    """Return a new file for a measurement of a step; a step that is done again gets another one."""
    stem = _stem(what, step)
    path = folder / f"{stem}.json"
    number = 2
    while path.exists():
        path = folder / f"{stem}-{number}.json"
        number += 1
    return path


def write_on_first_rank(group: dist.ProcessGroup, path: Path, content: Json) -> None:
    """Write a JSON file atomically on the first rank; all ranks call it together.

    Raises:
        CptError: on all ranks, if it could not be written.
    """

    def write() -> None:
        make_folder(path.parent)
        write_json(path, content)

    on_first_rank(group, write)


def keep_on_first_rank(
    group: dist.ProcessGroup, folder: Path, what: str, step: int, content: Json
) -> str:
    """Keep what a measurement is later audited with, as a file of its own on the first rank.

    Nothing that the run decides depends on it, so a full disk costs a warning. All ranks call it
    together.

    Returns:
        The name of the file; empty if it could not be written.
    """

    def keep() -> str:
        name = ""
        with best_effort(f"The {what} of the guard at step {step} are not kept for an audit"):
            make_folder(folder)
            path = free_file(folder, what, step)
            write_json(path, content)
            name = path.name
        return name

    return on_first_rank(group, keep)

"""The scores that a run keeps in <run_dir>/guard: the baseline, and those of every measurement.

baseline.json holds the scores of the untouched model, with a hash of the text and one of the
weights. It is written before step 0 and never again; a run that is resumed reads it. The scores of
later steps lie beside it, so that `cpt guard audit` can compute every bound again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from cpt.errors import ConfigError
from cpt.guard.score import DomainScore, ScoredSet
from cpt.parallel.agreement import on_first_rank
from data_pipeline.store.files import write_json

BASELINE_FILE = "baseline.json"

Json = dict[str, Any]


def baseline_content(
    domains: Sequence[ScoredSet], scores: Mapping[str, DomainScore], model: str, weights: str
) -> Json:
    """Return the content of baseline.json.

    Args:
        domains: The held-out sets.
        scores: Their scores, by name.
        model: Name of the untouched model, for people.
        weights: Hash of its weights, which stays the same when the files are moved.
    """
    content = {}
    for domain in domains:
        score = scores[domain.name]
        content[domain.name] = {
            "model": model,
            "weights": weights,
            "language": domain.language,
            "content_hash": domain.content_hash,
            "nats": score.nats.tolist(),
            "bytes": score.bytes.tolist(),
        }
    return content


def read_baseline(path: Path) -> Json:
    """Return the content of baseline.json; empty if there is no file."""
    if not path.is_file():
        return {}
    content: Json = json.loads(path.read_text(encoding="utf-8"))
    return content


def baseline_scores(stored: Json) -> dict[str, DomainScore]:
    """Return the scores in the content of baseline.json, by domain."""
    scores = {}
    for name, plain in stored.items():
        scores[name] = DomainScore.from_json(name, plain)
    return scores


def check_same_text(path: Path, stored: Json, domains: Sequence[ScoredSet]) -> None:
    """Refuse a baseline that was measured on other documents.

    Raises:
        ConfigError: a domain holds other text than the one that was measured.
    """
    changed = []
    for domain in domains:
        if domain.name in stored and domain.content_hash != stored[domain.name]["content_hash"]:
            changed.append(domain.name)
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
        if domain.get("weights") != weights:
            others.add(domain["model"])
    if others:
        names = ", ".join(sorted(others))
        raise ConfigError(
            f"{path} holds the scores of another untouched model: {names}, as it was then. This "
            f"run starts from {model}, whose weights are others. Change the model back, or use a "
            "new --run_dir."
        )


def check_finite(scores: Mapping[str, DomainScore], where: str, cure: str) -> None:
    """Refuse scores that are not finite: nothing can be compared with them.

    Args:
        scores: Scores of the untouched model, by domain.
        where: The file or the model that they are of.
        cure: What to do, as a sentence.

    Raises:
        ConfigError: naming the domains.
    """
    broken = []
    for name, score in scores.items():
        num_bad = int((~np.isfinite(score.nats)).sum())
        if num_bad:
            broken.append(f"{name} ({num_bad} of {len(score.nats)} documents)")
    if broken:
        raise ConfigError(
            f"{where}: the scores of the untouched model are not finite on the held-out domains "
            f"{', '.join(broken)}; no baseline is kept, because every later score would be "
            f"compared with it. {cure}"
        )


def free_scores_file(folder: Path, step: int) -> Path:
    """Return a new file for the scores of a step; a step that is done again gets another one."""
    path = folder / f"scores-{step:08d}.json"
    number = 2
    while path.exists():
        path = folder / f"scores-{step:08d}-{number}.json"
        number += 1
    return path


def write_on_first_rank(group: dist.ProcessGroup, path: Path, content: Json) -> None:
    """Write a JSON file atomically on the first rank; all ranks call it together.

    Raises:
        CptError: on all ranks, if it could not be written.
    """

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)

    on_first_rank(group, write)

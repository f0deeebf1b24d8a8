"""The cost of rounding a checkpoint to MXFP4: bits per byte of the run's held-out text.

All ranks of a launcher score together, the bf16 weights first and the rounded ones after them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from cpt.checkpoint.manifest import MANIFEST, Manifest
from cpt.checkpoint.model_config import model_config_of
from cpt.checkpoint.model_weights import open_weights
from cpt.checkpoint.run_state import RunState
from cpt.checkpoint.weights import CheckpointWeights
from cpt.errors import ConfigError, DataError
from cpt.export.rounded_weights import RoundedWeights
from cpt.guard.paired_test import compare_scores
from cpt.guard.score import ScoredSet
from cpt.model.adapters.merged import AdaptedWeights
from cpt.model.parameters import parameter_numels
from cpt.model.weights.writer import refuse_existing
from cpt.offline.model import OfflineModel, held_out_sets
from cpt.offline.pieces import kept_pieces, partial_folder
from cpt.offline.rank_options import RankOptions
from cpt.offline.ranks import check_fit, offline_ranks
from cpt.offline.scored_sets import SetScorer
from cpt.resilience.faults import fault_point
from data_pipeline.store.files import sha256_of

log = logging.getLogger("cpt.export")

LARGEST_CPU_MODEL = 10**9
"""Parameters; a larger model is scored on a CPU only with `--score always`."""


def write_scored(
    folder: Path,
    manifest: Manifest,
    out: Path,
    score: Literal["auto", "always"],
    options: RankOptions,
    write: Callable[[list[dict[str, Any]]], None],
    base: Path | None = None,
) -> bool:
    """Score the rounded weights of a checkpoint and call `write` with the costs.

    All ranks call it together; the first one writes.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        out: The directory that `write` makes.
        score: `auto` scores if the text is there and the model is small enough for the device.
        options: How the ranks work together.
        write: Takes the costs by domain, as JSON values.
        base: Directory of the model below an adapter; None for where it was in training.

    Returns:
        False if there is nothing to score, so that nothing was written.

    Raises:
        ConfigError: `score` is `always` and there is no held-out text.
        RequeueRequested: a stop was asked for; what is scored stays for the next start.
    """
    sets = _sets_to_score(manifest, score)
    if not sets:
        return False
    config = model_config_of(manifest)
    with offline_ranks(config, partial_folder(out), options) as ranks:
        ranks.on_first(lambda: refuse_existing(out))
        model = OfflineModel(config, ranks.topology)
        with kept_pieces(out, _identity(folder, manifest, sets, model), ranks) as pieces:
            weights = open_weights(folder, manifest, torch.bfloat16, base)
            costs = quantization_cost(weights, SetScorer(model, sets, pieces))

            def publish() -> None:
                fault_point("offline_publish", 0)
                write(costs)

            ranks.on_first(publish)
    return True


def _identity(
    folder: Path, manifest: Manifest, sets: Sequence[ScoredSet], model: OfflineModel
) -> dict[str, Any]:
    """Return what the scores are computed from."""
    return {
        "command": "export",
        "checkpoint": sha256_of(folder / MANIFEST),
        "step": manifest.step,
        "sets": {domain.name: domain.content_hash() for domain in sets},
        "computed_in": str(model.dtype).removeprefix("torch."),
    }


def _sets_to_score(manifest: Manifest, score: Literal["auto", "always"]) -> list[ScoredSet]:
    """Return the held-out sets of the run, or none, with a warning that says why."""
    config = RunState.of(manifest).config
    if config is None:  # an adapter that was imported, before its first step
        told = f"the checkpoint of step {manifest.step} is of no run, so there is no held-out text."
        if score == "always":
            raise ConfigError(f"--score always: {told} Give --score never.")
        log.warning("bits per byte of the quantized weights are not measured: %s", told)
        return []
    build_dir = config["data"].get("build_dir")
    try:
        sets = held_out_sets(
            Path(config["data"]["mix"]),
            Path(build_dir) if build_dir else None,
            config["guard"]["max_documents"],
        )
    except (ConfigError, DataError) as error:
        if score == "always":
            raise
        log.warning("bits per byte of the quantized weights are not measured: %s", error)
        return []
    if score == "auto":
        refusal = _too_large(manifest)
        if refusal:
            log.warning("bits per byte of the quantized weights are not measured: %s", refusal)
            return []
    return sets


def _too_large(manifest: Manifest) -> str:
    """Return why a model is too large to be scored without being asked for; empty if it is not."""
    numel = sum(parameter_numels(model_config_of(manifest)).values())
    if not torch.cuda.is_available():
        if numel > LARGEST_CPU_MODEL:
            return "there is no GPU. --score always measures them on the CPU."
        return ""
    try:
        check_fit(model_config_of(manifest))
    except ConfigError as error:
        return str(error)
    return ""


def quantization_cost(
    weights: CheckpointWeights | AdaptedWeights, scorer: SetScorer
) -> list[dict[str, Any]]:
    """Return bits per byte of bf16 weights and of the same rounded to MXFP4, paired by document.

    All ranks call it together and get the same.
    """
    before = scorer.scores("bf16", weights)
    after = scorer.scores("mxfp4", RoundedWeights(weights, weights.shapes))
    costs = []
    for exact, rounded in zip(before, after, strict=True):
        change = compare_scores(rounded, exact)
        costs.append(
            {
                "domain": exact.name,
                "language": exact.language,
                "documents": len(exact.nats),
                "bits_per_byte_bf16": exact.bits_per_byte,
                "bits_per_byte_mxfp4": rounded.bits_per_byte,
                "delta_percent": change.delta_percent,
                "ci_low": change.ci_low,
                "ci_high": change.ci_high,
            }
        )
    return costs

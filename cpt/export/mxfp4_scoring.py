"""Scores of an MXFP4 export before it is written: bits per byte of the run's held-out text.

    bf16 weights -> the same with the base's experts -> the same rounded, by each rule that is asked

All ranks of a launcher score together. What is scored is kept beside the export until that is
written (cpt/offline/pieces.py); each model has pieces of its own, so another rule scores nothing
twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from cpt.checkpoint.manifest import MANIFEST, Manifest
from cpt.checkpoint.model_config import model_config_of
from cpt.checkpoint.model_weights import open_weights
from cpt.checkpoint.run_state import RunState
from cpt.checkpoint.weights import CheckpointWeights
from cpt.config.precision_sections import ExponentRule
from cpt.errors import ConfigError, DataError
from cpt.export.exponent_choice import ExponentChoice
from cpt.export.export_base import BaseChoice, ExportBase, choose_base, open_base
from cpt.export.mxfp4_cost import costs_by_domain
from cpt.export.quantized_export import frozen_tensors
from cpt.export.rounded_weights import FiniteWeights, WithExpertsOf
from cpt.export.survived import survived_by_domain
from cpt.guard.score import DomainScore, ScoredSet
from cpt.model.adapters.merged import AdaptedWeights
from cpt.model.parameters import parameter_numels
from cpt.model.weights.hf_layout import expert_matrices
from cpt.model.weights.rounded_weights import RoundedWeights
from cpt.model.weights.writer import refuse_existing
from cpt.offline.model import OfflineModel, held_out_sets
from cpt.offline.pieces import Pieces, kept_pieces, partial_folder
from cpt.offline.rank_options import RankOptions
from cpt.offline.ranks import OfflineRanks, check_fit, offline_ranks
from cpt.offline.scored_sets import SetScorer, identity_of_sets
from cpt.resilience.faults import fault_point
from data_pipeline.store.files import AtChunk, sha256_of

log = logging.getLogger("cpt.export")

LARGEST_CPU_MODEL = 10**9
"""Parameters; a larger model is scored on a CPU only with `--score always`."""
BF16 = "bf16"
WITH_BASE_EXPERTS = "base-experts"
"""Names of models among the pieces."""

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringRequest:
    """An export that is to be scored."""

    folder: Path
    """The checkpoint."""
    manifest: Manifest
    """Its manifest."""
    out: Path
    """The directory of the export, which does not exist yet."""
    score: Literal["auto", "always"]
    """`auto` scores if the text is there and the model is small enough for the device."""
    choice: ExponentChoice
    """The rule of the export, and that of training."""
    base: Path | None = None
    """The model to compare with that the user has named; None for what the run started from."""
    options: RankOptions = field(default_factory=RankOptions)
    """How the ranks work together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """What held-out text says of an export; empty without text."""

    costs: list[Json] = field(default_factory=list)
    """What rounding costs, by domain."""
    survived: list[Json] = field(default_factory=list)
    """What survives of what the experts learned, by domain; empty without a base."""


def write_scored(request: ScoringRequest, write: Callable[[HeldOut, AtChunk], None]) -> bool:
    """Score the rounded weights of a checkpoint and call `write` with the result.

    All ranks call it together; the first one writes.

    Args:
        request: What is scored.
        write: Writes the export, and calls its second argument after each chunk of it.

    Returns:
        False if there is nothing to score, so that nothing was written.

    Raises:
        ConfigError: `score` is `always` and there is no held-out text.
        CheckpointError: the checkpoint has values that are not finite.
        RequeueRequested: a stop was asked for; what is scored stays for the next start.
    """
    sets = sets_to_score(request)
    if not sets:
        return False
    with scoring(request, sets) as models:
        held_out = models.held_out(request.choice.rule, request.choice.trained)

        def publish(at_chunk: AtChunk) -> None:
            fault_point("offline_publish", 0)
            write(held_out, at_chunk)

        models.ranks.publish(publish)
    return True


@dataclass(kw_only=True, slots=True)
class ScoredModels:
    """The models of one export that are scored, each at most once."""

    ranks: OfflineRanks
    """The ranks that score."""
    pieces: Pieces
    """Where their scores are kept."""
    base: ExportBase | None
    """The model to compare with."""
    absent: str
    """Why there is none."""
    weights: CheckpointWeights | AdaptedWeights
    """The checkpoint in bf16."""
    checkpoint: str
    """Its name."""
    frozen: Collection[str]
    """Its expert matrices that the run did not train."""
    scorer: SetScorer
    """Scores one model after the other."""

    def in_bf16(self) -> list[DomainScore]:
        """Return the scores of the weights before rounding, by domain."""
        return self.scorer.scores(BF16, self._finite())

    def rounded(self, rule: ExponentRule) -> list[DomainScore]:
        """Return the scores of the weights rounded by a rule."""
        source = RoundedWeights(self._finite(), self.weights.shapes, rule)
        return self.scorer.scores(f"mxfp4-{rule}", source)

    def as_trained(self, rule: ExponentRule | None) -> list[DomainScore]:
        """Return the scores of the weights with which training computed.

        Args:
            rule: The rule by which it rounded the matrices that it trained; None if it did not.
        """
        if rule is None:
            return self.in_bf16()
        if not self.frozen:
            return self.rounded(rule)
        source = RoundedWeights(self._finite(), self.weights.shapes, rule, self.frozen)
        return self.scorer.scores(f"trained-{rule}", source)

    def with_base_experts(self) -> list[DomainScore] | None:
        """Return the scores with the expert matrices of the base; None if there is none."""
        if self.base is None:
            return None
        source = WithExpertsOf(self._finite(), self.base.source, self.weights.shapes)
        return self.scorer.scores(WITH_BASE_EXPERTS, source)

    def held_out(self, rule: ExponentRule, trained_rule: ExponentRule | None) -> HeldOut:
        """Return what the text says of an export.

        Args:
            rule: Its rule.
            trained_rule: The rule by which training rounded: then the model that was trained is the
                rounded one, but for matrices that were frozen. None if it did not round.
        """
        before = self.in_bf16()
        after = self.rounded(rule)
        costs = costs_by_domain(before, after)
        base_experts = self.with_base_experts()
        if base_experts is None:
            return HeldOut(costs=costs)
        trained = self.as_trained(trained_rule)
        return HeldOut(costs=costs, survived=survived_by_domain(trained, base_experts, after))

    def _finite(self) -> FiniteWeights:
        return FiniteWeights(self.weights, self.checkpoint)


@contextmanager
def scoring(
    request: ScoringRequest, sets: Sequence[ScoredSet], *, keep: bool = False
) -> Iterator[ScoredModels]:
    """Join the ranks and open what is scored; all ranks call it together.

    Args:
        request: What is scored.
        sets: The held-out text.
        keep: Whether the scores stay afterwards, for a later export to the same directory.

    Raises:
        ConfigError: `out` exists, or its pieces are of other work; the base cannot be read; or the
            ranks see different checkpoints as the newest one.
    """
    folder = request.folder
    manifest = request.manifest
    config = model_config_of(manifest)
    with offline_ranks(config, partial_folder(request.out), request.options) as ranks:
        ranks.refuse_different(folder.name)
        ranks.on_first(lambda: refuse_existing(request.out))
        found = _agreed_base(request, ranks)
        model = OfflineModel(config, ranks.topology)
        identity = _identity(request, sets, model, found.base)
        with kept_pieces(request.out, identity, ranks, keep=keep) as pieces:
            weights = open_weights(folder, manifest, torch.bfloat16, request.base)
            yield ScoredModels(
                ranks=ranks,
                pieces=pieces,
                base=found.base,
                absent=found.absent,
                weights=weights,
                checkpoint=folder.name,
                frozen=frozen_tensors(manifest, expert_matrices(weights.shapes)),
                scorer=SetScorer(model, sets, pieces),
            )


def _agreed_base(request: ScoringRequest, ranks: OfflineRanks) -> BaseChoice:
    """Open the base that the first rank finds on every rank: each may see other disks."""

    def find() -> list[str]:
        found = choose_base(request.folder, request.manifest, request.base)
        return ["" if found.base is None else str(found.base.path), found.absent]

    path, absent = ranks.on_first(find)
    if not path:
        return BaseChoice(absent=absent)
    return BaseChoice(base=ranks.together(lambda: open_base(Path(path), request.manifest)))


def _identity(
    request: ScoringRequest,
    sets: Iterable[ScoredSet],
    model: OfflineModel,
    base: ExportBase | None,
) -> Json:
    """Return what the scores are computed from; each rule has pieces of its own."""
    return {
        "command": "export",
        "checkpoint": sha256_of(request.folder / MANIFEST),
        "step": request.manifest.step,
        "base": None if base is None else base.hash,
        "sets": identity_of_sets(sets),
        "computed_in": str(model.dtype).removeprefix("torch."),
    }


def sets_to_score(request: ScoringRequest) -> list[ScoredSet]:
    """Return the held-out sets of the run, or none, with a warning that says why.

    Raises:
        ConfigError: `score` is `always`, and there are none.
        DataError: the same, because an input file cannot be read.
    """
    manifest = request.manifest
    config = RunState.of(manifest).config
    if config is None:  # an adapter that was imported, before its first step
        told = f"the checkpoint of step {manifest.step} is of no run, so there is no held-out text."
        if request.score == "always":
            raise ConfigError(f"--score always: {told} Give --score never.")
        log.warning("bits per byte of the quantized weights are not measured: %s", told)
        return []
    if request.score == "auto":
        refusal = _too_large(manifest)
        if refusal:  # before a build is looked for, which may take long
            log.warning("bits per byte of the quantized weights are not measured: %s", refusal)
            return []
    build_dir = config["data"].get("build_dir")
    try:
        sets = held_out_sets(
            Path(config["data"]["mix"]),
            Path(build_dir) if build_dir else None,
            config["guard"]["max_documents"],
        )
    except (ConfigError, DataError) as error:
        if request.score == "always":
            raise
        log.warning("bits per byte of the quantized weights are not measured: %s", error)
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

"""Held-out sets scored by all ranks of an offline command, each set of each model once.

The scores of a set are a piece (cpt/offline/pieces.py): a command that was killed scores what is
left. A model whose sets are all scored is not loaded at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cpt.guard.score import DomainScore, ScoredSet, score_domain
from cpt.model.weights.source import WeightSource
from cpt.offline.model import OfflineModel
from cpt.offline.pieces import ItemSeries, Pieces, Report


def identity_of_sets(sets: Iterable[ScoredSet]) -> list[list[str]]:
    """Return name and content hash of each set, in their order: pieces are named by place in it."""
    return [[domain.name, domain.content_hash()] for domain in sets]


class SetScorer:
    """Scores the same sets with one model after another."""

    def __init__(self, model: OfflineModel, sets: Sequence[ScoredSet], pieces: Pieces) -> None:
        self._model = model
        self._sets = sets
        self._pieces = pieces

    def scores(self, name: str, weights: WeightSource) -> list[DomainScore]:
        """Return the scores of all sets; all ranks call it together and get the same.

        Args:
            name: Name of the weights, different for each of a command; a part of file names.
            weights: The weights.

        Raises:
            ConfigError: the weights cannot be used; see `OfflineModel.load`.
            RequeueRequested: a stop was asked for; the scores so far stay.
        """
        series = ItemSeries(name=name, num_items=len(self._sets), unit="domain")
        if self._pieces.missing(series):
            self._model.load(weights)

        def score(span: range, report: Report) -> list[dict[str, Any]]:
            found = []
            for index in span:
                domain = self._sets[index]
                scored = score_domain(domain, self._model, self._model.topology, micro_batch_size=1)
                found.append({"nats": scored.nats.tolist(), "bytes": scored.bytes.tolist()})
            return found

        self._pieces.compute_together(series, score, span_length=1)
        scores = []
        for domain, plain in zip(self._sets, self._pieces.read_items(series), strict=True):
            plain["language"] = domain.language
            scores.append(DomainScore.from_json(domain.name, plain))
        return scores

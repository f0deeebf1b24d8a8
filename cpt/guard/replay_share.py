"""Replay as shares of the mix: the sources that help a held-out domain, and the raised weights.

The main language gives what replay gains. It is the language with the largest share in the data-mix
YAML, the one that the run is for. All other sources keep the share that the YAML or a raise gave
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.mixture import Mixture

EPOCH_MARGIN = 0.98
"""Share of the epochs left that a raise may plan with, because rows are not equally full."""


class ReplayShares:
    """The shares of one mix and their bounds."""

    def __init__(self, mix: MixConfig, data: BuiltData, max_replay_share: float) -> None:
        """Divide the sources into those that give and those that are replayed.

        Args:
            mix: The data mix, as the user wrote it.
            data: The build of that mix.
            max_replay_share: Largest share of all sources that are not in the main language.
        """
        self.main_language = _main_language(mix)
        self._mix = mix
        self._data = data
        self._configured: dict[str, float] = {}
        self._language_of: dict[str, str] = {}
        self._givers: set[str] = set()
        for source in mix.sources:
            self._configured[source.name] = source.weight
            self._language_of[source.name] = source.language
            if source.language == self.main_language:
                self._givers.add(source.name)
        self._replayed_by = self._sources_by_domain()
        floor = 0.0
        if self.main_language in mix.languages:
            floor = mix.languages[self.main_language].min_share
        self._limit = min(max_replay_share, 1 - floor)

    def _sources_by_domain(self) -> dict[str, list[str]]:
        """Return the sources of each guard domain that have rows and do not give."""
        num_rows = {}
        for index, name in enumerate(self._data.source_names):
            num_rows[name] = len(self._data.row_tokens(index))
        replayed_by: dict[str, list[str]] = {}
        for domain, names in self._mix.serving_sources().items():
            replayed_by[domain] = []
            for name in names:
                if num_rows.get(name) and name not in self._givers:
                    replayed_by[domain].append(name)
        return replayed_by

    def weights(self, raised: Mapping[str, float]) -> dict[str, float]:
        """Return the share of every source; together they are 1.

        Args:
            raised: Shares to which the sources of domains were raised.
        """
        weights = dict(self._configured)
        for domain, share in raised.items():
            names = self._replayed_by.get(domain, [])
            before = _total(self._configured, names)
            for name in names:
                part = self._configured[name] / before if before > 0 else 1 / len(names)
                weights[name] = max(weights[name], share * part)
        kept = _total(weights, weights.keys() - self._givers)
        given = _total(self._configured, self._givers)
        for name in self._givers:
            weights[name] = (1 - kept) * self._configured[name] / given
        return weights

    def share(self, domain: str, raised: Mapping[str, float]) -> float | None:
        """Return the present share of a domain's sources; None if none of them can be raised."""
        names = self._replayed_by.get(domain)
        if not names:
            return None
        return _total(self.weights(raised), names)

    def room(self, raised: Mapping[str, float]) -> float:
        """Return the share of the tokens by which all replay together may still grow."""
        weights = self.weights(raised)
        return self._limit - _total(weights, weights.keys() - self._givers)

    def largest_share(
        self,
        domain: str,
        raised: Mapping[str, float],
        mixture: Mixture,
        batch: int,
        batches_left: int,
        batch_size: int,
    ) -> float:
        """Return the largest share that a domain's sources may have.

        It is bounded by the max_share of their languages and the max_epochs of each of them.

        Args:
            domain: The domain.
            raised: Shares to which the sources of domains were raised.
            mixture: The mixture, which knows the rows drawn so far.
            batch: The next batch.
            batches_left: Batches until the run ends.
            batch_size: Packed rows of a batch.
        """
        names = self._replayed_by.get(domain, [])
        weights = self.weights(raised)
        now = _total(weights, names)
        limits = [1.0, *self._language_limits(names, weights)]
        drawn = mixture.position(batch, batch_size).drawn_rows
        tokens_left = batches_left * batch_size * self._data.seq_len
        for source in self._mix.sources:
            if source.name not in names or source.max_epochs is None or not tokens_left:
                continue
            index = self._data.source_names.index(source.name)
            row_tokens = self._data.row_tokens(index)
            rows_left = source.max_epochs * len(row_tokens) - drawn[index]
            source_tokens_left = EPOCH_MARGIN * rows_left * float(np.mean(row_tokens))
            part = weights[source.name] / now if now > 0 else 1 / len(names)
            limits.append(source_tokens_left / (tokens_left * part))
        return max(now, min(limits))

    def _language_limits(self, names: list[str], weights: Mapping[str, float]) -> list[float]:
        """Return what the max_share of each language leaves to some of its sources."""
        limits = []
        for language in {self._language_of[name] for name in names} & self._mix.languages.keys():
            others = []
            for name, weight in weights.items():
                if self._language_of[name] == language and name not in names:
                    others.append(weight)
            limits.append(self._mix.languages[language].max_share - math.fsum(others))
        return limits


def _main_language(mix: MixConfig) -> str:
    """Return the language with the largest share, the first of the mix among equals."""
    shares: dict[str, float] = {}
    for source in mix.sources:
        shares[source.language] = shares.get(source.language, 0.0) + source.weight
    return max(shares, key=shares.__getitem__)


def _total(weights: Mapping[str, float], names: Iterable[str]) -> float:
    return math.fsum(weights[name] for name in names)

"""Replay as shares of the mix: which sources a held-out domain is replayed by, and the weights once
some are raised.

What replay gains, the main language gives: the language with the largest share in the data-mix
YAML, which is what the run is for.  All other sources keep the share that the YAML or a raise gave
them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.mixture import Mixture

EPOCH_MARGIN = 0.98
"""Share of the epochs left that a raise may plan with: rows are not equally full."""


class ReplayShares:
    """The shares of one mix and their bounds."""

    def __init__(self, mix: MixConfig, data: BuiltData, max_replay_share: float) -> None:
        languages: dict[str, float] = defaultdict(float)
        for source in mix.sources:
            languages[source.language] += source.weight
        self.main_language = max(languages, key=languages.__getitem__)
        self._mix, self._data = mix, data
        self._configured = {source.name: source.weight for source in mix.sources}
        self._givers = {
            source.name for source in mix.sources if source.language == self.main_language
        }
        rows = {name: len(data.row_tokens(index)) for index, name in enumerate(data.source_names)}
        self._replayed_by = {
            domain.name: [
                name for name in domain.sources if rows.get(name) and name not in self._givers
            ]
            for domain in mix.guard_domains()
        }
        floor = (
            mix.languages[self.main_language].min_share
            if self.main_language in mix.languages
            else 0.0
        )
        self._limit = min(max_replay_share, 1 - floor)

    def weights(self, raised: Mapping[str, float]) -> dict[str, float]:
        """Share of every source, given the shares to which domains were raised; those sum to 1."""
        weights = dict(self._configured)
        for domain, share in raised.items():
            names = self._replayed_by.get(domain, [])
            before = math.fsum(self._configured[name] for name in names)
            for name in names:
                part = self._configured[name] / before if before > 0 else 1 / len(names)
                weights[name] = max(weights[name], share * part)
        kept = math.fsum(weight for name, weight in weights.items() if name not in self._givers)
        given = math.fsum(self._configured[name] for name in self._givers)
        for name in self._givers:
            weights[name] = (1 - kept) * self._configured[name] / given
        return weights

    def share(self, domain: str, raised: Mapping[str, float]) -> float | None:
        """Share of a domain's sources now; None if it has none that could be raised."""
        names = self._replayed_by.get(domain)
        if not names:
            return None
        weights = self.weights(raised)
        return math.fsum(weights[name] for name in names)

    def room(self, raised: Mapping[str, float]) -> float:
        """How much all replay together may still grow."""
        weights = self.weights(raised)
        return self._limit - math.fsum(
            weight for name, weight in weights.items() if name not in self._givers
        )

    def largest_share(
        self,
        domain: str,
        raised: Mapping[str, float],
        mixture: Mixture,
        batch: int,
        batches_left: int,
        batch_size: int,
    ) -> float:
        """What a domain's share may grow to: max_share of the languages of its sources, max_epochs
        of each of them.

        Args:
            domain: The domain.
            raised: Shares to which domains were raised.
            mixture: What has been drawn so far.
            batch: The next batch.
            batches_left: Batches until the run ends.
            batch_size: Packed rows of a batch.
        """
        names = self._replayed_by.get(domain, [])
        weights = self.weights(raised)
        now = math.fsum(weights[name] for name in names)
        limits = [1.0]
        for language in {self._language(name) for name in names} & self._mix.languages.keys():
            others = math.fsum(
                weights[s.name]
                for s in self._mix.sources
                if s.language == language and s.name not in names
            )
            limits.append(self._mix.languages[language].max_share - others)
        drawn = mixture.position(batch, batch_size).drawn_rows
        tokens_left = batches_left * batch_size * self._data.seq_len
        for source in self._mix.sources:
            if source.name not in names or source.max_epochs is None or not tokens_left:
                continue
            index = self._data.source_names.index(source.name)
            sizes = self._data.row_tokens(index)
            left = (
                EPOCH_MARGIN
                * (source.max_epochs * len(sizes) - drawn[index])
                * float(np.mean(sizes))
            )
            part = weights[source.name] / now if now > 0 else 1 / len(names)
            limits.append(left / (tokens_left * part))
        return max(now, min(limits))

    def _language(self, name: str) -> str:
        return next(source.language for source in self._mix.sources if source.name == name)

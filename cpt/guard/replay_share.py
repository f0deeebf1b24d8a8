"""Replay as shares of the mix: the sources that serve a held-out domain, and their weights.

The main language gives what replay gains, and takes what replay loses. It is the language with the
largest share in the data-mix YAML, the one that the run is for. All other sources keep the share
that the YAML or the guard gave them.

The ladder raises the share of a domain (`GuardState.shares`), which its sources divide as in the
mix. The two-way controller moves single sources (`GuardState.replay`).

Under a schedule all of this holds at every place of the plan, with the weights and bounds of the
mix that are planned there (`ReplayShares.at`); the main language is that of the sources' weights.
What the guard gives to a source is kept in points on top of the plan (cpt/guard/plan_shift.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cpt.guard.epoch_ceiling import largest_share
from cpt.guard.ladder import GuardState
from cpt.guard.lever_limits import LeverLimits, SourceLimits
from cpt.guard.plan_shift import on_plan
from data_pipeline.config.language_limits import LanguageLimits
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.mixture import Mixture

EPOCH_MARGIN = 0.98
"""Share of the epochs left that a raise may plan with, because rows are not equally full."""

ROUNDING = 1e-9
"""Share that sums of shares may be off by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """A part of the run with rows or ceilings of its own, in which a raise holds on.

    It is a stage of sequence length that is still to come, or what is left of a phase that limits
    the epochs of sources.
    """

    rows: int
    """Rows that the run takes in it."""
    source_rows: Mapping[str, int]
    """Rows that it has, by source."""
    source_tokens: Mapping[str, int]
    """Predicted tokens of those rows, by source."""
    mean_shares: Mapping[str, float]
    """Mean share of every source in it, with what the guard has done so far."""
    max_epochs: Mapping[str, float] | None = None
    """Ceilings of a phase, by source; None for those of the sources."""
    drawn: Mapping[str, int] = field(default_factory=dict)
    """Rows that the run has taken in it so far, by source; none of a part that is to come."""


class ReplayShares:
    """The shares of one mix and their bounds."""

    def __init__(
        self,
        mix: MixConfig,
        data: BuiltData,
        max_replay_share: float,
        least_replay: float = 1.0,
    ) -> None:
        """Divide the sources into those that give and those that are replayed.

        Args:
            mix: The data mix, as the user wrote it.
            data: The build of that mix.
            max_replay_share: Largest share of all sources that are not in the main language.
            least_replay: Smallest share of a replayed source, as a part of the mix's.
        """
        self.main_language = main_language_of(mix)
        self._mix = mix
        self._data = data
        self._configured: dict[str, float] = {}
        self._language_of: dict[str, str] = {}
        self._max_epochs: dict[str, float | None] = {}
        self._givers: set[str] = set()
        for source in mix.sources:
            self._configured[source.name] = source.weight
            self._language_of[source.name] = source.language
            self._max_epochs[source.name] = source.max_epochs
            if source.language == self.main_language:
                self._givers.add(source.name)
        self._serving = self._replayed_by_domain()
        self._max_replay_share = max_replay_share
        self._least_replay = least_replay
        self._has_schedule = False
        self._set_bounds(mix.languages)

    def _set_bounds(self, languages: Mapping[str, LanguageLimits]) -> None:
        self._languages = languages
        floor = 0.0
        self._main_ceiling = 1.0
        if self.main_language in languages:
            floor = languages[self.main_language].min_share
            self._main_ceiling = languages[self.main_language].max_share
        self._limit = min(self._max_replay_share, 1 - floor)

    def at(
        self, planned: Mapping[str, float], languages: Mapping[str, Mapping[str, float]]
    ) -> ReplayShares:
        """Return the shares at a place of a schedule: other weights and bounds, the same sources.

        Args:
            planned: Weight of every source that the schedule plans there.
            languages: Bounds on languages there (`Segment.languages`).
        """
        there = copy.copy(self)
        there._configured = dict(planned)
        there._has_schedule = True
        bounds = {}
        for language, limits in languages.items():
            bounds[language] = LanguageLimits(**limits)
        there._set_bounds(bounds)
        return there

    def _planned(self) -> dict[str, float]:
        """Return the planned share of each replayed source; none without a schedule."""
        if not self._has_schedule:
            return {}
        names = {name for names in self._serving.values() for name in names}
        return {name: self._configured[name] for name in sorted(names)}

    def _replayed_by_domain(self) -> dict[str, tuple[str, ...]]:
        """Return the sources that serve each guard domain, have rows, and do not give."""
        num_rows = {}
        for index, name in enumerate(self._data.source_names):
            num_rows[name] = len(self._data.row_tokens(index))
        serving: dict[str, tuple[str, ...]] = {}
        for domain, names in self._mix.serving_sources().items():
            replayed = []
            for name in names:
                if num_rows.get(name) and name not in self._givers:
                    replayed.append(name)
            serving[domain] = tuple(replayed)
        return serving

    def weights(self, state: GuardState) -> dict[str, float]:
        """Return the share of every source under the guard's state; together they are 1."""
        weights = dict(self._configured)
        given = _total(self._configured, self._givers)
        if given <= 0:  # nobody gives
            return weights
        state = on_plan(state, self._planned(), self._serving)
        for name, share in self._known(state.replay).items():
            weights[name] = max(share, self._least_replay * self._configured[name])
        for domain, share in state.shares.items():
            names = self._serving.get(domain, ())
            before = _total(self._configured, names)
            for name in names:
                part = self._configured[name] / before if before > 0 else 1 / len(names)
                weights[name] = max(weights[name], share * part)
        self._keep_within_bounds(weights)
        kept = _total(weights, weights.keys() - self._givers)
        for name in self._givers:
            weights[name] = (1 - kept) * self._configured[name] / given
        return weights

    def _keep_within_bounds(self, weights: dict[str, float]) -> None:
        """Take back as much of what the guard did as the bounds of this place ask for.

        The guard moves replay within the bounds that hold when it decides. An edit of the mix, or a
        later phase, may have tighter ones, or plan so much that nothing is left. The plan itself
        keeps them. So the sources of each language go back towards it as far as its own bounds ask
        for, and after that those of all languages that gained, or lost, as far as the bounds of the
        main language do. A language that is between its plan and a share that was allowed is
        allowed, so the second step undoes nothing of the first.
        """
        replayed = sorted(weights.keys() - self._givers)
        planned = self._configured
        names_of: dict[str, list[str]] = {}
        for name in replayed:
            names_of.setdefault(self._language_of[name], []).append(name)
        for language, names in names_of.items():
            if language in self._languages:
                limits = self._languages[language]
                total = _total(planned, names)
                most = max(limits.max_share, total)
                least = min(limits.min_share, total)
                _go_back(weights, planned, names, least, most)
        gained: list[str] = []
        lost: list[str] = []
        for names in names_of.values():
            has_gained = _total(weights, names) > _total(planned, names)
            (gained if has_gained else lost).extend(names)
        total = _total(planned, replayed)
        most = max(self._limit, total) - _total(weights, lost)
        _go_back(weights, planned, gained, 0.0, most)
        least = min(1 - self._main_ceiling, total) - _total(weights, gained)
        _go_back(weights, planned, lost, least, 1.0)

    def _known(self, replay: Mapping[str, float]) -> dict[str, float]:
        """Return the shares of those sources that the mix still has and that do not give.

        A source that an edit of the mix has retired with weight 0 is trained on only if it still
        serves a domain.
        """
        serving = {name for names in self._serving.values() for name in names}
        known = {}
        for name, share in replay.items():
            may_train = self._configured.get(name, 0.0) > 0 or name in serving
            if may_train and name not in self._givers:
                known[name] = share
        return known

    def limits(
        self,
        state: GuardState,
        domains: Iterable[str],
        mixture: Mixture,
        batch: int,
        batches_left: int,
        batch_size: int,
        mean_shares: Mapping[str, float] | None = None,
        stretches: Sequence[Stretch] = (),
    ) -> LeverLimits:
        """Return how far replay may still be moved.

        Args:
            state: The guard's state.
            domains: The domains of the guard.
            mixture: The mixture, which knows the rows drawn so far.
            batch: The next batch.
            batches_left: Batches until the run, or its present stage, ends.
            batch_size: Packed rows of a batch.
            mean_shares: Mean share of every source in these batches, under a schedule; None if
                they stay what they are.
            stretches: Parts of the run with rows or ceilings of their own, the present one or
                later ones.
        """
        weights = self.weights(state)
        drawn = mixture.position(batch, batch_size).drawn_rows
        ceilings = self._ceilings_by_epochs(
            drawn, batches_left * batch_size, mean_shares or weights
        )
        for name, mean in (mean_shares or {}).items():
            # what the plan takes later is not left for now
            ceilings[name] = max(0.0, ceilings[name] + weights[name] - mean)
        for stretch in stretches:
            for name, left in self._left_by(stretch).items():
                ceilings[name] = min(ceilings[name], max(0.0, weights[name] + left))
        shares: dict[str, tuple[float | None, float]] = {}
        served_by = {}
        for domain in domains:
            names = self._serving.get(domain, ())
            served_by[domain] = names
            if not names:
                shares[domain] = (None, 1.0)
                continue
            now = _total(weights, names)
            bounds = [1.0, *self._language_limits(names, weights)]
            for name in names:
                part = weights[name] / now if now > 0 else 1 / len(names)
                bounds.append(ceilings[name] / part if part > 0 else math.inf)
            shares[domain] = (now, max(now, min(bounds)))
        return LeverLimits(
            shares=shares,
            room=self._limit - _total(weights, weights.keys() - self._givers),
            served_by=served_by,
            sources=self._source_limits(weights, ceilings),
            main_share=_total(weights, self._givers),
            planned=self._planned(),
        )

    def _source_limits(
        self, weights: Mapping[str, float], ceilings: Mapping[str, float]
    ) -> dict[str, SourceLimits]:
        """Return the present, the least and the largest share of every source that serves."""
        serving = {name for names in self._serving.values() for name in names}
        least = self._least_part(ceilings)
        limits = {}
        for name in sorted(serving):
            language = self._language_of[name]
            kin = [other for other in serving if self._language_of[other] == language]
            now = weights[name]
            part = now / _total(weights, kin) if _total(weights, kin) > 0 else 1 / len(kin)
            bounds = [1.0, ceilings[name]]
            for left in self._language_limits(kin, weights):
                bounds.append(part * left)
            lowest = self._configured[name] * max(least, self._language_floor(language))
            limits[name] = SourceLimits(
                share=now, least=min(now, lowest), largest=max(now, min(bounds))
            )
        return limits

    def _least_part(self, ceilings: Mapping[str, float]) -> float:
        """Return the part of the mix's replay that must stay.

        If replay falls below the mix, the main language takes more than the mix gives it. Its
        `max_share` and the epochs of its sources limit that.
        """
        replayed = _total(self._configured, self._configured.keys() - self._givers)
        if self._least_replay >= 1 or replayed <= 0:
            return 1.0
        largest = self._main_ceiling
        given = _total(self._configured, self._givers)
        for name in self._givers:
            if self._configured[name] > 0:
                largest = min(largest, ceilings[name] * given / self._configured[name])
        return min(1.0, max(self._least_replay, (1 - largest) / replayed))

    def _language_floor(self, language: str) -> float:
        """Return the part of a language's share in the mix that its `min_share` demands."""
        names = [name for name, of in self._language_of.items() if of == language]
        total = _total(self._configured, names)
        if language not in self._languages or total <= 0:
            return 0.0
        return min(1.0, self._languages[language].min_share / total)

    def _ceilings_by_epochs(
        self, drawn: Sequence[int], rows: int, shares: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the largest share of each source that its epochs allow until the run ends.

        Args:
            drawn: Rows drawn so far from each source of the build.
            rows: Rows that are still to be drawn.
            shares: Mean share of every source in them.
        """
        num_rows = {}
        row_tokens = {}
        for index, name in enumerate(self._data.source_names):
            tokens = self._data.row_tokens(index)
            num_rows[name] = len(tokens)
            if num_rows[name]:
                row_tokens[name] = float(np.mean(tokens))
        drawn_of = dict(zip(self._data.source_names, drawn, strict=True))
        return self._ceilings(self._max_epochs, rows, num_rows, drawn_of, shares, row_tokens)

    def _ceilings(
        self,
        allowed: Mapping[str, float | None],
        rows: int,
        num_rows: Mapping[str, int],
        drawn: Mapping[str, int],
        shares: Mapping[str, float],
        row_tokens: Mapping[str, float],
    ) -> dict[str, float]:
        """Return the largest share of each source in some rows of the run."""
        ceilings = dict.fromkeys(self._configured, math.inf)
        for name, max_epochs in allowed.items():
            if max_epochs is None or not rows or not num_rows[name]:
                continue
            rows_left = EPOCH_MARGIN * (max_epochs * num_rows[name] - drawn[name])
            side = self._givers if name in self._givers else shares.keys() - self._givers
            ceilings[name] = largest_share(name, rows, rows_left, shares, row_tokens, side)
        return ceilings

    def _left_by(self, stretch: Stretch) -> dict[str, float]:
        """Return by how much the share of each source may grow before a stretch lacks rows."""
        row_tokens = {}
        for name, num_rows in stretch.source_rows.items():
            if num_rows:
                row_tokens[name] = stretch.source_tokens[name] / num_rows
        allowed = self._max_epochs if stretch.max_epochs is None else stretch.max_epochs
        drawn = dict.fromkeys(stretch.source_rows, 0) | dict(stretch.drawn)
        ceilings = self._ceilings(
            allowed, stretch.rows, stretch.source_rows, drawn, stretch.mean_shares, row_tokens
        )
        left = {}
        for name, ceiling in ceilings.items():
            if not stretch.source_rows[name]:
                ceiling = 0.0
            left[name] = ceiling - stretch.mean_shares[name]
        return left

    def _language_limits(self, names: Iterable[str], weights: Mapping[str, float]) -> list[float]:
        """Return what the max_share of each language leaves to some of its sources."""
        names = set(names)
        limits = []
        for language in {self._language_of[name] for name in names} & self._languages.keys():
            others = []
            for name, weight in weights.items():
                if self._language_of[name] == language and name not in names:
                    others.append(weight)
            limits.append(self._languages[language].max_share - math.fsum(others))
        return limits


def main_language_of(mix: MixConfig) -> str:
    """Return the language with the largest share, the first of the mix among equals."""
    shares: dict[str, float] = {}
    for source in mix.sources:
        shares[source.language] = shares.get(source.language, 0.0) + source.weight
    return max(shares, key=shares.__getitem__)


def _go_back(
    weights: dict[str, float],
    planned: Mapping[str, float],
    names: Sequence[str],
    least: float,
    most: float,
) -> None:
    """Move sources towards their planned shares until their sum is within bounds, as the plan's is.

    All of them give up the same part of what sets them off from the plan.
    """
    total = _total(weights, names)
    bound = min(max(total, least), most)
    if abs(total - bound) <= ROUNDING:
        return
    part = min(1.0, (total - bound) / (total - _total(planned, names)))
    for name in names:
        weights[name] += part * (planned[name] - weights[name])


def _total(weights: Mapping[str, float], names: Iterable[str]) -> float:
    return math.fsum(weights[name] for name in names)

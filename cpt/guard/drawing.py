"""Which held-out documents are measured: a panel that stays, and fresh documents for every look.

    documents of a domain, over all its sources -> order by hash -> panel | look 1 | look 2 | ...

The order depends on the numbers of the documents alone, so it is the same on every rank and after
every restart, and every source of the domain is drawn from in proportion. Where the build knows
which documents belong together (`cluster_by` of a source), the first of every cluster come first:
documents of one site or package change together, and two of them say little more than one.

The panel shows how much has changed since step 0. Fresh documents show whether a loss is certain
(cpt/guard/betting.py): what was measured once cannot err the same way again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cpt.config import GuardSection
from cpt.guard.betting import documents_needed
from cpt.guard.yardstick import FALSE_ALARM_SHARE
from data_pipeline.store.hashing import splitmix64_numbers
from data_pipeline.store.packing import Integers

DOCUMENT_SPREAD_PERCENT = 2.0
"""Standard deviation of the change over single documents, assumed before a run to tell what a
held-out set can show. Measured: 1.2 to 2.7 % in five domains whose means had risen by 1.1 to 2.3 %
(bench/prove/guard.py). During the run the spread is that of the scores.
"""
FRESH_SHARE_OF_RUN = 0.25
"""Share of the looks within which fresh documents should show a loss of the tolerance."""
LARGEST_SHARE_OF_RUN = 0.5
"""Share of the looks within which they must where too few are held out for that; otherwise the
panel alone is used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """The documents of one domain that are measured."""

    order: Integers
    """Documents in the order in which they are drawn; the first ones are of different clusters."""
    num_panel: int
    """Documents of the panel: the first ones of `order`."""
    fresh_per_look: int
    """Documents after the panel that each look takes; 0 if the panel is all that is measured."""
    num_looks: int
    """Looks that fresh documents are drawn for."""

    @property
    def panel(self) -> Integers:
        """Documents that every look measures."""
        return self.order[: self.num_panel]

    @property
    def fresh(self) -> Integers:
        """Documents that one look each measures, those of look 1 first."""
        return self.order[self.num_panel :][: self.fresh_per_look * self.num_looks]

    def fresh_at(self, look_number: int) -> Integers:
        """Return the fresh documents of a look; none for one that was not foreseen."""
        if not 1 <= look_number <= self.num_looks:
            return self.order[:0]
        first = (look_number - 1) * self.fresh_per_look
        return self.fresh[first : first + self.fresh_per_look]


def draw(
    settings: GuardSection, name: str, clusters: Integers, num_looks: int, num_domains: int
) -> Drawing:
    """Draw the documents of a domain.

    Args:
        settings: The run's guard section.
        name: Name of the domain.
        clusters: (documents,) cluster of each document of the domain.
        num_looks: Looks of the whole run.
        num_domains: Domains of the whole run.
    """
    order, num_clusters = drawing_order(clusters)
    num_panel = min(len(order), settings.max_documents)
    fresh = fresh_per_look(settings, name, num_clusters - num_panel, num_looks, num_domains)
    return Drawing(order=order, num_panel=num_panel, fresh_per_look=fresh, num_looks=num_looks)


def drawing_order(clusters: Integers) -> tuple[Integers, int]:
    """Return documents in the order in which they are drawn, and the number of clusters.

    The first document of every cluster comes before the second of any.
    """
    by_hash = np.argsort(splitmix64_numbers(len(clusters)), kind="stable")
    of_cluster = np.argsort(clusters[by_hash], kind="stable")
    ordered = clusters[by_hash][of_cluster]
    begins = np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]
    starts = np.flatnonzero(begins)
    rank_in_cluster = np.empty(len(clusters), dtype=np.int64)
    numbers = np.arange(len(clusters))
    rank_in_cluster[of_cluster] = numbers - np.repeat(starts, np.diff([*starts, len(clusters)]))
    return by_hash[np.argsort(rank_in_cluster, kind="stable")], len(starts)


def fresh_per_look(
    settings: GuardSection, name: str, num_left: int, num_looks: int, num_domains: int
) -> int:
    """Return how many fresh documents each look takes; 0 if there are too few of them.

    Bets add up over looks, and a bound holds for any number of documents a look. So fewer than
    `fresh_documents` do, as long as all of them show a loss of the tolerance early enough.

    Args:
        settings: The run's guard section.
        name: Name of the domain.
        num_left: Documents of different clusters beside the panel.
        num_looks: Looks of the whole run.
        num_domains: Domains of the whole run.
    """
    if not settings.interval_steps or not settings.fresh_documents:
        return 0
    needed = alarm_documents(settings, name, num_looks * num_domains)
    wanted = max(settings.fresh_documents, math.ceil(needed / (FRESH_SHARE_OF_RUN * num_looks)))
    per_look = min(wanted, max(0, num_left) // num_looks)
    if per_look * num_looks * LARGEST_SHARE_OF_RUN < needed:
        return 0
    return per_look


def alarm_documents(settings: GuardSection, name: str, num_tests: int) -> int:
    """Return how many documents prove a loss of the tolerance, with a probability of 90 %.

    Where `act_at` is so near to 1 that none do, it is `MOST_DOCUMENTS`.

    Args:
        settings: The run's guard section.
        name: Name of the domain.
        num_tests: Domains times looks of the run.
    """
    tolerance, _ = settings.limits(name)
    return documents_needed(
        settings.act_at * tolerance,
        tolerance,
        DOCUMENT_SPREAD_PERCENT,
        max(1, num_tests) / FALSE_ALARM_SHARE,
    )

"""The documents that are measured are drawn at random, over all sources, one a cluster."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cpt.config import GuardSection
from cpt.guard.betting import Detector
from cpt.guard.drawing import (
    DOCUMENT_SPREAD_PERCENT,
    alarm_documents,
    draw,
    drawing_order,
    fresh_per_look,
)
from cpt.guard.yardstick import FALSE_ALARM_SHARE

SETTINGS = GuardSection(interval_steps=200)


def test_panel_is_drawn_from_all_sources_in_proportion() -> None:
    """The first 3,000 documents are of one source, the last 1,000 of another."""
    order, _ = drawing_order(np.arange(4000))
    assert sorted(order) == list(range(4000))
    of_second = (order[:400] >= 3000).mean()
    assert of_second == pytest.approx(0.25, abs=0.06)


def test_one_document_of_every_cluster_comes_first() -> None:
    clusters = np.repeat(np.arange(50), 20)
    order, num_clusters = drawing_order(clusters)
    assert num_clusters == 50
    assert sorted(clusters[order[:50]]) == list(range(50))
    assert sorted(clusters[order[50:100]]) == list(range(50))
    assert sorted(order) == list(range(1000))


def test_single_document_and_none_can_be_drawn() -> None:
    assert drawing_order(np.arange(1))[0].tolist() == [0]
    assert drawing_order(np.arange(0))[0].tolist() == []


def test_every_look_has_documents_of_its_own() -> None:
    drawing = draw(SETTINGS, "english", np.arange(20_000), num_looks=126, num_domains=4)
    assert drawing.num_panel == 256 and drawing.fresh_per_look == 100
    seen = list(drawing.panel)
    for look in range(1, 127):
        seen += list(drawing.fresh_at(look))
    assert len(set(seen)) == len(seen) == 256 + 126 * 100
    assert len(drawing.fresh_at(0)) == 0
    assert len(drawing.fresh_at(127)) == 0


def test_few_looks_take_more_documents_each() -> None:
    needed = alarm_documents(SETTINGS, "english", 10 * 4)
    assert fresh_per_look(SETTINGS, "english", 10**6, 10, 4) == np.ceil(needed / 2.5)
    scarce = 3 * needed
    assert fresh_per_look(SETTINGS, "english", scarce, 10, 4) == scarce // 10


def test_fewest_documents_a_look_show_a_loss_of_the_tolerance_within_half_of_the_run() -> None:
    """Far fewer than `fresh_documents`: what counts is the sum over looks."""
    num_looks, num_domains = 126, 4
    needed = alarm_documents(SETTINGS, "english", num_looks * num_domains)
    fewest = math.ceil(2 * needed / num_looks)
    held_out = fewest * num_looks
    assert fresh_per_look(SETTINGS, "english", held_out, num_looks, num_domains) == fewest < 20
    assert fresh_per_look(SETTINGS, "english", held_out - 1, num_looks, num_domains) == 0
    generator = np.random.default_rng(3)
    threshold = num_looks * num_domains / FALSE_ALARM_SHARE
    num_runs = 60
    found = {0.5: 0, 1.0: 0}
    for loss in found:
        for _ in range(num_runs):
            detector = Detector([0.5])
            bounds = []
            for _ in range(num_looks // 2):
                changes = loss + DOCUMENT_SPREAD_PERCENT * generator.normal(size=fewest)
                bounds.append(detector.add(changes, threshold))
            found[loss] += max(bounds) >= 0.5
    assert found[0.5] == 0 and found[1.0] >= 0.9 * num_runs


def test_fresh_documents_that_would_show_nothing_are_not_drawn() -> None:
    needed = alarm_documents(SETTINGS, "english", 10 * 4)
    assert fresh_per_look(SETTINGS, "english", needed, 10, 4) == 0
    assert fresh_per_look(SETTINGS, "english", -5, 10, 4) == 0
    assert fresh_per_look(GuardSection(interval_steps=0), "english", 10**6, 1, 4) == 0
    none = GuardSection(interval_steps=200, fresh_documents=0)
    assert fresh_per_look(none, "english", 10**6, 10, 4) == 0


def test_line_on_the_tolerance_leaves_the_panel_alone() -> None:
    """No number of documents proves a loss of the tolerance to be above such a line."""
    for act_at in (0.998, 1.0):
        settings = GuardSection(interval_steps=200, act_at=act_at)
        drawing = draw(settings, "english", np.arange(20_000), num_looks=126, num_domains=4)
        assert drawing.num_panel == 256 and drawing.fresh_per_look == 0


def test_documents_of_one_cluster_are_not_fresh_twice() -> None:
    clusters = np.repeat(np.arange(1000), 50)
    drawing = draw(SETTINGS, "english", clusters, num_looks=126, num_domains=4)
    assert drawing.fresh_per_look == 0  # 744 clusters are left beside the panel

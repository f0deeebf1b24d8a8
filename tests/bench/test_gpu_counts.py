"""docs/gpu.md and its drawing show the table that is committed beside them."""

from __future__ import annotations

import json

from bench import gpu_counts


def test_page_shows_the_committed_table() -> None:
    before = json.loads(gpu_counts.BEFORE.read_text(encoding="utf-8"))
    table = json.loads(gpu_counts.TABLE.read_text(encoding="utf-8"))
    page = gpu_counts.PAGE.read_text(encoding="utf-8")
    assert gpu_counts.with_tables(page, gpu_counts.markdown(before, table)) == page


def test_table_names_the_same_shapes_and_assumptions_as_the_one_before() -> None:
    before = json.loads(gpu_counts.BEFORE.read_text(encoding="utf-8"))
    table = json.loads(gpu_counts.TABLE.read_text(encoding="utf-8"))
    assert list(before["shapes"]) == list(table["shapes"])
    assert before["assumed"] == table["assumed"]

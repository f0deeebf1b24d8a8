"""The model card tells people and the hub what the model was trained on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.export.model_card import markdown_table, model_card, tokens_by_source


def manifest_of(*languages: str) -> Any:
    """A checkpoint of a run with one source per label."""
    sources = {}
    weights = {}
    for number, language in enumerate(languages):
        sources[f"source_{number}"] = {"language": language, "domain": "web"}
        weights[f"source_{number}"] = 1 / len(languages)
    segment = {"start_step": 0, "settings": {"sources": sources}, "weights": weights}
    return SimpleNamespace(
        state={"model_config": {}, "ledger": {"segments": [segment]}},
        step=8,
        layout={},
        versions={"torch": "2.x"},
    )


def front_matter(*languages: str) -> str:
    card = model_card(manifest_of(*languages), Path("no-metrics.jsonl"), "bf16")
    return card.split("---\n")[1]


@pytest.mark.parametrize(
    ("labels", "listed"),
    [
        (("ko", "en"), "language: [en, ko]"),
        (("ja", "en", "code"), "language: [en, ja]"),
        (("de", "math", "parallel", "mixed"), "language: [de]"),
    ],
)
def test_every_language_of_the_mix_is_listed_and_other_labels_are_not(
    labels: tuple[str, ...], listed: str
) -> None:
    assert listed in front_matter(*labels).splitlines()


def test_mix_of_code_alone_has_no_language() -> None:
    assert "language:" not in front_matter("code")


def test_step_that_was_done_twice_counts_once() -> None:
    events: list[dict[str, Any]] = [
        {"event": "step", "step": 1, "tokens_by_source": {"a": 10}},
        {"event": "step", "step": 2, "tokens_by_source": {"a": 10}},
        {"event": "step", "step": 2, "tokens_by_source": {"a": 4, "b": 6}},
        {"event": "step", "step": 3, "tokens_by_source": {"a": 10}},
    ]
    assert tokens_by_source(events, last_step=2) == {"a": 14, "b": 6}


def test_bar_in_a_name_does_not_end_a_cell() -> None:
    table = markdown_table(("name", "share"), [("a|b", "1 %")])
    assert table.splitlines() == ["| name | share |", "| :-- | --: |", "| a\\|b | 1 % |"]

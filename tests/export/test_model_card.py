"""The model card tells people and the hub what the model was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.export.logged_facts import LoggedFacts, logged_facts, read_logged_facts
from cpt.export.model_card import markdown_table, model_card


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
    card = model_card(manifest_of(*languages), LoggedFacts(tokens={}, held_out={}), "bf16")
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


def test_card_tells_which_conversations_were_learned() -> None:
    manifest = manifest_of("ja", "en")
    facts = LoggedFacts(tokens={}, held_out={})
    card = model_card(manifest, facts, "bf16")
    assert "# gpt-oss after continual pretraining\n" in card and "training on raw text" in card
    assert "tags: [gpt-oss, continual-pretraining]" in card
    (segment,) = manifest.state["ledger"]["segments"]
    segment["settings"]["sources"]["source_1"]["loss"] = "assistant"
    card = model_card(manifest, facts, "bf16")
    assert "# gpt-oss after fine-tuning\n" in card and "raw text" not in card
    assert "only tokens were learned that the assistant generates: `source_1`. No safety" in card
    assert "tags: [gpt-oss, sft]" in card


def test_phases_still_to_come_are_not_told_and_changes_show_both_ends() -> None:
    manifest = manifest_of("ja", "en")
    (first,) = manifest.state["ledger"]["segments"]
    first["to_weights"] = {"source_0": 0.25, "source_1": 0.75}
    for start in (6, 8):
        later = {"start_step": start, "phase": "later", "weights": {"source_0": 1.0}}
        manifest.state["ledger"]["segments"].append({**first, "to_weights": None, **later})
    card = model_card(manifest, LoggedFacts(tokens={}, held_out={}), "bf16")
    assert "0.5 to 0.25 -> 1" in card and "0.5 to 0.75 -> 0" in card
    assert "weights hold from step 0, 6 on" in card


def test_mix_of_code_alone_has_no_language() -> None:
    assert "language:" not in front_matter("code")


def test_step_that_was_done_twice_counts_once() -> None:
    events: list[dict[str, Any]] = [
        {"event": "step", "step": 1, "tokens_by_source": {"a": 10}},
        {"event": "step", "step": 2, "tokens_by_source": {"a": 10}},
        {"event": "step", "step": 2, "tokens_by_source": {"a": 4, "b": 6}},
        {"event": "step", "step": 3, "tokens_by_source": {"a": 10}},
    ]
    assert logged_facts(events, last_step=2).tokens == {"a": 14, "b": 6}


def test_measurement_of_weights_that_the_run_has_left_is_not_on_the_card() -> None:
    look = {"event": "guard", "domain": "english", "language": "en", "baseline": 1.0}
    look |= {"bits_per_byte": 1.0, "ci_low": 0.0, "ci_high": 0.0}
    events: list[dict[str, Any]] = [{"event": "step", "step": step} for step in range(1, 5)]
    events.insert(2, {**look, "step": 2, "delta_percent": 0.5})
    events.append({**look, "step": 4, "delta_percent": -9.0})
    assert logged_facts(events, last_step=5).held_out["english"].delta_percent == -9.0
    events += [{"event": "step", "step": step} for step in (3, 4, 5)]  # looks are rarer by now
    assert logged_facts(events, last_step=5).held_out["english"].delta_percent == 0.5
    assert logged_facts([*events, {"event": "step", "step": 1}], last_step=5).held_out == {}


def test_log_that_cannot_be_read_is_named_in_the_card_and_costs_no_export(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = read_logged_facts(tmp_path / "metrics.jsonl", last_step=8)
    card = model_card(manifest_of("ja"), facts, "bf16")
    assert "| source_0 | ja | web | 1 | not known |  |" in card
    assert "The log of the run could not be read" in card
    assert "The model card will not show the predicted tokens" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"event": ["step"], "step": 1},
        {"event": "step"},
        {"event": "step", "step": 1, "tokens_by_source": 3},
        {"event": "step", "step": 1, "tokens_by_source": {"source_0": "many"}},
        {"event": "step", "step": 10**30, "tokens_by_source": {"source_0": 1}},
        {"event": "guard", "step": 1, "domain": "x\ud800"},
        {"event": "guard", "step": 1, "domain": "a", "ci_low": "x", "language": "en"},
    ],
    ids=lambda line: "-".join(map(str, line)) or "empty",
)
def test_damaged_event_costs_no_export(tmp_path: Path, line: dict[str, Any]) -> None:
    sound = {"event": "step", "step": 2, "tokens_by_source": {"source_0": 5}}
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(f"{json.dumps(line)}\n{json.dumps(sound)}\n")
    card = model_card(manifest_of("ja"), read_logged_facts(metrics, last_step=8), "bf16")
    assert "| source_0 | ja | web | 1 | 5 | 100.00 % |" in card
    card.encode()


def test_bar_in_a_name_does_not_end_a_cell() -> None:
    table = markdown_table(("name", "share"), [("a|b", "1 %")])
    assert table.splitlines() == ["| name | share |", "| :-- | --: |", "| a\\|b | 1 % |"]

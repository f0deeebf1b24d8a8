"""The ledger only grows, and survives JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build.build import build
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import ConfigError
from data_pipeline.mixture.ledger import Ledger, mix_hash, resume_ledger
from data_pipeline.mixture.mixture import Mixture
from tests.data_pipeline.inputs import MakeMix, make_texts


def test_a_run_starts_with_one_segment_at_step_0(make_mix: MakeMix) -> None:
    mix = make_mix(
        {"ja": make_texts(3, "j"), "en": make_texts(3, "e")}, sources={"ja": {"max_epochs": 2.5}}
    )
    (segment,) = Ledger.start(mix).segments
    assert (
        segment.start_step == 0
        and segment.weights == {"ja": 0.5, "en": 0.5}
        and segment.max_epochs == {"ja": 2.5}
    )


def test_json_brings_the_same_ledger_back(make_mix: MakeMix) -> None:
    mix = make_mix(
        {"ja": make_texts(3, "j"), "en": make_texts(3, "e")}, weights={"ja": 0.3, "en": 0.7}
    )
    ledger = Ledger.start(mix).append(mix, 10)
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again == ledger and again.ledger_hash == ledger.ledger_hash


@pytest.mark.parametrize("step", [0, -1, 10, 9])
def test_a_segment_that_does_not_come_later_is_refused(make_mix: MakeMix, step: int) -> None:
    mix = make_mix({"en": make_texts(3, "e")})
    with pytest.raises(ConfigError, match="must increase"):
        Ledger.start(mix).append(mix, 10).append(mix, step)


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 99},
        {"segments": []},
        {"segments": [{"start_step": 0}]},
        {"segments": [3]},
    ],
)
def test_a_damaged_ledger_is_refused(make_mix: MakeMix, change: dict[str, Any]) -> None:
    value = Ledger.start(make_mix({"en": make_texts(3, "e")})).to_json()
    with pytest.raises(ConfigError, match="mix ledger"):
        Ledger.from_json(value | change)


def test_weights_that_are_no_shares_are_refused(make_mix: MakeMix) -> None:
    value = Ledger.start(make_mix({"en": make_texts(3, "e")})).to_json()
    value["segments"][0]["weights"]["en"] = 0.5
    with pytest.raises(ConfigError, match="not shares that sum to 1"):
        Ledger.from_json(value)


def test_mix_hash_sees_every_setting_but_not_where_the_files_are(make_mix: MakeMix) -> None:
    texts = {"ja": make_texts(3, "j"), "en": make_texts(3, "e")}
    base = make_mix(texts)
    assert mix_hash(make_mix(texts, folder="elsewhere")) == mix_hash(base)
    assert mix_hash(make_mix(texts, weights={"ja": 0.4, "en": 0.6})) != mix_hash(base)
    changes: list[dict[str, Any]] = [{"seed": 8}, {"seq_len": 64}, {"max_reject_share": 0.1}]
    for change in changes:
        assert mix_hash(dataclasses.replace(base, **change)) != mix_hash(base)


TEXTS = {"ja": make_texts(30, "j"), "en": make_texts(40, "e"), "code": make_texts(20, "c")}


def stored(mix: MixConfig, rows: dict[str, str] | None = None) -> dict[str, Any]:
    return json.loads(json.dumps(Ledger.start(mix, rows).to_json()))  # type: ignore[no-any-return]


def edited(mix: MixConfig, **weights: float) -> MixConfig:
    sources = (dataclasses.replace(s, weight=weights.get(s.name, s.weight)) for s in mix.sources)
    return dataclasses.replace(mix, sources=tuple(sources))


def test_an_unchanged_mix_goes_on_with_the_stored_ledger(make_mix: MakeMix) -> None:
    mix, rows = make_mix(TEXTS), {"ja": "1", "en": "2", "code": "3"}
    assert resume_ledger(stored(mix, rows), mix, 5, accept_change=False, rows=rows) == Ledger.start(
        mix, rows
    )
    moved = dataclasses.replace(mix, name="other")
    assert resume_ledger(
        stored(mix, rows), moved, 5, accept_change=True, rows=rows
    ) == Ledger.start(mix, rows)


def test_an_edited_mix_is_refused_with_every_change_in_words(make_mix: MakeMix) -> None:
    before = make_mix(TEXTS, weights={"ja": 0.5, "en": 0.3, "code": 0.2})
    after = make_mix(
        TEXTS,
        folder="b",
        weights={"ja": 0.4, "en": 0.4, "code": 0.2},
        sources={"ja": {"max_epochs": 3.0}},
    )
    with pytest.raises(ConfigError) as caught:
        resume_ledger(stored(before), after, 812, accept_change=False)
    message = str(caught.value)
    assert (
        caught.value.exit_code == 78
        and "data.accept_mix_change=true" in message
        and "from step 812 on" in message
    )
    assert (
        "sources[ja].weight: 0.5 -> 0.4" in message and "sources[en].weight: 0.3 -> 0.4" in message
    )
    assert "sources[ja].max_epochs: none -> 3" in message and "code" not in message
    assert "share of ja: 50.00% -> 40.00% of the tokens (-10.00 points)" in message


def test_an_accepted_edit_starts_at_the_next_step_and_repeats_or_loses_no_row(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    mix = make_mix(TEXTS, weights={"ja": 0.5, "en": 0.3, "code": 0.2})
    build(mix, tmp_path / "out", progress=False)
    built = BuiltData.open(tmp_path / "out")
    rows = built.manifest.row_hashes()
    ledger = resume_ledger(
        stored(mix, rows), edited(mix, ja=0.2, en=0.4, code=0.4), 3, accept_change=True, rows=rows
    )
    assert [segment.start_step for segment in ledger.segments] == [0, 3]
    old, new = Mixture(built, Ledger.start(mix), 7), Mixture(built, ledger, 7)
    drawn: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    for step in range(12):
        batch = new.global_batch(step, 4)
        same = old.global_batch(step, 4).chain_hash("") == batch.chain_hash("")
        assert same or step >= 3, "an edit may not touch past steps"
        for source, epoch, row in zip(
            batch.sources.tolist(), batch.epochs.tolist(), batch.rows.tolist(), strict=True
        ):
            drawn[source].append((epoch, row))
    for source, seen in drawn.items():
        count = built.num_rows(source)
        assert len(set(seen)) == len(seen), "no row is repeated within an epoch"
        for epoch in range(len(seen) // count):
            part = seen[epoch * count : (epoch + 1) * count]
            assert sorted(part) == [(epoch, row) for row in range(count)], "no row is lost"


def test_a_second_edit_before_any_step_takes_the_place_of_the_first(make_mix: MakeMix) -> None:
    mix = make_mix(TEXTS, weights={"ja": 0.5, "en": 0.3, "code": 0.2})
    once = resume_ledger(stored(mix), edited(mix, ja=0.4, en=0.4), 3, accept_change=True)
    twice = resume_ledger(once.to_json(), edited(mix, ja=0.3, en=0.5), 3, accept_change=True)
    assert [segment.weights["ja"] for segment in twice.segments] == [0.5, 0.3]
    at_start = resume_ledger(stored(mix), edited(mix, ja=0.3, en=0.5), 0, accept_change=True)
    assert [segment.weights["ja"] for segment in at_start.segments] == [0.3]


@pytest.mark.parametrize("key", ["seq_len", "seed"])
def test_settings_that_decide_the_rows_are_refused_by_name_whatever_is_accepted(
    make_mix: MakeMix, key: str
) -> None:
    mix = make_mix(TEXTS)
    changed = dataclasses.replace(mix, **{key: getattr(mix, key) + 1})
    with pytest.raises(
        ConfigError, match=f"{key}: was {getattr(mix, key)}, is {getattr(mix, key) + 1}"
    ):
        resume_ledger(stored(mix), changed, 3, accept_change=True)


def test_other_text_in_a_source_already_trained_on_is_refused(make_mix: MakeMix) -> None:
    mix, rows = make_mix(TEXTS), {"ja": "1", "en": "2", "code": "3"}
    with pytest.raises(ConfigError, match="source 'en' was trained on and has other rows now"):
        resume_ledger(stored(mix, rows), mix, 3, accept_change=True, rows=rows | {"en": "9"})


def test_a_source_may_be_added_but_one_trained_on_may_only_be_retired(make_mix: MakeMix) -> None:
    small, rows = make_mix({n: TEXTS[n] for n in ("ja", "en")}), {"ja": "1", "en": "2"}
    large = make_mix(TEXTS, folder="b", weights={"ja": 0.5, "en": 0.0, "code": 0.5})
    ledger = resume_ledger(
        stored(small, rows), large, 3, accept_change=True, rows=rows | {"code": "3"}
    )
    assert ledger.segments[-1].weights == {"ja": 0.5, "en": 0.0, "code": 0.5}
    with pytest.raises(
        ConfigError, match="source 'code' was trained on and is no longer in the mix"
    ):
        resume_ledger(ledger.to_json(), small, 5, accept_change=True, rows=rows)


def test_other_text_in_a_source_not_yet_trained_on_is_an_edit_in_words(make_mix: MakeMix) -> None:
    mix = make_mix(TEXTS, weights={"ja": 0.5, "en": 0.5, "code": 0.0})
    rows = {"ja": "1", "en": "2", "code": "3"}
    with pytest.raises(ConfigError, match="rows of source code: others than before"):
        resume_ledger(stored(mix, rows), mix, 3, accept_change=False, rows=rows | {"code": "9"})
    ledger = resume_ledger(stored(mix, rows), mix, 3, accept_change=True, rows=rows | {"code": "9"})
    assert ledger.segments[-1].rows["code"] == "9"


def test_a_checkpoint_older_than_the_last_segment_is_refused(make_mix: MakeMix) -> None:
    mix = make_mix(TEXTS)
    with pytest.raises(ConfigError, match="starts at step 9, after step 5"):
        resume_ledger(Ledger.start(mix).append(mix, 9).to_json(), mix, 5, accept_change=True)


def test_no_segment_may_break_a_floor_whoever_makes_it(make_mix: MakeMix) -> None:
    texts = {"ja": make_texts(3, "j"), "en": make_texts(3, "e")}
    limits = {"languages": {"en": {"min_share": 0.3}, "ja": {"min_share": 0.2, "max_share": 0.7}}}
    mix = make_mix(texts, weights={"ja": 0.6, "en": 0.4}, **limits)
    ledger = Ledger.start(mix)

    def reweigh(weights: dict[str, float]) -> Ledger:
        return ledger.adjust(mix, 5, lambda segment, planned: weights)

    assert reweigh({"ja": 0.2, "en": 0.8}).segments[1].weights["en"] == 0.8
    with pytest.raises(ConfigError) as caught:
        reweigh({"ja": 0.75, "en": 0.25})
    assert [line.split(". Change")[0] for line in caught.value.problems] == [
        "mix ledger: weights from step 5 give language 'en' a share of 25.00%, "
        "the mix allows 30.00% to 100.00%",
        "mix ledger: weights from step 5 give language 'ja' a share of 75.00%, "
        "the mix allows 20.00% to 70.00%",
    ]
    with pytest.raises(ConfigError, match="'ja' a share of 10"):
        reweigh({"ja": 0.1, "en": 0.9})
    edited = dataclasses.replace(
        mix,
        sources=tuple(
            dataclasses.replace(s, weight=0.9 if s.name == "ja" else 0.1) for s in mix.sources
        ),
    )
    with pytest.raises(ConfigError, match="'en' a share of 10"):
        resume_ledger(ledger.to_json(), edited, 5, accept_change=True)
    damaged = ledger.to_json()
    damaged["segments"][0]["weights"] = {"ja": 0.9, "en": 0.1}
    with pytest.raises(ConfigError, match="from step 0 give language 'en'"):
        Ledger.from_json(json.loads(json.dumps(damaged)))


def test_two_sources_of_a_language_miss_its_share_by_two_rows_at_most(make_mix: MakeMix) -> None:
    texts = {name: make_texts(3, name) for name in ("ja_a", "ja_b", "en_a", "en_b", "en_c")}
    mix = make_mix(texts)
    ledger = Ledger.start(mix)
    assert (ledger.slack_rows("ja"), ledger.slack_rows("en"), ledger.slack_rows("fr")) == (2, 2, 0)
    assert ledger.append(mix, 4).slack_rows("ja") == 4


def test_key_that_an_earlier_version_did_not_know_is_no_edit(make_mix: MakeMix) -> None:
    mix = make_mix({"ja_web": ["text"]})
    stored = Ledger.start(mix).to_json()
    segment = stored["segments"][0]
    del segment["settings"]["sources"]["ja_web"]["cluster_by"]
    segment["mix_hash"] = "of other keys"
    ledger = resume_ledger(stored, mix, 3, accept_change=False)
    assert len(ledger.segments) == 1

"""Every shipped mix can be read once its corpora are there, and has the promised shares."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.build.build import build
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from tests.support.mix_corpora import template_with_corpora

ROOT = Path(__file__).parents[3]
TEMPLATES = (
    "swallow_like",
    "gpt_oss_swallow",
    "gpt-oss-20b",
    "gpt-oss-120b",
    "gpt-oss-sft",
    "ja_annealing",
    "ja_long_context",
)


@pytest.fixture
def load_template(tmp_path: Path) -> Callable[[str], MixConfig]:
    """Return a function that loads a shipped template over small corpora."""

    def load(name: str) -> MixConfig:
        return load_mix(template_with_corpora(name, tmp_path))

    return load


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_reads_and_builds_once_its_corpora_are_there(
    load_template: Callable[[str], MixConfig], tmp_path: Path, name: str
) -> None:
    mix = load_template(name)
    # Each corpus has only 30 short texts, which are near copies of each other.
    guard = dataclasses.replace(mix.guard, min_documents=1, min_tokens=1)
    lenient = dataclasses.replace(mix, near_duplicates=0.0, decontaminate_tokens=0, guard=guard)
    manifest = build(lenient, tmp_path / "out", progress=False)
    assert all(entry.documents >= 28 for entry in manifest.sources)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_its_corpora_says_what_is_missing(name: str) -> None:
    with pytest.raises(Exception, match=r"ja_web/\*.jsonl.zst', which matches no file"):
        load_mix(ROOT / "configs" / "mixes" / f"{name}.yaml")


def test_shares_are_those_that_the_comments_promise(
    load_template: Callable[[str], MixConfig],
) -> None:
    mix = load_template("swallow_like")
    shares: dict[str, float] = defaultdict(float)
    for source in mix.sources:
        shares[source.language] += source.weight
        assert source.language == "ja" or not source.normalise
    assert shares["ja"] == pytest.approx(0.54)
    assert shares["en"] + shares["math"] == pytest.approx(0.296)
    assert shares["code"] == pytest.approx(0.16, abs=0.0005)
    assert shares["parallel"] == pytest.approx(0.0044)


def test_the_sources_of_gpt_oss_swallow_have_nearly_half_japanese(
    load_template: Callable[[str], MixConfig],
) -> None:
    mix = load_template("gpt_oss_swallow")
    shares: dict[str, float] = defaultdict(float)
    for source in mix.sources:
        shares[source.language] += source.weight
    assert shares["ja"] == pytest.approx(0.48)
    assert shares["en"] == pytest.approx(0.31)
    # what kept reasoning, by the published account: conversations that gpt-oss wrote
    assert {s.name for s in mix.sources if s.format == "harmony"} == {
        "chat_ja",
        "chat_en",
        "reasoning_en",
    }

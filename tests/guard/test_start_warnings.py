"""A start tells which domains nothing can be replayed for, and which turns nobody can join."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cpt.config import GuardSection
from cpt.guard.start_warnings import guard_warnings, unserved_domains
from data_pipeline.config.mix_config import GuardConfig, GuardDomain, MixConfig
from data_pipeline.config.source_config import SourceConfig

ACTS = GuardSection(interval_steps=100)


def source(name: str, language: str, weight: float) -> SourceConfig:
    return SourceConfig(
        name=name, language=language, domain="web", path="x", weight=weight, held_out_share=0.1
    )


def mix_of(*domains: GuardDomain) -> MixConfig:
    sources = (source("ja", "ja", 0.8), source("en", "en", 0.2), source("old_en", "en", 0.0))
    return MixConfig(seq_len=64, seed=1, sources=sources, guard=GuardConfig(domains=domains))


MEASURED = GuardDomain(name="books", language="en", sources=("old_en",))
FILES = GuardDomain(name="exam", language="en", path="exam.jsonl")


def test_domain_that_no_source_serves_is_named_at_the_start_of_a_guard_that_acts() -> None:
    served = (
        GuardDomain(name="english", language="en", sources=("en", "old_en")),
        GuardDomain(name="japanese", language="ja", sources=("ja",)),
        GuardDomain(name="by_name", language="en", sources=("old_en",), served_by=("en",)),
    )
    mix = mix_of(*served, MEASURED, FILES)
    assert unserved_domains(ACTS, mix) == ["books", "exam"]
    (told,) = guard_warnings(ACTS, mix, None)
    assert told.startswith("guard domains books, exam: ") and "served_by" in told
    assert unserved_domains(ACTS, mix_of(*served)) == []
    # what gives way to replay cannot be replayed
    given = GuardDomain(name="mixed", language="en", sources=("old_en",), served_by=("ja",))
    assert unserved_domains(ACTS, mix_of(given)) == ["mixed"]


@pytest.mark.parametrize(
    "settings",
    [
        GuardSection(interval_steps=100, policy="warn"),
        GuardSection(),
        GuardSection(interval_steps=100, enabled=False),
        GuardSection(interval_steps=100, kl_lever="beside"),
    ],
)
def test_nobody_is_warned_where_nothing_is_steered_or_another_lever_is_left(
    settings: GuardSection,
) -> None:
    assert guard_warnings(settings, mix_of(MEASURED, FILES), None) == []


def test_turns_that_a_build_does_not_join_are_told_by_the_name_of_their_source() -> None:
    mix = mix_of(GuardDomain(name="english", language="en", sources=("en",)))
    entries = [SimpleNamespace(name=name, held_out_documents=9) for name in ("en", "old_en")]
    rules = {"sources": [{"name": "en", "turns": "each"}, {"name": "old_en", "turns": "each"}]}
    manifest: Any = SimpleNamespace(sources=entries, rules=rules, files={})
    (told,) = guard_warnings(ACTS, mix, manifest)  # the other source is not measured
    assert told.startswith("sources en: their held-out documents are turns")
    manifest.rules = {"sources": [{"name": "en"}]}
    assert guard_warnings(ACTS, mix, manifest) == []

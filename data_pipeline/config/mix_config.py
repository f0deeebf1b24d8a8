"""The data mix as dataclasses: its keys, and the rules within each section.

Decisions
    A weight of 0 is allowed: such a source is built, and can be measured, but is not trained on,
    unless a phase gives it a weight or the guard is told by its name that it may replay it.
    Rules that span sections are in `mix_checks`; `mix_file` reads a file and applies both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from data_pipeline.config.decontamination_config import DecontaminationConfig
from data_pipeline.config.generation_config import GenerationDomain
from data_pipeline.config.language_limits import LanguageLimits
from data_pipeline.config.schedule_config import SchedulePhase
from data_pipeline.config.source_config import (
    Normalization,
    SourceConfig,
    check_ignored_keys,
    check_language,
    check_name,
    check_normalise,
)
from data_pipeline.config.stage_config import StageConfig, stage_problems
from data_pipeline.config.traces_config import TraceDomain

OWN_PREFIX = "guard-"
"""Prefix of the source that holds the files of a guard domain; the domain's name follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardDomain:
    """Held-out documents that are measured together."""

    name: str
    """Unique name of the domain in metrics."""
    language: str
    """Label of the text, as for a source."""
    sources: tuple[str, ...] = ()
    """Names of sources whose held-out documents form the domain; each needs a `held_out_share`
    above 0. The guard replays them for the domain, but for those that the mix never trains on."""
    path: str | tuple[str, ...] | None = None
    """Instead of `sources`: files, relative to the YAML file, that are measured as a whole and
    never trained on."""
    format: Literal["auto", "jsonl", "parquet", "text", "harmony"] = "auto"
    """Format of the files of `path`, as for a source."""
    text_field: str = "text"
    """Key or column that holds the text in the files of `path`."""
    ignored_keys: tuple[str, ...] = ()
    """Keys of conversations in the files of `path` that may be dropped, as for a source."""
    normalise: tuple[Normalization, ...] | None = None
    """Cleaning steps for the files of `path`, as for a source. Copies of them are looked for in
    training text as it is after its own steps, so both should have the same. Required, and may be
    empty, if a source of the same language has some."""
    served_by: tuple[str, ...] = ()
    """Names of sources that the guard replays for the domain, also those of weight 0. Without them
    a domain with `sources` is served by these, and replay cannot help one with a `path`."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each broken rule within one domain."""
        yield from check_name(self.name)
        yield from check_language(self.language)
        if not self.sources and self.path is None:
            yield (
                "sources",
                "is an empty list. Name at least one source, give a path, or remove the domain.",
            )
        if self.sources and self.path is not None:
            yield "path", "is given together with sources. Split the domain in two."
        yield from check_ignored_keys(self.ignored_keys, self.format)
        has_file_keys = self.format != "auto" or self.text_field != "text"
        if has_file_keys and self.path is None:
            yield "format", "and text_field need a path. Remove them."
        if self.normalise is not None and self.path is None:
            yield "normalise", "needs a path: the sources have their own. Remove it."
        yield from check_normalise(self.normalise or (), self.format)

    @property
    def own_source(self) -> SourceConfig:
        """Source that holds the files of `path`: it is built and measured, never trained on."""
        return SourceConfig(
            name=f"{OWN_PREFIX}{self.name}",
            language=self.language,
            domain="guard",
            path=self.path,
            format=self.format,
            text_field=self.text_field,
            ignored_keys=self.ignored_keys,
            normalise=self.normalise or (),
            weight=0.0,
            held_out_share=1.0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """Grouping of the held-out documents for the guard."""

    domains: tuple[GuardDomain, ...] = ()
    """Groups of held-out documents; empty makes one domain of each source that holds out documents,
    with the source's name."""
    generation: tuple[GenerationDomain, ...] = ()
    """Prompts that the model answers during the run: whether it still thinks, answers in good form,
    in the language asked for, and rightly."""
    traces: tuple[TraceDomain, ...] = ()
    """Prompts whose replies by the untouched model are kept before step 0: how far the model moves
    from what it would have written."""
    min_documents: int = 6
    """Held-out documents that a domain must have. With fewer than 6, even if all of them got worse,
    chance alone would do so more often than the 5 % that a 95 % interval allows (two-sided sign
    test: 2 / 2^5 = 6.3 %)."""
    min_tokens: int = 1000
    """Predicted tokens that the held-out documents of a domain must have."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each minimum that is not one."""
        minimums = {"min_documents": self.min_documents, "min_tokens": self.min_tokens}
        for key, value in minimums.items():
            if value < 1:
                yield (
                    key,
                    f"is {value}, must be at least 1: a domain without text cannot be measured.",
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class MixConfig:
    """The data-mix YAML as a whole."""

    name: str = ""
    """Name of the mix; empty takes the file's name without its suffix."""
    seq_len: int = 0
    """Tokens: input slots of a packed row; required, unless `stages` gives it. With stages it is
    that of the first one, in which held-out text is measured."""
    seed: int
    """Seed of the order of the rows."""
    sources: tuple[SourceConfig, ...]
    """Sources of the mix; at least one."""
    guard: GuardConfig = GuardConfig()
    """How held-out documents are grouped for the guard."""
    max_reject_share: float = 0.05
    """Share of a source's documents that may be unusable before the build stops, 0 to 1."""
    languages: dict[str, LanguageLimits] = field(default_factory=dict)
    """Bounds on the share of a language, by language; a mix outside them is refused."""
    schedule: tuple[SchedulePhase, ...] = ()
    """Phases of the run, each with its own weights; without them the weights of the sources hold
    throughout."""
    packing: Literal["best_fit", "concatenate"] = "best_fit"
    """best_fit keeps documents whole; concatenate fills each row to the end and cuts documents
    there, for comparison."""
    near_duplicates: float = 0.8
    """Jaccard similarity of 5-token shingles from which on a document counts as a copy; 0 finds
    exact copies only."""
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    """What is too close to held-out text to be trained on."""
    decontaminate_tokens: int | None = None
    """An older name of `decontamination.tokens`."""
    max_mislabelled_share: float = 0.05
    """Share of a source's documents that may be in another language than its label before `audit`
    fails, 0 to 1."""
    stages: tuple[StageConfig, ...] = ()
    """Instead of `seq_len`: rows of several lengths, one after the other in a run. Every training
    document is in one stage."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each broken rule on the top-level keys alone."""
        if self.name:
            yield from check_name(self.name)
        yield from stage_problems(self.stages)
        if not 0 <= self.seed < 2**63:
            yield "seed", f"is {self.seed}, must be from 0 to 2^63 - 1."
        if not 0 <= self.max_reject_share <= 1:
            yield "max_reject_share", f"is {self.max_reject_share:g}, must be from 0 to 1."
        if not 0 <= self.max_mislabelled_share <= 1:
            yield (
                "max_mislabelled_share",
                f"is {self.max_mislabelled_share:g}, must be from 0 to 1.",
            )
        if self.near_duplicates != 0 and not 0.5 <= self.near_duplicates <= 1:
            yield (
                "near_duplicates",
                f"is {self.near_duplicates:g}, must be 0 (off), or from 0.5 to 1.",
            )
        if self.decontaminate_tokens is not None:
            for key, problem in self.decontamination_rules.check():
                if key == "tokens":
                    yield "decontaminate_tokens", problem

    @property
    def decontamination_rules(self) -> DecontaminationConfig:
        """The `decontamination` section, with the tokens under whichever name they were given."""
        if self.decontaminate_tokens is None:
            return self.decontamination
        return replace(self.decontamination, tokens=self.decontaminate_tokens)

    def longest_conversation(self, source: SourceConfig) -> int:
        """Return the tokens of the longest conversation that a source may have.

        A conversation is never cut. One that may be held out has to fit the rows in which it would
        be measured, which are those of the first stage.
        """
        if not self.stages or source.held_out_share > 0:
            return self.seq_len
        return self.stages[-1].seq_len

    def guard_domains(self) -> tuple[GuardDomain, ...]:
        """Return the domains of the guard section, or one per source with held-out documents."""
        if self.guard.domains:
            return self.guard.domains
        return tuple(
            GuardDomain(name=source.name, language=source.language, sources=(source.name,))
            for source in self.sources
            if source.held_out_share > 0
        )

    def trained_sources(self) -> set[str]:
        """Return the sources that the mix or one of its phases trains on."""
        trained = {source.name for source in self.sources if source.is_trained}
        for phase in self.schedule:
            for weights in (phase.weights, phase.to):
                trained |= {name for name, weight in weights.items() if weight > 0}
        return trained

    def serving_sources(self) -> dict[str, tuple[str, ...]]:
        """Return the sources that the guard replays for each of its domains, by domain.

        A source that the mix never trains on serves a domain only if that names it in `served_by`
        or in the `sources` of its prompts; that its documents are measured does not allow it.
        """
        trained = self.trained_sources()
        serving = {}
        for domain in self.guard_domains():
            replayed = [name for name in domain.sources if name in trained]
            serving[domain.name] = domain.served_by or tuple(replayed)
        for asked in self.guard.generation:
            serving[asked.name] = asked.sources
        for traced in self.guard.traces:
            serving[traced.name] = traced.sources
        return serving

"""The prompts of one domain: those that a run asks, and those of one look.

    file -> records in an order that the seed decides -> the pool of the run -> prompts of a look

Decisions
    What a look asks depends on the seed, the texts of the prompts and the number of the look, and
    on nothing else: not on the layout, and not on the order of the lines.
    Looks ask fresh prompts as long as there are some. Then the prompts are shuffled, and asked
    again from the start: one pass after another. No prompt is asked twice in a pass, so a pass that
    does not divide evenly leaves some out.
    The untouched model answers the pool before step 0: only the prompts that the planned looks ask,
    if the file has more. A run that is given more looks later keeps that pool, and asks it again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.config.generation_config import GenerationDomain, PromptRecord, read_prompts
from data_pipeline.errors import ConfigError
from data_pipeline.text.harmony import DEFAULT_DATE, encode_prompt


def look_of_step(step: int, interval_steps: int) -> int:
    """Return the number of the look at a step; 0 is the untouched model.

    Args:
        step: Optimizer steps done.
        interval_steps: Steps between looks; 0 looks at the end only.
    """
    if step == 0:
        return 0
    return math.ceil(step / interval_steps) if interval_steps else 1


def looks_of_run(total_steps: int, interval_steps: int) -> int:
    """Return how many looks of a run follow the one at the untouched model."""
    return look_of_step(total_steps, interval_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class LookPrompts:
    """The prompts of one look."""

    pass_number: int
    """Pass over the pool, counted from 0."""
    indices: list[int]
    """Places of the prompts in the pool."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptPool:
    """The prompts of one domain that a run asks."""

    domain: GenerationDomain
    """The domain's keys."""
    records: Sequence[PromptRecord]
    """The prompts, in the order of the first pass."""
    spare: Sequence[PromptRecord]
    """The prompts that no planned look asks, in the order that follows."""
    seed: int
    """Seed of the run."""
    content_hash: str
    """Hex sha256 of everything in the file and the keys that decides replies and measures."""

    @classmethod
    def of(
        cls,
        domain: GenerationDomain,
        records: Sequence[PromptRecord],
        *,
        seed: int,
        num_looks: int,
    ) -> PromptPool:
        """Return the pool of a domain.

        Args:
            domain: The domain's keys.
            records: All prompts of its file.
            seed: Seed of the run.
            num_looks: Looks planned after the one at the untouched model.
        """
        ordered = sorted(records, key=lambda record: _place(seed, 0, record))
        num_needed = max(num_looks, 1) * domain.prompts_per_look
        return cls(
            domain=domain,
            records=ordered[:num_needed],
            spare=ordered[num_needed:],
            seed=seed,
            content_hash=_content_hash(domain, records),
        )

    def of_size(self, size: int) -> PromptPool:
        """Return the pool with this many prompts, or all of its file if it has fewer."""
        ordered = [*self.records, *self.spare]
        return replace(self, records=ordered[:size], spare=ordered[size:])

    @property
    def prompts_per_look(self) -> int:
        """Number of prompts of one look."""
        return min(self.domain.prompts_per_look, len(self.records))

    def of_look(self, number: int) -> LookPrompts:
        """Return the prompts of a look; those of look 0 are those of look 1.

        Args:
            number: Number of the look, counted from 0.
        """
        looks_per_pass = len(self.records) // self.prompts_per_look
        pass_number, place = divmod(max(0, number - 1), looks_per_pass)
        order = list(range(len(self.records)))
        order.sort(key=lambda index: _place(self.seed, pass_number, self.records[index]))
        first = place * self.prompts_per_look
        return LookPrompts(
            pass_number=pass_number, indices=order[first : first + self.prompts_per_look]
        )

    def encode(self, index: int) -> list[int]:
        """Return the tokens of a prompt in Harmony, up to where the assistant begins."""
        return encode_prompt(
            self.records[index].prompt,
            developer=None,
            effort=self.domain.effort,
            date=DEFAULT_DATE,
        )


def usable_prompts(domain: GenerationDomain) -> list[PromptRecord]:
    """Return the prompts of a domain's file.

    Args:
        domain: The domain's keys, its path absolute.

    Raises:
        ConfigError: a line cannot be used; every such line is named.
    """
    records, problems = read_prompts(Path(domain.path))
    if problems:
        raise ConfigError([f"guard.generation '{domain.name}': {text}" for text in problems])
    return records


def _place(seed: int, pass_number: int, record: PromptRecord) -> str:
    """Return a text by which the prompts of a pass are sorted."""
    return hashlib.sha256(f"{seed}:{pass_number}:{record.prompt}".encode()).hexdigest()


def _content_hash(domain: GenerationDomain, records: Sequence[PromptRecord]) -> str:
    asked = sorted(json.dumps(record.to_json(), sort_keys=True) for record in records)
    settings = [domain.language, domain.effort, domain.max_new_tokens, DEFAULT_DATE.isoformat()]
    return hashlib.sha256(json.dumps([settings, asked]).encode()).hexdigest()

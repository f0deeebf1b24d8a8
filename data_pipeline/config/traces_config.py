"""Prompts whose replies by the untouched model the guard keeps, to measure the model against them.

    guard.traces of the data mix -> TraceDomain -> JSONL file of prompts (generation_config.py)

Decisions
    One trace a prompt: replies to one prompt are alike, and would count for more than they say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from data_pipeline.config.source_config import check_language, check_name


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceDomain:
    """Replies that the untouched model writes before step 0; the guard measures how far the model
    has moved from them (docs/guard.md)."""

    name: str
    """Unique name of the domain in metrics, other than those of `guard.domains` and
    `guard.generation`."""
    language: str
    """Language of the prompts, as for a source."""
    path: str
    """JSONL file, relative to the YAML file: one `{"prompt": "..."}` a line. A file of
    `guard.generation` can be named, too; its answers are not read."""
    sources: tuple[str, ...] = ()
    """Sources of the mix whose replay helps this domain, also those of weight 0; without them, the
    learning rate, the pause and the rollback remain."""
    effort: Literal["low", "medium", "high"] = "medium"
    """Reasoning effort that the system message names."""
    num_traces: int = 500
    """Traces, one for each prompt; of more prompts, as many are drawn by the hash of their text."""
    max_new_tokens: int = 1024
    """Tokens of a trace; a longer reply is cut there, and what is there of it counts."""
    tolerance: float = 0.1
    """Tolerated divergence from the untouched model in nats a token: the mean over the traces."""
    hard_limit: float = 0.5
    """Divergence in nats a token that pauses the run if it stays. A trace counts with at most twice
    this value."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each broken rule within one domain."""
        yield from check_name(self.name)
        yield from check_language(self.language)
        for key in ("num_traces", "max_new_tokens"):
            value = getattr(self, key)
            if value < 1:
                yield key, f"is {value}, must be at least 1."
        if not 0 < self.tolerance <= self.hard_limit:
            yield (
                "tolerance",
                f"is {self.tolerance:g}, must be above 0 and at most hard_limit "
                f"({self.hard_limit:g}).",
            )

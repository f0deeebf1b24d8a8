"""The `stages` of a data mix: rows of several lengths over the same text, one after the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_SEQ_LEN = 131_072
"""Tokens; the longest context that gpt-oss was trained for."""
SHARE_SUM_TOLERANCE = 1e-6
"""Largest distance of the sum of the shares from 1 that counts as rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One stretch of a run with rows of one length."""

    seq_len: int
    """Tokens: input slots of a packed row; more than in the stage before."""
    share: float
    """Share of the run's tokens, and of the training tokens of every source, above 0 and up to 1;
    all shares sum to 1."""
    min_tokens: int = 0
    """Documents of at least this many tokens are taken first; shorter ones fill up the share of a
    source that has too few of them. 0 takes documents of any length."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each broken rule within one stage."""
        if not 2 <= self.seq_len <= MAX_SEQ_LEN:
            yield (
                "seq_len",
                f"is {self.seq_len}, must be from 2 to {MAX_SEQ_LEN} (the context of gpt-oss).",
            )
        if not 0 < self.share <= 1:
            yield "share", f"is {self.share:g}, must be above 0 and at most 1."
        if self.min_tokens < 0:
            yield "min_tokens", f"is {self.min_tokens}, must be >= 0."


def stage_problems(stages: Sequence[StageConfig]) -> Iterator[tuple[str, str]]:
    """Yield (key, problem) for each broken rule between the stages of a mix.

    The last stage takes what no other one takes, and the first one takes documents of any length.
    """
    if not stages:
        return
    if len(stages) == 1:
        yield "stages", "has one stage. Write its seq_len at the top level instead."
    if stages[0].min_tokens:
        yield (
            "stages[0].min_tokens",
            f"is {stages[0].min_tokens}, but the first stage takes what the others leave. Remove "
            "it.",
        )
    for number, (before, stage) in enumerate(itertools.pairwise(stages), 1):
        if stage.seq_len <= before.seq_len:
            yield (
                f"stages[{number}].seq_len",
                f"is {stage.seq_len}, must be more than the {before.seq_len} of the stage before: "
                "rows become longer from stage to stage.",
            )
    total = math.fsum(stage.share for stage in stages)
    if abs(total - 1) > SHARE_SUM_TOLERANCE:
        scaled = ", ".join(f"{stage.share / total:.6g}" for stage in stages)
        yield "stages", f"have shares that sum to {total:.9g}, must be 1. Scaled to 1: {scaled}."

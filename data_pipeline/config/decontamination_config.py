"""How much a training document may share with held-out text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MIN_WHOLE_TOKENS = 20
"""Tokens from which on a document that is only there to be measured is searched for as a whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecontaminationConfig:
    """What is too close to held-out text to be trained on."""

    tokens: int = 50
    """Tokens in a row that a document shares with a held-out document and that are not trained on;
    0 turns this off."""
    min_kept_tokens: int = 200
    """A long document loses only the shared stretch, with `tokens` tokens on both sides of it, and
    each side of at least this many tokens stays, as a document of its own. A document that would
    keep less than half of its tokens is dropped as a whole, as is a conversation."""
    stock_text: float = 0.0
    """Share of the training documents from which on a run of tokens counts as stock text, such as a
    license, and may stay although a held-out document of a training source has it, 0 to 1; it must
    also be in more than 10 documents. 0: no text may. Text of guard files never may, nor text of a
    source with held_out_share 1. `build` prints what was let through."""

    def min_searched_tokens(self, is_only_measured: bool) -> int:
        """Return the tokens from which on a held-out document is searched for in training text.

        Args:
            is_only_measured: Whether its source is never trained on.
        """
        return min(self.tokens, MIN_WHOLE_TOKENS) if is_only_measured else self.tokens

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each broken rule."""
        if self.tokens != 0 and not 16 <= self.tokens <= 1024:
            yield "tokens", f"is {self.tokens}, must be 0 (off), or from 16 to 1024 tokens."
        if not 2 <= self.min_kept_tokens < 2**40:
            yield (
                "min_kept_tokens",
                f"is {self.min_kept_tokens}, must be at least 2: shorter text has nothing to "
                "predict. A very large number drops every such document as a whole.",
            )
        if not 0 <= self.stock_text <= 1:
            yield "stock_text", f"is {self.stock_text:g}, must be from 0 (no text) to 1 (a share)."

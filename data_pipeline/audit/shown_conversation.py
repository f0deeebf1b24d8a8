"""One conversation of a source as a person looks at it: its tokens, and which are learned."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from data_pipeline.reading.document import Document
from data_pipeline.text.harmony import Learned
from data_pipeline.text.tokenizer import Tokens, decode_bytes

MAX_TOKENS = 1000
"""Tokens of a conversation that are shown, the last ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownConversation:
    """A conversation in pieces of which all tokens are learned, or none."""

    place: str
    """File and line that it was read from."""
    pieces: tuple[tuple[str, bool], ...]
    """(text, whether it is learned) in order; control tokens appear by name."""
    num_tokens: int
    """Tokens of the whole conversation."""
    num_learned: int
    """Tokens of it that are learned."""
    num_left_out: int
    """Tokens before the first piece that are not shown."""

    @property
    def title(self) -> str:
        """What it is, in one line."""
        title = f"{self.place}: {self.num_learned:,} of {self.num_tokens:,} tokens are learned"
        if self.num_left_out:
            title += f"; the first {self.num_left_out:,} are not shown"
        return title


def learned_tokens(document: Document) -> tuple[Tokens, Learned]:
    """Return the tokens of a document, and whether each is learned as a label."""
    tokens = document.tokenize()
    if document.loss is not None:
        return tokens, document.loss()
    learned = np.ones(len(tokens), np.bool_)
    learned[0] = False  # nothing comes before it, from which it could be predicted
    return tokens, learned


def show_conversation(document: Document, tokens: Tokens, learned: Learned) -> ShownConversation:
    """Return a conversation for people."""
    begin = max(len(tokens) - MAX_TOKENS, 0)
    flags = learned[begin:]
    borders = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    pieces = []
    for first, stop in itertools.pairwise(borders):
        text = decode_bytes(tokens[begin + first : begin + stop]).decode("utf-8", "replace")
        pieces.append((text, bool(flags[first])))
    return ShownConversation(
        place=str(document.place),
        pieces=tuple(pieces),
        num_tokens=len(tokens),
        num_learned=int(np.count_nonzero(learned)),
        num_left_out=begin,
    )


def tells_more(shown: ShownConversation, other: ShownConversation | None) -> bool:
    """Return whether a conversation is worth more to look at than another, or than none.

    One that is shown whole is, and then one of more pieces: it has calls, or earlier turns.
    """
    if other is None:
        return True
    if bool(shown.num_left_out) != bool(other.num_left_out):
        return not shown.num_left_out
    return len(shown.pieces) > len(other.pieces)

"""One document on its way from a reader to a token shard, whatever it was read from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from data_pipeline.reading.clusters import NO_CLUSTER
from data_pipeline.reading.content_hashes import content_hash
from data_pipeline.reading.stored_rows import StoredConversation
from data_pipeline.store.shards import LossMask
from data_pipeline.text.cleaning import Place
from data_pipeline.text.harmony import Conversation, body
from data_pipeline.text.tokenizer import Tokens, decode, encode

BYTES_PER_INVENTED_TOKEN = 4
"""UTF-8 bytes that an invented token counts as; about what a token of real text stands for."""
COPIES_BY = "tokens"
"""By what `hash_of_body` tells copies, for rules and parts: another word if other ones are told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A usable text, a conversation, or invented tokens.

    The tokens are made on demand: most copies are recognized by their hash and never tokenized.
    """

    text: str
    """Text for people to look at; empty for invented tokens."""
    content_hash: int
    """Hash of the whole content, 128 bits; equal for documents with the same content."""
    record: int = 0
    """Content hash of the whole record, of which the document is a turn; 0 if it is all of it."""
    num_bytes: int
    """UTF-8 bytes that count for bits per byte."""
    is_conversation: bool = False
    """Whether the tokens are in the Harmony format and end with <|return|>."""
    cluster: int = NO_CLUSTER
    """Hash of what it has in common with documents that it belongs to (`cluster_by`)."""
    origin: int = 0
    """Number of the file within the unit and of the record, as `store.provenance.place_of` packs
    them; lines are counted from the start of the unit."""
    kept: tuple[str | None, ...] = ()
    """Values of the fields that the source keeps."""
    place: Place | None = None
    """Place of a conversation in the input, for the account of those that fit no row."""
    tokenize: Callable[[], Tokens]
    """Function that returns the tokens, without END_OF_TEXT."""
    loss: Callable[[], LossMask] | None = None
    """Function that returns whether each of those tokens bears loss as a label; None if all do."""
    learned_bytes: int = 0
    """UTF-8 bytes of what bears loss, if there is a mask."""

    def located(
        self, origin: int, cluster: int = NO_CLUSTER, kept: tuple[str | None, ...] = ()
    ) -> Document:
        """Return the document with what is known of its record."""
        # some microseconds less than dataclasses.replace, for every document
        return Document(
            text=self.text,
            content_hash=self.content_hash,
            record=self.record,
            num_bytes=self.num_bytes,
            is_conversation=self.is_conversation,
            cluster=cluster,
            origin=origin,
            kept=kept,
            place=self.place,
            tokenize=self.tokenize,
            loss=self.loss,
            learned_bytes=self.learned_bytes,
        )

    @classmethod
    def from_text(cls, text: str) -> Document:
        """Return the document of a usable text."""
        content = text.encode("utf-8")
        return cls(
            text=text,
            content_hash=content_hash(content),
            num_bytes=len(content),
            tokenize=partial(encode, text),
        )

    @classmethod
    def from_conversation(cls, conversation: Conversation, place: Place) -> Document:
        """Return the document of a conversation; effort and date do not count as its content."""
        return cls(
            text=conversation.text,
            content_hash=hash_of(conversation),
            num_bytes=conversation.num_bytes,
            is_conversation=True,
            place=place,
            tokenize=conversation.tokens,
        )

    @classmethod
    def from_turn(cls, conversation: Conversation, record: int, place: Place) -> Document:
        """Return the document of a conversation of which only the last turn is learned.

        Args:
            conversation: The conversation up to that turn.
            record: Content hash of the whole record, if that has other turns to learn; else 0.
            place: Place of the record.
        """
        rendering = _Rendering(conversation)
        return cls(
            text=conversation.text,
            content_hash=hash_of(conversation),
            record=record,
            num_bytes=conversation.num_bytes,
            is_conversation=True,
            place=place,
            tokenize=rendering.tokens,
            loss=rendering.learned,
            learned_bytes=conversation.num_learned_bytes,
        )

    @classmethod
    def from_stored_conversation(cls, stored: StoredConversation, place: Place) -> Document:
        """Return the document of a conversation of an earlier build."""
        loss = stored.loss
        return cls(
            text=decode(body(stored.tokens)),
            content_hash=hash_of_body(stored.tokens),
            record=stored.record,
            num_bytes=stored.num_bytes,
            is_conversation=True,
            place=place,
            tokenize=lambda: stored.tokens,
            loss=None if loss is None else lambda: loss,
            learned_bytes=stored.learned_bytes,
        )

    @classmethod
    def from_invented_tokens(cls, tokens: Tokens) -> Document:
        """Return the document of tokens that stand for no text."""
        return cls(
            text="",
            content_hash=content_hash(tokens.tobytes()),
            num_bytes=len(tokens) * BYTES_PER_INVENTED_TOKEN,
            tokenize=lambda: tokens,
        )


def hash_of(conversation: Conversation) -> int:
    """Return the content hash of a conversation; what is learned of it does not count."""
    return content_hash(conversation.content.encode("utf-8"))


def hash_of_body(tokens: Tokens) -> int:
    """Return the hash by which copies of a conversation are found, whatever it was read from.

    An earlier build has its tokens alone. Neither effort and date count, nor what is learned.
    """
    return content_hash(body(tokens).tobytes())


class _Rendering:
    """Tokens and loss mask of a conversation, rendered once."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    @functools.cached_property
    def _both(self) -> tuple[Tokens, LossMask]:
        return self._conversation.tokens_and_learned()

    def tokens(self) -> Tokens:
        return self._both[0]

    def learned(self) -> LossMask:
        return self._both[1]

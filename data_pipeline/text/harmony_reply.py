"""The messages of a reply that a model wrote in the Harmony format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.text.harmony import END, MESSAGE, STOP_IDS
from data_pipeline.text.tokenizer import encoding

_HEADER_TOKENS = ("<|start|>", "<|constrain|>", "<|channel|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyMessage:
    """One message of a reply."""

    channel: str
    """`analysis`, `commentary`, `final`, or what the model wrote in its place."""
    recipient: str
    """Function that the message is addressed to (`functions.name`); empty if there is none."""
    text: str
    """Content of the message."""


def parse_reply(tokens: Sequence[int]) -> list[ReplyMessage]:
    """Return the messages of a reply.

    Tokens that do not follow the format are never dropped: they become the text of a message
    without a channel.
    """
    return [_parse_message(message) for message in _split_messages(tokens) if message]


def _split_messages(tokens: Sequence[int]) -> Iterator[list[int]]:
    message: list[int] = []
    for token in tokens:
        if token in (END, *STOP_IDS):
            yield message
            message = []
        else:
            message.append(token)
    yield message


def _parse_message(message: list[int]) -> ReplyMessage:
    if MESSAGE not in message:
        return ReplyMessage(channel="", recipient="", text=_decode(message))
    content_at = message.index(MESSAGE)
    header = _decode(message[:content_at])
    for name in _HEADER_TOKENS:
        header = header.replace(name, f" {name}")
    return ReplyMessage(
        channel=_field(header, "<|channel|>"),
        recipient=_field(header, "to="),
        text=_decode(message[content_at + 1 :]),
    )


def _field(header: str, name: str) -> str:
    for field in header.split():
        if field.startswith(name):
            return field.removeprefix(name)
    return ""


def _decode(tokens: list[int]) -> str:
    return encoding().decode(tokens)

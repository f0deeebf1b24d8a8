"""Split the tokens of a Harmony reply into its messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.text.harmony import END, MESSAGE, STOP_IDS
from data_pipeline.text.tokenizer import encoding


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyMessage:
    """One message of a reply."""

    channel: str
    """`analysis`, `commentary`, `final`, or what the model wrote in its place."""
    recipient: str
    """Whom it is addressed to (`functions.name`), or empty."""
    text: str
    """Its content."""


def parse_reply(tokens: Sequence[int]) -> list[ReplyMessage]:
    """The messages of a reply; what does not follow the format is kept as text of its own, never
    dropped.
    """
    parts, rest = [], list(tokens)
    while rest:
        stop = next((i for i, token in enumerate(rest) if token in (END, *STOP_IDS)), len(rest))
        message, rest = rest[:stop], rest[stop + 1 :]
        if message:
            parts.append(_part(message))
    return parts


def _part(message: list[int]) -> ReplyMessage:
    if MESSAGE not in message:
        return ReplyMessage(channel="", recipient="", text=_text(message))
    at = message.index(MESSAGE)
    header = _text(message[:at])
    for name in ("<|start|>", "<|constrain|>", "<|channel|>"):
        header = header.replace(name, f" {name}")
    channel, recipient = (_field(header, name) for name in ("<|channel|>", "to="))
    return ReplyMessage(channel=channel, recipient=recipient, text=_text(message[at + 1 :]))


def _field(header: str, name: str) -> str:
    return next(
        (field.removeprefix(name) for field in header.split() if field.startswith(name)), ""
    )


def _text(tokens: list[int]) -> str:
    return encoding().decode(tokens)

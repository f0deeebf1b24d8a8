"""Harmony, the conversation format of gpt-oss: messages to tokens, and a reply's tokens to its channels.

Text that people give is always encoded as plain text; control tokens stand only where this file puts them.  The chat
template of an export (`harmony.jinja`) renders the same, as a string.

Source: the Harmony response format (openai-harmony); the renderings in tests/unit/test_harmony.py come from it.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.tokenizer import END_OF_TEXT, encode, encoding

TEMPLATE = Path(__file__).with_name("harmony.jinja")
"""The chat template that goes into an export."""
Effort = Literal["low", "medium", "high"]
EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")
IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."

START, END, MESSAGE, CHANNEL = 200_006, 200_007, 200_008, 200_005
RETURN, CALL, CONSTRAIN = 200_002, 200_012, 200_003
STOP_IDS = (RETURN, END_OF_TEXT, CALL)
"""Each ends a generation: <|return|>, <|endoftext|>, <|call|>."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One message of a reply."""

    channel: str
    """`analysis`, `commentary`, `final`, or what the model wrote in its place."""
    recipient: str
    """Whom it is addressed to (`functions.name`), or empty."""
    text: str
    """Its content."""


def encode_prompt(user: str, *, developer: str | None, effort: Effort, date: datetime.date) -> list[int]:
    """A conversation of one question, up to where the assistant begins.

    Args:
        user: The question.
        developer: Instructions, if any.
        effort: Reasoning effort.
        date: The date that the system message names.
    """
    system = (
        f"{IDENTITY}\nKnowledge cutoff: 2024-06\nCurrent date: {date.isoformat()}\n\nReasoning: {effort}\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    )
    ids = _message("system", system)
    if developer is not None:
        ids += _message("developer", f"# Instructions\n\n{developer}")
    return [*ids, *_message("user", user), START, *_plain("assistant")]


def _message(role: str, text: str) -> list[int]:
    return [START, *_plain(role), MESSAGE, *_plain(text), END]


def _plain(text: str) -> list[int]:
    return [int(number) for number in encode(text)]


def parse_reply(tokens: Sequence[int]) -> list[Part]:
    """The messages of a reply; what does not follow the format is kept as text of its own, never dropped."""
    parts, rest = [], list(tokens)
    while rest:
        stop = next((i for i, token in enumerate(rest) if token in (END, *STOP_IDS)), len(rest))
        message, rest = rest[:stop], rest[stop + 1 :]
        if message:
            parts.append(_part(message))
    return parts


def _part(message: list[int]) -> Part:
    if MESSAGE not in message:
        return Part(channel="", recipient="", text=_text(message))
    at = message.index(MESSAGE)
    header = _text(message[:at])
    for name in ("<|start|>", "<|constrain|>", "<|channel|>"):
        header = header.replace(name, f" {name}")
    channel, recipient = (_field(header, name) for name in ("<|channel|>", "to="))
    return Part(channel=channel, recipient=recipient, text=_text(message[at + 1 :]))


def _field(header: str, name: str) -> str:
    return next((field.removeprefix(name) for field in header.split() if field.startswith(name)), "")


def _text(tokens: list[int]) -> str:
    return encoding().decode(tokens)

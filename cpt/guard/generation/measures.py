"""The measures of one reply: is it in good form, in the right language, and right?

    tokens of a reply -> its Harmony messages -> ReplyMeasures

Every function is pure. A reply begins where the prompt ends, behind `<|start|>assistant`, so it
begins with the header of its first message.

Decisions
    A reply that was cut off at the limit still parses: it is the beginning of a reply in good form.
    That it does not end is a measure of its own.
    A language that cannot be told, because the answer is a number or a few words, is none that
    disagrees. Code in fences is not judged.
    Loops are looked for in the tokens: the same tokens with a fixed period, over and over.
    An answer is right if the final channel says nothing else, or says it in its last line, behind a
    word such as `Answer:`, or in a box, as mathematics is often answered. A number is also right if
    it is the last number of the final channel.

Source: the Harmony response format, and data_pipeline/text/harmony.py.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from data_pipeline.text.harmony import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MESSAGE,
    RETURN,
    START,
    STOP_IDS,
)
from data_pipeline.text.language import disagrees
from data_pipeline.text.tokenizer import END_OF_TEXT, NUM_TEXT_TOKENS, encoding

FORM_MEASURES = ("parses", "thinks", "closes_thinking", "final", "ends", "in_language", "no_loop")
"""The measures that a reply in good form passes, all of them."""
MAX_LOOP_PERIOD = 128
"""Tokens of the longest piece whose repetition is looked for."""
MIN_LOOP_TOKENS = 64
"""Tokens that a repetition must take at least; less is a table, a list or a refrain."""
MIN_LOOP_COPIES = 5
"""Copies of a piece that make a loop."""

MAX_HEADER_TOKENS = 32
"""Tokens of the longest header of a message; more is text that stands outside of every message."""

_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_MARKED = re.compile(
    r"(?:answer(?: is)?|\u7b54\u3048(?:\u306f)?|\u7b54)\s*+[:\uff1a]?\s*+(.+)", re.I
)
_NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?")
_EDGES = " \t\n*_`$\"'.,:;!()[]\u3002\u3001\u300c\u300d"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyMeasures:
    """The measures of one reply."""

    parses: bool
    """Whether its tokens follow the Harmony format as far as they go."""
    thinks: bool
    """Whether an analysis channel holds text."""
    closes_thinking: bool
    """Whether every analysis message is closed; true if there is none."""
    final: bool
    """Whether a final channel holds text."""
    ends: bool
    """Whether the model ended its reply, rather than the limit."""
    in_language: bool
    """Whether the final channel is in the language asked for, as far as it can be told."""
    no_loop: bool
    """Whether nothing repeats itself over and over."""
    right: bool | None
    """Whether the final channel gives the right answer; None if the prompt has none."""
    thinking_tokens: int
    """Number of tokens in all analysis messages."""

    @property
    def good_form(self) -> bool:
        """Whether the reply passes all of FORM_MEASURES."""
        return all(getattr(self, name) for name in FORM_MEASURES)

    def value(self, measure: str) -> bool | None:
        """Return whether the reply passes a measure: `format`, `accuracy`, or one of its form."""
        if measure == "format":
            return self.good_form
        if measure == "accuracy":
            return self.right
        passed: bool = getattr(self, measure)
        return passed

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Self:
        """Read the output of `to_json`."""
        return cls(**plain)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        plain: dict[str, Any] = {name: getattr(self, name) for name in FORM_MEASURES}
        return {**plain, "right": self.right, "thinking_tokens": self.thinking_tokens}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Message:
    """One message of a reply, as its tokens stand."""

    channel: str
    content: list[int]
    """Tokens of the content."""
    closed: bool
    """Whether a token ends it."""


def measure_reply(tokens: Sequence[int], language: str, answers: Sequence[str]) -> ReplyMeasures:
    """Return the measures of a reply.

    Args:
        tokens: The tokens that the model added to the prompt, the one that ended them included.
        language: Language that the final channel should be in.
        answers: Answers that are right; empty if no program can tell.
    """
    messages, parses = _messages_of(tokens)
    analyses = [message for message in messages if message.channel == "analysis"]
    final = final_text(tokens)
    return ReplyMeasures(
        parses=parses,
        thinks=any(_has_text(message) for message in analyses),
        closes_thinking=all(message.closed for message in analyses),
        final=bool(final.strip()),
        ends=bool(tokens) and tokens[-1] in STOP_IDS,
        in_language=not disagrees(_CODE.sub("\n", final), language),
        no_loop=not loops(tokens),
        right=is_right(final, answers) if answers else None,
        thinking_tokens=sum(len(message.content) for message in analyses),
    )


def final_text(tokens: Sequence[int]) -> str:
    """Return the text of the last message in the final channel; empty if there is none."""
    messages, _ = _messages_of(tokens)
    text = ""
    for message in messages:
        if message.channel == "final":
            text = _decode(message.content)
    return text


def loops(tokens: Sequence[int]) -> bool:
    """Return whether a piece of at most MAX_LOOP_PERIOD tokens repeats itself over and over.

    That is: at least MIN_LOOP_COPIES copies in a row, which together have MIN_LOOP_TOKENS tokens.
    """
    tokens_T = np.asarray(tokens)
    longest_period = min(MAX_LOOP_PERIOD, len(tokens_T) // MIN_LOOP_COPIES)
    for period in range(1, longest_period + 1):
        needed = max(MIN_LOOP_TOKENS, MIN_LOOP_COPIES * period) - period
        if _longest_run(tokens_T[period:] == tokens_T[:-period]) >= needed:
            return True
    return False


def is_right(final: str, answers: Sequence[str]) -> bool:
    """Return whether the text of a final channel gives one of the answers."""
    given = {normalized(text) for text in _stated_answers(final)}
    return any(normalized(answer) in given for answer in answers)


def normalized(text: str) -> str:
    """Return a text without what does not change an answer: width, case, marks around it, commas
    in numbers, and zeros behind a decimal point.
    """
    text = _folded(text).casefold().strip(_EDGES)
    text = " ".join(text.split())
    if _NUMBER.fullmatch(text):
        text = text.replace(",", "").removeprefix("+")
        if "." in text:
            text = text.rstrip("0").rstrip(".")
    return text


def _stated_answers(final: str) -> list[str]:
    """Return every text that a final channel may give as its answer."""
    text = _folded(final).strip()
    lines = [line for line in text.splitlines() if line.strip()]
    stated = [text, *lines[-1:]]
    stated += _BOXED.findall(text)[-1:]
    stated += _MARKED.findall(text)[-1:]
    stated += _NUMBER.findall(text)[-1:]
    return stated


def _folded(text: str) -> str:
    """Return a text with one form of each character, the minus sign of mathematics included."""
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-")


class _ReplyReader:
    """Reads a reply token by token.

        reply   = header content (<|end|> <|start|> header content)* (<|return|> | <|call|>)
        header  = text <|channel|> text [<|constrain|> text] <|message|>

    A token that does not follow is noted and passed over, so that the rest can still be read.
    """

    def __init__(self) -> None:
        self.messages: list[_Message] = []
        self.follows = True
        """Whether all tokens so far follow the format."""
        self._header: list[int] = []
        self._content: list[int] | None = None
        """Tokens of the message that is open; None between messages."""
        self._channel = ""
        self._ended = False

    def take(self, token: int) -> None:
        """Read the next token."""
        if self._ended:
            self.follows = False
        elif self._content is None:
            self._take_header(token)
        elif token in (END, RETURN, CALL):
            self._close(is_closed=True)
            self._ended = token != END
            self._header = [END]
        elif token < NUM_TEXT_TOKENS:
            self._content.append(token)
        else:
            self.follows = False

    def finish(self) -> None:
        """Take what is open as a message that was cut off."""
        if self._content is not None:
            self._close(is_closed=False)
        elif len(self._header) > MAX_HEADER_TOKENS:
            self.follows = False

    def _take_header(self, token: int) -> None:
        if token == MESSAGE:
            self._channel, is_header = _channel_of(self._header)
            self.follows = self.follows and is_header
            self._content = []
            return
        self._header.append(token)
        if token in (RETURN, CALL, END, END_OF_TEXT):
            self.follows = False

    def _close(self, is_closed: bool) -> None:
        assert self._content is not None
        self.messages.append(
            _Message(channel=self._channel, content=self._content, closed=is_closed)
        )
        self._content = None


def _messages_of(tokens: Sequence[int]) -> tuple[list[_Message], bool]:
    """Return the messages of a reply, and whether its tokens follow the format so far."""
    reader = _ReplyReader()
    for token in tokens:
        reader.take(token)
    reader.finish()
    return reader.messages, reader.follows


def _channel_of(header: list[int]) -> tuple[str, bool]:
    """Return the channel that a header names, and whether the header follows the format."""
    follows = True
    if header[:1] == [END]:
        follows = header[1:2] == [START]
        header = header[2:]
    if CHANNEL not in header or len(header) > MAX_HEADER_TOKENS:
        return "", False
    name = header[header.index(CHANNEL) + 1 :]
    if CONSTRAIN in name:
        name = name[: name.index(CONSTRAIN)]
    control = [token for token in header if token >= NUM_TEXT_TOKENS]
    follows = follows and control in ([CHANNEL], [CHANNEL, CONSTRAIN])
    words = _decode(name).split()
    return (words[0] if words else ""), follows and bool(words)


def _has_text(message: _Message) -> bool:
    return bool(_decode(message.content).strip())


def _decode(tokens: list[int]) -> str:
    return encoding().decode(tokens)


def _longest_run(flags: np.ndarray[Any, np.dtype[np.bool_]]) -> int:
    """Return the length of the longest run of true values."""
    ends = np.flatnonzero(np.diff(np.concatenate([[0], flags.view(np.int8), [0]])))
    if not len(ends):
        return 0
    return int((ends[1::2] - ends[::2]).max())

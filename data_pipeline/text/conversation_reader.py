"""Records of a source of conversations -> the conversations that it trains on.

    record in any shape -> `messages` -> whole conversation -> as inference shows it, by turn
                                                                    |
                                             what cannot be learned, by reason <-+

Decisions
    With `turns: each` every turn is a conversation of its own: cut after it, and with the history
    as inference would show it there. So every turn is learned once, with its analysis. Together
    they are as long as the square of the record, so they are made one at a time.
    A turn of which no message bears loss is no document. That is a reject only if the record has no
    other turn: who marks single messages has meant it.
    With `loss: assistant` a turn must end where the model would stop. Messages of the assistant
    that neither answer nor call a function, followed by a question, teach no such end. Nor is a
    call learned of which the conversation does not say that there is such a function.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.config.source_config import SourceConfig
from data_pipeline.text.harmony import Conversation, Message
from data_pipeline.text.harmony_records import TOO_DEEP, whole_conversation
from data_pipeline.text.record_keys import UnusableRecordError
from data_pipeline.text.record_shapes import as_messages

LOSS_RULES_VERSION = 2
"""Raised when a source with `loss: assistant` gives other documents, or others count as copies."""
NO_ANALYSIS = "last turn without analysis"
NO_TOOLS = "call of a function in a record without 'tools'"
NO_LOSS = "no message of the assistant bears loss"
UNLEARNED_TURN = "turn of which no message bears loss"
"""Note on a turn that gives no document, beside others that do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadRecord:
    """What one record gives."""

    whole: Conversation | None = None
    """The conversation with the analysis of all turns; None if it cannot be rendered."""
    turns: tuple[range, ...] = ()
    """Turns to train on: the numbers of the messages of each."""
    rejects: tuple[str, ...] = ()
    """Why the record, or a turn of it, gives none."""
    notes: tuple[str, ...] = ()
    """What else is to be counted."""

    def conversations(self) -> Iterator[Conversation]:
        """Yield the conversations to train on, one for each turn, as inference shows them."""
        for turn in self.turns:
            assert self.whole is not None, "its turns are those"
            yield self.whole.up_to(turn)


def read_conversations(record: dict[str, Any], source: SourceConfig) -> ReadRecord:
    """Return the conversations of a record, or why it gives none.

    Args:
        record: A JSON record in the shape that the source names.
        source: Source with `format: harmony`.
    """
    try:
        renamed = as_messages(record, source.shape, source.template, source.ignored_keys)
        whole = whole_conversation(renamed, source.ignored_keys)
        if source.loss == "all":
            _require_loss(whole.messages)
    except UnusableRecordError as error:
        return ReadRecord(rejects=(str(error),))
    except RecursionError:
        return ReadRecord(rejects=(TOO_DEEP,))
    candidates = whole.turns()
    if source.turns == "last":
        candidates = candidates[-1:]
    learned = []
    for turn in candidates:
        messages = whole.messages[turn.start : turn.stop]
        if source.loss == "all" or any(message.is_learnable for message in messages):
            learned.append(turn)
    if not learned:
        return ReadRecord(rejects=(NO_LOSS,))
    kept = []
    rejects = []
    for turn in learned:
        messages = whole.messages[turn.start : turn.stop]
        reason = _why_not_learned(messages, source, has_tools=bool(whole.tools))
        if reason is None:
            kept.append(turn)
        else:
            rejects.append(reason)
    return ReadRecord(
        whole=whole,
        turns=tuple(kept),
        rejects=tuple(rejects),
        notes=(UNLEARNED_TURN,) * (len(candidates) - len(learned)),
    )


def _require_loss(messages: Sequence[Message]) -> None:
    for message in messages:
        if not message.bears_loss:
            raise UnusableRecordError("'loss: false' on a message, but loss of the source is all")


def _why_not_learned(
    turn: Sequence[Message], source: SourceConfig, *, has_tools: bool
) -> str | None:
    if source.require_analysis and "analysis" not in [message.channel for message in turn]:
        return NO_ANALYSIS
    if source.loss == "all":
        return None
    if not has_tools and any(message.is_call and message.is_learnable for message in turn):
        return NO_TOOLS
    for message, following in itertools.pairwise(turn):
        goes_on = message.is_call or following.role == "assistant"
        if message.role == "assistant" and not goes_on:
            return "turn in which the assistant stops before an answer or a call"
    return None

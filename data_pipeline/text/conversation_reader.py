"""Records of a source of conversations -> the conversations that it trains on.

    record in any shape -> `messages` -> whole conversation -> as inference shows it, by turn
                                                                    |
                                             what cannot be learned, by reason <-+

Decisions
    With `turns: each` every turn is a conversation of its own: cut after it, and with the history
    as inference would show it there. So every turn is learned once, with its analysis.
    A turn of which no message bears loss is no document. That is a reject only if the record has no
    other turn: who marks single messages has meant it.
    With `loss: assistant` a turn must end where the model would stop. Messages of the assistant
    that neither answer nor call a function, followed by a question, teach no such end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.config.source_config import SourceConfig
from data_pipeline.text.harmony import Conversation, Message
from data_pipeline.text.harmony_records import TOO_DEEP, whole_conversation
from data_pipeline.text.record_keys import UnusableRecordError
from data_pipeline.text.record_shapes import as_messages

NO_ANALYSIS = "last turn without analysis"
NO_LOSS = "no message of the assistant bears loss"
UNLEARNED_TURN = "turn of which no message bears loss"
"""Note on a turn that gives no document, beside others that do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadRecord:
    """What one record gives."""

    conversations: tuple[Conversation, ...] = ()
    """Conversations to train on, as inference shows them."""
    rejects: tuple[str, ...] = ()
    """Why the record, or a turn of it, gives none."""
    notes: tuple[str, ...] = ()
    """What else is to be counted."""
    content: str = ""
    """All that tells the whole record from others, its other turns included."""


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
    candidates = [whole.as_seen()]
    if source.turns == "each":
        candidates = list(whole.turns())
    learned = []
    for conversation in candidates:
        if source.loss == "all" or conversation.learned_messages():
            learned.append(conversation)
    if not learned:
        return ReadRecord(rejects=(NO_LOSS,))
    kept = []
    rejects = []
    for conversation in learned:
        reason = _why_not_learned(conversation, source)
        if reason is None:
            kept.append(conversation)
        else:
            rejects.append(reason)
    return ReadRecord(
        conversations=tuple(kept),
        rejects=tuple(rejects),
        notes=(UNLEARNED_TURN,) * (len(candidates) - len(learned)),
        content=whole.content,
    )


def _require_loss(messages: Sequence[Message]) -> None:
    for message in messages:
        if not message.bears_loss:
            raise UnusableRecordError("'loss: false' on a message, but loss of the source is all")


def _why_not_learned(conversation: Conversation, source: SourceConfig) -> str | None:
    turn = conversation.last_turn()
    if source.require_analysis and "analysis" not in [message.channel for message in turn]:
        return NO_ANALYSIS
    if source.loss == "all":
        return None
    for message, following in itertools.pairwise(turn):
        goes_on = message.is_call or following.role == "assistant"
        if message.role == "assistant" and not goes_on:
            return "turn in which the assistant stops before an answer or a call"
    return None

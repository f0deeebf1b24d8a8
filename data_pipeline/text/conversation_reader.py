"""Records of a source of conversations -> the conversations that it trains on.

record in any shape -> `messages` -> whole conversation -> as inference shows it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_pipeline.config.source_config import SourceConfig
from data_pipeline.text.harmony import Conversation
from data_pipeline.text.harmony_records import TOO_DEEP, whole_conversation
from data_pipeline.text.record_keys import UnusableRecordError
from data_pipeline.text.record_shapes import as_messages


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one record gives."""

    conversations: tuple[Conversation, ...] = ()
    """Conversations to train on, as inference shows them."""
    rejects: tuple[str, ...] = ()
    """Why the record, or a turn of it, gives none."""


def read_conversations(record: dict[str, Any], source: SourceConfig) -> Reading:
    """Return the conversations of a record, or why it gives none.

    Args:
        record: A JSON record in the shape that the source names.
        source: Source with `format: harmony`.
    """
    try:
        renamed = as_messages(record, source.shape, source.template, source.ignored_keys)
        whole = whole_conversation(renamed, source.ignored_keys)
    except UnusableRecordError as error:
        return Reading(rejects=(str(error),))
    except RecursionError:
        return Reading(rejects=(TOO_DEEP,))
    return Reading(conversations=(whole.as_seen(),))

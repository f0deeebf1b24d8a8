"""The decision that a run ends: why, through which rank, and with which exit code."""

from __future__ import annotations

import signal
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cpt.errors import (
    ConfigError,
    DataError,
    HungRankError,
    InternalError,
    StorageError,
)
from cpt.resilience.record_fields import MAX_NAME_LENGTH, RecordFields

SIGNAL_CODE = 128
"""Added to a signal for an exit code, as shells do."""
PASSED_ON = (
    ConfigError.exit_code,
    DataError.exit_code,
    HungRankError.exit_code,
    StorageError.exit_code,
)
"""Codes of a rank that ended without a word, which the others take over."""
FAILURE_CODES = frozenset({*PASSED_ON, InternalError.exit_code})
"""Codes of a ruling about a rank that no signal killed. 0 and 75 are none of them: a batch system
would take the job for done, or start it again.
"""
MAX_TEXT_LENGTH = 4000
"""Characters of the cause."""

Kind = Literal["hung", "failed", "killed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruling:
    """The decision that the run ends, which every rank obeys."""

    kind: Kind
    """Whether a rank hangs, has raised an error, or was ended from outside."""
    rank: int
    """The rank that decided, failed or was killed."""
    code: int
    """Exit code of all ranks."""
    text: str
    """Cause, in one line."""
    hung_ranks: tuple[int, ...] = ()
    """The ranks that hang, in ascending order; empty if all stand still together."""
    agreed: bool = False
    """Whether the error was one that all ranks raise together."""
    host: str = ""
    """Host name of the machine of the rank that is to blame."""
    node: str = ""
    """What the batch system calls this machine."""
    signal: int = 0
    """The signal that killed the rank; 0 if none did."""

    def __post_init__(self) -> None:
        if self.code not in codes_of(self.kind, self.signal):
            raise ValueError(f"a ruling of kind {self.kind} cannot have the code {self.code}")

    def to_blame(self) -> int | None:
        """Return the rank that is to blame: the first hung one, or the one that failed.

        None if all ranks stand still together.
        """
        if self.kind == "hung":
            return min(self.hung_ranks, default=None)
        return self.rank

    def to_record(self) -> dict[str, Any]:
        """Return the ruling as JSON values."""
        return {
            **asdict(self),
            "hung_ranks": list(self.hung_ranks),
            "text": self.text[:MAX_TEXT_LENGTH],
            "host": self.host[:MAX_NAME_LENGTH],
            "node": self.node[:MAX_NAME_LENGTH],
        }

    @classmethod
    def from_record(cls, record: Any, world_size: int) -> Ruling:
        """Return the ruling that `to_record` turned into JSON values.

        Args:
            record: What was read.
            world_size: Number of ranks.

        Raises:
            ValueError: a field has a type or a value that no ruling has.
        """
        fields = RecordFields(record)
        ruling = cls(
            kind=_kind(fields.text("kind")),
            rank=fields.integer("rank", 0, world_size - 1),
            code=fields.integer("code", 1, 255),
            text=fields.text("text", MAX_TEXT_LENGTH),
            hung_ranks=fields.ranks("hung_ranks", world_size),
            agreed=fields.flag("agreed"),
            host=fields.text("host"),
            node=fields.text("node"),
            signal=fields.integer("signal", 0, signal.NSIG - 1),
        )
        fields.end()
        return ruling


def codes_of(kind: Kind, killing_signal: int) -> frozenset[int]:
    """Return the exit codes that a ruling may have.

    Args:
        kind: Its kind.
        killing_signal: The signal that killed the rank; 0 if none did.
    """
    if kind == "hung":
        return frozenset({HungRankError.exit_code})
    if kind == "killed" and killing_signal:
        return frozenset({SIGNAL_CODE + killing_signal})
    return FAILURE_CODES


def failure_code(code: int) -> int:
    """Return the code that all ranks leave with after one has failed with `code`.

    It is the same one, or that of an internal error for a code that no failure has.
    """
    return code if code in FAILURE_CODES else InternalError.exit_code


def _kind(text: str) -> Kind:
    kinds: tuple[Kind, ...] = ("hung", "failed", "killed")
    for kind in kinds:
        if text == kind:
            return kind
    raise ValueError("the kind of a ruling is unknown")

"""How the ranks of an offline command work together, as its command line says.

This module imports no DeepSpeed, because some commands need these options and no ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cpt.errors import ConfigError
from cpt.resilience.stop import StopRequest

SAVE_EVERY = 32
"""Rows, texts or prompts of a rank between two saves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankOptions:
    """How the ranks of an offline command work together."""

    ep_size: int | None = None
    """Ranks that share one set of experts; None takes `choose_ep_size`."""
    save_every: int = SAVE_EVERY
    """Rows, texts or prompts of a rank between two saves."""
    stop: StopRequest = field(default_factory=StopRequest)
    """Requests to stop that have reached this rank."""

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise ConfigError(f"--save_every {self.save_every} must be >= 1.")

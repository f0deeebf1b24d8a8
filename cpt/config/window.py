"""The window of a model's sliding layers."""

from __future__ import annotations

from typing import Any


def window_tokens(model_config: Any) -> int:
    """Return the keys that a query of a window layer sees, itself included.

    A configuration without a window has no such layer. It counts as a window of 1: a query that
    sees itself alone needs no key of a neighbor.
    """
    return int(model_config.sliding_window or 1)

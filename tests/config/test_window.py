"""The window of a model has one meaning everywhere."""

from __future__ import annotations

from types import SimpleNamespace

from cpt.config.window import window_tokens


def test_window_counts_the_query_itself() -> None:
    assert window_tokens(SimpleNamespace(sliding_window=128)) == 128


def test_model_without_a_window_needs_no_key_of_a_neighbor() -> None:
    assert window_tokens(SimpleNamespace(sliding_window=None)) == 1

"""A start on far too little text is told before any weight is loaded."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.job.data import warn_of_little_text


def told(caplog: pytest.LogCaptureFixture, *, path: str | None, drawn: int) -> str:
    config: Any = SimpleNamespace(model=SimpleNamespace(path=path))
    sources = [
        SimpleNamespace(tokens=1000, drawn_tokens=drawn),
        SimpleNamespace(tokens=10**9, drawn_tokens=0),  # built, and not trained on
    ]
    whole = SimpleNamespace(sources=sources)
    plan: Any = SimpleNamespace(whole=lambda: whole)
    with caplog.at_level(logging.WARNING):
        warn_of_little_text(config, plan)
    return caplog.text


def test_a_model_that_reads_its_text_hundreds_of_times_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    message = told(caplog, path="gpt-oss-20b", drawn=2_000_000)
    assert "1,000 tokens and the run takes 2,000,000: every text is read 2000 times" in message
    assert "Add data" in message


def test_random_weights_and_enough_text_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert told(caplog, path=None, drawn=2_000_000) == ""
    assert told(caplog, path="gpt-oss-20b", drawn=40_000) == ""

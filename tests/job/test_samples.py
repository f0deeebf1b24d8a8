"""Samples of a run in progress: a long one is no hang, and a stop is not delayed by it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.errors import RequeueRequested
from cpt.job.samples import print_continuations, show_continuations
from cpt.offline.model import OfflineModel
from cpt.offline.sampling import decode_tokens
from cpt.resilience.phase import PhaseClock
from tests.support.decoders import small_decoder

PROMPTS = ["a", "b c"]
"""Texts whose tokens are in the vocabulary of the small model."""
SAMPLE_TOKENS = 20


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfflineModel]:
    with small_decoder(tmp_path_factory.mktemp("model")) as model:
        yield model


def job_of(decoder: OfflineModel, events: list[dict[str, Any]], *, stops: bool = False) -> Any:
    telemetry = SimpleNamespace(sample_prompts=PROMPTS, sample_tokens=SAMPLE_TOKENS)
    return SimpleNamespace(
        engine=decoder,
        topology=decoder.topology,
        clock=PhaseClock(),
        progress=SimpleNamespace(step=3),
        config=SimpleNamespace(telemetry=telemetry),
        stop=SimpleNamespace(requested=lambda: stops),
        telemetry=SimpleNamespace(log=events.append),
    )


def test_each_prompt_gives_an_event_with_its_continuation(decoder: OfflineModel) -> None:
    events: list[dict[str, Any]] = []
    show_continuations(job_of(decoder, events))
    assert [event["prompt"] for event in events] == PROMPTS
    for event in events:
        assert len(event["tokens"]) == SAMPLE_TOKENS
        assert event["text"] == decode_tokens(event["tokens"])
        assert event["step"] == 3


def test_watchdog_sees_progress_within_a_sample(decoder: OfflineModel) -> None:
    job = job_of(decoder, [])
    show_continuations(job)
    record = job.clock.now()
    assert (record.phase, record.step) == ("sample", 3)
    # at the start, and every eight tokens
    assert record.count >= 1 + SAMPLE_TOKENS // 8


def test_stop_leaves_the_samples_of_a_step_out(decoder: OfflineModel) -> None:
    events: list[dict[str, Any]] = []
    show_continuations(job_of(decoder, events, stops=True))
    assert events == []


def test_stop_ends_a_command_that_only_samples(
    decoder: OfflineModel, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequeueRequested, match="while texts were continued"):
        print_continuations(job_of(decoder, [], stops=True), PROMPTS)
    assert capsys.readouterr().out == ""

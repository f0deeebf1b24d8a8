"""The rows of a step are those of its batch, however they are read ahead and whatever changes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cpt.guard.ladder import GuardState
from cpt.job.job import Job
from cpt.job.progress import Progress
from cpt.resilience.phase import PhaseClock
from cpt.training.loader import MicroBatch, filler_row, places_of_rank
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.dataset import PackedRow
from data_pipeline.errors import DataError
from data_pipeline.mixture.ledger import Ledger, Segment
from data_pipeline.mixture.mixture import Mixture

SEQ_LEN = 8
ROWS = 40
MICRO_STEPS = 3
GLOBAL_BATCH_SIZE = 2 * MICRO_STEPS * 2
"""Two rows a pass, three passes a step, two data-parallel ranks."""


MIX = MixConfig(
    seq_len=SEQ_LEN,
    seed=3,
    sources=(
        SourceConfig(name="en", language="en", domain="web", format="mock", weight=0.5),
        SourceConfig(name="ja", language="ja", domain="web", format="mock", weight=0.5),
    ),
)


class Data:
    """Two sources whose rows hold their own places, and a record of who read what."""

    source_names = ("en", "ja")
    seq_len = SEQ_LEN

    def __init__(self) -> None:
        self.read: list[tuple[tuple[int, int], str]] = []
        self.broken: tuple[int, int] | None = None

    def row_tokens(self, source: int) -> Any:
        return np.full(ROWS, SEQ_LEN)

    def read_row(self, source: int, row: int, slots: slice) -> PackedRow:
        assert slots == slice(0, SEQ_LEN)
        self.read.append(((source, row), threading.current_thread().name))
        if (source, row) == self.broken:
            raise DataError(f"row {row} of source {source} is damaged")
        packed = filler_row(SEQ_LEN)
        packed.input_ids[:2] = source, row
        return packed


def segment(weights: Mapping[str, float], max_epochs: float = 100.0) -> Segment:
    limits = dict.fromkeys(weights, max_epochs)
    return Segment(start_step=0, weights=dict(weights), max_epochs=limits, mix_hash="")


def make_job(data: Data, *, total_steps: int = 6, max_epochs: float = 100.0) -> Job:
    train = SimpleNamespace(
        global_batch_size=GLOBAL_BATCH_SIZE, total_steps=total_steps, stop_at_step=None
    )
    config = SimpleNamespace(
        gradient_accumulation_steps=MICRO_STEPS, micro_batch_size=2, train=train
    )
    topology = SimpleNamespace(
        rank=1, sp_size=1, sp_rank=0, dp_size=2, dp_rank=1, device=torch.device("cpu")
    )
    context: Any = SimpleNamespace(config=config, topology=topology, clock=PhaseClock(), mix=MIX)
    ledger = Ledger((segment({"en": 0.5, "ja": 0.5}, max_epochs),))
    parts: dict[str, Any] = dict.fromkeys(
        ("kl_targets", "guard", "saver", "telemetry", "stability")
    )
    return Job(
        context=context,
        data=data,  # type: ignore[arg-type]
        ledger=ledger,
        mixture=Mixture(data, ledger, 3),
        engine=SimpleNamespace(send=lambda batch: batch),  # type: ignore[arg-type]
        progress=Progress(),
        replay=SimpleNamespace(weights=lambda state: state.replay),  # type: ignore[arg-type]
        **parts,
    )


def rows_of(batch: MicroBatch) -> list[tuple[int, int]]:
    return [(source, row) for source, row in batch.input_ids[:, :2].tolist()]


def do_step(job: Job) -> list[tuple[int, int]]:
    """Return the rows that one step is given, and count the step."""
    given = []
    for batch in job.micro_batches(job.next_global_batch()):
        given += rows_of(batch)
    job.progress.step += 1
    return given


def rows_of_batch(mixture: Mixture, number: int) -> list[tuple[int, int]]:
    """Return the rows of this rank in a batch, by the mixture alone."""
    topology: Any = SimpleNamespace(dp_size=2, dp_rank=1)
    batch = mixture.global_batch(number, GLOBAL_BATCH_SIZE)
    rows: list[tuple[int, int]] = []
    for micro_step in range(MICRO_STEPS):
        rows += places_of_rank(batch, micro_step, 2, topology)
    return rows


def plain_mixture(job: Job) -> Mixture:
    return Mixture(job.data, job.ledger, 3)


def test_steps_get_their_rows_in_order_and_only_the_first_pass_is_read_on_demand() -> None:
    data = Data()
    job = make_job(data)
    expected = plain_mixture(job)
    for step in range(6):
        assert do_step(job) == rows_of_batch(expected, step)
    on_demand = [row for row, thread in data.read if thread != "read ahead"]
    assert on_demand == rows_of_batch(expected, 0)[:2]
    read = [row for row, _ in data.read]
    assert read == [row for step in range(6) for row in rows_of_batch(expected, step)]


def test_a_mix_that_changes_between_two_steps_is_not_served_rows_of_the_old_one() -> None:
    job = make_job(Data())
    do_step(job)
    do_step(job)
    before = rows_of_batch(plain_mixture(job), 2)
    job.reweigh(GuardState(replay={"en": 0.1, "ja": 0.9}))
    after = rows_of_batch(plain_mixture(job), 2)
    assert after != before
    assert do_step(job) == after
    assert do_step(job) == rows_of_batch(plain_mixture(job), 3)


def test_a_rollback_gets_the_rows_of_the_step_gone_back_to() -> None:
    job = make_job(Data())
    for _ in range(3):
        do_step(job)
    job.progress.restore(Progress(step=1), skip_ranges=((2, 3),))
    expected = plain_mixture(job)
    assert do_step(job) == rows_of_batch(expected, 1)
    assert do_step(job) == rows_of_batch(expected, 3)


def test_a_damaged_row_stops_the_step_that_it_belongs_to_and_no_other() -> None:
    data = Data()
    job = make_job(data)
    data.broken = rows_of_batch(plain_mixture(job), 1)[0]
    do_step(job)
    with pytest.raises(DataError, match="is damaged"):
        do_step(job)


def test_nothing_is_read_beyond_the_last_step() -> None:
    data = Data()
    job = make_job(data, total_steps=2)
    do_step(job)
    do_step(job)
    job.reader.close()
    assert len(data.read) == 2 * MICRO_STEPS * 2


def test_rows_that_the_next_step_may_not_have_stop_that_step_only() -> None:
    """Three batches take nine of the ten rows of each source that one rank and the other get."""
    job = make_job(Data(), max_epochs=3 * GLOBAL_BATCH_SIZE / (2 * ROWS))
    for _ in range(3):
        do_step(job)
    with pytest.raises(DataError, match="max_epochs"):
        job.next_global_batch()

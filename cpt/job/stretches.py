"""Parts of a run that have rows or ceilings of their own, which bound how far replay may rise.

A raise of replay holds on until the run ends (cpt/guard/plan_shift.py). So it must leave enough
rows to each later stage of sequence length, and to each phase of the mix that limits the epochs of
a source, the present one included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cpt.guard.replay_share import Stretch
from cpt.job.job import Job
from data_pipeline.dataset import BuiltData


def later_stages(job: Job) -> list[Stretch]:
    """Return the stages of sequence length after the present one, in which a raise holds on."""
    stages = job.stages
    if stages is None:
        return []
    found = []
    for number in range(job.config.stage + 1, len(stages.spans)):
        first, stop = stages.batches_of(number, job.num_batches)
        if first == stop:
            continue
        span = stages.spans[number]
        source_rows = {}
        source_tokens = {}
        for entry in job.data.manifest.sources:
            source_rows[entry.name] = entry.stages[number].rows
            source_tokens[entry.name] = entry.stages[number].predicted_tokens
        found.append(
            Stretch(
                rows=(stop - first) * span.global_batch_size,
                source_rows=source_rows,
                source_tokens=source_tokens,
                mean_shares=job.ledger.mean_weights(first, stop),
            )
        )
    return found


def capped_phases(job: Job) -> list[Stretch]:
    """Return what is to come of the phases that limit epochs, in the present stage and later ones.

    A phase that lies in several stages of sequence length is one for each, as their rows are.
    """
    ledger = job.ledger
    now = job.progress.next_batch
    found = []
    for first, stop in ledger.capped_spans(now, job.num_batches):
        ceilings = ledger.segment_at(first).phase_max_epochs()
        for part in _parts_by_stage(job, first, stop):
            source_rows = {}
            source_tokens = {}
            for number, name in enumerate(part.data.source_names):
                row_tokens = part.data.row_tokens(number)
                source_rows[name] = len(row_tokens)
                source_tokens[name] = int(row_tokens.sum(dtype="int64"))
            found.append(
                Stretch(
                    rows=(part.stop - part.first) * part.batch_size,
                    source_rows=source_rows,
                    source_tokens=source_tokens,
                    mean_shares=ledger.mean_weights(part.first, part.stop),
                    max_epochs=ceilings,
                    drawn=_drawn_in_phase(job, part) if part.first == now else {},
                )
            )
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _BatchesOfStage:
    """Some batches of one stage."""

    data: BuiltData
    """The rows of the stage."""
    first: int
    """First batch."""
    stop: int
    """Batch after the last one."""
    stage_start: int
    """First batch of the stage."""
    batch_size: int
    """Packed rows of a batch."""


def _parts_by_stage(job: Job, first: int, stop: int) -> Iterator[_BatchesOfStage]:
    """Yield some batches of the run by the stage that they are in."""
    if job.stages is None:
        size = job.config.train.global_batch_size
        yield _BatchesOfStage(data=job.data, first=first, stop=stop, stage_start=0, batch_size=size)
        return
    for number, span in enumerate(job.stages.spans):
        begin, end = job.stages.batches_of(number, job.num_batches)
        if max(begin, first) >= min(end, stop):
            continue
        data = job.data if number == job.config.stage else job.data.of_stage(number)
        yield _BatchesOfStage(
            data=data,
            first=max(begin, first),
            stop=min(end, stop),
            stage_start=begin,
            batch_size=span.global_batch_size,
        )


def _drawn_in_phase(job: Job, part: _BatchesOfStage) -> Mapping[str, int]:
    """Return the rows that the phase of the next batch has taken so far, by source."""
    start = max(job.ledger.phase_start(part.first), part.stage_start)
    before = job.mixture.position(start, part.batch_size).drawn_rows
    until = job.mixture.position(part.first, part.batch_size).drawn_rows
    drawn = {}
    for name, early, late in zip(part.data.source_names, before, until, strict=True):
        drawn[name] = late - early
    return drawn

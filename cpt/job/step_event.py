"""The line of metrics.jsonl about an optimizer step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpt.job.job import Job
from cpt.planning.peak_rates import utilization
from cpt.planning.trained_weights import TrainedShares
from cpt.training.engine import StepResult
from data_pipeline.mixture.mixture import GlobalBatch


def tokens_by_source(batch: GlobalBatch, job: Job) -> list[int]:
    """Return the predicted tokens of a global batch per source; no rank has to ask another."""
    num_sources = len(job.data.source_names)
    counts = np.bincount(batch.sources, weights=batch.predicted_tokens, minlength=num_sources)
    return [int(count) for count in counts]


def count_slots(batch: GlobalBatch, job: Job) -> int:
    """Return the slots of a global batch that hold a token of a document."""
    total = 0
    for source in np.unique(batch.sources).tolist():
        rows = batch.rows[batch.sources == source]
        total += int(job.data.row_slots(source)[rows].sum(dtype=np.int64))
    return total


def step_event(
    job: Job, result: StepResult, lr: float, seconds: float, num_slots: int
) -> dict[str, Any]:
    """Return the event of the step that `job.progress` has just counted.

    Args:
        job: The run.
        result: The step.
        lr: Its learning rate.
        seconds: Its duration on this rank.
        num_slots: Slots of its rows that hold a token of a document. They are what takes time,
            whether their labels bear loss or not.
    """
    names, tokens = job.data.source_names, result.tokens_by_source
    num_tokens = sum(tokens)
    event: dict[str, Any] = {
        "event": "step",
        "step": job.progress.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens": num_tokens,
        "slots": num_slots,
        "total_tokens": job.progress.tokens,
        "seconds": seconds,
        "tokens_per_second": num_slots / seconds,
        "loss_by_source": means(names, result.nll_by_source, tokens),
        "loss_by_language": means(job.data.languages, result.nll_by_source, tokens),
        "tokens_by_source": dict(zip(names, tokens, strict=True)),
        "bytes_sent": result.bytes_sent,
        "time": time.time(),
        "peak_memory_bytes": peak_memory_bytes(job.topology.device),
    }
    if job.stages is not None:
        event["stage"] = job.config.stage + 1
        event["seq_len"] = job.config.train.seq_len
    share = share_of_peak(job, num_slots / seconds)
    if share is not None:
        event["utilization"] = share
    if job.kl_targets is not None and result.kl_by_source is not None:
        kl_by_source = means(names, result.kl_by_source, tokens)
        sources = job.kl_targets.sources
        event["kl_weight"] = job.kl_weight
        event["kl_by_source"] = {name: kl for name, kl in kl_by_source.items() if name in sources}
    return event


def share_of_peak(job: Job, tokens_per_second: float) -> float | None:
    """Return the share of its peak that a GPU reaches; None on a CPU or a GPU without a known peak.

    Args:
        job: The run.
        tokens_per_second: Slots of a second that hold a token, of all ranks together.
    """
    device = job.topology.device
    if device.type != "cuda":
        return None
    return utilization(
        job.context.model_config,
        job.config.train.seq_len,
        tokens_per_second / job.topology.world_size,
        torch.cuda.get_device_name(device),
        TrainedShares.of(job.config, job.context.model_config),
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this rank has used: allocated on its GPU, or resident on a CPU.

    On a GPU it counts from the last step of `telemetry.memory_report`, if that is on.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the most memory that this process has had in use; 0 where the kernel does not say."""
    # not resource.ru_maxrss, which a child inherits from the process that started it
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").split("\n"):
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    return 0


def means(keys: Iterable[str], sums: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
    """Return nats per token by key; a key without a token is left out.

    Args:
        keys: Key of each source; several sources may share one.
        sums: Nats of each source.
        tokens: Predicted tokens of each source.
    """
    nats: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for key, value, count in zip(keys, sums, tokens, strict=True):
        nats[key] += value
        counts[key] += count
    return {key: nats[key] / count for key, count in counts.items() if count}

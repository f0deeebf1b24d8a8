"""Fixed prompts, continued every so many steps of training: what the numbers mean, for people to read."""

from __future__ import annotations

import logging

import numpy as np

from cpt.job import Job
from cpt.state.harmony import STOP_IDS
from cpt.training.generate import continue_texts
from data_pipeline.tokenizer import decode, encode

log = logging.getLogger("cpt.continuations")


def show_continuations(job: Job) -> None:
    """Continue `telemetry.sample_prompts`, into the log, metrics.jsonl and the trackers; all ranks call it together."""
    settings = job.config.telemetry
    job.topology.place.enter("sample", job.progress.step)
    continuations = continue_texts(
        job.engine,
        [encode(prompt).tolist() for prompt in settings.sample_prompts],
        max_new_tokens=settings.sample_tokens,
        window=int(job.model_config["sliding_window"] or 1),
        stop_ids=STOP_IDS,
    )
    for number, (prompt, tokens) in enumerate(zip(settings.sample_prompts, continuations, strict=True)):
        text = decode(np.asarray(tokens))
        log.info("step %d: %s|%s", job.progress.step, prompt, text)
        event = {"event": "sample", "step": job.progress.step, "number": number, "prompt": prompt, "text": text}
        job.telemetry.log({**event, "tokens": tokens})

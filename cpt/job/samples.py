"""Fixed prompts, continued every so many steps of training: what the numbers mean, for people to
read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from cpt.config.window import window_tokens
from cpt.job.job import Job
from cpt.training.generate import continue_texts
from data_pipeline.text.harmony import STOP_IDS
from data_pipeline.text.tokenizer import decode, encode

log = logging.getLogger("cpt.job.samples")


def print_continuations(job: Job, prompts: Sequence[str]) -> None:
    """Continue texts with the weights of a run, in whatever layout it was started, and print them
    on rank 0.
    """
    continuations = continue_prompts(job, prompts)
    if job.topology.rank == 0:
        print(f"\nweights after step {job.progress.step}")
        for prompt, tokens in zip(prompts, continuations, strict=True):
            print(f"{prompt}|{decode(np.asarray(tokens))}", flush=True)


def continue_prompts(job: Job, prompts: Sequence[str]) -> list[list[int]]:
    """Greedy continuations of `telemetry.sample_tokens` tokens at most; all ranks call it
    together.
    """
    job.clock.enter("sample", job.progress.step)
    return continue_texts(
        job.engine,
        [encode(prompt).tolist() for prompt in prompts],
        max_new_tokens=job.config.telemetry.sample_tokens,
        window=window_tokens(job.context.model_config),
        stop_ids=STOP_IDS,
    )


def show_continuations(job: Job) -> None:
    """Continue `telemetry.sample_prompts`, into the log, metrics.jsonl and the trackers; all ranks
    call it together.
    """
    settings = job.config.telemetry
    continuations = continue_prompts(job, settings.sample_prompts)
    for number, (prompt, tokens) in enumerate(
        zip(settings.sample_prompts, continuations, strict=True)
    ):
        text = decode(np.asarray(tokens))
        log.info("step %d: %s|%s", job.progress.step, prompt, text)
        event = {
            "event": "sample",
            "step": job.progress.step,
            "number": number,
            "prompt": prompt,
            "text": text,
        }
        job.telemetry.log({**event, "tokens": tokens})

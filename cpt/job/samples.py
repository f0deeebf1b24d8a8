"""Continue fixed prompts during training, so that people can read what the numbers mean."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cpt.config.window import window_tokens
from cpt.job.job import Job
from cpt.offline.sampling import decode_tokens
from cpt.training.generate import continue_texts
from data_pipeline.text.harmony import STOP_IDS
from data_pipeline.text.tokenizer import encode

log = logging.getLogger("cpt.job.samples")


def print_continuations(job: Job, prompts: Sequence[str]) -> None:
    """Continue texts with the weights of a run, in any layout, and print them on the first rank."""
    continuations = continue_prompts(job, prompts)
    if job.topology.rank == 0:
        print(f"\nweights after step {job.progress.step}")
        for prompt, tokens in zip(prompts, continuations, strict=True):
            print(f"{prompt}|{decode_tokens(tokens)}", flush=True)


def continue_prompts(job: Job, prompts: Sequence[str]) -> list[list[int]]:
    """Continue texts greedily by at most `telemetry.sample_tokens` tokens, on all ranks together.

    Returns:
        The new tokens of each prompt.
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
    """Continue `telemetry.sample_prompts` into log, metrics.jsonl and trackers, on all ranks."""
    prompts = job.config.telemetry.sample_prompts
    continuations = continue_prompts(job, prompts)
    step = job.progress.step
    for number, prompt in enumerate(prompts):
        tokens = continuations[number]
        text = decode_tokens(tokens)
        log.info("step %d: %s|%s", step, prompt, text)
        event = {"event": "sample", "step": step, "number": number, "prompt": prompt, "text": text}
        job.telemetry.log({**event, "tokens": tokens})

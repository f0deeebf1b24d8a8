"""Continue fixed prompts during training, so that people can read what the numbers mean."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cpt.errors import RequeueRequested
from cpt.job.job import Job
from cpt.offline.sampling import decode_tokens
from cpt.training.generate import GenerationStopped, generate, reporting
from cpt.training.sampling import Sampling
from data_pipeline.console.say import say
from data_pipeline.text.tokenizer import encode

log = logging.getLogger("cpt.job.samples")


def print_continuations(job: Job, prompts: Sequence[str]) -> None:
    """Continue texts with the weights of a run, in any layout, and print them on the first rank.

    Raises:
        RequeueRequested: a stop was asked for before they were done.
    """
    try:
        continuations = continue_prompts(job, prompts)
    except GenerationStopped as stopped:
        raise RequeueRequested("stopped on request while texts were continued.") from stopped
    if job.topology.rank == 0:
        say(f"\nweights after step {job.progress.step}")
        for prompt, tokens in zip(prompts, continuations, strict=True):
            say(f"{prompt}|{decode_tokens(tokens)}", flush=True)


def continue_prompts(job: Job, prompts: Sequence[str]) -> list[list[int]]:
    """Continue texts greedily by at most `telemetry.sample_tokens` tokens, on all ranks together.

    Returns:
        The new tokens of each prompt.

    Raises:
        GenerationStopped: a stop was asked for before they were done.
    """
    step = job.progress.step

    def beat() -> None:
        job.clock.enter("sample", step)

    beat()
    with reporting(job.topology, len(prompts), "samples", beat) as report:
        return generate(
            job.engine,
            [encode(prompt).tolist() for prompt in prompts],
            Sampling(max_new_tokens=job.config.telemetry.sample_tokens),
            stop=job.stop,
            report=report,
        )


def show_continuations(job: Job) -> None:
    """Continue `telemetry.sample_prompts` into log, metrics.jsonl and trackers, on all ranks.

    A stop that is asked for meanwhile leaves them out; the loop obeys it.
    """
    prompts = job.config.telemetry.sample_prompts
    try:
        continuations = continue_prompts(job, prompts)
    except GenerationStopped:
        return
    step = job.progress.step
    for number, prompt in enumerate(prompts):
        tokens = continuations[number]
        text = decode_tokens(tokens)
        log.info("sample at step %d: %s|%s", step, prompt, text)
        event = {"event": "sample", "step": step, "number": number, "prompt": prompt, "text": text}
        job.telemetry.log({**event, "tokens": tokens})

"""Traces of the untouched model, before step 0: replies to prompts, and its own distribution there.

    prompts, in chunks -> replies at temperature 1, nothing cut off the distribution -> chunk files
    replies -> one forward pass each -> likeliest next tokens of every token -> kept traces

All ranks take part. A chunk that is on disk is not sampled again, and a reply depends on its own
prompt and number alone (cpt/training/sampling.py). So a run that was killed goes on to the traces
that it would have had.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cpt.guard.traces.divergence import Passes, TopKModel, likeliest_tokens
from cpt.guard.traces.rows import Trace
from cpt.guard.traces.store import KeptTraces, Tokens, TraceFolder, TraceOrigin, prompts_hash
from cpt.parallel.agreement import on_first_rank
from cpt.resilience.faults import fault_point
from cpt.training.kl_target_format import TargetFileWriter
from cpt.training.sampling import Sampling
from data_pipeline.config.generation_config import PromptRecord, read_prompts
from data_pipeline.config.traces_config import TraceDomain
from data_pipeline.errors import ConfigError
from data_pipeline.text.harmony import DEFAULT_DATE, encode_prompt

log = logging.getLogger("cpt.guard.traces")

CHUNK = 64
"""Prompts of a chunk: what a killed run samples again at most."""
TOP_K = 32
"""Tokens listed per token of a reply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModel:
    """The untouched model."""

    model: TopKModel
    """The model itself."""
    name: str
    """Its name, for people."""
    weights: str
    """Hash of its weights."""
    top_k: int
    """Tokens listed per token of a reply; fewer than the vocabulary has."""


Sample = Callable[[Sequence[Tokens], Sampling, Sequence[int]], list[Tokens]]
"""Continues prompts under a sampling; the numbers are those of the prompts in their domain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedPrompts:
    """The prompts of one domain, as the untouched model is asked."""

    domain: TraceDomain
    """The domain."""
    prompts: Sequence[Tokens]
    """Harmony prompts, one for each trace."""

    def origin(self, weights: str) -> TraceOrigin:
        """Return what the traces of these prompts follow from.

        Args:
            weights: Hash of the untouched model's weights.
        """
        digest = hashlib.sha256(self.domain.name.encode()).digest()
        return TraceOrigin(
            name=self.domain.name,
            weights=weights,
            prompts=prompts_hash(self.prompts),
            max_new_tokens=self.domain.max_new_tokens,
            seed=int.from_bytes(digest[:4], "little"),
        )


def asked_prompts(domain: TraceDomain, date: datetime.date = DEFAULT_DATE) -> AskedPrompts:
    """Read the prompts of a domain and put them into the Harmony format.

    Of more records than `num_traces`, those with the smallest hashes of their text are taken: a
    sample that does not depend on their order in the file.

    Raises:
        ConfigError: the file cannot be used.
    """
    records, problems = read_prompts(Path(domain.path))
    if problems:
        raise ConfigError(problems)
    prompts = []
    for record in sorted(records, key=_text_hash)[: domain.num_traces]:
        prompts.append(
            encode_prompt(record.prompt, developer=None, effort=domain.effort, date=date)
        )
    return AskedPrompts(domain=domain, prompts=prompts)


def _text_hash(record: PromptRecord) -> str:
    return hashlib.sha256(record.prompt.encode()).hexdigest()


def kept_traces(folder: TraceFolder, name: str, group: dist.ProcessGroup) -> KeptTraces | None:
    """Return the traces of a domain on every rank; None if they are not complete.

    Raises:
        DataError: on all ranks: a file is damaged or missing.
    """

    def read() -> dict[str, Any] | None:
        kept = folder.read(name)
        return None if kept is None else kept.to_json()

    content = on_first_rank(group, read)
    return None if content is None else KeptTraces.from_json(content)


def freeze_traces(
    asked: AskedPrompts,
    base: BaseModel,
    sample: Sample,
    folder: TraceFolder,
    passes: Passes,
) -> None:
    """Sample the traces of a domain and keep them; all ranks call it together.

    Args:
        asked: The prompts.
        base: The untouched model.
        sample: How it continues prompts. What it raises ends the sampling, and a later call goes
            on from the chunks that are there.
        folder: Where the traces go.
        passes: Layout of the rows.
    """
    group = passes.topology.control_group
    origin = asked.origin(base.weights)
    replies = _sampled_replies(asked, origin, sample, folder, group)
    traces = []
    for prompt, reply in zip(asked.prompts, replies, strict=True):
        traces.append(Trace(prompt=prompt, reply=reply))
    num_tokens = sum(map(len, replies))
    targets = _TargetsOnFirstRank(folder, origin.name, group)
    try:
        targets.open(num_tokens, base.top_k)
        for ids, log_p in likeliest_tokens(traces, base.model, base.top_k, passes):
            targets.append(ids, log_p)
        targets.finish()
    finally:
        targets.close()
    on_first_rank(group, lambda: folder.complete(origin, base.name, base.top_k, traces))
    log.info("traces %s: %d replies, %d tokens", origin.name, len(traces), num_tokens)


def _sampled_replies(
    asked: AskedPrompts,
    origin: TraceOrigin,
    sample: Sample,
    folder: TraceFolder,
    group: dist.ProcessGroup,
) -> list[Tokens]:
    """Return the reply to every prompt; chunks that are on disk are read."""
    sampling = Sampling(
        max_new_tokens=origin.max_new_tokens, temperature=1.0, top_p=1.0, seed=origin.seed
    )
    replies: list[Tokens] = []
    for number, first in enumerate(range(0, len(asked.prompts), CHUNK)):
        chunk = on_first_rank(group, partial(folder.read_chunk, origin, number))
        if chunk is None:
            fault_point("sample_traces", number)
            prompts = asked.prompts[first : first + CHUNK]
            chunk = sample(prompts, sampling, range(first, first + len(prompts)))
            on_first_rank(group, partial(folder.write_chunk, origin, number, chunk))
        replies += chunk
    return replies


class _TargetsOnFirstRank:
    """The file of targets, which the first rank writes; an error there is one of all ranks."""

    def __init__(self, folder: TraceFolder, name: str, group: dist.ProcessGroup) -> None:
        self._folder = folder
        self._name = name
        self._group = group
        self._file: TargetFileWriter | None = None

    def open(self, num_tokens: int, top_k: int) -> None:
        def begin() -> None:
            self._file = self._folder.open_targets(self._name, num_tokens, top_k)

        on_first_rank(self._group, begin)

    def append(self, ids: torch.Tensor, log_p: torch.Tensor) -> None:
        def write() -> None:
            assert self._file is not None
            self._file.append(ids, log_p)

        on_first_rank(self._group, write)

    def finish(self) -> None:
        def publish() -> None:
            assert self._file is not None
            self._file.finish()

        on_first_rank(self._group, publish)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

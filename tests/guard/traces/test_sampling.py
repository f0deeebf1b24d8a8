"""Traces are sampled once: a killed run goes on to the same ones, and nothing replaces them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cpt.errors import ConfigError, DataError
from cpt.guard.traces import sampling
from cpt.guard.traces.divergence import Passes
from cpt.guard.traces.sampling import (
    AskedPrompts,
    BaseModel,
    asked_prompts,
    freeze_traces,
    kept_traces,
)
from cpt.guard.traces.store import KeptTraces, Tokens, TraceFolder, check_origin
from cpt.parallel.topology import Topology
from cpt.training.loader import MicroBatch
from cpt.training.sampling import Sampling
from data_pipeline.config.traces_config import TraceDomain
from data_pipeline.text.harmony import DEFAULT_DATE, encode_prompt
from tests.support.records import write_jsonl

DOMAIN = TraceDomain(name="en", language="en", path="prompts.jsonl", max_new_tokens=9)
PROMPTS = [[10 + number, 20, 30][: 1 + number % 3] for number in range(7)]
WEIGHTS = "0123456789abcdef"


class _KilledError(Exception):
    """Stands for the end of a process."""


class FakeModel:
    """Its likeliest next tokens follow from the token that is read."""

    def top_k(self, batch: MicroBatch, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        read = batch.input_ids[batch.labels >= 0]
        ids = read.unsqueeze(1) + torch.arange(k)
        log_p = torch.full((len(read), k + 1), -0.25) * read.unsqueeze(1)
        return ids, log_p


class FakeSampler:
    """Replies follow from the number of a prompt alone; after `chunks` chunks it is killed."""

    def __init__(self, chunks: int = 99) -> None:
        self.chunks = chunks
        self.asked: list[int] = []

    def __call__(
        self, prompts: Sequence[Tokens], drawn_as: Sampling, numbers: Sequence[int]
    ) -> list[Tokens]:
        if not self.chunks:
            raise _KilledError
        self.chunks -= 1
        assert drawn_as.temperature == 1 and drawn_as.top_p == 1
        self.asked += numbers
        replies = []
        for number in numbers:
            generator = np.random.Generator(np.random.PCG64([drawn_as.seed, number]))
            size = int(generator.integers(1, drawn_as.max_new_tokens + 1))
            replies.append(generator.integers(0, 100, size).tolist())
        return replies


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CHUNK", 2)


def freeze(folder: Path, topology: Topology, sampler: FakeSampler) -> KeptTraces:
    asked = AskedPrompts(domain=DOMAIN, prompts=PROMPTS)
    base = BaseModel(model=FakeModel(), name="base", weights=WEIGHTS, top_k=3)
    passes = Passes(topology=topology, micro_batch_size=2, seq_len=32)
    freeze_traces(asked, base, sampler, TraceFolder(folder), passes)
    kept = kept_traces(TraceFolder(folder), "en", topology.control_group)
    assert kept is not None
    return kept


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_traces_are_prompts_and_replies_in_order(tmp_path: Path, topology: Topology) -> None:
    sampler = FakeSampler()
    kept = freeze(tmp_path / "traces", topology, sampler)
    assert [trace.prompt for trace in kept.traces] == PROMPTS
    assert sampler.asked == list(range(len(PROMPTS)))
    assert sorted(content_of(tmp_path / "traces")) == ["en.json", "en.safetensors"]


def test_targets_stand_in_the_order_of_the_replies(tmp_path: Path, topology: Topology) -> None:
    folder = TraceFolder(tmp_path / "traces")
    kept = freeze(folder.folder, topology, FakeSampler())
    read: list[int] = []
    for trace in kept.traces:
        read += [trace.prompt[-1], *trace.reply[:-1]]
    ids, log_p = folder.targets(kept).read(0, len(read))
    assert ids[:, 0].tolist() == read and ids[:, 2].tolist() == [token + 2 for token in read]
    assert log_p[:, 3].tolist() == [-0.25 * token for token in read]


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_killed_sampling_goes_on_to_the_same_files(
    chunks: int, tmp_path: Path, topology: Topology
) -> None:
    freeze(tmp_path / "whole", topology, FakeSampler())
    with pytest.raises(_KilledError):
        freeze(tmp_path / "killed", topology, FakeSampler(chunks))
    assert kept_traces(TraceFolder(tmp_path / "killed"), "en", topology.control_group) is None
    again = FakeSampler()
    freeze(tmp_path / "killed", topology, again)
    assert again.asked == list(range(2 * chunks, len(PROMPTS)))
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")


def test_killed_between_replies_and_targets_samples_nothing_again(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze(tmp_path / "whole", topology, FakeSampler())
    with monkeypatch.context() as patch:

        def die(*arguments: object) -> None:
            raise _KilledError

        patch.setattr(FakeModel, "top_k", die)
        with pytest.raises(_KilledError):
            freeze(tmp_path / "killed", topology, FakeSampler())
    again = FakeSampler()
    freeze(tmp_path / "killed", topology, again)
    assert again.asked == []
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")


def test_replies_of_another_model_are_not_gone_on_with(tmp_path: Path, topology: Topology) -> None:
    with pytest.raises(_KilledError):
        freeze(tmp_path, topology, FakeSampler(1))
    chunk = tmp_path / "en.sampled-00000.json"
    content = json.loads(chunk.read_text())
    content["origin"]["weights"] = "another"
    chunk.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="another untouched model"):
        freeze(tmp_path, topology, FakeSampler())


def test_damaged_targets_are_named(tmp_path: Path, topology: Topology) -> None:
    freeze(tmp_path, topology, FakeSampler())
    path = tmp_path / "en.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"en\.safetensors: damaged"):
        kept_traces(TraceFolder(tmp_path), "en", topology.control_group)


def test_what_traces_come_from_is_compared(tmp_path: Path) -> None:
    origin = AskedPrompts(domain=DOMAIN, prompts=PROMPTS).origin(WEIGHTS)
    check_origin(tmp_path, origin, origin)
    longer = AskedPrompts(domain=replace(DOMAIN, max_new_tokens=10), prompts=PROMPTS)
    with pytest.raises(ConfigError, match="max_new_tokens 9"):
        check_origin(tmp_path, origin, longer.origin(WEIGHTS))
    fewer = AskedPrompts(domain=DOMAIN, prompts=PROMPTS[1:])
    with pytest.raises(ConfigError, match="other prompts"):
        check_origin(tmp_path, origin, fewer.origin(WEIGHTS))


def test_traces_of_before_are_compared_by_the_hash_that_they_state(tmp_path: Path) -> None:
    asked = AskedPrompts(domain=DOMAIN, prompts=PROMPTS)
    now = asked.origin("tensors:new+old")
    check_origin(tmp_path, asked.origin("old"), now)
    for other in ("other", "tensors:other+old"):
        with pytest.raises(ConfigError, match="another untouched model"):
            check_origin(tmp_path, asked.origin(other), now)


def test_domains_have_random_streams_of_their_own() -> None:
    asked = AskedPrompts(domain=DOMAIN, prompts=PROMPTS)
    other = AskedPrompts(domain=replace(DOMAIN, name="ja"), prompts=PROMPTS)
    assert asked.origin(WEIGHTS).seed != other.origin(WEIGHTS).seed


def test_prompts_are_a_sample_that_does_not_depend_on_their_order(tmp_path: Path) -> None:
    questions = [f"What is {number} + 1?" for number in range(40)]
    path = tmp_path / "prompts.jsonl"
    domain = replace(DOMAIN, path=str(path), num_traces=10, effort="low")
    write_jsonl(path, [{"prompt": question} for question in questions])
    some = asked_prompts(domain).prompts
    write_jsonl(path, [{"prompt": question, "answer": "1"} for question in reversed(questions)])
    assert asked_prompts(domain).prompts == some and len(some) == 10
    encoded = [
        encode_prompt(question, developer=None, effort="low", date=DEFAULT_DATE)
        for question in questions
    ]
    assert all(prompt in encoded for prompt in some) and some != encoded[:10]

"""The divergence on own traces is that of all logits at once, and zero at the untouched model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cpt.guard.traces.divergence import Passes, likeliest_tokens, measure_divergence
from cpt.guard.traces.rows import Trace
from cpt.model.configuration import load_config
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.directory import DirectoryWeights
from cpt.offline.model import OfflineModel
from cpt.parallel.topology import Topology
from cpt.training import loader
from cpt.training.kl_target_format import TargetFileReader, TargetFileWriter
from cpt.training.loader import MicroBatch
from tests.dist.cases import WINDOW, reference_model

SEQ_LEN = 128
VOCABULARY = 512
LENGTHS = ((20, 30), (4, 90), (50, 60), (70, 1), (10, 11))
"""Tokens of prompt and reply; several go beyond the window."""


@dataclass
class Plain:
    """A model without an engine, as the divergence takes it."""

    offline: OfflineModel

    def score(self, batch: MicroBatch) -> torch.Tensor:
        return self.offline.score(batch)

    @torch.no_grad()
    def top_k(self, batch: MicroBatch, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = self.offline._model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            labels=batch.labels,
            top_k=k,
            packed_rows=batch.packed_rows,
            kernel=self.offline._kernel,
        )
        return found


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "END_OF_TEXT", VOCABULARY - 1)


def save_models(folder: Path) -> None:
    """Save an untouched model, and one that differs a little everywhere."""
    model = reference_model()
    model.save_pretrained(str(folder / "base"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.2 * parameter.std() * noise
    model.save_pretrained(str(folder / "moved"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert any(sum(lengths) > 2 * WINDOW for lengths in LENGTHS)
    folder = tmp_path_factory.mktemp("traces")
    save_models(folder)
    return folder


def loaded(path: Path, topology: Topology) -> Plain:
    config = load_config(path, None)
    model = OfflineModel(config, topology)
    model.load(DirectoryWeights(path, parameter_shapes(config)))
    return Plain(model)


def some_traces() -> list[Trace]:
    generator = np.random.Generator(np.random.PCG64(0))
    traces = []
    for prompt, reply in LENGTHS:
        tokens = generator.integers(0, 500, prompt + reply).tolist()
        traces.append(Trace(prompt=tokens[:prompt], reply=tokens[prompt:]))
    return traces


def passes(topology: Topology, micro_batch_size: int = 2) -> Passes:
    return Passes(topology=topology, micro_batch_size=micro_batch_size, seq_len=SEQ_LEN)


def written_targets(
    folder: Path, name: str, model: Plain, traces: Sequence[Trace], k: int, topology: Topology
) -> TargetFileReader:
    num_tokens = sum(len(trace.reply) for trace in traces)
    writer = TargetFileWriter(folder, name, num_tokens, k)
    for ids, log_p in likeliest_tokens(traces, model, k, passes(topology)):
        writer.append(ids, log_p)
    writer.finish()
    return TargetFileReader(folder, name, k)


def log_probabilities(path: Path, trace: Trace) -> torch.Tensor:
    """Return what plain transformers gives for every token of a reply, in float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.tensor([[*trace.prompt, *trace.reply[:-1]]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(trace.prompt) - 1 :]
    log_p: torch.Tensor = logits.double().log_softmax(1)
    return log_p


def full_divergences(folder: Path, traces: Sequence[Trace]) -> list[float]:
    """Return the divergence of each trace in nats a token, over the whole vocabulary."""
    found = []
    for trace in traces:
        log_p = log_probabilities(folder / "base", trace)
        log_q = log_probabilities(folder / "moved", trace)
        found.append(float((log_p.exp() * (log_p - log_q)).sum(1).mean()))
    return found


def test_all_tokens_but_one_give_the_divergence_over_the_whole_vocabulary(
    folder: Path, topology: Topology
) -> None:
    traces = some_traces()
    base = loaded(folder / "base", topology)
    targets = written_targets(folder, "full", base, traces, VOCABULARY - 1, topology)
    moved = loaded(folder / "moved", topology)
    found = measure_divergence(traces, targets, moved, passes(topology))
    expected = full_divergences(folder, traces)
    assert found.text.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert min(expected) > 1e-3 and len(found.control) == 0


def test_few_tokens_give_a_lower_bound_of_it(folder: Path, topology: Topology) -> None:
    traces = some_traces()
    base = loaded(folder / "base", topology)
    moved = loaded(folder / "moved", topology)
    by_k = []
    for k in (4, 64, VOCABULARY - 1):
        targets = written_targets(folder, f"few-{k}", base, traces, k, topology)
        by_k.append(measure_divergence(traces, targets, moved, passes(topology)).text)
    for fewer, more in itertools.pairwise(by_k):
        assert (fewer < more).all() and (fewer > 0).all()


def test_divergence_is_zero_at_the_untouched_model(folder: Path, topology: Topology) -> None:
    traces = some_traces()
    base = loaded(folder / "base", topology)
    targets = written_targets(folder, "own", base, traces, 32, topology)
    found = measure_divergence(traces, targets, base, passes(topology))
    assert found.text.max() <= 1e-6  # log-probabilities are stored in fp32
    assert len(found.text) == len(traces)


def test_rows_of_a_pass_change_nothing(folder: Path, topology: Topology) -> None:
    traces = some_traces()
    base = loaded(folder / "base", topology)
    targets = written_targets(folder, "passes", base, traces, 32, topology)
    moved = loaded(folder / "moved", topology)
    one = measure_divergence(traces, targets, moved, passes(topology, 1))
    five = measure_divergence(traces, targets, moved, passes(topology, 5))
    assert one.text.tolist() == pytest.approx(five.text.tolist(), abs=1e-6)

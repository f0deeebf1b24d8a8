"""Held-out text is compared with the model and the documents that it was first measured with."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cpt.config import GuardSection
from cpt.errors import CptError
from cpt.guard.guard import Guard
from cpt.guard.held_out_text import HeldOutText
from cpt.guard.score import DomainScore, content_hashes
from cpt.telemetry.metrics import Telemetry

NUM_DOCUMENTS = 200


@pytest.fixture
def english() -> DomainScore:
    generator = np.random.default_rng(1)
    nats = generator.uniform(500, 900, NUM_DOCUMENTS)
    return DomainScore(name="english", language="en", nats=nats, bytes=np.full(len(nats), 1000.0))


def test_domain_without_a_document_is_refused_by_name(tmp_path: Path) -> None:
    """Passed over, a small source's domain would look guarded and never warn."""
    domain = SimpleNamespace(name="english", language="en", num_documents=0)
    data: Any = SimpleNamespace(held_out=(domain,), manifest=SimpleNamespace(fingerprint="f"))
    config: Any = SimpleNamespace(guard=GuardSection(max_documents=4))
    topology: Any = SimpleNamespace(rank=0)
    with pytest.raises(CptError, match="english"):
        HeldOutText(data, config, topology, tmp_path)


def test_baseline_of_other_weights_is_refused_wherever_the_model_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, english: DomainScore
) -> None:
    def guard_of(model: Path) -> Guard:
        config: Any = SimpleNamespace(
            guard=GuardSection(interval_steps=0),
            model=SimpleNamespace(path=model),
            train=SimpleNamespace(total_steps=1),
            micro_batch_size=1,
        )
        run_dir = tmp_path / "run"
        return Guard([HeldOutText(data, config, topology, run_dir)], config, topology, run_dir)

    def model_of(name: str, value: float) -> Path:
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((1000,), value)}, tmp_path / name / "model.safetensors")
        return tmp_path / name

    domain = SimpleNamespace(
        name="english",
        language="en",
        num_documents=NUM_DOCUMENTS,
        document_clusters=np.arange(NUM_DOCUMENTS),
    )
    data: Any = SimpleNamespace(held_out=(domain,))
    topology: Any = SimpleNamespace(
        rank=0, control_group=None, place=SimpleNamespace(enter=lambda *_: None)
    )
    monkeypatch.setattr("cpt.guard.held_out_text.ScoredSet", lambda *_: None)
    monkeypatch.setattr("cpt.guard.held_out_text.content_hashes", lambda sets, _: ["c"] * len(sets))
    monkeypatch.setattr("cpt.guard.held_out_text.score_domain", lambda *_, **__: english)
    for module in ("guard", "held_out_text", "baseline", "untouched_model"):
        monkeypatch.setattr(f"cpt.guard.{module}.on_first_rank", lambda _, do: do())
    engine: Any = None
    guard_of(model_of("base", 1.0)).measure(0, engine, Telemetry(None))
    moved = guard_of(model_of("moved", 1.0))
    moved.measure_apart(1, engine)
    assert moved.latest["text"][0]["delta_percent"] == 0
    with pytest.raises(CptError, match="another untouched model"):
        guard_of(model_of("other", 1.5)).measure_apart(1, engine)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_documents_are_hashed_by_one_rank_each_and_known_to_all(
    monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    hashed: list[str] = []

    def scored_set(domain: str, documents: str) -> Any:
        def content_hash() -> str:
            hashed.append(domain + documents)
            return f"hash of {domain}{documents}"

        return SimpleNamespace(content_hash=content_hash)

    shares: dict[int, list[str]] = {}
    all_there = threading.Barrier(world_size, timeout=60)

    def gather(own: list[str], rank: int) -> list[list[str]]:
        shares[rank] = own
        all_there.wait()
        return [shares[other] for other in range(world_size)]

    monkeypatch.setattr("cpt.guard.score.ScoredSet", scored_set)
    monkeypatch.setattr("cpt.guard.score.together", lambda _, do: do())
    monkeypatch.setattr("cpt.guard.score.gather_json", gather)
    sets: Any = [("a", "1"), ("a", "2"), ("b", "1"), ("c", "1"), ("c", "2")]

    def hashes_of(rank: int) -> list[str]:
        topology: Any = SimpleNamespace(rank=rank, world_size=world_size, control_group=rank)
        return content_hashes(sets, topology)

    with ThreadPoolExecutor(world_size) as ranks:
        found = list(ranks.map(hashes_of, range(world_size)))
    expected = ["hash of a1", "hash of a2", "hash of b1", "hash of c1", "hash of c2"]
    assert found == [expected] * world_size
    assert sorted(hashed) == ["a1", "a2", "b1", "c1", "c2"]

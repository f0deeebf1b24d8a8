"""What a plan counts of Muon's update is what the ranks would do, and what the state takes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cpt.config import LaunchInfo, RunConfig, RunYaml, resolve
from cpt.model.configuration import load_config
from cpt.model.linear_maps import LinearMaps
from cpt.parallel.whole_blocks import HeldRange
from cpt.planning.estimate import estimate
from cpt.planning.hardware import GPUS, Assumptions
from cpt.planning.host_memory import host_memory
from cpt.planning.matrix_updates import (
    Shared,
    busiest_flops,
    moved_elements,
    sent_bytes,
    shared_tensors,
)
from cpt.planning.memory import counts_of, device_memory
from cpt.planning.search import search
from cpt.training.muon import plan_work
from data_pipeline.config.strict_yaml import parse_yaml, read_file
from tests.support.cut_tensors import cut

MODEL = load_config(None, "gpt-oss-20b")
H100 = GPUS["h100"]


def run_yaml(optimizer: str, rows: int) -> RunYaml:
    text = f"""
model: {{init: gpt-oss-20b}}
data: {{mix: unused.yaml}}
train: {{seq_len: 4096, global_batch_size: {rows}, micro_batch_size: 1, total_steps: 1,
  lr: 1e-5, optimizer: {optimizer}}}
"""
    return read_file(RunYaml, parse_yaml(text, "run.yaml"))


def resolved(
    optimizer: str, *, stage: int = 3, ep: int = 8, world_size: int = 8, **zero: Any
) -> RunConfig:
    run = run_yaml(optimizer, world_size)
    engine: dict[str, Any] = {"zero_optimization": {"stage": stage, **zero}}
    engine["expert_parallel"] = {"enabled": True, "autoep_size": ep}
    launch = LaunchInfo(world_size=world_size, local_world_size=8)
    return resolve(run, parse_yaml(json.dumps(engine), "ds.json"), MODEL, launch)


def spans_of_stage3(tensors: tuple[LinearMaps, ...], ranks: int) -> list[dict[int, HeldRange]]:
    """Return what each rank holds if every tensor is cut into equal parts."""
    spans: list[dict[int, HeldRange]] = [{} for _ in range(ranks)]
    starts = [0] * ranks
    for number, maps in enumerate(tensors):
        part = -(-maps.numel // ranks)
        for rank in range(ranks):
            numel = min(part, maps.numel - rank * part)
            if numel > 0:
                spans[rank][number] = HeldRange(offset=rank * part, start=starts[rank], numel=numel)
            starts[rank] += part
    return spans


def really_moved(tensors: tuple[LinearMaps, ...], spans: list[dict[int, HeldRange]]) -> int:
    """Return the elements that leave their rank when the matrices are gathered."""
    moved = 0
    for rank in range(len(spans)):
        for one in plan_work(tensors, spans, rank=rank, group=None).rounds:
            moved += sum(piece.numel for piece in one.sent if piece.worker != rank)
    return moved


DENSE = (LinearMaps(blocks=1, rows=64, columns=48), LinearMaps(blocks=1, rows=16, columns=48)) * 6
EXPERTS = (LinearMaps(blocks=8, rows=64, columns=48, interleaved=2),)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("tensors", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("stage", [1, 3])
def test_planned_traffic_is_what_the_ranks_send(
    stage: int, tensors: tuple[LinearMaps, ...], ranks: int
) -> None:
    """Parts of a cut block are taken to be equal: exact under ZeRO-3, where cuts are regular."""
    planned = moved_elements(Shared(tensors, ranks), stage)
    numels = [maps.numel for maps in tensors]
    total = sum(numels)
    spans = spans_of_stage3(tensors, ranks)
    if stage == 1:
        part = -(-total // ranks)
        spans = cut(numels, [rank * part for rank in range(1, ranks)])
    found = really_moved(tensors, spans)
    assert planned == pytest.approx(found, rel=0.02, abs=0 if stage == 3 else 0.1 * total)
    assert (planned == 0) == (found == 0)


def test_experts_that_ranks_divide_evenly_stay_where_they_are() -> None:
    config = resolved("muon", ep=1)
    dense, experts = shared_tensors(config, counts_of(config, MODEL))
    assert sent_bytes(experts, config) == 0 < sent_bytes(dense, config)
    config = resolved("muon", ep=8, world_size=128)  # 4 experts on a rank, 16 ranks share them
    _, experts = shared_tensors(config, counts_of(config, MODEL))
    assert sent_bytes(experts, config) > 0


@pytest.mark.parametrize("stage", [1, 3])
def test_matrices_have_eight_bytes_of_state_and_the_rest_twelve(stage: int) -> None:
    config = resolved("muon", stage=stage)
    counts = counts_of(config, MODEL)
    trained = counts.trained_dense + counts.trained_experts
    assert 0.9 * trained < counts.by_muon < trained
    memory = device_memory(config, MODEL, counts)
    expected = (12 * (trained - counts.by_muon) + 8 * counts.by_muon) / 8
    assert memory["optimizer"] == pytest.approx(expected, rel=1e-6)
    config = resolved("adamw", stage=stage)
    assert device_memory(config, MODEL, counts_of(config, MODEL))["optimizer"] == 12 * trained // 8


def test_offloaded_state_has_as_many_bytes_on_the_host() -> None:
    config = resolved("muon", offload_optimizer={"device": "cpu"})
    counts = counts_of(config, MODEL)
    on_device = device_memory(resolved("muon"), MODEL, counts)["optimizer"]
    assert host_memory(config, MODEL, counts)["optimizer"] == on_device
    assert device_memory(config, MODEL, counts)["optimizer"] == 0


def test_an_update_takes_the_operations_of_all_matrices_divided_among_the_ranks() -> None:
    """Each expert of 20b has 3 square maps of 2880, and a step of one takes 6 x 2880^3."""
    config = resolved("muon")
    counts = counts_of(config, MODEL)
    of_experts = 24 * 32 * 3 * 5 * 6 * 2880**3 / 8
    assert of_experts < busiest_flops(config, counts) < 1.1 * of_experts


def test_plan_tells_the_time_of_orthogonalizing_only_with_muon() -> None:
    for optimizer in ("adamw", "muon"):
        config = resolved(optimizer)
        found = estimate(config, MODEL, counts_of(config, MODEL), H100, Assumptions())
        has_muon = optimizer == "muon"
        assert ("orthogonalizing" in found.seconds) == has_muon
        assert (found.wire["muon"].total > 0) == has_muon


def test_search_offers_no_form_of_moments_that_a_start_refuses_beside_muon() -> None:
    """With 360 GB on the host AdamW fits in bf16; Muon has an fp32 momentum."""
    gpu = replace(H100, host_memory_bytes=360e9)
    found = {}
    for optimizer in ("adamw", "muon"):
        counts = counts_of(resolved(optimizer, world_size=1, ep=1), MODEL)
        run = run_yaml(optimizer, rows=128)
        found[optimizer] = search(run, MODEL, counts, 1, gpu, Assumptions())
    assert found["muon"] is None
    assert found["adamw"] is not None
    assert found["adamw"][0].optimizer_state == "bf16"

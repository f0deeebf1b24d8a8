"""What an offloaded step moves and how long it takes: counted by hand from what the code does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cpt.config import LaunchInfo, RunConfig, load, resolve
from cpt.model.configuration import load_config
from cpt.planning.estimate import estimate
from cpt.planning.hardware import GPUS, Assumptions, Gpu
from cpt.planning.host_memory import (
    host_memory,
    host_problem,
    largest_sub_group,
)
from cpt.planning.host_work import (
    ADAM_CORE_SECONDS,
    Copies,
    copies,
    nvme_bytes,
    update_bytes,
    update_seconds,
)
from cpt.planning.memory import (
    count_parameters,
    device_memory,
    optimizer_groups,
    trained_per_rank,
)
from cpt.storage.allocation import page_locked_bytes
from data_pipeline.config.strict_yaml import Located
from tests.support.launcher import ROOT

MODEL = load_config(None, "gpt-oss-20b")
COUNTS = count_parameters(MODEL, ())
RUN, JSON = load(ROOT / "configs" / "gpt-oss-20b.yaml", ROOT / "ds_configs" / "z3_ep.json", {})
GPU = replace(GPUS["h100"], pcie_bytes_per_second=50e9, host_bytes_per_second=40e9)
MICRO_STEPS = 4


def resolved(stage: int = 3, *, offload_checkpoints: bool = False, **blocks: Any) -> RunConfig:
    """Return 20b on 8 ranks with four micro steps; `blocks` are those of offloading."""
    zero = {**JSON.value["zero_optimization"], "stage": stage}
    for name, block in blocks.items():
        zero[f"offload_{name}"] = {"device": "cpu", **block}
    value = {**JSON.value, "zero_optimization": zero}
    model = replace(
        RUN.model, activation_checkpointing=True, offload_checkpoints=offload_checkpoints
    )
    train = replace(RUN.train, global_batch_size=8 * MICRO_STEPS, micro_batch_size=1)
    run = replace(RUN, model=model, train=train)
    launch = LaunchInfo(world_size=8, local_world_size=8)
    return resolve(run, Located("ds.json", value, {}), MODEL, launch)


def moved(config: RunConfig) -> Copies:
    return copies(config, COUNTS, host_memory(config, MODEL, COUNTS))


TRAINED = trained_per_rank(resolved(), COUNTS)
SUMS = 4 * TRAINED
"""Bytes of a rank's gradients."""


@pytest.mark.parametrize(
    ("stage", "gradients", "out", "back"),
    [
        (3, "host", MICRO_STEPS, MICRO_STEPS),
        (3, "device", 0, 0),
        (2, "host", MICRO_STEPS, MICRO_STEPS - 1),
        (2, "device", 1, 0),
        (1, "host", 1, 1),
    ],
)
def test_sums_of_gradients_travel_as_often_as_the_code_moves_them(
    stage: int, gradients: str, out: int, back: int
) -> None:
    found = moved(resolved(stage, optimizer={"gradients": gradients}))
    assert (found.out, found.back) == (out * SUMS, back * SUMS)
    assert found.page_locked


def test_weights_come_twice_in_a_micro_step_and_layer_inputs_go_and_come_once() -> None:
    config = resolved(param={}, offload_checkpoints=True)
    owned = (COUNTS.dense + COUNTS.experts) / 8
    inputs = MICRO_STEPS * MODEL.num_hidden_layers * 2 * RUN.train.seq_len * MODEL.hidden_size
    assert moved(config).out == inputs
    assert moved(config).back == inputs + MICRO_STEPS * 2 * 2 * owned


def test_copies_take_the_busier_direction_or_the_memory_that_both_share() -> None:
    assert Copies(out=100e9, back=10e9, page_locked=True).seconds(GPU) == 110e9 / 40e9
    slow_link = replace(GPU, pcie_bytes_per_second=20e9)
    assert Copies(out=100e9, back=10e9, page_locked=True).seconds(slow_link) == 5


def test_computing_waits_for_copies_to_memory_that_is_not_page_locked() -> None:
    locked = resolved(optimizer={})
    pageable = resolved(optimizer={"pin_memory": False})
    waits = {}
    for name, config in (("locked", locked), ("pageable", pageable)):
        one = estimate(config, MODEL, COUNTS, GPU, Assumptions(overlap=0.5))
        waits[name] = one.exposed_seconds
        copied = one.seconds["PCIe"]
    assert waits["pageable"] == copied
    assert waits["locked"] < copied


def test_update_reads_and_writes_the_state_and_moves_the_weights() -> None:
    """fp32: 28 bytes of Adam, 4 of the norm, 4 + 2 + 2 of the weights on their way."""
    config = resolved(optimizer={})
    assert update_bytes(config, COUNTS) == 40 * TRAINED
    expected = TRAINED * 40 / 40e9 + TRAINED * 2 / 50e9
    assert update_seconds(config, COUNTS, GPU) == pytest.approx(expected)
    on_host = resolved(optimizer={}, param={})
    expected = TRAINED * 40 / 40e9
    assert update_seconds(on_host, COUNTS, GPU) == pytest.approx(expected)


def test_moments_in_fewer_bytes_take_less_memory_and_more_of_the_cores() -> None:
    fp32 = resolved(optimizer={})
    bf16 = replace(fp32, train=replace(fp32.train, optimizer_state="bf16"))
    assert update_bytes(fp32, COUNTS) - update_bytes(bf16, COUNTS) == 2 * 4 * TRAINED
    few = replace(GPU, host_cores=1.0)
    link = TRAINED * 2 / 50e9
    expected = TRAINED * ADAM_CORE_SECONDS["bf16"] + link
    assert update_seconds(bf16, COUNTS, few) == pytest.approx(expected)
    many = replace(GPU, host_cores=100.0)
    expected = TRAINED * 32 / 40e9 + link
    assert update_seconds(bf16, COUNTS, many) == pytest.approx(expected)


def test_only_the_first_sub_group_of_gradients_on_the_device_is_waited_for() -> None:
    here = update_seconds(resolved(optimizer={"gradients": "device"}), COUNTS, GPU)
    there = update_seconds(resolved(optimizer={}), COUNTS, GPU)
    largest = largest_sub_group(resolved(optimizer={}), COUNTS)
    assert here - there == pytest.approx(4 * largest / 50e9)


def test_state_on_nvme_is_read_and_written_by_the_disks() -> None:
    block = {"device": "nvme", "nvme_path": "runs/nvme"}
    assert nvme_bytes(resolved(optimizer={}), COUNTS) == 0
    device = resolved(optimizer={**block, "gradients": "device"})
    assert nvme_bytes(device, COUNTS) == 2 * 12 * TRAINED
    sums = (2 * MICRO_STEPS + 2) * 4
    assert nvme_bytes(resolved(optimizer=block), COUNTS) == (2 * 12 + sums) * TRAINED
    gpu = replace(GPU, nvme_bytes_per_second=2e9)
    one = estimate(device, MODEL, COUNTS, gpu, Assumptions())
    assert one.seconds["NVMe"] == pytest.approx(TRAINED * 24 / 2e9)
    faster = replace(gpu, nvme_bytes_per_second=4e9)
    other = estimate(device, MODEL, COUNTS, faster, Assumptions())
    assert one.step_seconds - other.step_seconds == pytest.approx(TRAINED * 24 / 4e9)


@pytest.mark.parametrize("beside", [{}, {"optimizer": {}}], ids=["weights", "weights and state"])
def test_frozen_weights_in_files_are_read_as_often_as_trained_ones(beside: dict[str, Any]) -> None:
    """All weights are gathered twice in a micro step; the update writes those that are trained."""
    config = resolved(param={"device": "nvme", "nvme_path": "runs/nvme"}, **beside)
    owned = (COUNTS.dense + COUNTS.experts) // 8
    assert nvme_bytes(config, COUNTS) == 2 * (2 * MICRO_STEPS * owned + TRAINED)
    frozen = count_parameters(MODEL, ("model.layers.*.mlp.experts.*",))
    trained = trained_per_rank(config, frozen)
    assert trained < owned / 4
    moved = 2 * (2 * MICRO_STEPS * owned + trained)
    assert nvme_bytes(config, frozen) == moved
    gpu = replace(GPU, nvme_bytes_per_second=2e9)
    one = estimate(config, MODEL, frozen, gpu, Assumptions())
    assert one.seconds["NVMe"] == pytest.approx(moved / 2e9)


def fitted(config: RunConfig, gpu: Gpu) -> bool:
    return estimate(config, MODEL, COUNTS, gpu, Assumptions()).fits


def test_disks_of_a_known_size_must_hold_the_state() -> None:
    block = {"device": "nvme", "nvme_path": "runs/nvme", "gradients": "device"}
    config = resolved(optimizer=block)
    assert fitted(config, GPU), "nothing is known of the disks"
    assert fitted(config, replace(GPU, nvme_bytes=12 * TRAINED + 1))
    assert not fitted(config, replace(GPU, nvme_bytes=12 * TRAINED - 1))


def test_gradients_are_held_where_the_block_says() -> None:
    held = {}
    for stage, place in ((3, "host"), (3, "device"), (2, "host"), (2, "device")):
        config = resolved(stage, optimizer={"gradients": place})
        host = host_memory(config, MODEL, COUNTS)
        device = device_memory(config, MODEL, COUNTS)
        held[stage, place] = (host.get("gradients", 0), device["gradients"])
    assert held == {
        (3, "host"): (SUMS, 0),
        (3, "device"): (0, SUMS),
        (2, "host"): (SUMS, 0),
        (2, "device"): (SUMS, SUMS),
    }


def test_two_sub_groups_arrive_at_a_time_and_weights_are_rounded_beside_them() -> None:
    config = resolved(optimizer={"gradients": "device", "pin_memory": False})
    largest = largest_sub_group(config, COUNTS)
    assert host_memory(config, MODEL, COUNTS) == {
        "optimizer": 12 * TRAINED,
        "update": (2 * 4 + 2) * largest,
    }


def test_page_locked_memory_is_rounded_up_to_a_power_of_two() -> None:
    assert [page_locked_bytes(size) for size in (0, 1, 4096, 4097)] == [0, 1, 4096, 8192]
    name = "page-locked, rounded up"
    host = host_memory(resolved(optimizer={}), MODEL, COUNTS)
    assert host[name] == page_locked_bytes(SUMS) - SUMS
    pageable = resolved(optimizer={"pin_memory": False})
    assert name not in host_memory(pageable, MODEL, COUNTS)


def test_weights_are_page_locked_by_groups_and_frozen_ones_each_by_itself() -> None:
    """DeepSpeed has a flat buffer for each group of the optimizer; frozen parameters have none."""
    name = "page-locked, rounded up"
    groups = [2 * sum(group) for group in optimizer_groups(resolved(), COUNTS)]
    assert sum(groups) == pytest.approx(2 * TRAINED, rel=1e-3)
    wasted = sum(page_locked_bytes(size) - size for size in groups)
    assert host_memory(resolved(param={}), MODEL, COUNTS)[name] == wasted
    frozen = count_parameters(MODEL, ("*",))
    each = [2 * (numel // 8) for numel in frozen.frozen_matrices]
    assert sum(each) == pytest.approx(2 * (frozen.dense + frozen.experts) / 8, rel=1e-3)
    wasted = sum(page_locked_bytes(size) - size for size in each)
    assert host_memory(resolved(param={}), MODEL, frozen)[name] == wasted


def test_node_without_the_memory_is_told_what_takes_it_and_what_to_do() -> None:
    config = resolved(optimizer={"pin_memory": False})
    needed = 8 * sum(host_memory(config, MODEL, COUNTS).values())
    assert host_problem(config, MODEL, 8, None) is None
    assert host_problem(config, MODEL, 8, needed) is None
    problem = host_problem(config, MODEL, 8, needed - 1)
    assert problem is not None
    assert f"keep {needed / 1e9:.0f} GB on the host" in problem
    assert "optimizer 251 GB, gradients 84 GB" in problem
    assert '"gradients": "device"' in problem
    assert host_problem(resolved(), MODEL, 8, 0) is None, "nothing is offloaded"

"""A plan counts the rounding of experts and products in 8 bits."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import replace
from typing import Any, cast

import pytest

from cpt.cli import main
from cpt.config import RunConfig, RunYaml, load
from cpt.config.precision_sections import ProductsSection, QuantizeSection
from cpt.deepspeed_adapter.rounding import LARGEST_PIECE
from cpt.model.configuration import load_config
from cpt.model.weights.mxfp4_rounding import BYTES_OF_A_VALUE, PIECE_VALUES
from cpt.planning.estimate import Estimate, estimate
from cpt.planning.hardware import GPUS, Assumptions
from cpt.planning.low_precision import (
    OPERANDS,
    TRAVELING_VALUES,
    emulation_problem,
    products_problem,
    products_text,
    rounded_weights,
    rounding_bytes,
    rounding_memory,
    rounding_text,
)
from cpt.planning.memory import count_parameters, device_memory
from cpt.planning.part_times import PRODUCTS
from cpt.planning.search import Layout, Places, as_config, layouts, search
from tests.support.launcher import ROOT

CONFIG = ROOT / "configs" / "gpt-oss-20b.yaml"
DS_CONFIG = ROOT / "ds_configs" / "z3_ep.json"
MODEL = load_config(None, "gpt-oss-20b")
COUNTS = count_parameters(MODEL, ())
EXPERT_WEIGHTS = 24 * 32 * 3 * 2880 * 2880
"""Weights in the matrices of all experts of gpt-oss-20b."""
PLAIN = QuantizeSection()
BF16 = ProductsSection()
ROUNDED = QuantizeSection(experts="mxfp4", start_step=0)
EIGHT_BIT = ProductsSection(experts="fp8")
HOST = Places(offloads=("offload_optimizer", "offload_param"))


@functools.cache
def run_of(quantize: QuantizeSection, products: ProductsSection) -> RunYaml:
    run, _ = load(CONFIG, DS_CONFIG, {})
    train = dataclasses.replace(
        run.train, seq_len=4096, global_batch_size=512, quantize=quantize, products=products
    )
    return dataclasses.replace(run, train=train)


def resolved(
    gpus: int = 8,
    *,
    quantize: QuantizeSection = PLAIN,
    products: ProductsSection = BF16,
    **changes: Any,
) -> RunConfig:
    layout = {
        "sp_size": 1,
        "ep_size": 8,
        "stage": 3,
        "micro_batch_size": 1,
        "activation_checkpointing": True,
        "offload_checkpoints": False,
        **changes,
    }
    return as_config(Layout(**cast(Any, layout)), run_of(quantize, products), MODEL, gpus)


def estimated(config: RunConfig, gpu: str = "h100") -> Estimate:
    return estimate(config, MODEL, COUNTS, GPUS[gpu], Assumptions())


def test_zero_3_rounds_a_part_of_the_experts_and_the_other_stages_all_that_a_rank_has() -> None:
    part = resolved(16, quantize=ROUNDED, stage=3)
    assert rounded_weights(part, COUNTS.expert_matrices) == EXPERT_WEIGHTS // 16
    whole = resolved(16, quantize=ROUNDED, stage=2)
    assert rounded_weights(whole, COUNTS.expert_matrices) == EXPERT_WEIGHTS // 8
    assert rounded_weights(resolved(16), COUNTS.expert_matrices) == 0


def test_rounding_adds_one_pass_over_the_experts_to_a_step() -> None:
    plain, rounded = estimated(resolved()), estimated(resolved(quantize=ROUNDED))
    rate = GPUS["h100"].attainable().memory_bytes_per_second
    seconds = 4 * EXPERT_WEIGHTS / 8 / rate
    assert rounding_bytes(rounded.config, COUNTS.expert_matrices) == 4 * EXPERT_WEIGHTS // 8
    assert rounded.seconds["rounding"] == pytest.approx(seconds)
    assert rounded.step_seconds - plain.step_seconds == pytest.approx(seconds)
    assert rounded.memory == plain.memory
    assert "rounding" not in plain.seconds


def test_offloaded_experts_travel_to_the_device_and_back() -> None:
    plain = estimated(resolved(places=HOST))
    rounded = estimated(resolved(quantize=ROUNDED, places=HOST))
    seconds = 2 * 2 * EXPERT_WEIGHTS / 8 / GPUS["h100"].pcie_bytes_per_second
    assert rounded.seconds["rounding"] == pytest.approx(seconds)
    assert rounded.step_seconds - plain.step_seconds == pytest.approx(seconds)
    assert TRAVELING_VALUES == LARGEST_PIECE


def test_frozen_experts_are_not_rounded() -> None:
    frozen = count_parameters(MODEL, ("model.layers.*.mlp.experts.gate_up_proj",))
    rounded = rounded_weights(resolved(quantize=ROUNDED), frozen.expert_matrices)
    assert rounded == EXPERT_WEIGHTS // 3 // 8


def test_rounding_holds_little_beside_the_weights() -> None:
    on_device = resolved(quantize=ROUNDED)
    assert rounding_memory(on_device, MODEL, "cpu") == BYTES_OF_A_VALUE * PIECE_VALUES
    assert rounding_memory(on_device, MODEL, "cuda") == 0
    assert rounding_memory(resolved(quantize=ROUNDED, places=HOST), MODEL, "cuda") == 2 * 2**22
    assert rounding_memory(resolved(), MODEL, "cpu") == 0


def expert_sizes(quantize: QuantizeSection, world_size: int) -> set[int]:
    """Return the sizes of expert parallelism that the search tries under ZeRO-3."""
    found = layouts(run_of(quantize, ProductsSection()), MODEL, world_size)
    return {layout.ep_size for layout in found if layout.stage == 3}


def test_search_leaves_out_layouts_that_cut_blocks() -> None:
    """32 experts have 2,880 columns of blocks in a layer: 64 ranks can share them, 128 cannot."""
    every = {1, 2, 4, 8, 16, 32}
    assert expert_sizes(ROUNDED, 64) == every
    assert expert_sizes(QuantizeSection(), 128) == every
    assert expert_sizes(ROUNDED, 128) == set()


def test_eight_bit_products_take_about_half_the_time_of_those_that_they_replace() -> None:
    plain, eight = estimated(resolved()), estimated(resolved(products=EIGHT_BIT))
    saved = 1 - eight.parts[PRODUCTS] / plain.parts[PRODUCTS]
    # forward 3, recomputed 2 and the gradient of the inputs 3 of 11 products, at twice the speed
    # in 22 of 24 layers
    assert saved == pytest.approx(8 / 11 / 2 * 22 / 24, rel=0.05)
    assert eight.parts[OPERANDS] > 0
    assert eight.parts["projections"] == plain.parts["projections"]


def test_every_layer_in_bf16_costs_nothing_more() -> None:
    none = ProductsSection(experts="fp8", bf16_layers=(12, 12))
    assert estimated(resolved(products=none)).parts == estimated(resolved()).parts


def test_attention_in_eight_bits_shortens_its_projections_alone() -> None:
    plain = estimated(resolved())
    eight = estimated(resolved(products=ProductsSection(attention="fp8")))
    assert eight.parts["projections"] < 0.75 * plain.parts["projections"]
    assert eight.parts[PRODUCTS] == plain.parts[PRODUCTS]


def test_rounded_operands_take_memory_of_a_byte_for_each_value() -> None:
    plain, eight = resolved(), resolved(products=EIGHT_BIT)
    memory = device_memory(eight, MODEL, COUNTS)
    more = sum(memory.values()) - sum(device_memory(plain, MODEL, COUNTS).values())
    gate_up = 4 * 2880 * 5760
    assert 0 <= more <= gate_up + 4 * 4096 * 5760 + 10**6
    assert OPERANDS in memory


def test_a_gpu_without_eight_bit_products_is_named() -> None:
    message = products_problem(EIGHT_BIT, GPUS["a100-80gb"])
    assert message is not None and "A100 SXM 80 GB has no products in 8 bits" in message
    assert products_problem(EIGHT_BIT, GPUS["h100"]) is None
    assert emulation_problem(EIGHT_BIT, GPUS["h100"]) is None
    message = emulation_problem(EIGHT_BIT, GPUS["l40s"])
    assert message is not None and "they would be emulated" in message
    assert emulation_problem(ProductsSection(attention="fp8"), GPUS["l40s"]) is None
    assert products_problem(BF16, GPUS["a100-80gb"]) is None


def test_dry_run_says_what_is_rounded_and_multiplied_in_eight_bits() -> None:
    config = resolved(quantize=ROUNDED, products=EIGHT_BIT)
    assert rounding_text(config, COUNTS.expert_matrices) == (
        "experts to mxfp4 (floor) from step 0 on: 2,388.8 M weights of a rank after each update, "
        "9.56 GB read and written"
    )
    assert products_text(config, MODEL) == (
        "gate_up_proj, down_proj of layers 1 to 22 (not measured on a GPU)"
    )
    early = replace(config, train=replace(config.train, stop_at_step=5))
    late = replace(ROUNDED, start_step=5)
    early = replace(early, train=replace(early.train, quantize=late))
    told = rounding_text(early, COUNTS.expert_matrices)
    assert told.endswith("; this start does no such step, as it ends with train.stop_at_step 5")
    late = replace(ROUNDED, start_step=4)
    early = replace(early, train=replace(early.train, quantize=late))
    assert "stop_at_step" not in rounding_text(early, COUNTS.expert_matrices)
    offloaded = resolved(quantize=ROUNDED, places=HOST)
    text = rounding_text(offloaded, COUNTS.expert_matrices)
    assert text.endswith("9.56 GB between host and device")
    assert rounding_text(resolved(), COUNTS.expert_matrices) == "nothing"
    assert products_text(resolved(), MODEL) == "none"


def test_plan_names_what_it_assumes_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--config", str(CONFIG), "--ds_config", str(DS_CONFIG), "--gpus", "8"]
    keys = ["train.quantize.experts=mxfp4", "train.quantize.start_step=0"]
    keys += ["train.products.experts=fp8"]
    sets = [word for key in keys for word in ("--set", key)]
    command = ["plan", *files, "--model", "gpt-oss-20b", "--seq_len", "4096", *sets]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "1979 TFLOP/s dense FP8 (data sheet)" in printed
    assert "  rounding  " in printed and OPERANDS in printed
    assert main([*command, "--gpu", "a100-80gb"]) == 78
    assert "no products in 8 bits" in capsys.readouterr().err


def test_search_finds_a_layout_with_both() -> None:
    run = run_of(ROUNDED, EIGHT_BIT)
    found = search(run, MODEL, COUNTS, 16, GPUS["h100"], Assumptions())
    assert found is not None
    assert found[1].seconds["rounding"] > 0

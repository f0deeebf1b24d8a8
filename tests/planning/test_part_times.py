"""The work of a step is that of the table, scaled, and its time is that of the H100 measured."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from transformers import GptOssConfig

from cpt.model.configuration import PRESETS, load_config
from cpt.planning.flops import flops_per_token
from cpt.planning.hardware import GPUS, H100_MEASURED, FlashRates
from cpt.planning.one_gpu import estimate_on_one_gpu
from cpt.planning.part_times import PARTS, Held, micro_step_parts
from cpt.planning.step_work import PASSES, TABLE, ModelSizes, Share, Work, work_of_micro_step

COUNTED: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
NOTHING_HELD = Held(computed_with=0, gathered=0, owned=0)


def share_of(shape: dict[str, Any]) -> tuple[ModelSizes, Share]:
    model = load_config(None, shape["preset"])
    row = shape["tokens"] * shape["sp_size"] // shape["documents"]
    flops = flops_per_token(model, row)
    third = shape["tokens"] / 3
    share = Share(
        tokens=shape["tokens"],
        attention_flops=third * (flops.attention - flops.window_attention),
        window_flops=third * flops.window_attention,
        ep_size=shape["ep_size"],
        sp_size=shape["sp_size"],
    )
    return ModelSizes.of(model), share


def num_bytes(work: Work) -> float:
    return work.product_bytes + work.other_bytes


@pytest.mark.parametrize("name", COUNTED["shapes"])
def test_work_of_every_part_is_what_the_rehearsal_counts(name: str) -> None:
    """The shape with EP 8 and SP 4 is scaled from gpt-oss-20b on one rank, exchanges excepted."""
    shape = COUNTED["shapes"][name]
    works = work_of_micro_step(*share_of(shape))
    alone = shape["ep_size"] == 1
    close = 0.01 if alone else 0.4
    assert set(works) == set(shape["parts"])
    for part, passes in shape["parts"].items():
        for one, counted in passes.items():
            found = works[part][one]
            where = f"{part}, {one}"
            assert num_bytes(found) == pytest.approx(counted["num_bytes"], rel=close), where
            flops = found.flops + found.window_flops
            assert flops == pytest.approx(counted["flops"], rel=0.01), where
            if alone:
                assert found.launches == pytest.approx(counted["launches"], abs=2), where
            if part in ("experts", "loss head", "dispatch"):
                assert num_bytes(found) == pytest.approx(counted["num_bytes"], rel=0.02), where


@pytest.mark.parametrize("name", COUNTED["shapes"])
def test_time_by_part_adds_up_to_the_time_kernel_by_kernel(name: str) -> None:
    """The table's seconds take the longer of bytes and FLOPs for each kernel."""
    shape = COUNTED["shapes"][name]
    speed = COUNTED["assumed"]["product_flops_per_second"]
    rates = dataclasses.replace(
        H100_MEASURED,
        product_flops=speed,
        grouped_flops=speed,
        grouped_exposed=0.0,
        attention_flops=FlashRates(forward=speed, backward=speed),
        window_flops=FlashRates(forward=speed, backward=speed),
        memory_bytes_per_second=COUNTED["assumed"]["memory_bytes_per_second"],
        launch_seconds=0.0,
    )
    parts = micro_step_parts(*share_of(shape), NOTHING_HELD, PASSES, rates)
    kernels = 0.0
    for passes in shape["parts"].values():
        for counted in passes.values():
            kernels += counted["seconds"]
    assert sum(parts.values()) == pytest.approx(kernels, rel=0.01)


def test_parts_are_printed_in_one_order_and_none_is_lost() -> None:
    sizes, share = share_of(COUNTED["shapes"]["20b 4k"])
    parts = micro_step_parts(sizes, share, NOTHING_HELD, PASSES, H100_MEASURED)
    assert list(parts) == [part for part in PARTS if part in parts]
    assert parts["launches"] == 0


def test_small_model_waits_for_its_launches() -> None:
    tiny = GptOssConfig(**PRESETS["tiny"])
    share = Share(tokens=1024, attention_flops=0.0, window_flops=0.0)
    rates = H100_MEASURED
    parts = micro_step_parts(ModelSizes.of(tiny), share, NOTHING_HELD, PASSES, rates)
    launches = 0.0
    for passes in work_of_micro_step(ModelSizes.of(tiny), share).values():
        for work in passes.values():
            launches += work.launches
    assert parts["launches"] > sum(parts.values()) / 2
    assert sum(parts.values()) == pytest.approx(launches * rates.launch_seconds)


def slice_of(tokens: int) -> dict[str, float]:
    """Return the parts of the two layers that an H100 has measured."""
    model = load_config(None, "gpt-oss-20b")
    return estimate_on_one_gpu(model, 2, tokens, GPUS["h100"]).parts


@pytest.mark.parametrize(("tokens", "milliseconds"), [(4096, 9.37), (32_768, 57.2)])
def test_grouped_products_take_the_time_that_a_profile_shows(
    tokens: int, milliseconds: float
) -> None:
    """aten::_grouped_mm in bench/gpu/results/2026-11-26-h100-fused.jsonl."""
    assert 1e3 * slice_of(tokens)["experts: products"] == pytest.approx(milliseconds, rel=0.02)


@pytest.mark.parametrize(("tokens", "milliseconds"), [(32_768, 29.4 + 91.5)])
def test_attention_takes_the_time_that_a_profile_shows(tokens: int, milliseconds: float) -> None:
    """Of the whole part, the kernels of flash attention leave a few per cent to the rest."""
    found = 1e3 * slice_of(tokens)["attention core"]
    assert milliseconds <= found <= 1.05 * milliseconds


def test_other_gpus_are_scaled_by_their_data_sheets() -> None:
    h100, h200, b200 = (GPUS[name].attainable() for name in ("h100", "h200", "b200"))
    assert h100 == H100_MEASURED
    assert h200.product_flops == h100.product_flops
    assert h200.memory_bytes_per_second == pytest.approx(h100.memory_bytes_per_second * 4.8 / 3.35)
    assert b200.grouped_flops == pytest.approx(h100.grouped_flops * 2250 / 989)


def test_activation_checkpointing_recomputes_all_but_what_the_backward_does_not_read() -> None:
    """A layer's forward again, without the down projection of the experts; not the loss head."""
    sizes, share = share_of(COUNTED["shapes"]["20b 16k"])
    rates = H100_MEASURED
    once = micro_step_parts(sizes, share, NOTHING_HELD, ("forward", "backward"), rates)
    twice = micro_step_parts(sizes, share, NOTHING_HELD, PASSES, rates)
    assert twice["loss head"] == once["loss head"]
    assert twice["projections"] == pytest.approx(4 / 3 * once["projections"], rel=0.05)
    assert twice["experts: products"] == pytest.approx(11 / 9 * once["experts: products"], rel=0.02)

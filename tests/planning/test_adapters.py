"""What is planned for adapters: state, steps over a frozen base, and the cards that they fit on."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cpt.config import LaunchInfo, RunConfig, RunYaml, resolve
from cpt.model.configuration import load_config
from cpt.planning.adapter_work import ADAPTERS, AdapterWork
from cpt.planning.estimate import Estimate, estimate
from cpt.planning.fit import Card
from cpt.planning.hardware import GPUS, Assumptions
from cpt.planning.memory import GIB, counts_of, device_memory
from cpt.planning.peak_rates import utilization
from cpt.planning.step_work import Share
from cpt.planning.trained_weights import ALL, NOTHING
from data_pipeline.config.strict_yaml import parse_yaml, read_file

MODELS = {name: load_config(None, name) for name in ("tiny", "gpt-oss-20b", "gpt-oss-120b")}
LORA = {"kind": "lora"}
PACKED = {"kind": "lora", "base": "mxfp4"}
ATTENTION = {**PACKED, "targets": ["attention"]}


def resolved(
    name: str,
    adapter: dict[str, Any],
    *,
    gpus: int = 1,
    ep: int = 1,
    stage: int = 2,
    tokens: int = 4096,
    checkpointing: bool = True,
) -> RunConfig:
    run = {
        "model": {"init": "tiny", "activation_checkpointing": checkpointing},
        "data": {"mix": "unused.yaml"},
        "adapter": adapter,
        "train": {
            "seq_len": tokens,
            "global_batch_size": 8 * gpus,
            "micro_batch_size": 1,
            "total_steps": 1,
            "lr": 1e-4,
        },
    }
    engine = {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": "auto"},
        "expert_parallel": {"enabled": True, "autoep_size": ep},
    }
    return resolve(
        read_file(RunYaml, parse_yaml(json.dumps(run), "run.yaml")),
        parse_yaml(json.dumps(engine), "ds.json"),
        MODELS[name],
        LaunchInfo(world_size=gpus, local_world_size=gpus),
    )


def memory(name: str, adapter: dict[str, Any], **layout: Any) -> dict[str, int]:
    config = resolved(name, adapter, **layout)
    return device_memory(config, MODELS[name], counts_of(config, MODELS[name]))


def estimated(name: str, adapter: dict[str, Any], **layout: Any) -> Estimate:
    config = resolved(name, adapter, **layout)
    counts = counts_of(config, MODELS[name])
    return estimate(config, MODELS[name], counts, GPUS["h100"], Assumptions())


FITTING = {
    "20b packed on 24 GB": ("rtx4090", "gpt-oss-20b", PACKED, {}, 16.6),
    "20b bf16 on 80 GB": ("h100", "gpt-oss-20b", LORA, {}, 41.9),
    "120b packed, attention, on 80 GB": ("h100", "gpt-oss-120b", ATTENTION, {}, 63.5),
    "120b bf16 on 8 x 80 GB": ("h100", "gpt-oss-120b", LORA, {"gpus": 8, "ep": 8}, 33.4),
}
"""GPU, model, adapter, layout, GiB of a rank."""


@pytest.mark.parametrize("case", FITTING.values(), ids=FITTING)
def test_adapters_fit_on_the_cards_of_the_recipes(case: tuple[Any, ...]) -> None:
    gpu, name, adapter, layout, size = case
    total = sum(memory(name, adapter, **layout).values())
    assert total <= Card.named(gpu).planned_bytes
    assert total / GIB == pytest.approx(size, abs=0.1)


def test_120b_with_all_experts_adapted_starts_on_80_gb_with_a_warning_only() -> None:
    total = sum(memory("gpt-oss-120b", PACKED).values())
    card = Card.named("h100")
    assert card.planned_bytes < total < card.memory_bytes


def test_state_is_that_of_the_adapters_and_weights_that_of_both() -> None:
    config = resolved("gpt-oss-20b", LORA)
    counts = counts_of(config, MODELS["gpt-oss-20b"])
    trained = counts.trained_dense + counts.trained_experts
    # rank 32 beside q, k, v, o; rank 8 beside both matrices of every expert
    attention = 24 * 32 * (2 * (2880 + 4096) + 2 * (2880 + 512))
    experts = 24 * 32 * 8 * ((2880 + 5760) + (2880 + 2880))
    assert (counts.trained_dense, counts.trained_experts) == (attention, experts)
    parts = memory("gpt-oss-20b", LORA)
    assert parts["optimizer"] == 12 * trained
    assert parts["gradients"] == 4 * trained
    assert parts["weights"] == 2 * (counts.dense + counts.experts)
    assert "packed experts" not in parts


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_packed_experts_take_four_and_a_quarter_bits_and_divide_by_expert_parallelism_only(
    stage: int,
) -> None:
    numel = 24 * 32 * 3 * 2880 * 2880
    for ep in (1, 4):
        parts = memory("gpt-oss-20b", PACKED, gpus=8, ep=ep, stage=stage)
        assert parts["packed experts"] == numel // ep * 17 // 32


def test_packed_base_leaves_out_the_weights_and_decodes_one_layer_at_most() -> None:
    packed = memory("gpt-oss-20b", PACKED)
    decoded = memory("gpt-oss-20b", LORA)
    experts = 2 * 24 * 32 * 3 * 2880 * 2880
    assert decoded["weights"] - packed["weights"] == experts
    assert packed["decoded experts"] == 2 * 32 * 2 * 2880 * 2880
    # of the larger model as many experts as fit in the scratch
    larger = memory("gpt-oss-120b", PACKED)["decoded experts"]
    assert larger == packed["decoded experts"]


def test_frozen_weights_have_no_gradients_at_any_moment_of_a_step() -> None:
    trained = memory("gpt-oss-20b", {}, gpus=8, ep=8, tokens=1024)
    adapted = memory("gpt-oss-20b", LORA, gpus=8, ep=8, tokens=1024)
    assert trained["weight gradients"] + trained["update"] > 10**9
    assert adapted["weight gradients"] + adapted["update"] < 10**8


def test_layers_before_the_first_adapter_keep_nothing() -> None:
    everywhere = memory("gpt-oss-20b", LORA, checkpointing=False)["activations"]
    upper_half = memory("gpt-oss-20b", {**LORA, "layers": ["12-23"]}, checkpointing=False)
    assert upper_half["activations"] < 0.6 * everywhere


def test_a_step_of_adapters_is_faster_and_decoding_takes_a_part_of_that() -> None:
    whole = estimated("gpt-oss-20b", {}, gpus=8, ep=8)
    adapted = estimated("gpt-oss-20b", LORA, gpus=8, ep=8)
    packed = estimated("gpt-oss-20b", PACKED, gpus=8, ep=8)
    assert sum(adapted.parts.values()) < sum(packed.parts.values()) < sum(whole.parts.values())
    assert adapted.parts["adapters"] > 0 == adapted.parts.get("experts: decoding", 0)
    assert packed.parts["experts: decoding"] > 0
    # two thirds of the operations are left: no gradients of weights
    assert adapted.flops.experts == pytest.approx(whole.flops.experts * 2 / 3)


@pytest.mark.parametrize(
    ("targets", "factors"),
    [(("attention",), {1.0}), (("experts",), {3.0}), (("attention", "experts"), {})],
)
def test_only_adapters_of_experts_wait_for_the_busiest_rank(
    targets: tuple[str, ...], factors: set[float]
) -> None:
    config = resolved("gpt-oss-20b", {**LORA, "targets": list(targets)}, gpus=8, ep=8)
    model = MODELS["gpt-oss-20b"]
    adapters = AdapterWork.of(config, model, counts_of(config, model).adapted, 0)
    assert adapters is not None
    balanced = Share(tokens=4096, attention_flops=0.0, window_flops=0.0, ep_size=8)
    even = adapters.changed({}, balanced)[ADAPTERS]
    skewed = adapters.changed({}, replace(balanced, imbalance=3.0))[ADAPTERS]
    for name, work in even.items():
        for ratio in (
            skewed[name].flops / work.flops,
            skewed[name].other_bytes / work.other_bytes,
        ):
            assert ratio in factors or (not factors and 1 < ratio < 3)


def test_share_of_the_peak_leaves_out_gradients_that_nobody_computes() -> None:
    model = MODELS["gpt-oss-20b"]
    shares = []
    for trained in (ALL, NOTHING):
        share = utilization(model, 4096, 1e4, "NVIDIA L40S", trained)
        assert share is not None
        shares.append(share)
    assert 2 / 3 < shares[1] / shares[0] < 0.75  # attention has no weights


def test_only_what_is_trained_is_gathered_after_an_update_of_zero_2() -> None:
    config = resolved("gpt-oss-20b", LORA, gpus=8, ep=8)
    counts = counts_of(config, MODELS["gpt-oss-20b"])
    wire = estimated("gpt-oss-20b", LORA, gpus=8, ep=8).wire["ZeRO gather"]
    assert wire.total == pytest.approx(2 * counts.trained_dense * 7 / 8)

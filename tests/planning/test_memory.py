"""The memory of a rank that is planned, beside what a GPU took and what DeepSpeed does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import GptOssConfig

from cpt.config import LaunchInfo, RunConfig, RunYaml, resolve
from cpt.job.memory_report import PEAK, predicted
from cpt.model.configuration import load_config
from cpt.planning import update_groups
from cpt.planning.hardware import GPUS
from cpt.planning.memory import count_parameters, device_memory
from cpt.planning.one_gpu import estimate_on_one_gpu
from data_pipeline.config.strict_yaml import parse_yaml, read_file

ON_AN_H100 = {
    4096: 56_405_339_648,
    8192: 56_901_307_904,
    16_384: 58_769_015_808,
    32_768: 62_502_178_304,
}
"""`torch.cuda.max_memory_allocated` by tokens; bench/gpu/results/2026-11-26-h100-fused.jsonl."""

MODEL = load_config(None, "gpt-oss-20b")
TINY = load_config(None, "tiny")


def planned(stage: int, model: GptOssConfig = MODEL, rows: int = 8, **zero: Any) -> dict[str, int]:
    """Plan the memory of eight ranks with one row each at a time."""
    config = resolved(stage, model, rows, **zero)
    return device_memory(config, model, count_parameters(model, ()))


def resolved(stage: int, model: GptOssConfig, rows: int = 8, **zero: Any) -> RunConfig:
    text = f"""
model: {{init: tiny}}
data: {{mix: unused.yaml}}
train: {{seq_len: 4096, global_batch_size: {rows}, micro_batch_size: 1, total_steps: 1, lr: 1e-5}}
"""
    run = read_file(RunYaml, parse_yaml(text, "run.yaml"))
    engine = {"zero_optimization": {"stage": stage, **zero}}
    launch = LaunchInfo(world_size=8, local_world_size=8)
    return resolve(run, parse_yaml(json.dumps(engine), "ds.json"), model, launch)


@pytest.mark.parametrize("tokens", ON_AN_H100)
def test_two_layers_take_what_they_took_on_an_h100(tokens: int) -> None:
    """Within 0.5 %: cuBLAS keeps some 70 MB of its own there."""
    predicted = estimate_on_one_gpu(MODEL, 2, tokens, GPUS["h100"]).memory
    assert sum(predicted.values()) == pytest.approx(ON_AN_H100[tokens], rel=0.005)


def test_update_is_the_peak_of_short_rows_only() -> None:
    short = estimate_on_one_gpu(MODEL, 2, 4096, GPUS["h100"]).memory
    long = estimate_on_one_gpu(MODEL, 2, 8192, GPUS["h100"]).memory
    assert short["update"] > short["activations"] == 0
    assert long["activations"] > long["update"] == 0


def test_part_of_a_group_ends_when_it_has_reached_the_size() -> None:
    assert update_groups.sub_groups([6, 3, 3, 9, 1], 10) == [[6, 3, 3], [9, 1]]
    assert update_groups.sub_groups([6, 3], 10) == [[6, 3]]


def test_group_of_experts_ends_before_it_is_too_large() -> None:
    half = update_groups.EXPERT_GROUP_SIZE // 2
    assert update_groups.expert_groups([half, half, half, 4 * half]) == [
        [half, half],
        [half],
        [4 * half],
    ]


def test_gradients_are_there_at_the_loss_only_if_they_add_up() -> None:
    """A single pass of ZeRO-2 begins without gradients, and needs most before they come."""
    once = planned(2, TINY, rows=8)
    twice = planned(2, TINY, rows=16)
    assert once["logits"] > 0 == once["gradients"]
    assert twice["gradients"] == planned(3, TINY)["gradients"] > 0


def test_reductions_have_the_buffers_of_the_deepspeed_json() -> None:
    assert planned(3)["reduce buffers"] == 2 * 500_000_000
    assert planned(3, reduce_bucket_size="auto")["reduce buffers"] == 2 * 2880**2
    assert planned(2, overlap_comm=True)["reduce buffers"] == 2 * 2 * 500_000_000
    assert planned(3, contiguous_gradients=False)["reduce buffers"] == 0


def test_report_leaves_out_the_buffers_that_zero_3_has_before_a_step() -> None:
    small, large = {"reduce_bucket_size": 1000}, {"reduce_bucket_size": 10**9}
    for stage, more in ((3, 0), (2, 2 * 10**9 - 2000)):
        peaks = []
        for zero in (small, large):
            peaks.append(predicted(resolved(stage, TINY, **zero), TINY, "cuda")[PEAK])
        assert peaks[1] - peaks[0] == more

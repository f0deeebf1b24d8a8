"""Layouts that cut blocks of 8-bit moments are refused, and the plan counts every form."""

from __future__ import annotations

import json
import math
import re

import pytest

from cpt.config import LaunchInfo, RunConfig, RunYaml, resolve
from cpt.config.moment_blocks import matrix_sizes, moment_block_problems
from cpt.errors import ConfigError
from cpt.model.configuration import load_config
from cpt.model.parameters import parameter_shapes
from cpt.planning.host_memory import host_memory
from cpt.planning.memory import count_parameters, device_memory
from cpt.storage.state_bytes import MOMENT_BLOCK
from data_pipeline.config.strict_yaml import parse_yaml, read_file
from tests.support.narrow_reference import has_blocks


def run_yaml(form: str, adapter: str = "none") -> RunYaml:
    text = f"""
model: {{init: tiny}}
data: {{mix: unused.yaml}}
adapter: {{kind: {adapter}}}
train: {{seq_len: 4096, global_batch_size: 1680, micro_batch_size: 1, total_steps: 1, lr: 1e-5,
         optimizer_state: {form}}}
"""
    return read_file(RunYaml, parse_yaml(text, "run.yaml"))


def resolved(form: str, world_size: int, **zero: object) -> RunConfig:
    engine = {"zero_optimization": {"stage": 3, **zero}}
    launch = LaunchInfo(world_size=world_size, local_world_size=8)
    ds_config = parse_yaml(json.dumps(engine), "ds.json")
    return resolve(run_yaml(form), ds_config, load_config(None, "gpt-oss-20b"), launch)


def test_world_size_that_cuts_blocks_is_refused_with_the_nearest_that_do_not() -> None:
    with pytest.raises(ConfigError, match=r"7 ranks cannot share") as caught:
        resolved("int8", 7)
    nearest = re.search(r"that can: ([\d, ]+)\.", str(caught.value))
    assert nearest is not None
    assert nearest.group(1) == "5, 6, 8"


@pytest.mark.parametrize("form", ["fp32", "bf16"])
def test_other_forms_run_with_any_world_size(form: str) -> None:
    assert resolved(form, 7).train.optimizer_state == form


@pytest.mark.parametrize("preset", ["gpt-oss-20b", "gpt-oss-120b"])
def test_nodes_of_eight_up_to_128_ranks_cut_no_block_of_a_release(preset: str) -> None:
    model = load_config(None, preset)  # type: ignore[arg-type]
    for world_size in (1, 2, 3, 4, 6, 8, 16, 24, 32, 48, 64, 96, 128):
        assert moment_block_problems("int8", model, world_size=world_size) == [], world_size
    assert moment_block_problems("int8", model, world_size=256) != []


@pytest.mark.parametrize("preset", ["tiny", "gpt-oss-20b", "gpt-oss-120b"])
def test_the_check_knows_the_sizes_of_all_matrices_in_blocks(preset: str) -> None:
    model = load_config(None, preset)  # type: ignore[arg-type]
    sizes = set()
    for name, shape in parameter_shapes(model).items():
        if has_blocks(name):
            sizes.add(math.prod(shape))
    assert sizes == set(matrix_sizes(model).values())


def test_model_whose_matrices_are_no_whole_blocks_is_refused() -> None:
    model = load_config(None, "tiny")
    model.vocab_size = 1001
    model.hidden_size = 36
    (told,) = moment_block_problems("int8", model, world_size=1)
    assert "embed_tokens" in told
    assert "train.optimizer_state: bf16" in told


def test_blocks_of_an_adapter_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer_state is int8, but with adapter"):
        run_yaml("int8", "lora")
    assert run_yaml("bf16", "lora").train.optimizer_state == "bf16"


def test_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer_state"):
        run_yaml("fp16")


BYTES = {"fp32": 12.0, "bf16": 8.0, "int8": 6 + 2 / MOMENT_BLOCK}


@pytest.mark.parametrize("form", BYTES)
def test_plan_counts_the_bytes_of_the_form_wherever_the_state_lies(form: str) -> None:
    """What is small stays in fp32 in the form int8: a fiftieth of a percent of the parameters."""
    model = load_config(None, "gpt-oss-20b")
    counts = count_parameters(model, ())
    trained = counts.trained_dense + counts.trained_experts
    on_device = resolved(form, 8)
    planned = device_memory(on_device, model, counts)["optimizer"]
    assert planned == pytest.approx(BYTES[form] * trained / 8, rel=1e-3)
    assert planned >= BYTES[form] * trained // 8
    on_host = resolved(form, 8, offload_optimizer={"device": "cpu"})
    assert host_memory(on_host, model, counts)["optimizer"] == planned
    assert device_memory(on_host, model, counts)["optimizer"] == 0

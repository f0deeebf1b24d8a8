"""A base that cannot be kept in 4 bits is refused before weights are read, with the cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GptOssConfig

from cpt.checkpoint.manifest import MANIFEST
from cpt.config import RunYaml
from cpt.errors import ConfigError
from cpt.job.packed_base import check_one_expert, packed_base_problems
from cpt.model.configuration import PRESETS
from cpt.model.parameters import parameter_shapes
from cpt.model.weights import mxfp4
from cpt.model.weights.hf_layout import SINGLE_FILE, is_expert_matrix
from data_pipeline.config.strict_yaml import parse_yaml, read_file

SMALL = {
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model(**sizes: Any) -> GptOssConfig:
    return GptOssConfig(**{**PRESETS["tiny"], **SMALL, **sizes})


def run(start: str, base: str = "mxfp4", guard: str = "{}") -> RunYaml:
    text = f"""
model: {start}
data: {{mix: unused.yaml}}
adapter: {{kind: lora, base: {base}}}
guard: {guard}
train: {{seq_len: 128, global_batch_size: 2, total_steps: 1, lr: 1e-4}}
"""
    return read_file(RunYaml, parse_yaml(text, "run.yaml"))


def checkpoint_of(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")
    return folder


def test_random_weights_are_refused() -> None:
    (problem,) = packed_base_problems(run("{init: tiny}"), model())
    assert problem.startswith("adapter.base is mxfp4, but the weights of model.init: tiny")
    assert "cpt export --format mxfp4" in problem


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size"])
def test_sizes_that_are_no_whole_blocks_are_refused(key: str, tmp_path: Path) -> None:
    (problem,) = packed_base_problems(run(f"{{path: {tmp_path}}}"), model(**{key: 48}))
    assert f"{key} of the model is 48, and MXFP4 has blocks of 32 weights" in problem


def test_checkpoint_is_refused_as_model_and_as_baseline(tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path)
    (problem,) = packed_base_problems(run(f"{{path: {folder}}}"), model())
    assert f"model.path {folder} is a checkpoint" in problem
    (problem,) = packed_base_problems(
        run(f"{{path: {tmp_path}}}", guard=f"{{baseline_model: {folder}}}"), model()
    )
    assert f"guard.baseline_model {folder} is a checkpoint" in problem


def test_nothing_is_refused_of_a_decoded_base() -> None:
    assert packed_base_problems(run("{init: tiny}", base="bf16"), model(hidden_size=48)) == []


def test_packed_base_without_an_adapter_is_refused() -> None:
    text = """
model: {init: tiny}
data: {mix: unused.yaml}
adapter: {base: mxfp4}
train: {seq_len: 128, global_batch_size: 2, total_steps: 1, lr: 1e-4}
"""
    with pytest.raises(ConfigError, match=r"adapter\.base is mxfp4, but adapter\.kind is none"):
        read_file(RunYaml, parse_yaml(text, "run.yaml"))


@pytest.mark.parametrize("exact", [True, False], ids=["decoded from MXFP4", "trained"])
def test_a_look_at_one_expert_tells_a_base_that_was_trained(tmp_path: Path, exact: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    stored = {}
    for name, shape in parameter_shapes(model()).items():
        values = torch.randn(shape, generator=generator).bfloat16()
        if exact and is_expert_matrix(name, shape):
            values = mxfp4.decode(*mxfp4.encode(values))
        stored[name] = values
    save_file(stored, str(tmp_path / SINGLE_FILE))
    if exact:
        check_one_expert(tmp_path, model())
        return
    with pytest.raises(ConfigError, match="gate_up_proj' is not MXFP4"):
        check_one_expert(tmp_path, model())

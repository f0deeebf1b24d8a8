"""A model with packed experts holds the codes of its directory and computes with their values."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GptOssConfig

from cpt.errors import ConfigError
from cpt.model import gpt_oss
from cpt.model.configuration import PRESETS
from cpt.model.experts.packed_base import (
    fill_packed,
    materialize_packed,
    pack,
    packed_matrices,
)
from cpt.model.parameters import parameter_shapes
from cpt.model.weights import mxfp4
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.hf_layout import BLOCKS, SCALES, SINGLE_FILE, is_expert_matrix
from cpt.model.weights.source import fill_model
from cpt.parallel.traffic import Traffic

LAYERS = 2
EXPERT = "model.layers.1.mlp.experts.down_proj"


def small_config() -> GptOssConfig:
    sizes = {"vocab_size": 96, "pad_token_id": 95, "bos_token_id": 94, "eos_token_id": 93}
    return GptOssConfig(**{**PRESETS["tiny"], **sizes, "num_hidden_layers": LAYERS})


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    """Random weights; those of experts are MXFP4 values."""
    generator = torch.Generator().manual_seed(5)
    drawn = {}
    for name, shape in parameter_shapes(small_config()).items():
        tensor = torch.randn(shape, generator=generator).bfloat16()
        if is_expert_matrix(name, shape):
            tensor = mxfp4.decode(*mxfp4.encode(tensor))
        drawn[name] = tensor
    return drawn


@pytest.fixture(params=["as released", "decoded"])
def path(request: pytest.FixtureRequest, tmp_path: Path, values: dict[str, Tensor]) -> Path:
    """A directory with MXFP4 experts, or with the same values in bf16."""
    stored = {}
    for name, tensor in values.items():
        if request.param == "as released" and is_expert_matrix(name, tensor.shape):
            stored[name + BLOCKS], stored[name + SCALES] = mxfp4.encode(tensor)
        else:
            stored[name] = tensor
    save_file(stored, str(tmp_path / SINGLE_FILE))
    return tmp_path


def packed_model(ep_size: int = 1, ep_rank: int = 0) -> gpt_oss.GptOssForCPT:
    model = gpt_oss.skeleton(small_config(), torch.bfloat16)
    topology: Any = SimpleNamespace(
        ep_size=ep_size, ep_rank=ep_rank, ep_group=None, traffic=Traffic()
    )
    gpt_oss.patch(model, topology)
    assert pack(model) == 2 * LAYERS
    gpt_oss.materialize(model, torch.device("cpu"))
    materialize_packed(model, torch.device("cpu"))
    return model


def source_of(path: Path) -> DirectoryWeights:
    return DirectoryWeights(path, parameter_shapes(small_config()))


@pytest.mark.parametrize("ep_size", [1, 4])
def test_ranks_together_hold_the_codes_of_every_expert_once(
    path: Path, values: dict[str, Tensor], ep_size: int
) -> None:
    parts = []
    for rank in range(ep_size):
        model = packed_model(ep_size, rank)
        fill_packed(model, source_of(path))
        parts.append(packed_matrices(model))
    assert len(parts[0]) == 2 * LAYERS
    for name in parts[0]:
        held = torch.cat([part[name].decoded(torch.bfloat16) for part in parts])
        assert torch.equal(held, values[name]), name


def test_packed_matrices_are_neither_parameters_nor_state() -> None:
    model = packed_model()
    named = {*dict(model.named_parameters()), *dict(model.named_buffers()), *model.state_dict()}
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in named)
    assert {name.rpartition(".")[2] for name in named if ".experts." in name} == {
        "gate_up_proj_bias",
        "down_proj_bias",
    }
    before = packed_matrices(model)[EXPERT].blocks_ENb16
    model.to(torch.float32)
    assert packed_matrices(model)[EXPERT].blocks_ENb16 is before


def test_packed_experts_take_four_and_a_quarter_bits() -> None:
    for name, packed in packed_matrices(packed_model()).items():
        numel = math.prod(parameter_shapes(small_config())[name])
        assert packed.nbytes * 8 == 4.25 * numel


@pytest.mark.parametrize("apart", [False, True], ids=["as trained", "as scored"])
def test_the_layers_compute_what_those_of_the_decoded_model_compute(
    path: Path, apart: bool
) -> None:
    """The output of the experts of all layers, and the gradient of what goes in."""
    results = []
    for is_packed in (True, False):
        if is_packed:
            model = packed_model()
            fill_packed(model, source_of(path))
        else:
            model = gpt_oss.skeleton(small_config(), torch.bfloat16)
            topology: Any = SimpleNamespace(ep_size=1, ep_rank=0, ep_group=None, traffic=Traffic())
            gpt_oss.patch(model, topology)
            gpt_oss.materialize(model, torch.device("cpu"))
        fill_model(model, source_of(path))
        hidden = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(8)).bfloat16()
        hidden.requires_grad_()
        out = hidden
        for layer in model.model.layers:
            layer.mlp.apart = apart
            out = out + layer.mlp(out)[0]
        out.float().square().sum().backward()
        results.append((out.detach(), hidden.grad))
    for of_codes, of_values in zip(*results, strict=True):
        assert torch.equal(of_codes, of_values)


def test_a_base_that_is_not_mxfp4_is_refused_with_tensor_and_cure(
    tmp_path: Path, values: dict[str, Tensor]
) -> None:
    stored = {**values, EXPERT: values[EXPERT].clone()}
    stored[EXPERT][3, 5, 7] = 1.03125
    save_file(stored, str(tmp_path / SINGLE_FILE))
    with pytest.raises(ConfigError) as caught:
        fill_packed(packed_model(), source_of(tmp_path))
    (problem,) = caught.value.problems
    assert f"{tmp_path / SINGLE_FILE}: tensor '{EXPERT}' is not MXFP4: 1 of 6,144" in problem
    assert "expert 3 have no code, the first is 1.03125 (nearest 1)" in problem
    assert "Give adapter.base: bf16, or a model.path that is MXFP4" in problem


@pytest.mark.parametrize("scale", [255, 0])
def test_codes_that_are_no_weights_are_refused_as_when_they_are_decoded(
    tmp_path: Path, values: dict[str, Tensor], scale: int
) -> None:
    """Scales of 255 are not finite, and with scales of 0 there is nothing in a tensor."""
    stored = {name: tensor for name, tensor in values.items() if name != EXPERT}
    stored[EXPERT + BLOCKS], stored[EXPERT + SCALES] = mxfp4.encode(values[EXPERT])
    if scale:
        stored[EXPERT + SCALES][2, 1, 0] = scale
    else:
        stored[EXPERT + SCALES].zero_()
    save_file(stored, str(tmp_path / SINGLE_FILE))
    messages = []
    for is_packed in (True, False):
        source = source_of(tmp_path)
        if is_packed:
            fill_packed(packed_model(), source)
        else:
            for name, shape in parameter_shapes(small_config()).items():
                list(source.pieces(name, 0, torch.Size(shape).numel()))
        with pytest.raises(ConfigError) as caught:
            source.refuse_unusable([source.seen_json()])
        messages.append(caught.value.problems[0])
    assert f"'{EXPERT}' holds" in messages[0]
    assert messages[0] == messages[1]


def test_inputs_that_do_not_fill_a_block_are_refused() -> None:
    model = gpt_oss.skeleton(GptOssConfig(**{**PRESETS["tiny"], "hidden_size": 48}), torch.bfloat16)
    topology: Any = SimpleNamespace(ep_size=1, ep_rank=0, ep_group=None, traffic=Traffic())
    gpt_oss.patch(model, topology)
    with pytest.raises(ValueError, match="multiple of 32"):
        pack(model)

"""Rounded weights are those of an MXFP4 export, whatever experts a rank asks for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

from cpt.config.precision_sections import ExponentRule
from cpt.model.configuration import PRESETS
from cpt.model.parameters import parameter_shapes
from cpt.model.weights import mxfp4
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.hf_layout import is_expert_matrix
from cpt.model.weights.mxfp4 import EXPONENT_RULES
from cpt.model.weights.rounded_weights import RoundedWeights


@pytest.mark.parametrize("rule", EXPONENT_RULES)
def test_expert_matrices_are_rounded_and_all_else_stays_what_it_is(
    tmp_path: Path, rule: ExponentRule
) -> None:
    torch.manual_seed(3)
    ids = {"pad_token_id": 63, "bos_token_id": 62, "eos_token_id": 61}
    sizes = {"vocab_size": 64, "num_hidden_layers": 1}
    config = GptOssConfig(**{**PRESETS["tiny"], **sizes, **ids})
    model = GptOssForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path)
    shapes = parameter_shapes(config)
    source = RoundedWeights(DirectoryWeights(tmp_path, shapes), shapes, rule)
    num_rounded = 0
    for name, value in model.named_parameters():
        expected = value.detach()
        first = 0
        if is_expert_matrix(name, shapes[name]):
            expected = mxfp4.decode(*mxfp4.encode(expected, rule))
            assert not torch.equal(expected, value)
            num_rounded += 1
            first = math.prod(shapes[name][1:])  # the second expert and all that follow
        found = [values for _, values in source.pieces(name, first, value.numel())]
        assert torch.equal(torch.cat(found), expected.flatten()[first:]), name
    assert num_rounded == 2

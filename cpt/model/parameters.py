"""The parameters of a configuration: names, shapes and sizes, without a model that holds them.

The names and shapes come from Hugging Face's own class, built on the meta device. That takes about
60 ms, so the answer is kept for each configuration.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM


def parameter_shapes(config: GptOssConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every parameter of the whole model, by Hugging Face's name."""
    return _shapes_of(config.to_json_string(use_diff=False))


def parameter_numels(config: GptOssConfig) -> dict[str, int]:
    """Return the number of elements of every parameter of the whole model."""
    return {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}


@functools.lru_cache(maxsize=16)
def _shapes_of(config_json: str) -> Mapping[str, tuple[int, ...]]:
    config = GptOssConfig(**json.loads(config_json))
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return MappingProxyType(shapes)

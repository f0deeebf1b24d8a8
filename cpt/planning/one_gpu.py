"""The estimate of a few layers on one GPU: what bench/gpu/acceptance.py measures beside it."""

from __future__ import annotations

import copy
import json

from transformers import GptOssConfig

from cpt.config import LaunchInfo, RunYaml, resolve
from cpt.planning.estimate import Estimate, estimate
from cpt.planning.hardware import Assumptions, Gpu
from cpt.planning.memory import count_parameters
from data_pipeline.config.strict_yaml import parse_yaml, read_file


def estimate_on_one_gpu(model: GptOssConfig, layers: int, tokens: int, gpu: Gpu) -> Estimate:
    """Estimate an optimizer step of the first layers of a model under ZeRO-3 with one rank.

    Args:
        model: Sizes of the whole model.
        layers: Layers that are taken; window layers and full layers take turns.
        tokens: Tokens of the only row of a step, one document.
        gpu: Where it runs.
    """
    first = copy.deepcopy(model)
    first.num_hidden_layers = layers
    first.layer_types = list(model.layer_types or ())[:layers]
    run = read_file(RunYaml, parse_yaml(_run_yaml(tokens), "the slice"))
    zero = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True}
    engine = parse_yaml(json.dumps({"zero_optimization": zero}), "the slice's DeepSpeed JSON")
    config = resolve(run, engine, first, LaunchInfo(world_size=1, local_world_size=1))
    return estimate(config, first, count_parameters(first, ()), gpu, Assumptions())


def _run_yaml(tokens: int) -> str:
    return f"""
model: {{init: tiny}}
data: {{mix: unused.yaml}}
train: {{seq_len: {tokens}, global_batch_size: 1, total_steps: 1, schedule: constant, lr: 1e-5,
  dtype: bf16}}
"""

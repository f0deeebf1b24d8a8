"""This project's engine as cpt/run.py builds it, with all experts on every rank.

It runs ZeRO-3, and ZeRO-2 with adapters, as the recipes for one GPU do.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from cpt.config import LaunchInfo, RunYaml, resolve
from cpt.deepspeed_adapter.groups import create_topology, init_distributed
from cpt.job.engine_setup import build_engine, fill_weights
from cpt.model.weights.random_init import RandomWeights
from cpt.parallel.topology import Topology
from cpt.resilience.phase import PhaseClock
from cpt.training.engine import TrainingEngine
from data_pipeline.config.strict_yaml import parse_yaml, read_file
from step_parts.cases import EXPERT_RANK, LR, RANK, Case, model_config


def build(case: Case, offload: dict[str, Any] | None = None) -> tuple[TrainingEngine, Topology]:
    """Join the process group and build the engine with random weights.

    Args:
        offload: Blocks for zero_optimization of the DeepSpeed JSON.
    """
    init_distributed(torch.device("cpu"))
    text = f"""
model: {{init: tiny}}
data: {{mix: unused.yaml}}
train: {{seq_len: {case.tokens}, global_batch_size: {case.ranks}, total_steps: 1000,
  schedule: constant, lr: {LR}}}
"""
    if case.lora:
        text += f"adapter: {{kind: lora, rank: {RANK}, expert_rank: {EXPERT_RANK}, alpha: {RANK}}}"
    zero = {"stage": 2 if case.lora else 3, **(offload or {})}
    engine_text = json.dumps({"zero_optimization": zero, "sequence_parallel_size": 1})
    engine_json = parse_yaml(engine_text, "ds.json")
    launch_info = LaunchInfo(world_size=case.ranks, local_world_size=case.ranks)
    model = model_config(case)
    run_yaml = read_file(RunYaml, parse_yaml(text, "run.yaml"))
    config = resolve(run_yaml, engine_json, model, launch_info)
    topology = create_topology(sp_size=1, ep_size=1, device=torch.device("cpu"))
    engine = build_engine(config, model, topology, PhaseClock())
    fill_weights(engine, RandomWeights(0, 0.02))
    return engine, topology

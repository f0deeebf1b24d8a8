"""One rank of the decoding test, which leaves the replies that every rank got in each scenario."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from cpt.config import LaunchInfo, resolve
from cpt.deepspeed_adapter.groups import create_topology
from cpt.job.engine_setup import build_engine, fill_weights, weight_source
from cpt.model.configuration import load_config
from cpt.parallel.agreement import gather_json
from cpt.resilience.phase import PhaseClock
from cpt.training.engine import TrainingEngine
from cpt.training.generate import generate
from data_pipeline.config.strict_yaml import parse_yaml
from tests.dist.cases import GREEDY, SAMPLED, STOPS, Scenario, decoding_prompts
from tests.dist.worker import run_scenarios, run_yaml


def build(scenario: Scenario, path: Path) -> TrainingEngine:
    """Return an engine of a scenario's layout that is filled from a directory."""
    model = load_config(path, None)
    engine_json = {
        "zero_optimization": {"stage": scenario.stage},
        "expert_parallel": {"enabled": True, "autoep_size": scenario.ep},
        "sequence_parallel_size": scenario.sp,
    }
    world_size = scenario.world_size
    config = resolve(
        run_yaml(scenario, path),
        parse_yaml(json.dumps(engine_json), "json"),
        model,
        LaunchInfo(world_size=world_size, local_world_size=world_size),
    )
    topology = create_topology(sp_size=scenario.sp, ep_size=scenario.ep, device=torch.device("cpu"))
    engine = build_engine(config, model, topology, PhaseClock())
    fill_weights(engine, weight_source(config, model, topology))
    return engine


def run(scenario: Scenario, folder: Path) -> None:
    """Reply greedily, and with draws; rows are refilled in the second."""
    engine = build(scenario, folder / "model")
    prompts = decoding_prompts()
    replies = {
        "greedy": generate(engine, prompts, GREEDY, stop_ids=[]),
        "sampled": generate(engine, prompts, SAMPLED, stop_ids=STOPS, max_rows=1),
    }
    by_rank = gather_json(replies, engine.topology.control_group)
    if engine.topology.rank == 0:
        (folder / f"{scenario.name}.json").write_text(json.dumps(by_rank))
    engine.deepspeed.destroy()
    dist.barrier()


if __name__ == "__main__":
    run_scenarios(run)

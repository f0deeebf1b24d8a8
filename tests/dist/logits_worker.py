"""One rank of the export test.

It leaves logits and a checkpoint after a few steps, and a checkpoint of MXFP4 weights after none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import GptOssConfig

from cpt.checkpoint.saver import Saver
from cpt.config import CheckpointSection, LaunchInfo, resolve
from cpt.deepspeed_adapter.groups import create_topology, init_distributed
from cpt.job.engine_setup import build_engine, fill_weights, weight_source
from cpt.model.configuration import load_config
from cpt.parallel.topology import Topology
from cpt.resilience.phase import PhaseClock
from cpt.training.engine import TrainingEngine
from cpt.training.generate import generate
from cpt.training.loader import make_micro_batch
from cpt.training.sampling import Sampling
from data_pipeline.config.strict_yaml import parse_yaml
from tests.dist.cases import (
    NEW_TOKENS,
    PROMPTS,
    ROWS,
    Scenario,
    model_config,
    num_predicted,
    rows_of_step,
)
from tests.dist.worker import run_yaml

INFO = LaunchInfo(world_size=2, local_world_size=2)
SCENARIO = Scenario(world_size=2, sp=1, ep=2, stage=3)
"""Settings of both runs; the layout of the second has SP 2."""


def build(path: Path, model: GptOssConfig, sp_size: int) -> tuple[TrainingEngine, Topology]:
    """Return an engine that is filled from a directory."""
    engine_json = {
        "zero_optimization": {"stage": 3},
        "expert_parallel": {"enabled": True, "autoep_size": 2},
        "sequence_parallel_size": sp_size,
    }
    parsed = parse_yaml(json.dumps(engine_json), "json")
    config = resolve(run_yaml(SCENARIO, path), parsed, model, INFO)
    topology = create_topology(sp_size=sp_size, ep_size=2, device=torch.device("cpu"))
    engine = build_engine(config, model, topology, PhaseClock())
    fill_weights(engine, weight_source(config, model, topology))
    return engine, topology


def save(
    run_dir: Path, engine: TrainingEngine, topology: Topology, model: GptOssConfig, step: int
) -> None:
    saver = Saver(run_dir, engine.deepspeed, topology, CheckpointSection())
    saver.save_now(step, {"model_config": model.to_dict()})


def continue_prompts(engine: TrainingEngine) -> list[list[int]]:
    """Return continuations of PROMPTS."""
    return generate(engine, PROMPTS, Sampling(max_new_tokens=NEW_TOKENS), stop_ids=[])


def train_and_save(folder: Path) -> list[list[int]]:
    """Train two steps, leave logits and a checkpoint, and return continuations."""
    engine, topology = build(folder / "model", model_config(), sp_size=1)
    for step in range(2):
        rows = rows_of_step(step)
        mine = range(topology.rank, ROWS, 2)
        batches = [make_micro_batch([rows[i]], [0], topology) for i in mine]
        engine.step(batches, [num_predicted(rows)], step=1)
    batch = make_micro_batch([rows_of_step(0)[0]], [0], topology)
    with torch.no_grad():
        logits = engine.deepspeed(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            packed_rows=batch.packed_rows,
        )
    new_tokens = continue_prompts(engine)
    if topology.rank == 0:
        save_file({"logits": logits.contiguous()}, str(folder / "logits.safetensors"))
    save(folder / "run", engine, topology, model_config(), 2)
    engine.deepspeed.destroy()
    return new_tokens


def save_untouched(folder: Path) -> list[list[int]]:
    """Load MXFP4 weights, save them without a step, and return continuations."""
    quantized = load_config(folder / "mxfp4", None)
    engine, topology = build(folder / "mxfp4", quantized, sp_size=2)
    save(folder / "untouched", engine, topology, quantized, 0)
    return continue_prompts(engine)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    init_distributed(torch.device("cpu"))
    new_tokens = {"run": train_and_save(folder), "untouched": save_untouched(folder)}
    (folder / f"generated-{dist.get_rank()}.json").write_text(json.dumps(new_tokens))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""For the export test: logits and checkpoint after a few steps, and a checkpoint of MXFP4 weights
after none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from cpt.checkpoint.saver import Saver
from cpt.config import CheckpointSection, LaunchInfo, resolve
from cpt.deepspeed_adapter.groups import create_topology, init_distributed
from cpt.job.engine_setup import build_engine, fill_weights, weight_source
from cpt.model.configuration import load_config
from cpt.resilience.phase import PhaseClock
from cpt.training.engine import TrainingEngine
from cpt.training.generate import continue_texts
from cpt.training.loader import make_micro_batch
from data_pipeline.config.strict_yaml import parse_yaml
from tests.dist.cases import NEW_TOKENS, PROMPTS, ROWS, WINDOW, Scenario, model_config, rows_of_step
from tests.dist.worker import run_yaml


def generate(engine: TrainingEngine) -> list[list[int]]:
    """Continuations of PROMPTS."""
    return continue_texts(engine, PROMPTS, max_new_tokens=NEW_TOKENS, window=WINDOW, stop_ids=[])


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    init_distributed(torch.device("cpu"))
    scenario = Scenario(world_size=2, sp=1, ep=2, stage=3)
    experts = {"enabled": True, "autoep_size": 2}
    engine_json = parse_yaml(
        json.dumps({"zero_optimization": {"stage": 3}, "expert_parallel": experts}), "json"
    )
    info = LaunchInfo(world_size=2, local_world_size=2)
    config = resolve(run_yaml(scenario, folder / "model"), engine_json, model_config(), info)
    topology = create_topology(sp_size=1, ep_size=2, device=torch.device("cpu"))
    engine = build_engine(config, model_config(), topology, PhaseClock())
    fill_weights(engine, weight_source(config, model_config(), topology))
    for step in range(2):
        rows = rows_of_step(step)
        batches = [
            make_micro_batch([rows[i]], [0], topology) for i in range(topology.rank, ROWS, 2)
        ]
        engine.step(batches, [sum(int((row.labels >= 0).sum()) for row in rows)], step=1)
    batch = make_micro_batch([rows_of_step(0)[0]], [0], topology)
    with torch.no_grad():
        logits = engine.deepspeed(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            packed_rows=batch.packed_rows,
        )
    new_tokens = {"run": generate(engine)}
    if topology.rank == 0:
        save_file({"logits": logits.contiguous()}, str(folder / "logits.safetensors"))
    state = {"model_config": model_config().to_dict()}
    Saver(folder / "run", engine.deepspeed, topology, CheckpointSection()).save_now(2, state)
    engine.deepspeed.destroy()
    path = folder / "mxfp4"
    quantised = load_config(path, None)
    sequence_parallel = parse_yaml(
        json.dumps(
            {
                "zero_optimization": {"stage": 3},
                "expert_parallel": experts,
                "sequence_parallel_size": 2,
            }
        ),
        "json",
    )
    config = resolve(run_yaml(scenario, path), sequence_parallel, quantised, info)
    topology = create_topology(sp_size=2, ep_size=2, device=torch.device("cpu"))
    engine = build_engine(config, quantised, topology, PhaseClock())
    fill_weights(engine, weight_source(config, quantised, topology))
    state = {"model_config": quantised.to_dict()}
    Saver(folder / "untouched", engine.deepspeed, topology, CheckpointSection()).save_now(0, state)
    new_tokens["untouched"] = generate(engine)
    (folder / f"generated-{topology.rank}.json").write_text(json.dumps(new_tokens))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

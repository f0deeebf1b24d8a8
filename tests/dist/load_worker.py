"""One rank of the load test.

It fills engines from a directory, compares its own parts, counts bytes, and does one step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from cpt.checkpoint.loading import flat_ranges
from cpt.config import LaunchInfo, resolve
from cpt.deepspeed_adapter.groups import create_topology, init_distributed
from cpt.errors import ConfigError
from cpt.job.engine_setup import build_engine, fill_weights, verify_checksums, weight_source
from cpt.model.configuration import load_config
from cpt.model.weights.directory import DirectoryWeights
from cpt.parallel.agreement import gather_json
from cpt.parallel.topology import Topology
from cpt.resilience.phase import PhaseClock
from cpt.training.engine import TrainingEngine
from cpt.training.loader import make_micro_batch
from data_pipeline.config.strict_yaml import parse_yaml
from tests.dist.cases import Scenario, num_predicted, rows_of_step
from tests.dist.worker import run_yaml


def build(scenario: Scenario, path: Path) -> tuple[TrainingEngine, DirectoryWeights, Topology]:
    """Return an engine in the layout of a scenario, filled from a directory."""
    engine_json = {
        "zero_optimization": {"stage": scenario.stage},
        "sequence_parallel_size": scenario.sp,
        "expert_parallel": {"enabled": True, "autoep_size": scenario.ep},
    }
    info = LaunchInfo(world_size=scenario.world_size, local_world_size=scenario.world_size)
    model_config = load_config(path, None)
    parsed = parse_yaml(json.dumps(engine_json), "json")
    config = resolve(run_yaml(scenario, path), parsed, model_config, info)
    device = torch.device("cpu")
    topology = create_topology(sp_size=config.sp_size, ep_size=config.ep_size, device=device)
    source = weight_source(config, model_config, topology)
    assert isinstance(source, DirectoryWeights)
    verify_checksums(source, topology)
    engine = build_engine(config, model_config, topology, PhaseClock())
    fill_weights(engine, source)
    return engine, source, topology


def report(
    engine: TrainingEngine, source: DirectoryWeights, topology: Topology, expected: Path
) -> dict[str, Any]:
    """Return this rank's wrong values by name, the bytes it read, and the elements it holds."""
    different = []
    numel = {"experts": 0, "dense": 0}
    with safe_open(str(expected), framework="pt") as values:
        for key, part in flat_ranges(engine.deepspeed, topology).items():
            kind, name = key.split("/", 1)
            if kind != "master":
                continue
            end = part.offset + part.tensor.numel()
            whole = values.get_tensor(name).view(-1)
            if not torch.equal(part.tensor, whole[part.offset : end]):
                different.append(name)
            is_expert_matrix = ".experts." in name and name.endswith("_proj")
            numel["experts" if is_expert_matrix else "dense"] += part.tensor.numel()
    return {"different": different, "bytes_read": source.bytes_read, **numel}


def first_loss(engine: TrainingEngine, topology: Topology, size: int) -> float:
    """Return the loss of one step on the rows of step 0, in micro batches of some rows."""
    rows = rows_of_step(0)
    mine = rows[topology.dp_rank :: topology.dp_size]
    batches = []
    for first in range(0, len(mine), size):
        batches.append(make_micro_batch(mine[first : first + size], [0] * size, topology))
    return engine.step(batches, [num_predicted(rows)], step=1).loss


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    init_distributed(torch.device("cpu"))
    for text in sys.argv[2:]:
        case = json.loads(text)
        directory = case["directory"]
        scenario = Scenario(**case["scenario"])
        try:
            engine, source, topology = build(scenario, folder / directory)
        except ConfigError as error:
            (folder / f"{directory}-refused-{dist.get_rank()}.txt").write_text(str(error))
            continue
        expected = folder / f"{directory}-expected.safetensors"
        found = report(engine, source, topology, expected)
        reports = gather_json(found, topology.control_group)
        loss = first_loss(engine, topology, scenario.micro_batch_size)
        if topology.rank == 0:
            out = folder / f"{directory}-{scenario.name}.json"
            out.write_text(json.dumps({"loss": loss, "ranks": reports}))
        engine.deepspeed.destroy()
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

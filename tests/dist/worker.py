"""One rank of the layout comparison: runs scenarios one after another and leaves losses and a
checkpoint of each.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cpt.checkpoint.loading import load_checkpoint
from cpt.checkpoint.saver import Saver
from cpt.config import CheckpointSection, LaunchInfo, RunConfig, RunYaml, resolve
from cpt.config.engine_json import OFFLOADS
from cpt.deepspeed_adapter.groups import create_topology, init_distributed
from cpt.deepspeed_adapter.offload import nvme_paths
from cpt.deepspeed_adapter.shards import state_tensors
from cpt.job.engine_setup import build_engine, fill_weights, weight_source
from cpt.parallel.agreement import gather_json
from cpt.planning.memory import count_parameters, host_memory
from cpt.resilience.faults import install_faults
from cpt.resilience.phase import PhaseClock
from cpt.training.engine import TrainingEngine
from cpt.training.kl_targets import KLTargets
from cpt.training.loader import make_micro_batch
from data_pipeline.config.strict_yaml import parse_yaml, read_file
from tests.dist.cases import (
    CLIPPING,
    KL_WEIGHT,
    ROWS,
    SEQ_LEN,
    SETTINGS,
    SOURCES,
    Scenario,
    even_row_tokens,
    model_config,
    parameter_file,
    rows_of_step,
)
from tests.support.launcher import ROOT
from tests.support.mapped_files import mapped_files

STATE = {"model_config": model_config().to_dict()}


def run_yaml(scenario: Scenario, model_dir: Path) -> RunYaml:
    text = f"""
model: {{path: {model_dir}, activation_checkpointing: {str(scenario.checkpointing).lower()},
  offload_checkpoints: {str(scenario.offload_checkpoints).lower()},
  window_exchange: {scenario.exchange}, expert_recompute: {scenario.expert_recompute},
  router_aux_loss_coef: {scenario.router_penalties * 0.3}, router_z_loss_coef: {scenario.router_penalties * 0.1}}}
data: {{mix: unused.yaml}}
train: {{seq_len: {SEQ_LEN}, global_batch_size: {ROWS}, micro_batch_size: {scenario.micro_batch_size}, total_steps: 100,
  schedule: constant, dtype: {scenario.dtype}, gradient_clipping: {CLIPPING},
  freeze: {json.dumps(scenario.freeze)},
  kl_targets: {json.dumps(str(model_dir.parent / "targets") if scenario.kl else None)},
  kl_weight: {json.dumps(KL_WEIGHT if scenario.kl else None)},
  {", ".join(f"{key}: {value}" for key, value in SETTINGS.items())}}}
"""
    return read_file(RunYaml, parse_yaml(text, "scenario"))


def config_of(scenario: Scenario, folder: Path) -> RunConfig:
    ds: dict[str, Any] = {"zero_optimization": {"stage3_param_persistence_threshold": 100}}
    if scenario.ds_config:
        ds = json.loads((ROOT / "ds_configs" / scenario.ds_config).read_text())
    ds["zero_optimization"]["stage"] = scenario.stage
    ds["zero_optimization"] |= {
        f"offload_{what}": {"device": device} for what, device in scenario.offloads.items()
    }
    if scenario.sub_group_size:
        ds["zero_optimization"]["sub_group_size"] = scenario.sub_group_size
    for block in (ds["zero_optimization"].get(name, {}) for name in OFFLOADS):
        if block.get("device") == "nvme":
            block["nvme_path"] = str(folder / "nvme" / scenario.name)
    ds["sequence_parallel_size"] = scenario.sp
    ds["expert_parallel"] = {"enabled": True, "autoep_size": scenario.ep}
    launch_info = LaunchInfo(world_size=scenario.world_size, local_world_size=scenario.world_size)
    return resolve(
        run_yaml(scenario, folder / "model"),
        parse_yaml(json.dumps(ds), "scenario.json"),
        model_config(),
        launch_info,
    )


def parts_outside(nvme: Path, engine: TrainingEngine) -> list[str]:
    """The parts of this rank's offloaded state of which something lies in memory that is no file in
    `nvme`.
    """
    inside = mapped_files(nvme)

    def is_inside(tensor: torch.Tensor) -> bool:
        return any(start <= tensor.data_ptr() < start + size for start, size in inside)

    state = state_tensors(engine.deepspeed)
    state["weights"] = [
        parameter.ds_tensor.data for parameter in engine.deepspeed.module.parameters()
    ]
    return [
        part
        for part, tensors in state.items()
        if not all(is_inside(t) for t in tensors if t.numel())
    ]


def run(scenario: Scenario, folder: Path) -> None:
    config = config_of(scenario, folder)
    topology = create_topology(
        sp_size=config.sp_size, ep_size=config.ep_size, device=torch.device("cpu")
    )
    clock = PhaseClock()
    engine = build_engine(config, model_config(), topology, clock)
    install_faults(engine.deepspeed, clock)
    if not scenario.resume_from:
        fill_weights(engine, weight_source(config, model_config(), topology))
    if scenario.resume_from:
        loaded = load_checkpoint(
            folder / scenario.resume_from, engine.deepspeed, topology, str(scenario.start)
        )
        assert loaded is not None and loaded.step == scenario.start
    targets = (
        KLTargets(folder / "targets", SOURCES, {SOURCES[0]: even_row_tokens()})
        if scenario.kl
        else None
    )
    saver, results = (
        Saver(folder / scenario.name, engine.deepspeed, topology, CheckpointSection()),
        [],
    )
    for step in (
        step for step in range(scenario.start, scenario.steps) if step not in scenario.omit
    ):
        rows = rows_of_step(step)
        per_pass = config.micro_batch_size * topology.dp_size
        micro_batches = []
        for first in range(0, ROWS, per_pass):
            start = first + topology.dp_rank * config.micro_batch_size
            mine = range(start, start + config.micro_batch_size)
            found = None
            if targets is not None:
                places = [(i % 2, (step * ROWS + i) // 2) for i in mine]
                found = targets.of_rows(places, topology, SEQ_LEN)
            sources = [i % 2 for i in mine]
            micro_batches.append(
                make_micro_batch([rows[i] for i in mine], sources, topology, found)
            )
        tokens = [int(sum((row.labels >= 0).sum() for row in rows[source::2])) for source in (0, 1)]
        result = engine.step(micro_batches, tokens, step=step + 1)
        results.append(dataclasses.asdict(result))
        if scenario.saves_first and step == 0:
            saver.save_now(1, STATE)
    if nvme_paths(config.engine_json):
        nvme = folder / "nvme" / scenario.name
        found = {
            "outside": parts_outside(nvme, engine),
            "bytes": sum(size for _, size in mapped_files(nvme)),
        }
        by_rank = gather_json(found, topology.control_group)
        if topology.rank == 0:
            planned = host_memory(
                config, model_config(), count_parameters(model_config(), scenario.freeze), "nvme"
            )
            files = {"by_rank": by_rank, "planned_bytes": sum(planned.values())}
            (folder / f"{scenario.name}.files.json").write_text(json.dumps(files))
    saver.save_now(scenario.steps, STATE)
    if topology.rank == 0:
        parameter_file(folder, scenario).write_text(json.dumps(results))
    engine.deepspeed.destroy()
    dist.barrier()


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    init_distributed(torch.device("cpu"))
    for text in sys.argv[2:]:
        run(Scenario(**json.loads(text)), folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

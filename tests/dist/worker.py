"""One rank of the layout comparison, which leaves losses and a checkpoint of each scenario."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import GptOssConfig

from cpt.checkpoint.adapter_state import AdapterState
from cpt.checkpoint.loading import flat_ranges, load_checkpoint
from cpt.checkpoint.saver import Saver
from cpt.config import CheckpointSection, LaunchInfo, RunConfig, RunYaml, resolve
from cpt.config.offload_blocks import OFFLOADS
from cpt.deepspeed_adapter.experts import is_expert
from cpt.deepspeed_adapter.groups import create_topology, init_distributed
from cpt.deepspeed_adapter.offload import nvme_paths
from cpt.deepspeed_adapter.partition import gathered
from cpt.deepspeed_adapter.rounding import is_expert_matrix
from cpt.deepspeed_adapter.shards import publish_master_weights, state_tensors
from cpt.job.engine_setup import base_of, build_engine, fill_weights, weight_source
from cpt.model.adapters.layout import adapter_shapes, is_adapter_name
from cpt.parallel.agreement import gather_json
from cpt.parallel.topology import Topology
from cpt.planning.host_memory import host_memory
from cpt.planning.memory import count_parameters
from cpt.resilience.faults import install_faults
from cpt.resilience.phase import PhaseClock
from cpt.training.engine import TrainingEngine
from cpt.training.kl_targets import KLTargets, LabeledSlots
from cpt.training.loader import MicroBatch, make_micro_batch, span_of_rank
from data_pipeline.config.strict_yaml import parse_yaml, read_file
from data_pipeline.store.packing import Integers
from tests.dist.cases import (
    KL_WEIGHT,
    POISONED,
    ROWS,
    SEQ_LEN,
    SETTINGS,
    SOURCES,
    Scenario,
    adapter_value,
    even_row_tokens,
    model_config,
    num_predicted,
    parameter_file,
    rows_of_step,
)
from tests.support.launcher import ROOT
from tests.support.mapped_files import mapped_files


def state_of(config: RunConfig, scenario: Scenario, step: int) -> dict[str, Any]:
    """Return what the checkpoint of a step keeps besides tensors, as far as tests read it."""
    state = {
        "model_config": model_config(scenario.expert_size).to_dict(),
        "quantize": config.train.quantize.state_after(step),
    }
    if config.adapter.is_on:
        adapter = AdapterState(
            section=config.adapter, base=base_of(config, model_config()), dtype=config.train.dtype
        )
        state["adapter"] = adapter.to_json()
    return state


def targets_folder(scenario: Scenario) -> str:
    """Return the name of the folder with the targets of a scenario."""
    return "targets-masked" if scenario.masked else "targets"


def run_yaml(scenario: Scenario, model_dir: Path) -> RunYaml:
    """Return the run YAML of a scenario."""
    model: dict[str, Any] = {
        "path": str(model_dir),
        "activation_checkpointing": scenario.checkpointing,
        "offload_checkpoints": scenario.offload_checkpoints,
        "window_exchange": scenario.exchange,
        "expert_recompute": scenario.expert_recompute,
        "expert_overlap": scenario.expert_overlap,
        "router_aux_loss_coef": 0.0,
        "router_z_loss_coef": 0.0,
    }
    if scenario.router_penalties:
        model |= {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.1}
    train = {
        "seq_len": SEQ_LEN,
        "global_batch_size": ROWS,
        "micro_batch_size": scenario.micro_batch_size,
        "total_steps": 100,
        "schedule": "constant",
        "dtype": scenario.dtype,
        "gradient_clipping": scenario.clipping,
        "freeze": list(scenario.freeze),
        "products": scenario.products,
        "optimizer": scenario.optimizer,
        **SETTINGS,
        "weight_decay": scenario.weight_decay,
        "optimizer_state": scenario.optimizer_state,
    }
    if scenario.quantize:
        train["quantize"] = {"experts": "mxfp4", **scenario.quantize}
    if scenario.kl:
        train |= {
            "kl_targets": str(model_dir.parent / targets_folder(scenario)),
            "kl_weight": KL_WEIGHT,
        }
    content = {
        "model": model,
        "data": {"mix": "unused.yaml"},
        "train": train,
        "adapter": scenario.adapter,
    }
    text = json.dumps(content)
    return read_file(RunYaml, parse_yaml(text, "scenario"))


def config_of(scenario: Scenario, folder: Path) -> RunConfig:
    """Return the resolved configuration of a scenario."""
    threshold = {"stage3_param_persistence_threshold": scenario.persistence_threshold}
    ds: dict[str, Any] = {"zero_optimization": threshold}
    if scenario.ds_config:
        ds = json.loads((ROOT / "ds_configs" / scenario.ds_config).read_text())
    zero = ds["zero_optimization"]
    zero["stage"] = scenario.stage
    for what, device in scenario.offloads.items():
        zero[f"offload_{what}"] = {"device": device}
    if scenario.gradients:
        zero["offload_optimizer"]["gradients"] = scenario.gradients
    if scenario.sub_group_size:
        zero["sub_group_size"] = scenario.sub_group_size
    for name in OFFLOADS:
        block = zero.get(name, {})
        if block.get("device") == "nvme":
            block["nvme_path"] = str(folder / "nvme" / scenario.name)
    ds["sequence_parallel_size"] = scenario.sp
    ds["expert_parallel"] = {"enabled": True, "autoep_size": scenario.ep}
    return resolve(
        run_yaml(scenario, folder / "model"),
        parse_yaml(json.dumps(ds), "scenario.json"),
        model_config(scenario.expert_size),
        LaunchInfo(world_size=scenario.world_size, local_world_size=scenario.world_size),
    )


def parts_outside(nvme: Path, engine: TrainingEngine) -> list[str]:
    """Return the parts of this rank's state that do not lie wholly in files in `nvme`."""
    inside = mapped_files(nvme)

    def is_inside(tensor: torch.Tensor) -> bool:
        return any(start <= tensor.data_ptr() < start + size for start, size in inside)

    state = state_tensors(engine.deepspeed)
    parameters = engine.deepspeed.module.parameters()
    state["weights"] = [parameter.ds_tensor.data for parameter in parameters]
    outside = []
    for part, tensors in state.items():
        filled = [tensor for tensor in tensors if tensor.numel()]
        if not all(map(is_inside, filled)):
            outside.append(part)
    return outside


def micro_batches_of(
    step: int,
    config: RunConfig,
    topology: Topology,
    targets: KLTargets | None,
    *,
    masked: bool = False,
) -> list[MicroBatch]:
    """Return this rank's part of the rows of a step."""
    rows = rows_of_step(step, masked=masked)
    per_pass = config.micro_batch_size * topology.dp_size
    micro_batches = []
    for first in range(0, ROWS, per_pass):
        start = first + topology.dp_rank * config.micro_batch_size
        mine = range(start, start + config.micro_batch_size)
        found = None
        if targets is not None:
            parts = []
            for i in mine:
                place = (i % 2, (step * ROWS + i) // 2)
                parts.append(labeled_slots(place, rows[i].labels, topology))
            found = targets.of_rows(parts)
        sources = [i % 2 for i in mine]
        batch = make_micro_batch([rows[i] for i in mine], sources, topology, found)
        micro_batches.append(batch)
    return micro_batches


def labeled_slots(place: tuple[int, int], labels: Integers, topology: Topology) -> LabeledSlots:
    """Return this rank's part of a row."""
    span = span_of_rank(SEQ_LEN, topology)
    source, row = place
    before = int((labels[: span.start] >= 0).sum())
    return LabeledSlots(source=source, row=row, labels=labels[span], labels_before=before)


def write_files_report(
    scenario: Scenario, folder: Path, config: RunConfig, topology: Topology, engine: TrainingEngine
) -> None:
    """Write which of every rank's state lies in files, how much, and how much was planned."""
    nvme = folder / "nvme" / scenario.name
    found = {
        "outside": parts_outside(nvme, engine),
        "bytes": sum(size for _, size in mapped_files(nvme)),
    }
    by_rank = gather_json(found, topology.control_group)
    if topology.rank == 0:
        parameters = count_parameters(model_config(), scenario.freeze)
        planned = host_memory(config, model_config(), parameters, "nvme")
        files = {"by_rank": by_rank, "planned_bytes": sum(planned.values())}
        (folder / f"{scenario.name}.files.json").write_text(json.dumps(files))


@torch.no_grad()
def fill_adapters(engine: TrainingEngine, config: RunConfig, of_model: GptOssConfig) -> None:
    """Give A and B of every adapter the values of `adapter_value`."""
    shapes = adapter_shapes(config.adapter, of_model)
    for key, part in flat_ranges(engine.deepspeed, engine.topology).items():
        kind, name = key.split("/", 1)
        if kind == "master" and name.endswith(("lora_A", "lora_B")):
            values = adapter_value(name, shapes[name]).flatten()
            part.tensor.copy_(values[part.offset : part.offset + part.tensor.numel()])
    if shapes:
        publish_master_weights(engine.deepspeed)


def held(parameter: Any) -> torch.Tensor:
    """Return what this rank holds of a parameter between steps."""
    partition = getattr(parameter, "ds_tensor", None)
    values: torch.Tensor = parameter.data
    if partition is not None:
        values = partition.data[: partition.ds_numel]
    return values


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Return a hash of the bits of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def frozen_weights(engine: TrainingEngine) -> list[torch.Tensor]:
    """Return what this rank holds of the weights below the adapters."""
    named = engine.deepspeed.module.named_parameters()
    return [held(parameter) for name, parameter in named if not is_adapter_name(name)]


def write_adapter_report(
    scenario: Scenario, folder: Path, engine: TrainingEngine, base_before: str
) -> None:
    """Write what every rank holds of adapters and of the weights below them."""
    state = state_tensors(engine.deepspeed)
    frozen = frozen_weights(engine)
    replicated = []
    gradients = []
    for name, parameter in engine.deepspeed.module.named_parameters():
        if not is_adapter_name(name) and parameter.grad is not None:
            gradients.append(name)
        if is_adapter_name(name) and not is_expert(parameter):
            with gathered([parameter]):
                replicated.append(parameter.detach().clone())
    report = {
        "frozen_bytes": sum(tensor.nbytes for tensor in frozen),
        "optimizer_bytes": sum(tensor.nbytes for tensor in state["optimizer"]),
        "gradients_of_frozen": gradients,
        "base_before": base_before,
        "base_after": digest(frozen),
        "replicated": digest(replicated),
    }
    by_rank = gather_json(report, engine.topology.control_group)
    if engine.topology.rank == 0:
        (folder / f"{scenario.name}.adapter.json").write_text(json.dumps(by_rank))


def poison_expert(engine: TrainingEngine, value: float) -> None:
    """Set one master weight of the first expert matrix, on the rank that holds it."""
    for key, part in flat_ranges(engine.deepspeed, engine.topology).items():
        if key == f"master/{POISONED}" and part.offset == 0:
            part.tensor.data[0] = value
    publish_master_weights(engine.deepspeed)


def write_expert_matrices(scenario: Scenario, folder: Path, engine: TrainingEngine) -> None:
    """Write the whole expert matrices as the next forward pass of every rank will see them."""
    topology = engine.topology
    matrices = {}
    for name, parameter in engine.deepspeed.module.named_parameters():
        if not is_expert_matrix(parameter):
            continue
        with gathered([parameter]):
            local = parameter.detach().clone()
        parts = [torch.empty_like(local) for _ in range(topology.ep_size)]
        dist.all_gather(parts, local, group=topology.ep_group)
        matrices[name] = torch.cat(parts)
    found = gather_json(digest(matrices.values()), topology.control_group)
    assert len(set(found)) == 1, "ranks see other weights"
    if topology.rank == 0:
        save_file(matrices, folder / f"{scenario.name}.working.safetensors")


def run(scenario: Scenario, folder: Path) -> None:
    """Train a scenario; leave its checkpoint and the results of its steps."""
    config = config_of(scenario, folder)
    device = torch.device("cpu")
    topology = create_topology(sp_size=config.sp_size, ep_size=config.ep_size, device=device)
    clock = PhaseClock()
    of_model = model_config(scenario.expert_size)
    engine = build_engine(config, of_model, topology, clock)
    install_faults(engine.deepspeed, clock)
    source = weight_source(config, of_model, topology)
    if scenario.resume_from:
        run_dir = folder / scenario.resume_from
        start = str(scenario.start)
        loaded = load_checkpoint(run_dir, engine.deepspeed, topology, start, set_aside=False)
        assert loaded is not None and loaded.step == scenario.start
        if config.adapter.is_on:
            fill_weights(engine, source, below_adapter=True)
    else:
        fill_weights(engine, source)
        fill_adapters(engine, config, of_model)
    if scenario.poison:
        poison_expert(engine, float(scenario.poison))
    engine.rounding.publish(scenario.start)
    targets = None
    if scenario.kl:
        row_tokens = {SOURCES[0]: even_row_tokens(masked=scenario.masked)}
        targets = KLTargets(folder / targets_folder(scenario), SOURCES, row_tokens)
    base_before = digest(frozen_weights(engine)) if scenario.adapter else ""
    saver = Saver(folder / scenario.name, engine.deepspeed, topology, CheckpointSection())
    results = []
    for step in range(scenario.start, scenario.steps):
        if step in scenario.omit:
            continue
        masked = scenario.masked
        micro_batches = micro_batches_of(step, config, topology, targets, masked=masked)
        rows = rows_of_step(step, masked=masked)
        tokens = [num_predicted(rows[0::2]), num_predicted(rows[1::2])]
        weights = scenario.loss_weights or None
        result = engine.step(micro_batches, tokens, step=step + 1, loss_weights=weights)
        results.append(asdict(result))
        if scenario.saves_first and step == 0:
            saver.save_now(1, state_of(config, scenario, 1))
    if nvme_paths(config.engine_json):
        write_files_report(scenario, folder, config, topology, engine)
    if scenario.adapter:
        write_adapter_report(scenario, folder, engine, base_before)
    if scenario.quantize:
        write_expert_matrices(scenario, folder, engine)
    saver.save_now(scenario.steps, state_of(config, scenario, scenario.steps))
    if topology.rank == 0:
        parameter_file(folder, scenario).write_text(json.dumps(results))
    engine.deepspeed.destroy()
    dist.barrier()


def run_scenarios(run_one: Callable[[Scenario, Path], None]) -> None:
    """Run the scenarios of the command line on one thread: a folder, then a scenario each."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    init_distributed(torch.device("cpu"))
    for text in sys.argv[2:]:
        run_one(Scenario(**json.loads(text)), folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    run_scenarios(run)

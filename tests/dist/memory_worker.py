"""One rank of the memory test: measures a few steps of one small engine after another."""

from __future__ import annotations

import gc
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import GptOssConfig

from cpt.config import LaunchInfo, RunConfig, RunYaml, resolve
from cpt.deepspeed_adapter.groups import create_topology, init_distributed
from cpt.deepspeed_adapter.shards import flat_partitions
from cpt.job.engine_setup import build_engine, fill_weights, weight_source
from cpt.job.memory_report import bytes_on, measured, peak_within, predicted
from cpt.model.configuration import PRESETS
from cpt.model.parameters import parameter_shapes
from cpt.model.weights import mxfp4
from cpt.model.weights.hf_layout import BLOCKS, SCALES, SINGLE_FILE, is_expert_matrix
from cpt.parallel.agreement import gather_json
from cpt.parallel.topology import Topology
from cpt.planning.host_memory import host_memory, largest_sub_group
from cpt.planning.memory import counts_of
from cpt.resilience.phase import PhaseClock
from cpt.storage.state_bytes import gradient_place
from cpt.training.engine import TrainingEngine
from cpt.training.loader import MicroBatch, make_micro_batch
from data_pipeline.config.strict_yaml import parse_yaml, read_file
from data_pipeline.dataset import PackedRow

WORLD_SIZE = 2
VOCABULARY = 16_384
MEASURED_STEPS = 3
"""Steps of which the smallest peak counts.

What a thread of gloo frees goes unseen and only ever adds to a peak (see `highest_level`).
"""
ARRIVALS = "gradients on their way"
"""The memory to which ZeRO-3 copies gradients from the device, for one update after the other."""
ROUNDED = "rounded weights"
"""The part of `host_memory` that DeepSpeed keeps under ZeRO 1 and 2."""
MODEL = {
    **PRESETS["tiny"],
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The tiny model with a vocabulary so small that its tables do not hide the activations."""


def packed_row(seq_len: int, seed: int) -> PackedRow:
    """Return a row of four random documents."""
    generator = np.random.default_rng(seed)
    cuts = sorted(generator.choice(np.arange(1, seq_len), size=3, replace=False))
    bounds = [0, *(int(cut) for cut in cuts), seq_len]
    return PackedRow(
        input_ids=generator.integers(0, VOCABULARY, size=seq_len),
        labels=generator.integers(0, VOCABULARY, size=seq_len),
        position_ids=np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(bounds)]),
        bounds=bounds,
        documents=np.arange(4),
    )


def batch(topology: Topology, rows: int, seq_len: int, step: int) -> MicroBatch:
    seeds = [1000 * step + topology.dp_rank * rows + index for index in range(rows)]
    return make_micro_batch([packed_row(seq_len, seed) for seed in seeds], [0] * rows, topology)


def released_model(folder: Path) -> Path:
    """Return a directory with random weights of the model, its experts in MXFP4."""
    path = folder / "model"
    if dist.get_rank() == 0 and not path.exists():
        generator = torch.Generator().manual_seed(1)
        stored = {}
        for name, sizes in parameter_shapes(GptOssConfig(**MODEL)).items():
            values = torch.randn(sizes, generator=generator) / 8
            if is_expert_matrix(name, sizes):
                stored[name + BLOCKS], stored[name + SCALES] = mxfp4.encode(values)
            else:
                stored[name] = values.bfloat16()
        path.mkdir()
        save_file(stored, str(path / SINGLE_FILE))
    dist.barrier()
    return path


def host_tensors(engine: TrainingEngine) -> dict[str, list[torch.Tensor]]:
    """Return what stays on the host beside optimizer state and ZeRO-3's gradients, by part."""
    zero = engine.deepspeed.optimizer
    if engine.deepspeed.zero_optimization_stage() == 3:
        copies = getattr(zero, "copies_for_update", None)
        return {ARRIVALS: copies.buffers} if copies else {}
    if not zero.cpu_offload:
        return {}
    gradients = [master.grad for master in flat_partitions(engine.deepspeed)]
    return {"gradients": gradients, ROUNDED: zero.param_buffer_of_bit16_for_cpu_offload_groups}


def of_both_places(config: RunConfig, model: GptOssConfig) -> dict[str, int]:
    """Return what is planned for device and host, which are one memory here."""
    sizes = predicted(config, model, "cpu")
    counts = counts_of(config, model)
    host = host_memory(config, model, counts)
    for name in ("optimizer", "gradients", ROUNDED):
        if name in host:
            sizes[name] = sizes.get(name, 0) + host[name]
    if config.zero_stage == 3 and gradient_place(config.engine_json) == "device":
        # a CPU rounds weights where they go; the plan has the copy that a GPU needs
        sizes[ARRIVALS] = host["update"] - config.itemsize * largest_sub_group(config, counts)
    return sizes


def run(shape: dict[str, Any], folder: Path) -> None:
    rows = shape["rows"]
    seq_len = shape["seq_len"]
    adapter = shape.get("adapter", {})
    start: dict[str, Any] = {"init": "tiny"}
    if adapter.get("base") == "mxfp4":
        start = {"path": str(released_model(folder))}
    run = {
        "model": {**start, "activation_checkpointing": shape["checkpointing"]},
        "adapter": adapter,
        "data": {"mix": "unused.yaml"},
        "train": {
            "seq_len": seq_len,
            "global_batch_size": rows * WORLD_SIZE,
            "micro_batch_size": rows,
            "total_steps": 99,
            "lr": 1e-3,
            "quantize": shape.get("quantize", {}),
            "optimizer": shape.get("optimizer", "adamw"),
            "optimizer_state": shape["optimizer_state"],
        },
    }
    run_yaml = read_file(RunYaml, parse_yaml(json.dumps(run), "run.yaml"))
    zero = {"stage": shape["stage"], "reduce_bucket_size": "auto"}
    if shape["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = "auto"
    if shape["gradients"]:
        zero["offload_optimizer"] = {"device": "cpu", "gradients": shape["gradients"]}
    experts = {"enabled": True, "autoep_size": WORLD_SIZE}
    ds = json.dumps({"zero_optimization": zero, "expert_parallel": experts})
    ds_json = parse_yaml(ds, "ds.json")
    model = GptOssConfig(**MODEL)
    launch_info = LaunchInfo(world_size=WORLD_SIZE, local_world_size=WORLD_SIZE)
    config = resolve(run_yaml, ds_json, model, launch_info)
    device = torch.device("cpu")
    topology = create_topology(sp_size=config.sp_size, ep_size=config.ep_size, device=device)
    engine = build_engine(config, model, topology, PhaseClock())
    fill_weights(engine, weight_source(config, model, topology))
    tokens = [rows * seq_len * WORLD_SIZE]
    engine.step([batch(topology, rows, seq_len, 0)], tokens, step=1)
    peaks = []
    for step in range(2, 2 + MEASURED_STEPS):
        measured_batch = batch(topology, rows, seq_len, step)
        # what the engine before this one has left must not be freed within the measurement
        gc.collect()
        with peak_within(topology.device) as peak:
            engine.step([measured_batch], tokens, step=step)
        peaks.append(peak)
    peak = min(peaks, key=lambda one: one.num_bytes)
    sizes = measured(engine, peak)
    for name, tensors in host_tensors(engine).items():
        sizes[name] = bytes_on("cpu", tensors)
    ranks = gather_json(sizes, topology.control_group)
    if topology.rank == 0:
        found = {"predicted": of_both_places(config, model), "measured_by_rank": ranks}
        (folder / f"{shape['name']}.json").write_text(json.dumps(found))
    engine.deepspeed.destroy()
    dist.barrier()


def main() -> None:
    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"))
    for text in sys.argv[2:]:
        run(json.loads(text), Path(sys.argv[1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Prove that loading a directory of weights on 4 ranks with EP 4 stays within its bound.

    python bench/prove/load_memory.py [--format mxfp4] [--offload] [--layers 8]

It takes about two minutes, with 8 layers 15 GB of memory and 0.5 GB of disk (2 GB in bf16), and
ends with 1 if the peak host memory of a rank is above the bound.  `--offload` keeps optimizer
state and weights on the host, as the recipes do that fill the memory of a node.

The bound is what the rank keeps (working weights, fp32 master weights, Adam moments, gradient
buffer) plus twice its part of the largest layer.  Peaks are VmHWM.  It is reset after a tiny engine
was built, which pays for what libraries take at their first use, and before this one is built.  The
files are read, not mapped, so they do not count.  glibc is told to give freed memory back.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

WORLD_SIZE = 4
MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_local_experts": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "pad_token_id": 4095,
    "bos_token_id": 4094,
    "eos_token_id": 4093,
}


def write_fixture(path: Path, options: argparse.Namespace) -> int:
    """Write a directory in the released layout or in bf16, with one file per layer.

    Returns:
        Bytes of its decoded experts in bf16.
    """
    from transformers import GptOssConfig

    from cpt.model.configuration import PRESETS
    from cpt.model.parameters import parameter_shapes
    from cpt.model.weights.hf_layout import is_expert_matrix

    shape = {**PRESETS["tiny"], **MODEL, "num_hidden_layers": options.layers}
    shape["layer_types"] = ["sliding_attention", "full_attention"] * (options.layers // 2)
    config = GptOssConfig(**shape)
    config.save_pretrained(str(path))
    values = json.loads((path / "config.json").read_text())
    if options.format == "mxfp4":
        values["quantization_config"] = {"quant_method": "mxfp4"}
    (path / "config.json").write_text(json.dumps(values))
    files: dict[str, dict[str, torch.Tensor]] = {}
    decoded_bytes = 0
    generator = torch.Generator().manual_seed(0)
    for name, shape in parameter_shapes(config).items():
        layer = name.split(".")[2] if ".layers." in name else "x"
        tensors = files.setdefault(f"model-{layer}.safetensors", {})
        is_matrix = is_expert_matrix(name, shape)
        if is_matrix:
            decoded_bytes += 2 * math.prod(shape)
        if is_matrix and options.format == "mxfp4":
            experts, inputs, rows = shape
            blocks = (experts, rows, inputs // 32, 16)
            tensors[name + "_blocks"] = torch.randint(
                0, 256, blocks, dtype=torch.uint8, generator=generator
            )
            tensors[name + "_scales"] = torch.randint(
                116, 124, blocks[:3], dtype=torch.uint8, generator=generator
            )
        else:
            tensors[name] = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    weight_map = {}
    for file, tensors in files.items():
        save_file(tensors, str(path / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = json.dumps({"weight_map": weight_map})
    (path / "model.safetensors.index.json").write_text(index)
    return decoded_bytes


def status_bytes(key: str) -> int:
    """Return a size of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def kept_bytes(engine: object) -> int:
    """Return the bytes of all memory that the engine keeps for this rank between steps."""
    from cpt.deepspeed_adapter.shards import create_optimizer_state, state_tensors
    from cpt.job.memory_report import bytes_on

    create_optimizer_state(engine)
    state = state_tensors(engine).values()
    return bytes_on("cpu", [tensor for tensors in state for tensor in tensors])


def build(
    run_yaml: str, model_config: Any, topology: Any, *, offload: bool = False
) -> tuple[Any, Any]:
    """Return an engine of ZeRO-3 and EP, filled as a run fills it, and the source."""
    from cpt.config import LaunchInfo, RunYaml, resolve
    from cpt.job.engine_setup import build_engine, fill_weights, weight_source
    from cpt.resilience.phase import PhaseClock
    from data_pipeline.config.strict_yaml import parse_yaml, read_file

    zero: dict[str, Any] = {"stage": 3}
    if offload:
        zero["offload_optimizer"] = zero["offload_param"] = {"device": "cpu"}
    engine_json = {
        "zero_optimization": zero,
        "expert_parallel": {"enabled": True, "autoep_size": WORLD_SIZE},
    }
    info = LaunchInfo(world_size=WORLD_SIZE, local_world_size=WORLD_SIZE)
    rest = (
        "data: {mix: x.yaml}, train: {seq_len: 128, global_batch_size: 4, total_steps: 1, lr: 1e-5}"
    )
    parsed = read_file(RunYaml, parse_yaml(f"{{{run_yaml}, {rest}}}", "run"))
    config = resolve(parsed, parse_yaml(json.dumps(engine_json), "json"), model_config, info)
    source = weight_source(config, model_config, topology)
    engine = build_engine(config, model_config, topology, PhaseClock())
    fill_weights(engine, source)
    return engine, source


def worker(path: Path, *, offload: bool) -> None:
    """Load the directory as one rank; the first rank prints what all measured."""
    from cpt.deepspeed_adapter.groups import create_topology, init_distributed
    from cpt.model.configuration import load_config
    from cpt.parallel.agreement import gather_json

    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"))
    topology = create_topology(sp_size=1, ep_size=WORLD_SIZE, device=torch.device("cpu"))
    # a tiny engine first: what the libraries take at their first use is not the model's
    build("model: {init: tiny}", load_config(None, "tiny"), topology)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
    model_config = load_config(path, None)
    engine, source = build(f"model: {{path: {path}}}", model_config, topology, offload=offload)
    peak = status_bytes("VmHWM") - before
    layer = engine.deepspeed.module.model.layers[0]
    local_layer = 2 * sum(p.ds_numel for p in layer.parameters())
    found = {
        "peak": peak,
        "kept": kept_bytes(engine.deepspeed),
        "layer": local_layer,
        "read": source.bytes_read,
    }
    reports = gather_json(found, topology.control_group)
    if topology.rank == 0:
        print("RESULT " + json.dumps(reports), flush=True)
    os._exit(0)


def main() -> int:
    """Print a table of all ranks, and return 1 if one is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=("mxfp4", "bf16"), default="mxfp4")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--layers", type=int, default=8, help="an even number")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, offload=options.offload)
    with tempfile.TemporaryDirectory() as folder:
        decoded = write_fixture(Path(folder), options)
        stored = sum(file.stat().st_size for file in Path(folder).iterdir())
        print(f"experts: {decoded / 1e9:.2f} GB in bf16, directory: {stored / 1e9:.2f} GB")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(WORLD_SIZE), __file__, "--worker", folder]
        command += ["--offload"] if options.offload else []
        # without a fixed threshold glibc keeps freed memory for itself: 1 to 6 % more, another
        # amount in every run
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(done.stderr[-12000:])
        return 1
    reports = json.loads(lines[0].removeprefix("RESULT "))
    print("rank    read MB   peak MB   kept MB   layer MB   bound MB   peak/bound")
    over = []
    for rank, found in enumerate(reports):
        peak = found["peak"]
        bound = found["kept"] + 2 * found["layer"]
        columns = [found["read"], peak, found["kept"], found["layer"], bound]
        cells = "".join(f"{value / 1e6:>10.0f}" for value in columns)
        print(f"{rank:>4} {cells}{peak / bound:>12.2f}")
        if peak > bound:
            over.append(rank)
    print(f"over the bound: {over or 'none'}")
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())

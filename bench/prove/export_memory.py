"""Count the host memory that an export of gpt-oss-120b takes, with matrices of its true sizes.

    python bench/prove/export_memory.py [--experts 5] [--vocab 32768] [--folder runs/export_memory]

A checkpoint is written that has one layer with the matrices of 120b, but few experts and a part of
the vocabulary.  An export holds pieces of a set number of elements, in whole experts, so neither
number of experts nor number of layers changes what it holds; both are chosen so that tensors are
larger than a piece.  Each format is exported in a process of its own, from which the largest
anonymous memory is read (memory that belongs to no file, sampled every 5 ms).

The script ends with 1 if a format takes more than LIMIT.  Of several ranks only the first one
writes, and the others wait, so what it takes does not grow with their number.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "bench" / "prove")]
import measuring  # noqa: E402
from nvme import AnonymousPeak  # noqa: E402

FORMATS = ("bf16", "mxfp4")
LIMIT = 4 * 2**30
"""A sixteenth of the memory of a node with 64 GB."""
STEP = 1


def config_of(options: argparse.Namespace) -> Any:
    """Return a gpt-oss-120b of one layer."""
    from transformers import GptOssConfig

    from cpt.model.configuration import PRESETS

    shape = {
        **PRESETS["gpt-oss-120b"],
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "num_local_experts": options.experts,
        "vocab_size": options.vocab,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    return GptOssConfig(**shape)


def write(options: argparse.Namespace) -> int:
    """Write the checkpoint, as of a run that trained nothing, and return its elements."""
    import torch

    from cpt.checkpoint.manifest import TensorRecord
    from cpt.checkpoint.writer import write_alone
    from cpt.model.parameters import parameter_shapes

    config = config_of(options)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    records = {}
    for name, shape in parameter_shapes(config).items():
        tensors[f"master/{name}"] = torch.randn(shape, generator=generator) * 0.02
        records[name] = TensorRecord(shape=tuple(shape), dtype="float32", trained=False)
    state = {"model_config": config.to_dict()}
    write_alone(Path(options.folder), STEP, tensors, records, state)
    return sum(tensor.numel() for tensor in tensors.values())


def export(options: argparse.Namespace) -> None:
    """Export in one format and print the largest anonymous memory beyond that at the start."""
    from cpt.checkpoint.reader import step_folder
    from cpt.export.huggingface import export_checkpoint

    before = measuring.resident_bytes("RssAnon")
    peak = AnonymousPeak()
    peak.start()
    folder = Path(options.folder)
    export_checkpoint(step_folder(folder, STEP), folder / options.format, options.format)
    found = {"bytes": peak.num_bytes - before, "process": peak.num_bytes}
    print("RESULT " + json.dumps(found), flush=True)
    os._exit(0)


def main() -> None:
    """Write a checkpoint and print what each format takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--folder", default="runs/export_memory")
    parser.add_argument("--format", choices=FORMATS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.format:
        export(options)
    shutil.rmtree(options.folder, ignore_errors=True)
    numel = write(options)
    print(f"{numel / 1e6:.0f} M elements, {numel * 4 / 1e9:.2f} GB of master weights")
    environment = {**os.environ, **measuring.RETURN_MEMORY}
    over = []
    for name in FORMATS:
        command = [sys.executable, __file__, "--format", name, "--folder", options.folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            sys.exit(done.stderr[-3000:])
        found = json.loads(lines[-1].removeprefix("RESULT "))
        process = found["process"] / 2**20
        taken = found["bytes"] / 2**20
        print(f"{name:<6} {taken:8.0f} MiB by the export, {process:8.0f} MiB in all", flush=True)
        if found["process"] > LIMIT:
            over.append(name)
    shutil.rmtree(options.folder, ignore_errors=True)
    if over:
        sys.exit(f"more than {LIMIT / 2**30:.0f} GiB: {', '.join(over)}")


if __name__ == "__main__":
    main()

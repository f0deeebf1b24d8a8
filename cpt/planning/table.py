"""A plan for people: one layout beside another in full, or one line for each of many."""

from __future__ import annotations

from cpt.planning.estimate import Estimate
from cpt.planning.hardware import Assumptions, Gpu, gigabytes
from cpt.planning.memory import GIB
from cpt.planning.part_times import PARTS
from cpt.planning.traffic import KINDS
from cpt.storage.state_bytes import gradient_place

Cell = tuple[str, str]
"""Name of the row, and text."""


def comparison(columns: dict[str, Estimate], gpu: Gpu, assumed: Assumptions) -> str:
    """Return layouts side by side: layout, memory, traffic, time, cost."""
    estimates = list(columns.values())
    places = ["memory"]
    if any(one.host for one in estimates):
        places.append("host")
    if any(one.nvme for one in estimates):
        places.append("nvme")
    shown: dict[str, None] = {}
    for one in estimates:
        shown.update(dict.fromkeys(one.parts))
    parts = [part for part in PARTS if part in shown]
    texts = []
    for name, one in columns.items():
        texts.append([("", name), *_column(one, places, parts, gpu, assumed)])
    return _aligned(texts)


def _column(
    one: Estimate, places: list[str], parts: list[str], gpu: Gpu, assumed: Assumptions
) -> list[Cell]:
    """Return the cells of one layout from top to bottom; a heading has an empty cell."""
    return [
        *_layout_cells(one).items(),
        *_memory_cells(one, places, gpu, assumed).items(),
        *_traffic_cells(one).items(),
        *_time_cells(one, parts, gpu).items(),
    ]


def _layout_cells(one: Estimate) -> dict[str, str]:
    config = one.config
    batch = f"{config.micro_batch_size} x {config.gradient_accumulation_steps}"
    return {
        "sequence parallel": str(config.sp_size),
        "expert parallel": str(config.ep_size),
        "ZeRO stage": str(config.zero_stage),
        "micro batch x accumulation": batch,
        "activation checkpointing": checkpointing(one),
        "offload": offloads(one),
    }


def _memory_cells(
    one: Estimate, places: list[str], gpu: Gpu, assumed: Assumptions
) -> dict[str, str]:
    cells = {"memory of one rank, GiB": ""}
    for part, size in one.memory.items():
        cells[f"  {part}"] = f"{size / GIB:.2f}"
    room = assumed.memory_share * gpu.memory_bytes
    cells["  sum"] = f"{_gib(one.memory)} of {room / GIB:.1f}"
    if "host" in places:
        cells["  host"] = _gib(one.host)
        ranks = min(one.config.world_size, assumed.ranks_per_node)
        of_node = gigabytes(ranks * sum(one.host.values()))
        node = gigabytes(assumed.host_memory_share * assumed.ranks_per_node * gpu.host_memory_bytes)
        cells["  host of a node"] = f"{of_node} of {node}"
    if "nvme" in places:
        cells["  NVMe"] = _gib(one.nvme)
    cells["  fits"] = "yes" if one.fits else "NO"
    return cells


def _gib(parts: dict[str, int]) -> str:
    return f"{sum(parts.values()) / GIB:.2f}"


def _traffic_cells(one: Estimate) -> dict[str, str]:
    cells = {"sent by one rank in a step, GB inside / between nodes": ""}
    for kind in KINDS:
        if kind == "muon" and one.config.train.optimizer != "muon":
            continue
        sent = one.wire[kind]
        cells[f"  {kind}"] = f"{sent.intra / 1e9:.2f} / {sent.inter / 1e9:.2f}"
    return cells


def _part_cells(one: Estimate, parts: list[str]) -> dict[str, str]:
    cells = {}
    for part in parts:
        cells[f"    {part}"] = f"{one.parts[part]:.2f}" if part in one.parts else "-"
    return cells


def _time_cells(one: Estimate, parts: list[str], gpu: Gpu) -> dict[str, str]:
    cells = {
        "GFLOPs per token": f"{one.flops.total / 1e9:.1f}",
        "seconds of one step, by resource": "",
    }
    for name, seconds in one.seconds.items():
        cells[f"  {name}"] = f"{seconds:.2f}"
        if name == "compute":
            cells.update(_part_cells(one, parts))
    return {
        **cells,
        "  waits for exchanges": f"{one.exchange_seconds:.2f}",
        "  waits for ZeRO, offload": f"{one.exposed_seconds:.2f}",
        "  whole step": f"{one.step_seconds:.2f}",
        "bottleneck": one.bottleneck,
        "tokens/s/GPU": f"{one.tokens_per_gpu_second:,.0f}",
        "MFU after all waits": f"{one.mfu(gpu):.1%}",
        "GPU-hours per 1e9 tokens": f"{one.gpu_hours_per_billion_tokens:,.1f}",
    }


def _aligned(columns: list[list[Cell]]) -> str:
    """Return columns with the same rows beside each other; headings do not widen the first."""
    first = max(len(name) for name, cell in columns[0] if cell)
    width = max(len(cell) for column in columns for _, cell in column)
    lines = []
    for row in zip(*columns, strict=True):
        name, text = row[0]
        line = f"  {name:<{first}}"
        if text:
            line += "".join(f"  {cell:>{width}}" for _, cell in row)
        lines.append(line)
    return "\n".join(lines)


def checkpointing(one: Estimate) -> str:
    """Return how activations are kept."""
    if one.config.model.offload_checkpoints:
        return "to host"
    return "yes" if one.config.model.activation_checkpointing else "no"


def offloads(one: Estimate) -> str:
    """Return which state ZeRO keeps elsewhere, and where, and if gradients are not there."""
    zero = one.config.engine_json["zero_optimization"]
    places = []
    for name in ("optimizer", "param"):
        if f"offload_{name}" in zero:
            places.append(f"{name} to {zero[f'offload_{name}']['device']}")
    if gradient_place(one.config.engine_json) == "device":
        places.append("grads on GPU")
    if one.config.train.optimizer_state != "fp32":
        places.append(f"moments {one.config.train.optimizer_state}")
    return ", ".join(places) or "none"


_LAYOUT_HEADER = f"{'SP':>4}{'EP':>5}{'ZeRO':>6}{'micro':>7}{'ckpt':>9}  {'offload':<58}"
_COST_HEADER = f"{'bottleneck':>12}{'tok/s/GPU':>11}{'MFU':>7}{'GPU-h/1e9':>11}"
HEADER = (
    f"  {'model':<13}{'tokens':>8}{'GPUs':>6}{_LAYOUT_HEADER}"
    f"{'GiB':>7}{'NVLink':>9}{'IB':>8}{_COST_HEADER}"
)
"""Columns of `line`; NVLink and IB are GB that one rank sends in a step."""


def line(model: str, seq_len: int, gpus: int, one: Estimate | None, gpu: Gpu) -> str:
    """Return the best layout of one point, or the news that there is none."""
    head = f"  {model:<13}{seq_len:>8}{gpus:>6}"
    if one is None:
        return f"{head}  nothing fits"
    config = one.config
    micro = f"{config.micro_batch_size}x{config.gradient_accumulation_steps}"
    intra = sum(sent.intra for sent in one.wire.values()) / 1e9
    inter = sum(sent.inter for sent in one.wire.values()) / 1e9
    memory = sum(one.memory.values()) / GIB
    return (
        f"{head}{config.sp_size:>4}{config.ep_size:>5}{config.zero_stage:>6}{micro:>7}"
        f"{checkpointing(one):>9}  {offloads(one):<58}{memory:>7.1f}"
        f"{intra:>9.1f}{inter:>8.1f}{one.bottleneck:>12}"
        f"{one.tokens_per_gpu_second:>11,.0f}{one.mfu(gpu):>7.1%}"
        f"{one.gpu_hours_per_billion_tokens:>11,.1f}"
    )

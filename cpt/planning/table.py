"""A plan for people: one layout beside another in full, or one line for each of many."""

from __future__ import annotations

from collections.abc import Sequence

from cpt.planning.estimate import Estimate
from cpt.planning.hardware import Assumptions, Gpu
from cpt.planning.memory import GIB
from cpt.planning.traffic import KINDS


def comparison(columns: dict[str, Estimate], gpu: Gpu, assumed: Assumptions) -> str:
    """Layouts side by side: layout, memory, traffic, time, cost."""
    estimates = list(columns.values())
    lines = [("", list(columns)), *_layout_rows(estimates)]
    lines += [("memory of one rank, GiB", [])]
    for part in dict.fromkeys(part for one in estimates for part in one.memory):
        lines.append((f"  {part}", [f"{one.memory.get(part, 0) / GIB:.2f}" for one in estimates]))
    room = assumed.memory_share * gpu.memory_bytes
    lines.append(
        (
            "  sum",
            [f"{sum(one.memory.values()) / GIB:.2f} of {room / GIB:.1f}" for one in estimates],
        )
    )
    if any(one.host for one in estimates):
        lines.append(
            ("  host, offloaded", [f"{sum(one.host.values()) / GIB:.2f}" for one in estimates])
        )
    if any(one.nvme for one in estimates):  # how fast a node's disks are is not known
        lines.append(
            (
                "  NVMe, its time not counted",
                [f"{sum(one.nvme.values()) / GIB:.2f}" for one in estimates],
            )
        )
    lines.append(("  fits", ["yes" if one.fits else "NO" for one in estimates]))
    lines.append(("sent by one rank in a step, GB inside / between nodes", []))
    for kind in KINDS:
        lines.append(
            (
                f"  {kind}",
                [f"{w.intra / 1e9:.2f} / {w.inter / 1e9:.2f}" for w in _of(estimates, kind)],
            )
        )
    lines += _time_rows(estimates, gpu)
    return _aligned(lines)


def _of(estimates: Sequence[Estimate], kind: str) -> list:  # type: ignore[type-arg]
    return [one.wire[kind] for one in estimates]


def _layout_rows(estimates: list[Estimate]) -> list[tuple[str, list[str]]]:
    configs = [one.config for one in estimates]
    return [
        ("sequence parallel", [str(c.sp_size) for c in configs]),
        ("expert parallel", [str(c.ep_size) for c in configs]),
        ("ZeRO stage", [str(c.zero_stage) for c in configs]),
        (
            "micro batch x accumulation",
            [f"{c.micro_batch_size} x {c.gradient_accumulation_steps}" for c in configs],
        ),
        ("activation checkpointing", [checkpointing(one) for one in estimates]),
        ("offload", [offloads(one) for one in estimates]),
    ]


def checkpointing(one: Estimate) -> str:
    """How activations are kept."""
    model = one.config.model
    return (
        "to host"
        if model.offload_checkpoints
        else "yes"
        if model.activation_checkpointing
        else "no"
    )


def offloads(one: Estimate) -> str:
    """What ZeRO keeps elsewhere."""
    zero = one.config.engine_json["zero_optimization"]
    places = {
        name: zero[f"offload_{name}"]["device"]
        for name in ("optimizer", "param")
        if f"offload_{name}" in zero
    }
    return ", ".join(f"{name} to {device}" for name, device in places.items()) or "none"


def _time_rows(estimates: list[Estimate], gpu: Gpu) -> list[tuple[str, list[str]]]:
    rows: list[tuple[str, list[str]]] = [
        ("GFLOPs per token", [f"{one.flops.total / 1e9:.1f}" for one in estimates]),
        ("seconds of one step, by resource", []),
    ]
    for name in estimates[0].seconds:
        rows.append((f"  {name}", [f"{one.seconds[name]:.2f}" for one in estimates]))
    rows += [
        ("  waits for exchanges", [f"{one.exchange_seconds:.2f}" for one in estimates]),
        ("  waits for ZeRO, offload", [f"{one.exposed_seconds:.2f}" for one in estimates]),
        ("  whole step", [f"{one.step_seconds:.2f}" for one in estimates]),
        ("bottleneck", [one.bottleneck for one in estimates]),
        ("tokens/s/GPU", [f"{one.tokens_per_gpu_second:,.0f}" for one in estimates]),
        ("MFU after all waits", [f"{one.mfu(gpu):.1%}" for one in estimates]),
        (
            "GPU-hours per 1e9 tokens",
            [f"{one.gpu_hours_per_billion_tokens:,.1f}" for one in estimates],
        ),
    ]
    return rows


def _aligned(lines: list[tuple[str, list[str]]]) -> str:
    first = max(len(name) for name, cells in lines if cells)
    width = max(len(cell) for _, cells in lines for cell in cells)
    return "\n".join(
        f"  {name:<{first}}" + "".join(f"  {c:>{width}}" for c in cells) for name, cells in lines
    )


HEADER = (
    f"  {'model':<13}{'tokens':>8}{'GPUs':>6}{'SP':>4}{'EP':>5}{'ZeRO':>6}{'micro':>7}{'ckpt':>9}  {'offload':<28}"
    f"{'GiB':>7}{'NVLink':>9}{'IB':>8}{'bottleneck':>12}{'tok/s/GPU':>11}{'MFU':>7}{'GPU-h/1e9':>11}"
)
"""Columns of `line`; NVLink and IB are GB that one rank sends in a step."""


def line(model: str, seq_len: int, gpus: int, one: Estimate | None, gpu: Gpu) -> str:
    """The best layout of one point, or that there is none."""
    head = f"  {model:<13}{seq_len:>8}{gpus:>6}"
    if one is None:
        return f"{head}  nothing fits"
    config, wire = one.config, one.wire.values()
    return (
        f"{head}{config.sp_size:>4}{config.ep_size:>5}{config.zero_stage:>6}"
        f"{f'{config.micro_batch_size}x{config.gradient_accumulation_steps}':>7}"
        f"{checkpointing(one):>9}  {offloads(one):<28}{sum(one.memory.values()) / GIB:>7.1f}"
        f"{sum(w.intra for w in wire) / 1e9:>9.1f}{sum(w.inter for w in wire) / 1e9:>8.1f}{one.bottleneck:>12}"
        f"{one.tokens_per_gpu_second:>11,.0f}{one.mfu(gpu):>7.1%}{one.gpu_hours_per_billion_tokens:>11,.1f}"
    )

"""A plan beside what was published, what an H100 measured, and what the plan was before."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from cpt.config import LaunchInfo, RunYaml, load, resolve
from cpt.model.configuration import load_config
from cpt.planning.estimate import Estimate, estimate
from cpt.planning.hardware import GPUS, Assumptions
from cpt.planning.memory import count_parameters
from cpt.planning.one_gpu import estimate_on_one_gpu
from cpt.planning.part_times import PARTS
from cpt.planning.search import search

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "gpu" / "results"
H100 = GPUS["h100"]


def best(preset: str, gpus: int, seq_len: int, tokens: int) -> Estimate:
    """Return the best layout for `tokens` of an optimizer step."""
    model = load_config(None, preset)
    run = _run(seq_len, tokens)
    found = search(run, model, count_parameters(model, ()), gpus, H100, Assumptions())
    if found is None:
        raise ValueError(f"{preset} does not fit on {gpus} GPUs")
    return found[1]


def _run(seq_len: int, tokens: int) -> RunYaml:
    run, _ = load(ROOT / "configs" / "gpt-oss-20b.yaml", ROOT / "ds_configs" / "z3_ep.json", {})
    train = replace(run.train, seq_len=seq_len, global_batch_size=tokens // seq_len)
    return replace(run, train=train)


def layout_of(one: Estimate) -> str:
    """Return a layout in a few words."""
    config = one.config
    words = [f"ZeRO-{config.zero_stage}"]
    for name, size in (("SP", config.sp_size), ("EP", config.ep_size)):
        if size > 1:
            words.append(f"{name} {size}")
    words.append(f"{config.micro_batch_size} x {config.gradient_accumulation_steps} rows")
    if config.model.offload_checkpoints:
        words.append("checkpoints to the host")
    elif config.model.activation_checkpointing:
        words.append("checkpointing")
    return ", ".join(words)


TOKENS = 2**20
BEFORE = {
    # by `cpt plan` of commit 2549e06: 40 % of the peak was assumed
    (8, 4096): (15_170, "ZeRO-2, EP 8, 1 x 32 rows"),
    (8, 32_768): (11_313, "ZeRO-2, SP 8, EP 8, 1 x 32 rows"),
    (16, 4096): (13_928, "ZeRO-2, EP 8, 2 x 8 rows"),
    (16, 32_768): (10_625, "ZeRO-2, SP 4, EP 8, 1 x 8 rows"),
}
"""Tokens per second and GPU, and layout, of 20b at 40 % of the peak."""


def in_parts() -> str:
    """Return 20b on 8 and 16 GPUs, part by part, beside the plan at 40 % of the peak."""
    columns = {}
    for gpus, seq_len in BEFORE:
        title = f"{gpus} GPUs, {seq_len // 1024}k"
        columns[title] = (best("gpt-oss-20b", gpus, seq_len, TOKENS), BEFORE[gpus, seq_len])
    lines = [f"| s of a step of {TOKENS:,} tokens | {' | '.join(columns)} |"]
    lines.append("|---|" + "---|" * len(columns))
    found = [one for one, _ in columns.values()]
    lines.append(_row("layout", [layout_of(one) for one in found]))
    for part in PARTS:
        if any(one.parts.get(part) for one in found):
            lines.append(_row(part, [f"{one.parts.get(part, 0):.2f}" for one in found]))
    lines.append(_row("waits for exchanges", [f"{one.exchange_seconds:.2f}" for one in found]))
    lines.append(_row("waits for ZeRO, offload", [f"{one.exposed_seconds:.2f}" for one in found]))
    lines.append(_row("update", [f"{one.seconds['update']:.2f}" for one in found]))
    lines.append(_row("whole step", [f"**{one.step_seconds:.2f}**" for one in found]))
    lines.append(_row("tokens/s/GPU", [f"{one.tokens_per_gpu_second:,.0f}" for one in found]))
    lines.append(_row("MFU", [f"{one.mfu(H100):.1%}" for one in found]))
    lines.append(_row("before: tokens/s/GPU", [f"{old:,}" for _, (old, _) in columns.values()]))
    lines.append(_row("before: layout", [text for _, (_, text) in columns.values()]))
    return "\n".join(lines)


def _row(title: str, cells: list[str]) -> str:
    return f"| {title} | {' | '.join(cells)} |"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published run on H100 GPUs, in bf16."""

    preset: str
    gpus: int
    seq_len: int
    tokens: int
    """Tokens of an optimizer step; taken as 2**20 where they were not found."""
    speed: int
    """Tokens per second and GPU."""
    routing: str


PUBLISHED = (
    Published(
        preset="gpt-oss-20b", gpus=8, seq_len=4096, tokens=2**20, speed=13_058, routing="forced"
    ),
    Published(
        preset="gpt-oss-20b", gpus=16, seq_len=4096, tokens=2**20, speed=5_851, routing="natural"
    ),
    Published(
        preset="gpt-oss-20b", gpus=8, seq_len=32_768, tokens=2**20, speed=428, routing="real data"
    ),
    Published(
        preset="gpt-oss-120b", gpus=64, seq_len=4096, tokens=2**21, speed=7_626, routing="forced"
    ),
    Published(
        preset="gpt-oss-120b", gpus=64, seq_len=4096, tokens=2**21, speed=1_966, routing="natural"
    ),
)


IMBALANCES = (1.0, 2.0, 4.0)


def published() -> str:
    """Return the published runs beside the plan of the same model, row and GPUs."""
    titles = [f"EP 8, busiest rank {imbalance:g} x" for imbalance in IMBALANCES]
    head = ["run", "routing", "published", "best of the plan", "its layout", "best / published"]
    lines = [_row(head[0], [*head[1:], *titles]), "|---" * (len(head) + len(titles)) + "|"]
    for run in PUBLISHED:
        one = best(run.preset, run.gpus, run.seq_len, run.tokens)
        name = f"{run.preset.removeprefix('gpt-oss-')}, {run.gpus} GPUs, {run.seq_len // 1024}k"
        cells = [run.routing, f"{run.speed:,}", f"{one.tokens_per_gpu_second:,.0f}"]
        cells += [layout_of(one), f"{one.tokens_per_gpu_second / run.speed:.2f}"]
        for imbalance in IMBALANCES:
            cells.append(f"{_shipped(run, imbalance).tokens_per_gpu_second:,.0f}")
        lines.append(_row(name, cells))
    return "\n".join(lines)


def _shipped(run: Published, imbalance: float) -> Estimate:
    """Return the plan of ds_configs/z3_ep.json with two rows at a time and checkpointing."""
    model = load_config(None, run.preset)
    _, engine = load(ROOT / "configs" / "gpt-oss-20b.yaml", ROOT / "ds_configs" / "z3_ep.json", {})
    rows = _run(run.seq_len, run.tokens)
    rows = replace(rows, train=replace(rows.train, micro_batch_size=2))
    info = LaunchInfo(world_size=run.gpus, local_world_size=8)
    config = resolve(rows, engine, model, info)
    assumed = Assumptions(imbalance=imbalance)
    return estimate(config, model, count_parameters(model, ()), H100, assumed)


SLICE_LAYERS = 2


def slices() -> str:
    """Return the steps of two layers of 20b on one H100: predicted beside measured."""
    model = load_config(None, "gpt-oss-20b")
    measured = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        measured[path.stem] = _training_steps(path)
    latest = measured[max(measured, key=_order)]
    lengths = [int(tokens) for tokens in latest if tokens.isdigit()]
    found = [estimate_on_one_gpu(model, SLICE_LAYERS, tokens, H100) for tokens in lengths]
    lines = [_row("ms", [f"{tokens:,}" for tokens in lengths])]
    lines.append("|---|" + "---|" * len(lengths))
    for part in PARTS:
        if any(one.parts.get(part) for one in found):
            lines.append(_row(part, [f"{1e3 * one.parts.get(part, 0):.1f}" for one in found]))
    lines.append(_row("update", [f"{1e3 * one.seconds['update']:.1f}" for one in found]))
    lines.append(_row("predicted", [f"**{1e3 * one.step_seconds:.0f}**" for one in found]))
    for name, steps in measured.items():
        seconds = [statistics.median(steps[str(tokens)]["seconds"][1:]) for tokens in lengths]
        lines.append(_row(f"measured, {name}", [f"{1e3 * value:.0f}" for value in seconds]))
        if steps is latest:
            ratios = []
            for one, value in zip(found, seconds, strict=True):
                ratios.append(f"{one.step_seconds / value:.2f}")
            lines.append(_row("predicted / measured", ratios))
    memory = [f"{sum(one.memory.values()) / 1e9:.1f}" for one in found]
    peaks = [f"{latest[str(tokens)]['peak_GB']:.1f}" for tokens in lengths]
    lines.append(_row("memory predicted, GB", memory))
    lines.append(_row("memory measured, GB", peaks))
    return "\n".join(lines)


def _order(name: str) -> tuple[bool, str]:
    """Return a key by which results before the fusions come first."""
    return "before" not in name, name


def _training_steps(path: Path) -> dict[str, dict[str, list[float]]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        stage = json.loads(line)
        if stage.get("stage") == "training_steps" and stage["state"] == "ok":
            result: dict[str, dict[str, list[float]]] = stage["result"]
            return result
    raise ValueError(f"{path} has no training steps")

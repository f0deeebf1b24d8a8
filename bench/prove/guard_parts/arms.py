"""The arms of the behavior proof: ways to go on with Japanese, from the same base and order."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.telemetry.metrics import read_events
from data_pipeline.build.build import build
from data_pipeline.config.mix_file import load_mix
from guard_parts import launching
from guard_parts.base import ANSWERS, ask, run_yaml
from guard_parts.mixes import ENGLISH, JAPANESE, JAPANESE_LIMITS, OWN, write_mix
from guard_parts.scale import Scale

PEAK_LR = 5e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to go on with Japanese."""

    english: float = 0.0
    """Share of raw English, which a guard may change."""
    own: float = 0.0
    """Share of own traces, which a guard may change."""
    controller: str = ""
    """Law of the guard that acts; empty only measures at the end."""
    behavior: bool = True
    """Whether the guard has prompts and traces, too."""
    yoked_to: str = ""
    """Arm whose mean shares this one has, fixed."""


STEERED = "new guard"
YOKED = "yoked"
ARMS = {
    "Japanese only": Arm(),
    "replay 10 %": Arm(english=0.10),
    "replay 25 %": Arm(english=0.25),
    "replay 50 %": Arm(english=0.50),
    "text guard": Arm(english=0.10, controller="ladder", behavior=False),
    STEERED: Arm(english=0.10, own=0.05, controller="two_way"),
    YOKED: Arm(yoked_to=STEERED),
    "English only": Arm(english=1.0),
}


def make_own_traces(work_dir: Path, scale: Scale, base: Path, number: int) -> Path:
    """Let a base answer questions of training items, and build its data; return the folder."""
    folder = work_dir / f"base-{number}"
    own = folder / "own"
    if not own.exists():
        questions = work_dir / "tasks" / "questions.jsonl"
        arguments = ["replay", "--model", str(base), "--questions", str(questions)]
        arguments += ["--max_new_tokens", str(scale.generation["max_new_tokens"])]
        arguments += ["--temperature", "1", "--out", str(own)]
        launching.run_script("command.py", arguments, folder / "own.log")
    if not (folder / "build").exists():
        shares = {ENGLISH: 0.1, OWN: 0.05}
        path = folder / "build.mix.yaml"
        mix = write_mix(path, work_dir, own, scale, 0, shares, behavior=True)
        part = folder / "build.part"
        shutil.rmtree(part, ignore_errors=True)
        build(load_mix(mix), part)
        part.rename(folder / "build")
    return own


def run_arm(work_dir: Path, scale: Scale, base: Path, number: int, order: int, name: str) -> None:
    """Run one arm, and let its model answer the items."""
    arm = ARMS[name]
    folder = work_dir / f"base-{number}"
    run_dir = _run_dir(work_dir, number, order, name)
    shares = {ENGLISH: arm.english, OWN: arm.own}
    if arm.yoked_to:
        shares = mean_shares(_run_dir(work_dir, number, order, arm.yoked_to))
    mix = write_mix(
        run_dir.with_suffix(".mix.yaml"),
        work_dir,
        folder / "own",
        scale,
        order,
        shares,
        behavior=arm.behavior,
    )
    schedule = {"lr": PEAK_LR, "warmup_steps": max(1, scale.steps // 12), "schedule": "cosine"}
    run = run_yaml(scale, base, mix, folder / "build", scale.steps, schedule)
    run["guard"] = _guard(scale, arm)
    launching.train(run_dir, run)
    ask(work_dir, scale, launching.exported(run_dir), run_dir / ANSWERS)


def finished_run(work_dir: Path, number: int, order: int, name: str) -> Path | None:
    """Return the run directory of an arm whose model has answered; None if it has not."""
    run_dir = _run_dir(work_dir, number, order, name)
    return run_dir if (run_dir / ANSWERS).exists() else None


def mean_shares(run_dir: Path) -> dict[str, float]:
    """Return the shares of English and of own traces of all tokens that a run was trained on."""
    tokens: dict[str, int] = {}
    for event in read_events(run_dir / "metrics.jsonl"):
        if event["event"] == "step":
            for source, number in event["tokens_by_source"].items():
                tokens[source] = tokens.get(source, 0) + number
    total = sum(tokens.values())
    return {name: tokens.get(name, 0) / total for name in (ENGLISH, OWN)}


def _run_dir(work_dir: Path, number: int, order: int, name: str) -> Path:
    plain = name.replace(" %", "").replace(" ", "-").lower()
    return work_dir / f"base-{number}" / f"order-{order}" / plain


def _guard(scale: Scale, arm: Arm) -> dict[str, Any]:
    guard: dict[str, Any] = {**scale.guard, "domains": {JAPANESE: JAPANESE_LIMITS}}
    if not arm.controller:
        return {**guard, "policy": "warn"}
    guard["interval_steps"] = scale.interval_steps
    guard["controller"] = arm.controller
    if arm.behavior:
        guard["generation_interval_steps"] = 2 * scale.interval_steps
    return guard

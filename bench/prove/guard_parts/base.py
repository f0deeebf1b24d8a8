"""The base of the behavior proof: a small model that knows two languages and solves tasks.

    random weights -> English 50 %, Japanese 20 %, tasks 30 % -> rounds of tasks, at last of tasks
    alone, until raw English is 5 % worse, as it is after post-training, and the gates are passed

A base that does not pass the gates ends the proof, with its figures: a model that cannot do a task
cannot forget it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM

from cpt.model.configuration import PRESETS
from cpt.telemetry.metrics import read_events
from data_pipeline.build.build import build
from data_pipeline.config.mix_file import load_mix
from data_pipeline.store.files import atomic_write
from guard_parts import launching
from guard_parts.mixes import ENGLISH_DOMAINS, JAPANESE, JAPANESE_LIMITS, write_base_mix
from guard_parts.scale import Scale
from guard_parts.small_vocabulary import END_OF_TEXT, NUM_MERGES, VOCAB_SIZE
from guard_parts.tasks import FAMILIES

ANSWERS = "answers.json"
"""The answers of a model, in the folder of the base or run that ended with it."""
TASKS_SHARE = 0.3
WORSE_PERCENT = 5.0
"""Rise of raw English bits per byte that a round must reach."""
LEAST_ACCURACY = 0.90
"""0.95 for the base 1 that docs/guard.md reports."""
LEAST_FORMAT = 0.99
_HEADS = {"num_attention_heads": 4, "num_local_experts": 4, "max_position_embeddings": 4096}
_TOKENS = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": NUM_MERGES,
    "bos_token_id": NUM_MERGES,
    "eos_token_id": END_OF_TEXT,
}


def make_base(work_dir: Path, scale: Scale, number: int) -> Path:
    """Return the Hugging Face directory of a base; what is done is not done again.

    Raises:
        SystemExit: the base does not pass the gates.
    """
    folder = work_dir / f"base-{number}"
    initial = folder / "initial"
    if not initial.exists():
        write_initial(initial, scale, number)
    mix = write_base_mix(folder / "text.mix.yaml", work_dir, scale, number, tasks=TASKS_SHARE)
    build_dir = work_dir / "build-base"
    schedule = {"lr": 3e-3, "warmup_steps": scale.pretrain_steps // 20, "schedule": "cosine"}
    run = run_yaml(scale, initial, mix, build_dir, scale.pretrain_steps, schedule)
    run["guard"] = {"enabled": False}
    weights = launching.exported(launching.train(folder / "pretrain", run))
    weights, problems = _post_train(work_dir, scale, number, weights)
    if problems and scale.gates:
        raise SystemExit(f"base {number} does not pass the gates: {'; '.join(problems)}")
    return weights


def write_initial(path: Path, scale: Scale, number: int) -> None:
    """Write random weights, whose seed is the number of the base."""
    torch.manual_seed(number)
    keys: dict[str, Any] = {**PRESETS["tiny"], **_HEADS, **scale.model, **_TOKENS}
    layers = keys["num_hidden_layers"]
    keys.pop("layer_types", None)
    part = path.with_suffix(".part")
    GptOssForCausalLM(GptOssConfig(**keys)).save_pretrained(part)
    part.rename(path)
    print(f"base {number}: {layers} layers", flush=True)


def build_base(work_dir: Path, scale: Scale) -> None:
    """Build the sources of all bases, unless that is done."""
    build_dir = work_dir / "build-base"
    if not build_dir.exists():
        mix = write_base_mix(work_dir / "base.mix.yaml", work_dir, scale, 0, tasks=TASKS_SHARE)
        build(load_mix(mix), build_dir)


def run_yaml(
    scale: Scale,
    model: Path,
    mix: Path,
    build_dir: Path,
    steps: int,
    schedule: dict[str, Any],
) -> dict[str, Any]:
    """Return the run YAML of one run of the proof, without what is particular to it."""
    return {
        "model": {"path": str(model)},
        "data": {"mix": str(mix), "build_dir": str(build_dir)},
        "train": {
            "total_steps": steps,
            "seq_len": scale.seq_len,
            "global_batch_size": scale.global_batch_size,
            "micro_batch_size": scale.global_batch_size,
            "dtype": "fp32",
            "threads": 1,
            **schedule,
        },
        "telemetry": {"export_at_end": True},
    }


def _post_train(work_dir: Path, scale: Scale, number: int, weights: Path) -> tuple[Path, list[str]]:
    """Train on tasks until the gates are passed; return the weights and what is missing."""
    folder = work_dir / f"base-{number}"
    before: dict[str, float] = {}
    problems: list[str] = []
    for turn, part in enumerate(scale.rounds, 1):
        seed = 100 * number + turn
        path = folder / f"tasks-{turn}.mix.yaml"
        mix = write_base_mix(path, work_dir, scale, seed, tasks=part.tasks_share)
        schedule = {"lr": part.lr, "warmup_steps": part.steps // 20, "schedule": "cosine"}
        run = run_yaml(scale, weights, mix, work_dir / "build-base", part.steps, schedule)
        run["guard"] = {**scale.guard, "policy": "warn", "domains": {JAPANESE: JAPANESE_LIMITS}}
        run_dir = launching.train(folder / f"tasks-{turn}", run)
        events = read_events(run_dir / "metrics.jsonl")
        now: dict[str, float] = {}
        for event in events:
            if event["event"] == "guard" and event["domain"] in ENGLISH_DOMAINS:
                before.setdefault(event["domain"], event["baseline"])
                now[event["domain"]] = event["bits_per_byte"]
        worse = min(100 * (now[name] / before[name] - 1) for name in ENGLISH_DOMAINS)
        weights = launching.exported(run_dir)
        answers = ask(work_dir, scale, weights, folder / f"answers-{turn}.json")
        problems = _missing(number, worse, answers)
        with atomic_write(folder / ANSWERS) as file:  # those of the base, if it is one
            file.write(json.dumps(answers).encode("ascii"))
        if not problems:
            break
    return weights, problems


def ask(work_dir: Path, scale: Scale, weights: Path, out: Path) -> list[dict[str, Any]]:
    """Return the answers of a model to the items of the end."""
    if not out.exists():
        arguments = ["--model", str(weights), "--items", str(work_dir / "tasks" / "items.jsonl")]
        arguments += ["--out", str(out)]
        arguments += ["--max_new_tokens", str(scale.generation["max_new_tokens"])]
        launching.run_script("answers.py", arguments, out.with_suffix(".log"))
    answers: list[dict[str, Any]] = json.loads(out.read_text())
    return answers


def share(answers: list[dict[str, Any]], key: str, family: str | None = None) -> float:
    """Return the share of answers that are `right` or in `good_form`, of one family or of all."""
    values = [item[key] for item in answers if family in (None, item["family"])]
    return sum(values) / len(values)


def _missing(number: int, worse: float, answers: list[dict[str, Any]]) -> list[str]:
    """Print what a base can do, and return the gates that it does not pass."""
    problems = []
    for family in FAMILIES:
        right = share(answers, "right", family)
        form = share(answers, "good_form", family)
        line = f"{family}: {100 * right:.1f} % right, {100 * form:.1f} % in good form"
        print(f"base {number}: {line}", flush=True)
        if right < LEAST_ACCURACY or form < LEAST_FORMAT:
            problems.append(line)
    line = f"raw English is {worse:+.1f} %, must be >= {WORSE_PERCENT:g} %"
    print(f"base {number}: {line}", flush=True)
    if worse < WORSE_PERCENT:
        problems.append(line)
    return problems

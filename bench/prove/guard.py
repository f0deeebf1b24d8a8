"""Measure on real text what Japanese costs English: no replay, fixed shares of it, and the guard.

    python bench/prove/guard.py [--work_dir DIR] [--seeds 3] [--arms ...] [--json FILE] [--svg FILE]

A gpt-oss of 3.9 M parameters (all parts of the architecture, the first 8,192 merges of its
vocabulary) learns English prose, reference, code, mathematics and Harmony-like dialogue, then goes
on with Japanese:

    naive           Japanese alone
    replay N %      N percent of the tokens are the same English, evenly over its five domains
    KL N %          as replay, with the divergence from the base model on these rows in the loss
    self N %        N percent of the tokens are text that the base model wrote (`cpt replay`)
    guard           starts with 1 % replay and is told nothing but the tolerance

The divergence has a weight of 1.  KL and self run only if `--arms` names them.  The others, with
three seeds, took 2 h 10 min on two cores that other work shared.

Every run is the product: `deepspeed cpt/run.py`, ZeRO, the mixture, the guard.  All measure the
same held-out documents, and only the guard arm acts on them.  Runs that are done are not repeated,
so the script can be stopped and started again.

The script needs a Debian system with a package mirror (for the texts) and about 2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "bench" / "prove")]

from guard_parts.small_vocabulary import END_OF_TEXT, NUM_MERGES, VOCAB_SIZE, shrink  # noqa: E402

shrink()

import torch  # noqa: E402
import yaml  # noqa: E402
from guard_parts import drawing, launching  # noqa: E402
from guard_parts.text import write_domains  # noqa: E402
from transformers import GptOssConfig, GptOssForCausalLM  # noqa: E402

from cpt.model.configuration import PRESETS  # noqa: E402
from cpt.telemetry.metrics import read_events  # noqa: E402
from data_pipeline.build.build import build  # noqa: E402
from data_pipeline.config.mix_file import load_mix  # noqa: E402

ENGLISH = {"prose": "en", "reference": "en", "code": "code", "math": "math", "chat": "en"}
SELF_WRITTEN = "self_written"
SELF_WRITTEN_DOCUMENTS = 100
"""Texts of each domain, with up to 128 tokens after the first 8: an arm of 10 % reads as much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to go on with Japanese."""

    replay: float
    """Share of the English tokens at the start."""
    guard: bool = False
    """Whether the guard measures on the way and acts."""
    kl_weight: float = 0.0
    """Weight of the divergence from the base model on English rows."""
    self_written: bool = False
    """Whether the English is the base model's own."""


ARMS = {
    "naive": Arm(replay=0.0),
    **{f"replay {percent} %": Arm(replay=percent / 100) for percent in (1, 5, 10, 25, 50)},
    **{f"KL {percent} %": Arm(replay=percent / 100, kl_weight=1.0) for percent in (10, 25)},
    **{f"self {percent} %": Arm(replay=percent / 100, self_written=True) for percent in (10, 25)},
    "guard": Arm(replay=0.01, guard=True),
}
DEFAULT_ARMS = [name for name, arm in ARMS.items() if not (arm.kl_weight or arm.self_written)]
TOLERANCE_PERCENT = 1.0
PANEL_DOCUMENTS = 800
"""Documents of each domain that every look measures.  With 16 looks at six domains a loss of 1 %
takes 779 (cpt/guard/requirements.py), and a guard that could not see it is refused.
"""
SEQ_LEN = 512
GLOBAL_BATCH_SIZE = 8
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": NUM_MERGES,
    "bos_token_id": NUM_MERGES,
    "eos_token_id": END_OF_TEXT,
    "max_position_embeddings": 4096,
}


def main() -> None:
    """Run the arms that are not done yet, then print the table."""
    parser = argparse.ArgumentParser(description="The guard's proof.")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "prove_guard")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--parallel", type=int, default=2, help="runs at a time, of one thread each"
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=DEFAULT_ARMS)
    parser.add_argument("--pretrain_steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=150, help="of the continuation")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    prepare(options.work_dir)
    base = pretrain(options.work_dir, options.pretrain_steps)
    arms = [ARMS[arm] for arm in options.arms]
    if any(arm.kl_weight for arm in arms):
        write_kl_targets(options.work_dir, base)
    if any(arm.self_written for arm in arms):
        write_self_replay(options.work_dir, base)
    planned = [(arm, seed) for seed in range(1, options.seeds + 1) for arm in options.arms]
    with ThreadPoolExecutor(options.parallel) as pool:
        started = []
        for arm, seed in planned:
            started.append(pool.submit(continue_on_japanese, options, base, arm, seed))
        folders = [future.result() for future in started]
    runs = []
    for (arm, seed), folder in zip(planned, folders, strict=True):
        runs.append({"arm": arm, "seed": seed, **outcome(folder)})
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "runs": runs,
        "pretrain_steps": options.pretrain_steps,
        "steps": options.steps,
        "tokens_per_step": SEQ_LEN * GLOBAL_BATCH_SIZE,
        "date": time.strftime("%Y-%m-%d"),
    }
    size = f"{options.steps} steps of {report['tokens_per_step']} slots"
    source = f"{report['machine']}, {report['date']}; one point a run, {size}"
    print(drawing.table(runs))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.svg:
        options.svg.write_text(drawing.draw(runs, TOLERANCE_PERCENT, source), encoding="utf-8")


def prepare(work_dir: Path) -> None:
    """Write the texts, their build, and the untrained model."""
    if (work_dir / "initial").exists():
        return
    shutil.rmtree(work_dir, ignore_errors=True)
    write_domains(work_dir / "text")
    build(load_mix(write_mix(work_dir, "pretrain", seed=0, replay=1.0)), work_dir / "build")
    torch.manual_seed(0)
    config = GptOssConfig(**{**PRESETS["tiny"], **MODEL})
    GptOssForCausalLM(config).save_pretrained(work_dir / "initial.part")
    (work_dir / "initial.part").rename(work_dir / "initial")


def write_mix(
    work_dir: Path, name: str, *, seed: int, replay: float, self_written: bool = False
) -> Path:
    """Write a mix of which `replay` is English and the rest Japanese; return its path.

    The English is shared evenly by the five domains, or it is all of the base model's own writing.
    """
    share = 0.0 if self_written else replay / len(ENGLISH)
    weights = {**dict.fromkeys(ENGLISH, share), "japanese": 1 - replay}
    sources: list[dict[str, Any]] = []
    for domain, weight in weights.items():
        source = {
            "name": domain,
            "language": ENGLISH.get(domain, "ja"),
            "domain": domain,
            "path": str(work_dir / "text" / f"{domain}.jsonl"),
            "weight": weight,
            "held_out_share": 0.03 if domain == "japanese" else 0.4,
        }
        sources.append(source)
    if self_written:
        written = {
            "name": SELF_WRITTEN,
            "language": "en",
            "domain": SELF_WRITTEN,
            "kind": "self_replay",
            "path": str(work_dir / SELF_WRITTEN / "plain.jsonl"),
            "weight": replay,
        }
        sources.append(written)
    path = work_dir / f"{name}.mix.yaml"
    mix = {"seq_len": SEQ_LEN, "seed": seed, "sources": sources}
    path.write_text(yaml.safe_dump(mix, sort_keys=False))
    return path


def write_kl_targets(work_dir: Path, base: Path) -> None:
    """Write what the base model predicts on the English training rows, unless it is there."""
    if (work_dir / "kl_targets").exists():
        return
    arguments = ["--model", str(base), "--build", str(work_dir / "build"), "--top_k", "16"]
    for domain in ENGLISH:
        arguments += ["--source", domain]
    run_command(work_dir, "kl_targets", "kl_targets", arguments)


def write_self_replay(work_dir: Path, base: Path) -> None:
    """Let the base model write texts, and build the mix with them, unless that is done."""
    if (work_dir / "build_self").exists():
        return
    if not (work_dir / SELF_WRITTEN).exists():  # `cpt replay` makes it when all is sampled
        sample_self_replay(work_dir, base)
    mix = write_mix(work_dir, "self", seed=0, replay=0.1, self_written=True)
    build(load_mix(mix), work_dir / "build_self")


def sample_self_replay(work_dir: Path, base: Path) -> None:
    """Let the base model continue equally many texts of each English domain."""
    prefixes = work_dir / "prefixes.jsonl"
    with open(prefixes, "w", encoding="utf-8") as file:
        for domain in ENGLISH:
            documents = (work_dir / "text" / f"{domain}.jsonl").read_text().splitlines()
            step = len(documents) // SELF_WRITTEN_DOCUMENTS
            for line in documents[::step][:SELF_WRITTEN_DOCUMENTS]:
                file.write(f"{line}\n")
    arguments = ["--model", str(base), "--prefixes", str(prefixes)]
    arguments += ["--max_new_tokens", "128", "--temperature", "1"]
    run_command(work_dir, SELF_WRITTEN, "replay", arguments)


def run_command(work_dir: Path, out: str, subcommand: str, arguments: list[str]) -> None:
    """Run a subcommand of `cpt` with the small vocabulary."""
    words = [subcommand, *arguments, "--out", str(work_dir / out)]
    launching.run_script("command.py", words, work_dir / f"{out}.log")


def pretrain(work_dir: Path, steps: int) -> Path:
    """Train the small model on English, and return its Hugging Face directory."""
    run = {
        "model": {"path": str(work_dir / "initial")},
        "data": {
            "mix": str(write_mix(work_dir, "pretrain", seed=0, replay=1.0)),
            "build_dir": str(work_dir / "build"),
        },
        "train": {"total_steps": steps, "lr": 3e-3, "warmup_steps": 50, "schedule": "cosine"},
        "guard": {"enabled": False},
        "telemetry": {"export_at_end": True},
    }
    run_dir = launch(work_dir, "pretrain", run)
    return launching.exported(run_dir)


def continue_on_japanese(options: argparse.Namespace, base: Path, arm: str, seed: int) -> Path:
    """Run one arm with one order of the data, and return its run directory."""
    name = f"{arm.replace(' %', '').replace(' ', '-')}-{seed}"
    chosen = ARMS[arm]
    mix = write_mix(
        options.work_dir, name, seed=seed, replay=chosen.replay, self_written=chosen.self_written
    )
    guard: dict[str, Any] = {
        "max_documents": PANEL_DOCUMENTS,
        "tolerance_percent": TOLERANCE_PERCENT,
        # fewer documents, and its bits fall by tens of percent
        "domains": {"japanese": {"tolerance_percent": 5.0}},
    }
    if chosen.guard:
        guard["interval_steps"] = 10
        guard["controller"] = "ladder"
    train: dict[str, Any] = {
        "total_steps": options.steps,
        "lr": 5e-4,
        "warmup_steps": 10,
        "schedule": "cosine",
    }
    if chosen.kl_weight:
        train |= {"kl_targets": str(options.work_dir / "kl_targets"), "kl_weight": chosen.kl_weight}
    build_dir = options.work_dir / ("build_self" if chosen.self_written else "build")
    run = {
        "model": {"path": str(base)},
        "data": {"mix": str(mix), "build_dir": str(build_dir)},
        "train": train,
        "guard": guard,
        "telemetry": {"export_at_end": False},
    }
    return launch(options.work_dir, name, run)


def launch(work_dir: Path, name: str, run: dict[str, Any]) -> Path:
    """Train through the launcher unless that is done, and return the run directory.

    Args:
        work_dir: The run directory is made in it.
        name: Name of the run directory.
        run: The run YAML's content, whose `train` section is completed here.
    """
    train = {
        "seq_len": SEQ_LEN,
        "global_batch_size": GLOBAL_BATCH_SIZE,
        "micro_batch_size": GLOBAL_BATCH_SIZE,
        "dtype": "fp32",
        "threads": 1,
        **run["train"],
    }
    return launching.train(work_dir / name, {**run, "train": train})


def outcome(run_dir: Path) -> dict[str, Any]:
    """Return each domain's final change against the untouched model, and how the run went."""
    events = read_events(run_dir / "metrics.jsonl")
    guard = {event["domain"]: event for event in events if event["event"] == "guard"}
    steps = [event for event in events if event["event"] == "step"]
    replayed = 0
    for event in steps:
        by_source = event["tokens_by_source"]
        replayed += sum(by_source.values()) - by_source.get("japanese", 0)
    intervals = {}
    for domain, event in guard.items():
        intervals[domain] = [event["ci_low"], event["ci_high"]]
    return {
        "change_percent": {domain: event["delta_percent"] for domain, event in guard.items()},
        "interval": intervals,
        "baseline": {domain: event["baseline"] for domain, event in guard.items()},
        "replay_share": replayed / sum(event["tokens"] for event in steps),
        "decisions": [event for event in events if event["event"] == "guard_decision"],
    }


if __name__ == "__main__":
    main()

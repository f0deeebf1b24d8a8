"""Train a small gpt-oss with Adam's moments in fp32, in bf16 and in 8-bit blocks, and compare.

    python bench/prove/optimizer_state.py [--work_dir DIR] [--quick] [--seeds N ...] [--report]
        [--json FILE]

The model begins from random weights and learns English and some Japanese, with the same rows in the
same order whatever `train.optimizer_state` is.  Everything is the product's but the engine
(mxfp4_parts/training.py).  Measured are the bits per byte of held-out English and Japanese, as
differences from fp32 of the same seed, with 95 % intervals over the seeds.

    beta2 0.95     the default of `train.beta2`
    beta2 0.999    a mean over 1,000 steps: the harder case for a moment that is rounded
    controls       with beta2 0.999: the moments rounded to the nearest, which this project does not
                   offer for the second

Results are kept: killed at any time, the script goes on.  It needs a Debian system with a package
mirror for the texts.  `--quick` shows that all parts work, on the sample corpora, with figures that
mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "bench" / "prove")]

from mxfp4_parts import scale as sizes  # noqa: E402

QUICK = replace(sizes.QUICK, steps=6)
REAL = replace(
    sizes.REAL,
    num_merges=512,
    model={
        **sizes.REAL.model,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 16,
    },
    seq_len=128,
    global_batch_size=4,
    steps=240,
    warmup_steps=20,
    text_bytes=600_000,
    held_out_bytes=16_000,
)
# the vocabulary must be chosen before anything reads it
SCALE = QUICK if "--quick" in sys.argv else REAL
os.environ["GUARD_PROOF_MERGES"] = str(SCALE.num_merges)

from guard_parts.small_vocabulary import shrink  # noqa: E402

shrink()

import torch  # noqa: E402
from mxfp4_parts.material import Material  # noqa: E402
from mxfp4_parts.outcome import interval  # noqa: E402
from mxfp4_parts.texts import RELEASE  # noqa: E402
from mxfp4_parts.training import Rows, Trainer  # noqa: E402

from cpt.config import TrainSection  # noqa: E402
from cpt.guard.score import ScoredSet  # noqa: E402
from cpt.offline.ranks import single_process  # noqa: E402
from cpt.storage.state_bytes import MomentForm  # noqa: E402
from cpt.training import narrow_adamw  # noqa: E402
from data_pipeline.store.files import write_json  # noqa: E402

CONTROL = "to the nearest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A setting that is compared."""

    form: MomentForm
    beta2: float
    is_control: bool = False
    """Whether both moments are rounded to the nearest."""

    @property
    def name(self) -> str:
        """Its name in tables."""
        rounding = f", {CONTROL}" if self.is_control else ""
        return f"beta2 {self.beta2}, {self.form}{rounding}"

    @property
    def reference(self) -> Arm:
        """The setting that it is compared with."""
        return Arm(form="fp32", beta2=self.beta2)


ARMS = (
    Arm(form="fp32", beta2=0.95),
    Arm(form="bf16", beta2=0.95),
    Arm(form="int8", beta2=0.95),
    Arm(form="fp32", beta2=0.999),
    Arm(form="bf16", beta2=0.999),
    Arm(form="int8", beta2=0.999),
    Arm(form="bf16", beta2=0.999, is_control=True),
    Arm(form="int8", beta2=0.999, is_control=True),
)


def main() -> None:
    """Train what is not done yet, then print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work_dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="small, to see that all parts work")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SCALE.num_seeds)))
    parser.add_argument("--report", action="store_true", help="report what is done, run nothing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    name = "prove_optimizer_state_quick" if options.quick else "prove_optimizer_state"
    work_dir: Path = (options.work_dir or ROOT / "runs" / name).resolve()
    torch.set_num_threads(1)
    (work_dir / "cells").mkdir(parents=True, exist_ok=True)
    if not options.report:
        train_all(work_dir, options.seeds, from_sample=options.quick)
    results = read_results(work_dir, options.seeds)
    print(table(results))
    if options.json is not None:
        origin = {"machine": platform.machine(), "torch": torch.__version__}
        content = {**origin, "date": time.strftime("%Y-%m-%d"), "cells": results}
        write_json(options.json, content, indent=1)


def train_all(work_dir: Path, seeds: list[int], *, from_sample: bool) -> None:
    """Train the cells that are not done, one seed after the other."""
    material = Material(work_dir, SCALE, from_sample=from_sample)
    with single_process() as topology:
        trainer = Trainer(SCALE, topology)
        for seed in seeds:
            rows = material.rows(RELEASE, seed, topology)
            for arm in ARMS:
                path = file_of(work_dir, arm, seed)
                if not path.exists():
                    result = train_cell(trainer, rows, material.sets, arm, seed)
                    write_json(path, result)
                    print(time.strftime("%H:%M:%S"), result, flush=True)


def train_cell(
    trainer: Trainer, rows: Rows, sets: list[ScoredSet], arm: Arm, seed: int
) -> dict[str, Any]:
    """Train from random weights, and return the scores of held-out text."""
    began = time.process_time()
    section = TrainSection(
        seq_len=SCALE.seq_len,
        global_batch_size=SCALE.global_batch_size,
        total_steps=SCALE.steps,
        lr=SCALE.release_lr,
        warmup_steps=SCALE.warmup_steps,
        beta2=arm.beta2,
        optimizer_state=arm.form,
        seed=seed,
    )
    stochastic = narrow_adamw.STOCHASTIC
    largest_beta = narrow_adamw.LARGEST_NEAREST_BETA
    if arm.is_control:
        narrow_adamw.STOCHASTIC = {**stochastic, arm.form: ()}
        narrow_adamw.LARGEST_NEAREST_BETA = 1.0
    try:
        state = trainer.train(trainer.initial(seed), rows, section, SCALE.steps)
    finally:
        narrow_adamw.STOCHASTIC = stochastic
        narrow_adamw.LARGEST_NEAREST_BETA = largest_beta
    return {
        "arm": arm.name,
        "seed": seed,
        "steps": SCALE.steps,
        "tokens": SCALE.steps * SCALE.step_tokens,
        "bits_per_byte": trainer.bits_per_byte(state.weights, sets),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def file_of(work_dir: Path, arm: Arm, seed: int) -> Path:
    """Return the file that holds the result of a cell."""
    kind = f"{arm.form}-nearest" if arm.is_control else arm.form
    return work_dir / "cells" / f"{kind}-{arm.beta2}-{seed}.json"


def read_results(work_dir: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """Return the results of the cells that are done."""
    results = []
    for seed in seeds:
        for arm in ARMS:
            path = file_of(work_dir, arm, seed)
            if path.exists():
                results.append(json.loads(path.read_text(encoding="utf-8")))
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Return the scores, and the differences from fp32 of the same seed with their intervals."""
    scores = {(one["arm"], one["seed"]): one["bits_per_byte"] for one in results}
    lines = ["| setting | seeds | English | Japanese | English - fp32 | Japanese - fp32 |"]
    lines.append("|---|---|---|---|---|---|")
    for arm in ARMS:
        seeds = [seed for name, seed in scores if name == arm.name]
        pairs = [seed for seed in seeds if (arm.reference.name, seed) in scores]
        cells = []
        for domain in ("english", "japanese"):
            found = [scores[arm.name, seed][domain] for seed in seeds]
            cells.append(interval(found).text(".3f") if found else "")
        for domain in ("english", "japanese"):
            differences = []
            for seed in pairs:
                before = scores[arm.reference.name, seed][domain]
                differences.append(scores[arm.name, seed][domain] - before)
            is_compared = differences and arm.form != "fp32"
            cells.append(interval(differences).text("+.4f") if is_compared else "")
        lines.append(f"| {arm.name} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Compare Muon with AdamW: a small gpt-oss from random weights, and one that goes on with Japanese.

    python bench/prove/muon.py [--work_dir DIR] [--quick] [--seeds N ...] [--report]
        [--json FILE] [--svg FILE]

    random weights -> English and some Japanese, by each optimizer  -> the bases, with curves
    each base      -> Japanese alone, by each optimizer             -> learned, and forgotten

Both optimizers see the same rows in the same order, at the same learning rates: `train.muon` scales
updates so that the rates of AdamW carry over.  Everything is the product's but the engine
(mxfp4_parts/training.py), and the texts are those of bench/prove/mxfp4.py.  What is measured is the
bits per byte of held-out Japanese and English, with 95 % intervals over seeds, and of the
difference of the optimizers seed by seed.

Results are kept: killed at any time, the script goes on.  It needs a Debian system with a package
mirror for the texts.  `--quick` shows that all parts work, on the sample corpora, with figures that
mean nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "bench" / "prove")]

from mxfp4_parts import scale as sizes  # noqa: E402

# the vocabulary must be chosen before anything reads it
NUM_MERGES = 1024
os.environ["GUARD_PROOF_MERGES"] = str(NUM_MERGES)

from guard_parts.small_vocabulary import shrink  # noqa: E402

shrink()

import torch  # noqa: E402
from muon_parts import report  # noqa: E402
from muon_parts.cells import BASE, Plan, continued, from_random_weights, result_of  # noqa: E402
from mxfp4_parts.material import Material  # noqa: E402
from mxfp4_parts.texts import JAPANESE, RELEASE  # noqa: E402
from mxfp4_parts.training import Trainer  # noqa: E402

from cpt.offline.ranks import single_process  # noqa: E402
from data_pipeline.store.files import write_json  # noqa: E402

SMALL_MODEL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
"""Muon's products grow with the third power of the sizes, and a CPU has to compute them."""
REAL = Plan(
    scale=replace(
        sizes.REAL,
        num_merges=NUM_MERGES,
        model={**sizes.REAL.model, **SMALL_MODEL},
        seq_len=256,
        global_batch_size=4,
        held_out_bytes=16_000,
        lrs=(3e-4, 1e-3),
    ),
    base_lrs=(3e-3,),
    base_steps=160,
    check_steps=40,
    steps=32,
)
QUICK = Plan(
    scale=replace(sizes.QUICK, lrs=(1e-3, 3e-3)),
    base_lrs=(1e-3, 3e-3),
    base_steps=8,
    check_steps=4,
    steps=6,
)


def main() -> None:
    """Run what is not done yet, then print the tables."""
    parser = argparse.ArgumentParser(description="Muon beside AdamW on a small model.")
    parser.add_argument("--work_dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="small, to see that all parts work")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to run; default: all")
    parser.add_argument("--report", action="store_true", help="report what is done, run nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    plan = QUICK if options.quick else REAL
    name = "prove_muon_quick" if options.quick else "prove_muon"
    work_dir: Path = (options.work_dir or ROOT / "runs" / name).resolve()
    torch.set_num_threads(1)
    if not options.report:
        seeds = options.seeds or list(range(plan.scale.num_seeds))
        run_seeds(work_dir, plan, seeds, from_sample=options.quick)
    write_report(work_dir, plan, options)


def run_seeds(work_dir: Path, plan: Plan, seeds: list[int], *, from_sample: bool) -> None:
    """Run everything that is not done, one seed after the other."""
    scale = plan.scale
    material = Material(work_dir, scale, from_sample=from_sample)
    sets = material.sets
    folder = work_dir / "cells"
    folder.mkdir(exist_ok=True)
    with single_process() as topology:
        trainer = Trainer(scale, topology)
        for seed in seeds:
            base_rows = material.rows(RELEASE, seed, topology)
            rows = material.rows(JAPANESE, seed, topology)
            for cell in plan.cells(seed):
                if result_of(folder, cell) is not None:
                    continue
                if cell.base == BASE:
                    found = from_random_weights(folder, plan, trainer, base_rows, sets, cell)
                else:
                    found = continued(folder, plan, trainer, rows, sets, cell)
                print(time.strftime("%H:%M:%S"), report.in_a_line(found), flush=True)


def write_report(work_dir: Path, plan: Plan, options: argparse.Namespace) -> None:
    """Print the tables of what is done, and write the JSON and the figure."""
    wanted = []
    for seed in range(plan.scale.num_seeds):
        wanted += plan.cells(seed)
    results = []
    for cell in wanted:
        found = result_of(work_dir / "cells", cell)
        if found is not None:
            results.append(found)
    machine = f"{platform.machine()}, torch {torch.__version__}"
    date = time.strftime("%Y-%m-%d")
    counted = f"{len(results)} of {len(wanted)} trainings"
    print(counted)
    print(report.base_table(results))
    print(report.continued_table(results))
    content: dict[str, Any] = {
        "machine": machine,
        "date": date,
        "quick": options.quick,
        "trainings_run": len(results),
        "trainings_planned": len(wanted),
        "step_tokens": plan.scale.step_tokens,
        "trainings": results,
    }
    if options.json:
        write_json(options.json, content, indent=1)
    if options.svg:
        source = f"{counted}; bands are 95 % intervals over seeds; {machine}, {date}"
        options.svg.write_text(report.draw(results, source), encoding="utf-8")


if __name__ == "__main__":
    main()

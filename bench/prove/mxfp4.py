"""Measure what an MXFP4 export keeps of what experts learned, with and without training for it.

    python bench/prove/mxfp4.py [--work_dir DIR] [--quick] [--seeds N ...] [--report]
        [--json FILE] [--svg FILE] [--page FILE]

A small gpt-oss learns English and is rounded to MXFP4: the release.  It goes on with Japanese, at
three learning rates, and is exported by three exponent rules; beside it the same with the last
third of the steps MXFP4-aware (`train.quantize`).  Measured on held-out Japanese and English of
packages that no training has read: bits per byte before and after the export, how much of what the
experts learned survived, and what the export kept of their movement (mxfp4_parts/cells.py).

    short, floor       a release that has hardly learned, rounded by floor
    long, floor        one that was trained three times as long
    long, ceil         the same, rounded by ceil, as the released gpt-oss probably was
    converged, ceil    one whose held-out English no longer falls
    second run         after the long release's training on Japanese another as long, rounded from
                       its first step on, as the recipes for a last phase are

Everything is the product's but the engine (mxfp4_parts/training.py); one cell is also run through
cpt/run.py and cpt export, and the report says how near the figures are (mxfp4_parts/product.py).
Cells are kept: killed at any time, the script goes on.  One seed is completed after the other.  It
needs a Debian system with a package mirror for the texts, and a good hour of one CPU core.
`--quick` shows that all parts work, on the sample corpora, with figures that mean nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "bench" / "prove")]

from mxfp4_parts.scale import QUICK, REAL, Scale  # noqa: E402

# the vocabulary must be chosen before anything reads it, here and in every process of a run
os.environ["GUARD_PROOF_MERGES"] = str((QUICK if "--quick" in sys.argv else REAL).num_merges)

from guard_parts.small_vocabulary import shrink  # noqa: E402

shrink()

import torch  # noqa: E402
from mxfp4_parts import outcome, product, releases  # noqa: E402
from mxfp4_parts.cells import Cell, finished, in_a_line, run_cell  # noqa: E402
from mxfp4_parts.drawing import draw  # noqa: E402
from mxfp4_parts.material import Material  # noqa: E402
from mxfp4_parts.page import write_page  # noqa: E402
from mxfp4_parts.texts import JAPANESE, RELEASE  # noqa: E402
from mxfp4_parts.training import Trainer  # noqa: E402

from cpt.offline.ranks import single_process  # noqa: E402
from data_pipeline.store.files import write_json  # noqa: E402

PRODUCT_ARM = releases.ARMS[1]
"""The release of the cell that is also run through the product's commands."""


def main() -> None:
    """Run what is not done yet, then print the tables."""
    parser = argparse.ArgumentParser(description="The proof of MXFP4-aware training.")
    parser.add_argument("--work_dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="small, to see that all parts work")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to run; default: all")
    parser.add_argument("--report", action="store_true", help="report what is done, run nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--page", type=Path, help="page that gets the tables, docs/precision.md")
    options = parser.parse_args()
    scale = QUICK if options.quick else REAL
    name = "prove_mxfp4_quick" if options.quick else "prove_mxfp4"
    work_dir: Path = (options.work_dir or ROOT / "runs" / name).resolve()
    torch.set_num_threads(1)
    if not options.report:
        seeds = options.seeds or list(range(scale.num_seeds))
        run_cells(work_dir, scale, seeds, from_sample=options.quick)
        run_product(work_dir, scale)
    write_report(work_dir, scale, options)


def run_cells(work_dir: Path, scale: Scale, seeds: list[int], *, from_sample: bool) -> None:
    """Run the cells that are not done, one seed after the other."""
    material = Material(work_dir, scale, from_sample=from_sample)
    sets = material.sets
    folder = work_dir / "cells"
    folder.mkdir(exist_ok=True)
    with single_process() as topology:
        trainer = Trainer(scale, topology)
        for seed in seeds:
            base_rows = material.rows(RELEASE, seed, topology)
            rows = material.rows(JAPANESE, seed, topology)
            for arm, cells in releases.cells_of_seed(scale, seed):
                release = releases.make_release(folder, scale, trainer, base_rows, sets, arm, seed)
                for cell in cells:
                    if finished(folder, cell) is None:
                        result = run_cell(folder, scale, trainer, rows, sets, cell, release)
                        print(time.strftime("%H:%M:%S"), in_a_line(result), flush=True)


def run_product(work_dir: Path, scale: Scale) -> None:
    """Run one cell through the product's commands, unless that is done."""
    cell = product_cell(scale)
    result = finished(work_dir / "cells", cell)
    if product.finished(work_dir, scale) is not None or result is None:
        return
    release = releases.read_release(work_dir / "cells", PRODUCT_ARM, cell.seed)
    product.run_product(work_dir, scale, result, release)


def product_cell(scale: Scale) -> Cell:
    """Return the cell that the product runs, too: the middle learning rate of the long release."""
    return Cell(arm=PRODUCT_ARM.name, seed=0, lr=scale.middle_lr)


def write_report(work_dir: Path, scale: Scale, options: argparse.Namespace) -> None:
    """Print the tables of the cells that are done, and write the JSON and the figure."""
    folder = work_dir / "cells"
    wanted = []
    for seed in range(scale.num_seeds):
        for _, cells in releases.cells_of_seed(scale, seed):
            wanted += cells
    results = []
    for cell in wanted:
        result = finished(folder, cell)
        if result is not None:
            results.append(result)
    machine = f"{platform.machine()}, torch {torch.__version__}"
    date = time.strftime("%Y-%m-%d")
    print(f"{len(results)} of {len(wanted)} cells")
    print(outcome.table(results))
    print(outcome.english_table(results))
    print(outcome.verdict(results))
    report: dict[str, Any] = {
        "machine": machine,
        "date": date,
        "quick": options.quick,
        "cells_run": len(results),
        "cells_planned": len(wanted),
        "releases": releases.all_facts(folder, scale.num_seeds),
        "summary": outcome.summary(results),
        "cells": results,
    }
    compared = product.finished(work_dir, scale)
    if compared is not None:
        report["product"] = compared
        print(product.told(compared))
    if options.json:
        write_json(options.json, report, indent=1)
    if options.page:
        write_page(options.page, report)
    if options.svg:
        source = f"{len(results)} of {len(wanted)} cells; a dot is a seed; {machine}, {date}"
        options.svg.write_text(draw(results, source), encoding="utf-8")


if __name__ == "__main__":
    main()

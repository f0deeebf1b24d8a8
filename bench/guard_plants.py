"""The laws of the guard on eighteen simulated models that forget.

    python bench/guard_plants.py [--seeds 20] [--evidences bets] [--plot docs/guard-plants.svg]

Prints one table over all plants and seeds: the two laws of `guard.controller`, the two-way law with
permission to go below the mix, what a fixed share equal to its mean would have given, and the best
fixed shares, which nobody knows beforehand. It takes about three minutes on one core.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.guard_plants_parts.contenders import contenders, figures_of, run_all, table
from bench.guard_plants_parts.drawing import draw_plants
from bench.guard_plants_parts.plants import Evidences
from data_pipeline.store.files import atomic_write


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="The laws of the guard on simulated models.")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each plant (default 20)")
    parser.add_argument(
        "--evidences",
        choices=get_args(Evidences),
        default="bets",
        help="how the guard reads a loss: with the product's bets, with the normal bound of "
        "before, or from other documents at each look (default bets)",
    )
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    return parser.parse_args(arguments)


def main() -> None:
    """Run all contenders and print the table."""
    options = parse()
    seeds = range(options.seeds)
    figures = {}
    for name, run in contenders(options.evidences).items():
        is_random = not name.startswith("best fixed")
        figures[name] = figures_of(run_all(run, seeds, is_random=is_random))
    print(table(figures))
    if options.plot is not None:
        with atomic_write(options.plot) as file:
            file.write(draw_plants(options.evidences).encode())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

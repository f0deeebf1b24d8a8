"""`cpt merge`: interpolated weights with bits per byte of held-out text against alpha."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpt.export.merge import MergedWeights, Pair, open_pair, parse_alphas, write_merged
from cpt.guard.paired_test import compare_scores
from cpt.guard.score import DomainScore, ScoredSet
from cpt.model.weights.writer import published
from cpt.offline.model import OfflineModel, single_process
from cpt.telemetry.plot import DASHES, INK, PALETTE, Plot, Series, scale_over
from data_pipeline.store.files import write_json
from data_pipeline.tables import table

RESULT_FILE = "bits_per_byte.json"
PLOT_FILE = "bits_per_byte.svg"


def merge(
    base: Path, tuned: Path, alphas: str, out: Path, sets: list[ScoredSet], *, score_only: bool
) -> str:
    """Write interpolations and, with held-out sets, score them.

    Args:
        base: Directory of the model before training.
        tuned: Directory of the model after training.
        alphas: See `parse_alphas`.
        out: The new directory.
        sets: Held-out sets to score; may be empty.
        score_only: Write scores, but no weights.

    Returns:
        A table for people; empty without held-out sets.
    """
    shares = parse_alphas(alphas)
    pair = open_pair(base, tuned)
    with published(out) as folder:
        if not score_only:
            write_merged(pair, shares, folder, base, tuned)
        if not sets:
            return ""
        results = score_sweep(pair, shares, sets)
        write_json(folder / RESULT_FILE, {"results": results}, indent=2, sort_keys=True)
        (folder / PLOT_FILE).write_text(sweep_plot(results), encoding="utf-8")
    return sweep_table(results)


def score_sweep(pair: Pair, alphas: Sequence[float], sets: list[ScoredSet]) -> list[dict[str, Any]]:
    """Return bits per byte of every interpolation, paired by document with the base model."""
    results = []
    with single_process() as topology:
        model = OfflineModel(pair.config, topology)
        model.load(pair.base)
        untouched = {score.name: score for score in model.score_all(sets)}
        for alpha in alphas:
            model.load(MergedWeights(pair, alpha))
            for score in model.score_all(sets):
                results.append(_result(alpha, score, untouched[score.name]))
    return results


def _result(alpha: float, score: DomainScore, untouched: DomainScore) -> dict[str, Any]:
    change = compare_scores(score, untouched)
    return {
        "alpha": alpha,
        "domain": score.name,
        "language": score.language,
        "bits_per_byte": score.bits_per_byte,
        "delta_percent": change.delta_percent,
        "ci_low": change.ci_low,
        "ci_high": change.ci_high,
    }


def sweep_table(results: list[dict[str, Any]]) -> str:
    """Return one line per alpha with every domain's bits per byte and its change."""
    domains: list[str] = []
    cells_of_alpha: dict[float, list[str]] = {}
    for result in results:
        if result["domain"] not in domains:
            domains.append(result["domain"])
        cells = cells_of_alpha.setdefault(result["alpha"], [f"{result['alpha']:g}"])
        cells.append(f"{result['bits_per_byte']:.4f} ({result['delta_percent']:+.2f} %)")
    return table(["alpha", *domains], list(cells_of_alpha.values()))


def sweep_plot(results: list[dict[str, Any]]) -> str:
    """The change of bits per byte against the share of the tuned weights, with 95 % intervals; an
    SVG file.
    """
    domains = list(dict.fromkeys(result["domain"] for result in results))
    ends = [
        np.asarray([r[key] for r in results], dtype=np.float64) for key in ("ci_low", "ci_high")
    ]
    percents = np.asarray([100 * r["alpha"] for r in results], dtype=np.float64)
    plot = Plot(
        size=(720, 380),
        x=scale_over([percents]),
        y=scale_over(ends, include=[0.0]),
        labels=("share of the tuned weights, %", "bits per byte against the base model, %"),
        right=190,
    )
    plot.horizontal(0.0, INK, label="")
    labels = []
    for index, domain in enumerate(domains):
        mine = [r for r in results if r["domain"] == domain]
        series = Series(
            x=np.asarray([100 * r["alpha"] for r in mine]),
            **{
                name: np.asarray([r[key] for r in mine])
                for name, key in (("mean", "delta_percent"), ("low", "ci_low"), ("high", "ci_high"))
            },
        )
        color = PALETTE[index % len(PALETTE)]
        plot.line(series, color, dash=DASHES[index // len(PALETTE) % len(DASHES)], dots=True)
        labels.append((float(series.mean[-1]), color, f"{domain} ({mine[0]['language']})"))
    plot.right_labels(labels)
    drawing = plot.svg("Bits per byte of held-out text against the share of the tuned weights")
    style = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" width="720" height="380"'
    return drawing.replace("<svg ", f"<svg {style} ", 1) + "\n"

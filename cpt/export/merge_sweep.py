"""`cpt merge`: interpolated weights with bits per byte of held-out text against alpha."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.export.merge import MergedWeights, Pair, open_pair, parse_alphas, write_merged
from cpt.guard.paired_test import compare_scores
from cpt.guard.score import DomainScore, ScoredSet
from cpt.model.weights.writer import published
from cpt.offline.model import OfflineModel, single_process
from data_pipeline.charts import (
    DASHES,
    INK,
    PALETTE,
    Line,
    as_svg,
    draw_level,
    draw_lines,
    new_figure,
)
from data_pipeline.store.files import write_json
from data_pipeline.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        (folder / PLOT_FILE).write_text(sweep_figure(results), encoding="utf-8")
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


@as_svg
def sweep_figure(results: list[dict[str, Any]]) -> Figure:
    """Draw the change of bits per byte over the share of the tuned weights, with 95 % intervals."""
    figure, (axes,) = new_figure(720, 380)
    draw_level(axes, 0.0, INK)
    by_domain: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_domain.setdefault(result["domain"], []).append(result)
    lines = []
    for index, (domain, own) in enumerate(by_domain.items()):
        lines.append(
            Line(
                label=f"{domain} ({own[0]['language']})",
                x=[100 * result["alpha"] for result in own],
                y=[result["delta_percent"] for result in own],
                low=[result["ci_low"] for result in own],
                high=[result["ci_high"] for result in own],
                color=PALETTE[index % len(PALETTE)],
                dash=DASHES[index // len(PALETTE) % len(DASHES)],
            )
        )
    draw_lines(
        axes,
        lines,
        x_label="share of the tuned weights, %",
        y_label="bits per byte against the base model, %",
    )
    return figure

"""`cpt merge`: interpolated weights with bits per byte of held-out text against alpha."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.export.merge import (
    MergedWeights,
    Pair,
    check_merged_space,
    folder_name,
    open_pair,
    parse_alphas,
    write_merged,
)
from cpt.guard.paired_test import compare_scores
from cpt.guard.score import DomainScore, ScoredSet
from cpt.model.weights.checksums import model_hash
from cpt.model.weights.writer import published, refuse_existing
from cpt.offline.model import OfflineModel
from cpt.offline.pieces import kept_pieces, partial_folder
from cpt.offline.rank_options import RankOptions
from cpt.offline.ranks import offline_ranks
from cpt.offline.scored_sets import SetScorer, identity_of_sets
from cpt.resilience.environment import rank_of_environment
from cpt.resilience.faults import fault_point
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
from data_pipeline.store.files import AtChunk, make_folder, no_call, write_json
from data_pipeline.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT_FILE = "bits_per_byte.json"
PLOT_FILE = "bits_per_byte.svg"


def merge(
    base: Path,
    tuned: Path,
    alphas: str,
    out: Path,
    sets: list[ScoredSet],
    *,
    score_only: bool,
    options: RankOptions | None = None,
) -> str:
    """Score interpolations on held-out sets, if there are any, and write them.

    All ranks of a launcher call it together: they score, and the first one writes. What another
    start has scored is not scored again.

    Args:
        base: Directory of the model before training.
        tuned: Directory of the model after training.
        alphas: See `parse_alphas`.
        out: The new directory.
        sets: Held-out sets to score; may be empty.
        score_only: Write scores, but no weights.
        options: How the ranks work together.

    Returns:
        A table for people; empty without held-out sets.

    Raises:
        ConfigError: the models differ in architecture, or `out` exists.
        RequeueRequested: a stop was asked for; what is scored stays for the next start.
    """
    shares = parse_alphas(alphas)
    pair = open_pair(base, tuned)
    results: list[dict[str, Any]] = []

    def write(at_chunk: AtChunk = no_call) -> None:
        fault_point("offline_publish", 0)
        with published(out) as folder:
            if not score_only:
                write_merged(pair, shares, folder, base, tuned, at_chunk)
            if results:
                write_json(folder / RESULT_FILE, {"results": results}, indent=2, sort_keys=True)
                (folder / PLOT_FILE).write_text(sweep_figure(results), encoding="utf-8")

    if not sets:
        if rank_of_environment() == 0:
            write()
        return ""
    with offline_ranks(pair.config, partial_folder(out), options or RankOptions()) as ranks:
        ranks.on_first(lambda: _check_place(pair, shares, out, score_only=score_only))
        model = OfflineModel(pair.config, ranks.topology)
        identity = ranks.on_first(lambda: _identity(pair, sets, model))
        with kept_pieces(out, identity, ranks) as pieces:
            results += score_sweep(pair, shares, SetScorer(model, sets, pieces))
            ranks.publish(write)
    return sweep_table(results)


def _check_place(pair: Pair, alphas: Sequence[float], out: Path, *, score_only: bool) -> None:
    """Refuse, before anything is scored, what could not be written after it."""
    refuse_existing(out)
    make_folder(out.parent)
    if not score_only:
        check_merged_space(pair, alphas, out.parent)


def _identity(pair: Pair, sets: Sequence[ScoredSet], model: OfflineModel) -> dict[str, Any]:
    """Return what the scores are computed from; each alpha has pieces of its own."""
    return {
        "command": "merge",
        "base": model_hash(pair.base.path, pair.base.files),
        "tuned": model_hash(pair.tuned.path, pair.tuned.files),
        "sets": identity_of_sets(sets),
        "computed_in": str(model.dtype).removeprefix("torch."),
    }


def score_sweep(pair: Pair, alphas: Sequence[float], scorer: SetScorer) -> list[dict[str, Any]]:
    """Return bits per byte of every interpolation, paired by document with the base model.

    All ranks call it together and get the same results.
    """
    untouched = {score.name: score for score in scorer.scores("base", pair.base)}
    results = []
    for alpha in alphas:
        for score in scorer.scores(folder_name(alpha), MergedWeights(pair, alpha)):
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

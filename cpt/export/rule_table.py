"""`cpt export --score_rules`: what each exponent rule would make of a checkpoint.

    the matrices, divided over the ranks -> errors, changed codes, kept
    held-out text, all ranks together -> bits per byte, survived       -> one table

With a rule (`--exponent`) the export is written as well, and holds the table. Without one nothing
is exported: the scores stay beside the directory that was named, and an export to it with any rule
goes on from there and scores nothing again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from cpt.config.precision_sections import ExponentRule
from cpt.export.expert_rounding import ExpertRounder
from cpt.export.mxfp4_report import NONE, compared_cells, percent, survived_cell
from cpt.export.mxfp4_scoring import (
    BF16,
    WITH_BASE_EXPERTS,
    HeldOut,
    ScoredModels,
    ScoringRequest,
    scoring,
    sets_to_score,
)
from cpt.export.rounding_sums import RoundingSums, merged_sums
from cpt.model.weights.hf_layout import is_expert_matrix
from cpt.model.weights.mxfp4 import EXPONENT_RULES
from cpt.offline.pieces import ItemSeries
from cpt.resilience.faults import fault_point
from data_pipeline.tables import table

RULES_FILE = "mxfp4_rules.json"
"""What each rule makes of the checkpoint, if all were scored."""
SERIES = "rounding"
"""Name of the sums among the pieces."""

Json = dict[str, Any]
Write = Callable[[HeldOut, Json], None]
"""Writes the export, with what held-out text says of it, and with the comparison of the rules."""


def score_rules(request: ScoringRequest, write: Write | None) -> Json:
    """Score a checkpoint rounded by every rule; all ranks of a launcher call it together.

    Args:
        request: What is scored; its `score` must be `always`.
        write: Called on the first rank; None if nothing is exported.

    Returns:
        The comparison of the rules, as JSON values, on every rank.

    Raises:
        ConfigError: there is no held-out text.
        CheckpointError: the checkpoint has values that are not finite.
        RequeueRequested: a stop was asked for; what is scored stays for the next start.
    """
    sets = sets_to_score(request)
    with scoring(request, sets, keep=write is None) as models:
        held_out = {}
        for rule in EXPONENT_RULES:
            held_out[rule] = models.held_out(rule, request.choice.trained)
        rules = _comparison(_sums_by_rule(models), held_out, models)

        def publish() -> None:
            fault_point("offline_publish", 0)
            if write is not None:
                write(held_out[request.choice.rule], rules)

        models.ranks.on_first(publish)
    return rules


def _sums_by_rule(models: ScoredModels) -> dict[ExponentRule, RoundingSums]:
    """Return what each rule does to all expert matrices together; the ranks divide the matrices."""
    names = []
    for name, shape in sorted(models.weights.shapes.items()):
        if is_expert_matrix(name, shape):
            names.append(name)
    series = ItemSeries(name=SERIES, num_items=len(names), unit="matrix")

    def compute(index: int | None) -> Json:
        return {} if index is None else _sums_of_matrix(models, names[index])

    models.pieces.compute(series, compute, list)
    found: dict[ExponentRule, RoundingSums] = {}
    items = models.pieces.read_items(series)
    for rule in EXPONENT_RULES:
        found[rule] = merged_sums(RoundingSums(**item[rule]) for item in items)
    return found


def _sums_of_matrix(models: ScoredModels, name: str) -> Json:
    """Return what each rule does to one matrix, read expert by expert."""
    num_experts, inputs, rows = models.weights.shapes[name]
    numel = math.prod((inputs, rows))
    rounders = [ExpertRounder(rule) for rule in EXPONENT_RULES]
    for index in range(num_experts):
        pieces = models.weights.pieces(name, index * numel, (index + 1) * numel)
        exact = torch.cat([values for _, values in pieces]).view(1, inputs, rows)
        own = None if models.base is None else models.base.expert(name, index)
        for rounder in rounders:
            rounder.round(name, exact, own)
    return {rounder.rule: rounder.sums[name].plain() for rounder in rounders}


def _comparison(
    sums: dict[ExponentRule, RoundingSums],
    held_out: dict[ExponentRule, HeldOut],
    models: ScoredModels,
) -> Json:
    """Return the content of `RULES_FILE`."""
    rules: Json = {}
    for rule, total in sums.items():
        rules[rule] = {
            "all_expert_matrices": total.figures(),
            "costs": held_out[rule].costs,
            "held_out": held_out[rule].survived,
        }
    content: Json = {"rules": rules}
    if models.base is None:
        content["notes"] = [models.absent]
    else:
        content["base"] = {"name": models.base.name}
    return content


def rules_text(content: Json) -> str:
    """Return the comparison as a table for terminals: a line for each rule."""
    first = next(iter(content["rules"].values()))
    domains = [cost["domain"] for cost in first["costs"]]
    header = ["rule", "relative l2 error, %"]
    is_compared = bool(first["held_out"])
    if is_compared:
        header += ["changed codes, %", "movement, %", "kept", "noise"]
    rows = _rows_to_compare_with(first, len(header) - 1)
    for rule, result in content["rules"].items():
        figures = result["all_expert_matrices"]
        row = [rule, percent(figures["relative_l2_error"])]
        if is_compared:
            row += compared_cells(figures)
        rows.append(row + _cells_of_domains(result))
    text = "bits per byte, and what survived of what the experts learned in %\n"
    text += f"{table([*header, *domains], rows)}\n"
    for note in content.get("notes", []):
        text += f"{note}\n"
    return text


def _rows_to_compare_with(result: Json, num_figures: int) -> list[list[str]]:
    """Return the lines of the models that are not rounded."""
    empty = [NONE] * num_figures
    rows = [[BF16, *empty]]
    for cost in result["costs"]:
        rows[0].append(f"{cost['bits_per_byte_bf16']:.4f}")
    if result["held_out"]:
        rows.append([WITH_BASE_EXPERTS, *empty])
        for one in result["held_out"]:
            rows[1].append(f"{one['bits_per_byte_base_experts']:.4f}")
    return rows


def _cells_of_domains(result: Json) -> list[str]:
    cells = []
    for number, cost in enumerate(result["costs"]):
        cell = f"{cost['bits_per_byte_mxfp4']:.4f}"
        if result["held_out"]:
            cell += f", {survived_cell(result['held_out'][number]['survived'])}"
        cells.append(cell)
    return cells

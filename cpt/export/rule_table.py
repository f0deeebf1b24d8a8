"""`cpt export --score_rules`: what each exponent rule would make of a checkpoint.

    the matrices, divided over the ranks -> errors, changed codes, kept
    held-out text, all ranks together -> bits per byte, survived       -> one table

With a rule (`--exponent`) the export is written as well, and holds the table. Without one nothing
is exported: the scores stay beside the directory that was named, and an export to it with any rule
goes on from there and scores nothing again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cpt.config.precision_sections import ExponentRule
from cpt.export.expert_rounding import ExpertRounder
from cpt.export.mxfp4_report import (
    COMPARED_HEADER,
    ERROR_HEADER,
    NO_BASE,
    compared_cells,
    percent,
    survived_cell,
)
from cpt.export.mxfp4_scoring import (
    BF16,
    HeldOut,
    ScoredModels,
    ScoringRequest,
    scoring,
    sets_to_score,
)
from cpt.export.rounding_sums import RoundingSums, merged_sums
from cpt.model.weights.hf_layout import expert_matrices
from cpt.model.weights.mxfp4 import EXPONENT_RULES
from cpt.model.weights.source import read_window
from cpt.offline.pieces import ItemSeries
from cpt.resilience.faults import fault_point
from data_pipeline.store.files import AtChunk
from data_pipeline.tables import table

RULES_FILE = "mxfp4_rules.json"
"""What each rule makes of the checkpoint, if all were scored."""
TRAINED_BY = (
    "The run rounded by the rule {rule} in training, so that is the model that was trained."
)
SERIES = "rounding"
"""Name of the sums among the pieces."""

Json = dict[str, Any]
Write = Callable[[HeldOut, Json, AtChunk], None]
"""Writes the export, with what held-out text says of it, and with the comparison of the rules; it
calls the third argument after each chunk.
"""


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
        rules = _comparison(_sums_by_rule(models), held_out, models, request.choice.trained)

        def publish(at_chunk: AtChunk) -> None:
            fault_point("offline_publish", 0)
            if write is not None:
                write(held_out[request.choice.rule], rules, at_chunk)

        models.ranks.publish(publish)
    return rules


def _sums_by_rule(models: ScoredModels) -> dict[ExponentRule, RoundingSums]:
    """Return what each rule does to all expert matrices together; the ranks divide the matrices."""
    names = expert_matrices(models.weights.shapes)
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
    numel = inputs * rows
    rounders = [ExpertRounder(rule) for rule in EXPONENT_RULES]
    for index in range(num_experts):
        flat = read_window(models.weights, name, index * numel, (index + 1) * numel)
        exact = flat.view(1, inputs, rows)
        own = None if models.base is None else models.base.expert(name, index)
        for rounder in rounders:
            rounder.round(name, exact, own)
    return {rounder.rule: rounder.sums[name].plain() for rounder in rounders}


def _comparison(
    sums: dict[ExponentRule, RoundingSums],
    held_out: dict[ExponentRule, HeldOut],
    models: ScoredModels,
    trained: ExponentRule | None,
) -> Json:
    """Return the content of `RULES_FILE`.

    Args:
        sums: What each rule does to all expert matrices together.
        held_out: What text says of each rule.
        models: The models that were scored.
        trained: The rule by which training rounded; None if it did not.
    """
    rules: Json = {}
    for rule, total in sums.items():
        rules[rule] = {
            "all_expert_matrices": total.figures(),
            "costs": held_out[rule].costs,
            "held_out": held_out[rule].survived,
        }
    content: Json = {"rules": rules, "notes": []}
    if models.base is None:
        content["notes"].append(NO_BASE.format(absent=models.absent))
    else:
        content["base"] = {"name": models.base.name}
    if trained is not None:
        content["notes"].append(TRAINED_BY.format(rule=trained))
    return content


def rules_text(content: Json) -> str:
    """Return the comparison for terminals: a table with a line by rule, and one by domain."""
    rules = content["rules"]
    first = next(iter(rules.values()))
    is_compared = "kept" in first["all_expert_matrices"]
    header = ["rule", ERROR_HEADER]
    if is_compared:
        header += COMPARED_HEADER
    rows = []
    for rule, result in rules.items():
        figures = result["all_expert_matrices"]
        row = [rule, percent(figures["relative_l2_error"])]
        if is_compared:
            row += compared_cells(figures)
        rows.append(row)
    text = f"{table(header, rows)}\n\n{_domain_table(rules)}\n"
    for note in content["notes"]:
        text += f"{note}\n"
    return text


def _domain_table(rules: Json) -> str:
    """Return bits per byte of every domain, with what survived by each rule in percent."""
    first = next(iter(rules.values()))
    header = ["domain", BF16]
    if first["held_out"]:
        header.append("with the base's experts")
    rows = []
    for number, cost in enumerate(first["costs"]):
        row = [cost["domain"], f"{cost['bits_per_byte_bf16']:.4f}"]
        if first["held_out"]:
            row.append(f"{first['held_out'][number]['bits_per_byte_base_experts']:.4f}")
        for result in rules.values():
            row.append(_cell(result, number))
        rows.append(row)
    title = "bits per byte"
    if first["held_out"]:
        title += ", and what survived of what the experts learned, % (95 % interval)"
    return f"{title}\n{table([*header, *rules], rows)}"


def _cell(result: Json, number: int) -> str:
    cell = f"{result['costs'][number]['bits_per_byte_mxfp4']:.4f}"
    if result["held_out"]:
        cell += f"  {survived_cell(result['held_out'][number]['survived'])}"
    return cell

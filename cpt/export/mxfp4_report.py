"""What an MXFP4 export says of itself: mxfp4_report.json, its tables, and when to warn.

exponent             the rule of the exponents
quantized_training   from_step and rule, if training rounded the experts
base                 name and format of the model that it was compared with, if there was one
notes                sentences: what the figures are against, or why some are not there
all_expert_matrices, tensors      figures of cpt/export/rounding_sums.py
held_out             what survived, by domain, if it was scored (cpt/export/survived.py)
warnings             what a person should do something about
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cpt.export.exponent_choice import ExponentChoice
from cpt.export.export_base import ExportBase
from cpt.export.model_card import markdown_table
from cpt.export.rounding_sums import RoundingSums, figures_of_tensors
from data_pipeline.tables import table

REPORT_FILE = "mxfp4_report.json"
"""What rounding did to the experts of an MXFP4 export."""
ENOUGH = 0.5
"""A share of what was learned below which a person is warned."""
NONE = "-"
"""The cell of a figure that is not there."""
ERROR_HEADER = "relative l2 error, %"
FIGURES_HEADER = ("tensor", ERROR_HEADER, "largest error")
COMPARED_HEADER = ("changed codes, %", "movement, %", "kept", "noise")
SURVIVED_HEADER = (
    "domain",
    "trained",
    "with the base's experts",
    "exported",
    "survived, % (95 % interval)",
)

TRAINED_VALUES = (
    "The exported values are those that were trained: the run rounded its experts by the same rule "
    "(train.quantize), and all values are finite. The errors are those of the fp32 master weights, "
    "with which no forward pass computed."
)
FROZEN_VALUES = (
    "The run rounded the experts that it trained by the same rule (train.quantize), but computed "
    "with {frozen} frozen expert matrices that have values which MXFP4 does not have, so the "
    "exported model is not the one that was trained."
)
OTHER_RULE = (
    "The run rounded its experts by another rule in training ({trained}), so the exported values "
    "are not those that were trained."
)
NO_BASE = (
    "There is no base to compare with, so what is kept and what survived are not told. {absent}"
)
BYTES_MAY_DIFFER = (
    "Without the base, a block that does not use its range may have other bytes than there for the "
    "same values."
)
AGAINST_ROUNDED_BASE = (
    "The base is not stored in MXFP4: changed codes are counted against its values rounded by the "
    "same rule."
)
CURES = (
    "Look whether another rule keeps more (cpt export --score_rules), train the last part of the "
    "run with train.quantize, or train an adapter, which rounds nothing."
)

Json = dict[str, Any]


def rounding_report(
    choice: ExponentChoice,
    base: ExportBase | None,
    absent: str,
    sums: Mapping[str, RoundingSums],
    frozen: Collection[str] = (),
) -> Json:
    """Return the report of an export, without held-out text.

    All values of the export must have been found finite.

    Args:
        choice: Its rule.
        base: The model that it was compared with; None if there was none.
        absent: Why there was none.
        sums: What was counted, by tensor.
        frozen: Tensors that the run did not train.
    """
    report: Json = choice.to_json()
    notes = []
    if choice.writes_what_was_trained:
        changed = sum(sums[name].largest_error > 0 for name in frozen)
        notes.append(FROZEN_VALUES.format(frozen=changed) if changed else TRAINED_VALUES)
    elif choice.trained is not None:
        notes.append(OTHER_RULE.format(trained=choice.trained))
    if base is None:
        notes += [NO_BASE.format(absent=absent), BYTES_MAY_DIFFER]
    else:
        in_mxfp4 = all(map(base.is_mxfp4, sums))
        report["base"] = {"name": base.name, "format": "mxfp4" if in_mxfp4 else "other"}
        if not in_mxfp4:
            notes.append(AGAINST_ROUNDED_BASE)
    return {**report, "notes": notes, **figures_of_tensors(sums)}


def with_held_out(report: Json, held_out: Sequence[Json]) -> Json:
    """Return a report with what survived on held-out text, and with its warnings.

    Args:
        report: Output of `rounding_report`.
        held_out: What survived, by domain; empty if nothing was scored.
    """
    full = dict(report)
    if held_out:
        full["held_out"] = list(held_out)
    full["warnings"] = _warnings(full)
    return full


def _warnings(report: Json) -> list[str]:
    """Return why a person should not be content with the export; empty if there is no reason.

    Scores are the judge wherever they tell what the experts have learned: what is kept of the
    values says little about them.
    """
    learned = [one for one in report.get("held_out", []) if _has_learned(one)]
    if learned:
        lost = [one for one in learned if one["survived"]["share"] < ENOUGH]
        if not lost:
            return []
        shares = []
        for one in lost:
            shares.append(f"{100 * one['survived']['share']:.0f} % on {one['domain']}")
        told = f"of what the experts learned survived the rounding to MXFP4: {', '.join(shares)}."
        return [f"Less than half {told} {CURES}"]
    kept = report["all_expert_matrices"].get("kept")
    if kept is None or kept >= ENOUGH or _is_trained(report):
        return []
    return [
        f"The rounding to MXFP4 kept {100 * kept:.0f} % of the change of the expert matrices "
        f"(projection). {CURES}"
    ]


def _has_learned(one: Json) -> bool:
    """Return whether the trained experts are better than the base's on a domain, beyond doubt."""
    return one.get("survived") is not None and one["learned_percent"] > 0


def _is_trained(report: Json) -> bool:
    training = report.get("quantized_training")
    return training is not None and training["rule"] == report["exponent"]


def figures_table(report: Json) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the figures: every tensor, then all together."""
    every = {**report["tensors"], "all expert matrices": report["all_expert_matrices"]}
    is_compared = "kept" in report["all_expert_matrices"]
    rows = []
    for name, figures in every.items():
        row = [name, percent(figures["relative_l2_error"])]
        row.append(f"{figures['largest_absolute_error']:.3g}")
        if is_compared:
            row += compared_cells(figures)
        rows.append(tuple(row))
    header = (*FIGURES_HEADER, *COMPARED_HEADER) if is_compared else FIGURES_HEADER
    return header, rows


def compared_cells(figures: Json) -> list[str]:
    """Return the cells of `COMPARED_HEADER`."""
    cells = [percent(figures["changed_codes"]), percent(figures["movement"])]
    for name in ("kept", "noise"):
        value = figures[name]
        cells.append(NONE if value is None else f"{value:.3f}")
    return cells


def percent(share: float | None) -> str:
    """Return a share in percent as a cell."""
    return NONE if share is None else f"{100 * share:.3f}"


def survived_rows(held_out: Sequence[Json]) -> list[tuple[str, ...]]:
    """Return the rows of `SURVIVED_HEADER`."""
    rows = []
    for one in held_out:
        row = [one["domain"]]
        for model in ("trained", "base_experts", "exported"):
            row.append(f"{one[f'bits_per_byte_{model}']:.4f}")
        rows.append((*row, survived_cell(one["survived"])))
    return rows


def survived_cell(survived: Json | None) -> str:
    """Return what survived as a cell, with its interval."""
    if survived is None:
        return "not resolved"
    low = 100 * survived["ci_low"]
    high = 100 * survived["ci_high"]
    return f"{100 * survived['share']:.0f} ({low:.0f} to {high:.0f})"


def report_text(report: Json) -> str:
    """Return the report for terminals, without its warnings."""
    header, rows = figures_table(report)
    text = f"{headline(report)}\n{table(header, rows)}\n\n"
    if "held_out" in report:
        text += "bits per byte, and what survived of what the experts learned\n"
        text += f"{table(SURVIVED_HEADER, survived_rows(report['held_out']))}\n\n"
    for note in report["notes"]:
        text += f"{note}\n"
    return text


def card_sections(report: Json) -> list[str]:
    """Return the sections of the model card that tell of the rounding."""
    error = report["all_expert_matrices"]["relative_l2_error"]
    header, rows = figures_table(report)
    parts = [
        "## Rounding to MXFP4",
        f"{headline(report)}. Rounding the expert matrices has a relative l2 error of "
        f"{100 * error:.3f} %; `{REPORT_FILE}` has these figures, too.",
        *report["notes"],
        *report["warnings"],
        markdown_table(header, rows),
    ]
    if "held_out" in report:
        parts.append(
            "## What survived of what the experts learned\n\nBits per byte of held-out text. "
            "Survived is the share of the difference between the trained expert matrices and those "
            "of the base, all else as trained, that the exported ones still make."
        )
        parts.append(markdown_table(SURVIVED_HEADER, survived_rows(report["held_out"])))
    return ["\n\n".join(parts)]


def headline(report: Json) -> str:
    """Return one line on the rule and the base."""
    base = report.get("base")
    against = "" if base is None else f", compared with {base['name']}"
    return f"MXFP4, exponents by the rule {report['exponent']}{against}"

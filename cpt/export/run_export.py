"""`cpt export`: a checkpoint of a run with its model card and, for MXFP4, the cost of rounding.

The weight files are those of cpt/export/huggingface.py, or of cpt/export/adapter.py for an adapter
alone; this file adds what only the run knows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cpt.checkpoint.lineage import LINEAGE_FILE, lineage_with
from cpt.checkpoint.manifest import Manifest, read_manifest
from cpt.checkpoint.model_weights import adapter_of
from cpt.errors import ConfigError
from cpt.export.adapter import BASE_FILE, export_adapter, is_over_mxfp4, serving_section
from cpt.export.huggingface import REPORT_FILE, export_checkpoint
from cpt.export.logged_facts import read_logged_facts
from cpt.export.model_card import markdown_table, model_card
from cpt.export.quantization_error import report_rows
from cpt.export.vllm_constants import vllm_differences
from cpt.offline.rank_options import RankOptions
from cpt.resilience.environment import is_launched, rank_of_environment, read_environment
from data_pipeline.escaping import escaped_text
from data_pipeline.store.files import write_json
from data_pipeline.tables import table

COST_FILE = "mxfp4_cost.json"
"""Bits per byte of held-out text before and after rounding to MXFP4."""
COST_HEADER = ("domain", "bf16", "MXFP4", "change in % (95 % interval)")

UNROUNDED = (
    "The adapter of this model alone (`cpt export --format peft`), loaded over the MXFP4 weights "
    "that it was trained on, rounds nothing."
)
"""What the card of a rounded model says of its adapter, if the base was in MXFP4."""
UNROUNDED_BASE = (
    "The adapter of this model alone (`cpt export --format peft`), loaded over its base in bf16, "
    "rounds nothing to MXFP4."
)
"""The same of a base that was not."""

Score = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportForm:
    """What is written of a checkpoint."""

    format_name: str
    """`peft` for an adapter alone, or a format of `export_checkpoint`."""
    adapter_dtype: str = "bf16"
    """Dtype of an adapter alone: `bf16` or `fp32`."""
    base: Path | None = None
    """Directory of the model below an adapter; None for where it was in training."""


def export_run(
    run_dir: Path,
    folder: Path,
    out: Path,
    form: ExportForm,
    score: Score = "never",
    options: RankOptions | None = None,
) -> Path:
    """Export a checkpoint of a run and return the directory.

    With a score, all ranks of a launcher call it together: they score, and the first one writes.

    Args:
        run_dir: The run directory; its metrics.jsonl goes into the model card.
        folder: The checkpoint.
        out: The new directory.
        form: What is written.
        score: Whether an MXFP4 export is scored on the run's held-out text; `auto` does it if the
            text is there and the model is small enough for the device; one process only.
        options: How the ranks work together.

    Raises:
        ConfigError: see `export_checkpoint` and `export_adapter`; or `score` is `always` and there
            is no held-out text, or it is `auto` on several ranks.
        RequeueRequested: a stop was asked for; what is scored stays for the next start.
    """
    rounds = form.format_name == "mxfp4"
    if rounds and score == "auto" and is_launched():
        _refuse_ranks_that_decide_alone()
    manifest = read_manifest(folder)

    def write(costs: list[dict[str, Any]]) -> None:
        _export(run_dir, folder, manifest, out, form, costs)

    if rounds and score != "never":
        # it imports DeepSpeed, which nothing else here needs
        from cpt.export.mxfp4_cost import write_scored

        if write_scored(folder, manifest, out, score, options or RankOptions(), write, form.base):
            return out
    if rank_of_environment() == 0:
        write([])
    return out


def _refuse_ranks_that_decide_alone() -> None:
    """Refuse `--score auto` on several ranks: before they have met, each would decide by itself.

    Raises:
        ConfigError: there are several ranks.
    """
    world_size = read_environment().world_size
    if world_size > 1:
        raise ConfigError(
            f"--score auto on {world_size} ranks: each would look by itself whether there is "
            "held-out text and room for the model. Give --score always, or --score never."
        )


def _export(
    run_dir: Path,
    folder: Path,
    manifest: Manifest,
    out: Path,
    form: ExportForm,
    costs: list[dict[str, Any]],
) -> None:
    """Write weights, costs and model card.

    All that the card is made of is read and put into words before the weights, which may take
    hours: what is wrong with it must not cost them.
    """
    format_name = form.format_name
    facts = read_logged_facts(run_dir / "metrics.jsonl", manifest.step)
    model_card(manifest, facts, format_name)
    adapter = adapter_of(folder, manifest)

    def complete(temporary: Path) -> None:
        sections = []
        if adapter is not None and format_name == "peft":
            sections.append(serving_section(manifest, adapter))
        else:
            sections += _vllm_sentences(temporary)
        if format_name == "mxfp4":
            sections.append(_error_section(_read_json(temporary / REPORT_FILE)))
            if adapter is not None:
                over_mxfp4 = is_over_mxfp4(adapter, form.base)
                sections.append(UNROUNDED if over_mxfp4 else UNROUNDED_BASE)
        if costs:
            write_json(temporary / COST_FILE, {"domains": costs}, indent=2, sort_keys=True)
            sections.append(_cost_section(costs))
        name = run_dir.resolve().name
        models = lineage_with(manifest, name, is_rounded=format_name == "mxfp4")
        write_json(temporary / LINEAGE_FILE, {"models": models}, indent=2, sort_keys=True)
        card = escaped_text(model_card(manifest, facts, format_name, sections))
        (temporary / "README.md").write_text(card, encoding="utf-8")

    if format_name == "peft":
        export_adapter(folder, out, form.adapter_dtype, complete)
    else:
        export_checkpoint(folder, out, format_name, complete, form.base)


def describe_export(out: Path) -> str:
    """Return what to know of an export: what vLLM would not read, and the cost of MXFP4."""
    text = ""
    if (out / BASE_FILE).is_file():
        for note in _read_json(out / BASE_FILE)["vllm"]:
            text += f"{note}\n"
        return text
    for sentence in _vllm_sentences(out):
        text += f"{sentence}\n"
    if (out / REPORT_FILE).is_file():
        rows = report_rows(_read_json(out / REPORT_FILE))
        text += table(("tensor", "relative l2 error, %", "largest error"), rows) + "\n\n"
    if (out / COST_FILE).is_file():
        costs = _read_json(out / COST_FILE)["domains"]
        text += "bits per byte\n" + table(COST_HEADER, cost_rows(costs)) + "\n\n"
    return text


def cost_rows(costs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the costs as table rows, one per domain."""
    rows: list[tuple[str, ...]] = []
    for cost in costs:
        interval = f"{cost['ci_low']:+.3f} to {cost['ci_high']:+.3f}"
        rows.append(
            (
                cost["domain"],
                f"{cost['bits_per_byte_bf16']:.4f}",
                f"{cost['bits_per_byte_mxfp4']:.4f}",
                f"{cost['delta_percent']:+.3f} ({interval})",
            )
        )
    return rows


def _cost_section(costs: list[dict[str, Any]]) -> str:
    rows = markdown_table(COST_HEADER, cost_rows(costs))
    return f"## Cost of MXFP4, bits per byte of held-out text\n\n{rows}"


def _error_section(report: dict[str, Any]) -> str:
    error = report["all_expert_matrices"]["relative_l2_error"]
    return (
        f"Rounding the expert matrices to MXFP4 has a relative l2 error of {100 * error:.3f} %; "
        f"`{REPORT_FILE}` has the error of every tensor."
    )


def _vllm_sentences(out: Path) -> list[str]:
    file = out / "config.json"
    return vllm_differences(_read_json(file)) if file.is_file() else []


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

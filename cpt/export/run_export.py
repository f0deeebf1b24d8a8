"""`cpt export`: a checkpoint of a run with its model card and, for MXFP4, what rounding did to it.

The weight files are those of cpt/export/huggingface.py, or of cpt/export/adapter.py for an adapter
alone; this file adds what only the run knows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cpt.checkpoint.adapter_state import AdapterState
from cpt.checkpoint.lineage import LINEAGE_FILE, lineage_with
from cpt.checkpoint.manifest import Manifest, read_manifest
from cpt.checkpoint.model_weights import adapter_of
from cpt.checkpoint.run_state import quantized_by
from cpt.config.precision_sections import ExponentRule
from cpt.errors import ConfigError
from cpt.export.adapter import BASE_FILE, export_adapter, is_over_mxfp4, serving_section
from cpt.export.exponent_choice import ExponentChoice, choose_exponent
from cpt.export.huggingface import export_checkpoint
from cpt.export.logged_facts import read_logged_facts
from cpt.export.model_card import markdown_table, model_card
from cpt.export.mxfp4_cost import COST_FILE, COST_HEADER, cost_rows
from cpt.export.mxfp4_report import REPORT_FILE, card_sections, report_text, with_held_out
from cpt.export.vllm_constants import vllm_differences
from cpt.offline.rank_options import RankOptions
from cpt.resilience.environment import is_launched, rank_of_environment, read_environment
from data_pipeline.escaping import escaped_text
from data_pipeline.store.files import AtChunk, no_call, write_json
from data_pipeline.tables import table

if TYPE_CHECKING:  # they import DeepSpeed, which nothing else here needs
    from cpt.export.mxfp4_scoring import HeldOut, ScoringRequest

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
MASTERS = (
    "The experts of this run were trained with weights rounded to MXFP4. This export holds the "
    "master weights, which no forward pass has used; the trained model is that of "
    "`cpt export --format mxfp4`."
)
"""What is said of an export of such a run in a format that does not round."""

Score = Literal["auto", "always", "never"]
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportForm:
    """What is written of a checkpoint."""

    format_name: str
    """`peft` for an adapter alone, or a format of `export_checkpoint`."""
    adapter_dtype: str = "bf16"
    """Dtype of an adapter alone: `bf16` or `fp32`."""
    base: Path | None = None
    """The model below an adapter, or to compare an MXFP4 export with; None for what the run started
    from.
    """
    exponent: ExponentRule | None = None
    """The exponent rule of MXFP4; None for that of training, or the default."""
    accepts_rule_change: bool = False
    """Whether the rule may be another one than that of training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Export:
    """One export of a run, with all that is known before the weights are read."""

    run_dir: Path
    folder: Path
    manifest: Manifest
    out: Path
    form: ExportForm
    choice: ExponentChoice = field(default_factory=ExponentChoice)

    @property
    def rounds(self) -> bool:
        """Whether the experts are rounded."""
        return self.form.format_name == "mxfp4"


def export_run(
    run_dir: Path,
    folder: Path,
    out: Path,
    form: ExportForm,
    score: Score = "never",
    options: RankOptions | None = None,
    at_chunk: AtChunk = no_call,
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
        at_chunk: Called after each chunk of an export without a score.

    Raises:
        ConfigError: see `export_checkpoint`, `export_adapter` and `choose_exponent`; or `score` is
            `always` and there is no held-out text, or it is `auto` on several ranks.
        CheckpointError: see `export_checkpoint`.
        RequeueRequested: a stop was asked for; what is scored stays for the next start.
    """
    if form.format_name == "mxfp4" and score == "auto" and is_launched():
        _refuse_ranks_that_decide_alone()
    export = _begin(run_dir, folder, out, form)
    if export.rounds and score != "never":
        from cpt.export.mxfp4_scoring import write_scored

        def write(held_out: HeldOut, followed: AtChunk) -> None:
            _export(export, followed, held_out)

        request = _request(export, score, options)
        if write_scored(request, write):
            return out
    if rank_of_environment() == 0:
        _export(export, at_chunk)
    return out


def export_with_rules(
    run_dir: Path, folder: Path, out: Path, form: ExportForm, options: RankOptions | None = None
) -> str:
    """Compare all exponent rules and, if the form names one, export with it.

    All ranks of a launcher call it together. Without a rule the scores stay beside `out`, for an
    export that follows.

    Args:
        run_dir: The run directory.
        folder: The checkpoint.
        out: The directory of the export.
        form: What is written; its format is `mxfp4`.
        options: How the ranks work together.

    Returns:
        The comparison, as a table for people.

    Raises:
        ConfigError: see `export_run`; or there is no held-out text.
        CheckpointError: see `export_checkpoint`.
        RequeueRequested: a stop was asked for; what is scored stays for the next start.
    """
    from cpt.export.rule_table import RULES_FILE, rules_text, score_rules

    export = _begin(run_dir, folder, out, form)

    def write(held_out: HeldOut, rules: Json, at_chunk: AtChunk) -> None:
        _export(export, at_chunk, held_out, {RULES_FILE: rules})

    request = _request(export, "always", options)
    return rules_text(score_rules(request, write if form.exponent is not None else None))


def _begin(run_dir: Path, folder: Path, out: Path, form: ExportForm) -> _Export:
    manifest = read_manifest(folder)
    choice = ExponentChoice()
    if form.format_name == "mxfp4":
        choice = choose_exponent(
            manifest, form.exponent, is_change_accepted=form.accepts_rule_change
        )
    return _Export(
        run_dir=run_dir, folder=folder, manifest=manifest, out=out, form=form, choice=choice
    )


def _request(
    export: _Export, score: Literal["auto", "always"], options: RankOptions | None
) -> ScoringRequest:
    from cpt.export.mxfp4_scoring import ScoringRequest

    return ScoringRequest(
        folder=export.folder,
        manifest=export.manifest,
        out=export.out,
        score=score,
        choice=export.choice,
        base=export.form.base,
        options=options or RankOptions(),
    )


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
    export: _Export,
    at_chunk: AtChunk,
    held_out: HeldOut | None = None,
    files: dict[str, Json] | None = None,
) -> None:
    """Write weights, what rounding did to them, and the model card.

    All that the card is made of is read and put into words before the weights, which may take
    hours: what is wrong with it must not cost them.

    Args:
        export: What is exported.
        at_chunk: Called after each chunk that is hashed or written.
        held_out: What held-out text says of it; None if it was not scored.
        files: Further JSON files, by name.
    """
    form = export.form
    manifest = export.manifest
    facts = read_logged_facts(export.run_dir / "metrics.jsonl", manifest.step)
    model_card(manifest, facts, form.format_name)
    adapter = adapter_of(export.folder, manifest)
    name = export.run_dir.resolve().name
    models = lineage_with(manifest, name, is_rounded=export.rounds)

    def complete(temporary: Path) -> None:
        sections = _sections(export, adapter, temporary, held_out)
        write_json(temporary / LINEAGE_FILE, {"models": models}, indent=2, sort_keys=True)
        for file, content in (files or {}).items():
            write_json(temporary / file, content, indent=2, sort_keys=True)
        card = escaped_text(model_card(manifest, facts, form.format_name, sections))
        (temporary / "README.md").write_text(card, encoding="utf-8")

    if form.format_name == "peft":
        export_adapter(export.folder, export.out, form.adapter_dtype, complete)
        return
    choice = export.choice if export.rounds else None
    export_checkpoint(
        export.folder, export.out, form.format_name, complete, form.base, choice, at_chunk
    )


def _sections(
    export: _Export, adapter: AdapterState | None, temporary: Path, held_out: HeldOut | None
) -> list[str]:
    """Return the sections of the card that depend on what was written; complete the report."""
    if adapter is not None and export.form.format_name == "peft":
        return [serving_section(export.manifest, adapter)]
    sections = _vllm_sentences(temporary)
    if not export.rounds:
        return [*sections, *warnings_of_masters(export.manifest, export.form.format_name)]
    report = _read_json(temporary / REPORT_FILE)
    costs: Sequence[Json] = []
    if held_out is not None:
        costs = held_out.costs
        report = with_held_out(report, held_out.survived)
        write_json(temporary / REPORT_FILE, report, indent=2, sort_keys=True)
    sections += card_sections(report)
    if adapter is not None:
        over_mxfp4 = is_over_mxfp4(adapter, export.form.base)
        sections.append(UNROUNDED if over_mxfp4 else UNROUNDED_BASE)
    if costs:
        write_json(temporary / COST_FILE, {"domains": costs}, indent=2, sort_keys=True)
        sections.append(_cost_section(costs))
    return sections


def describe_export(out: Path) -> str:
    """Return what to know of an export: what vLLM would not read, and what MXFP4 did to it."""
    text = ""
    if (out / BASE_FILE).is_file():
        for note in _read_json(out / BASE_FILE)["vllm"]:
            text += f"{note}\n"
        return text
    for sentence in _vllm_sentences(out):
        text += f"{sentence}\n"
    if (out / COST_FILE).is_file():
        costs = _read_json(out / COST_FILE)["domains"]
        text += "bits per byte\n" + table(COST_HEADER, cost_rows(costs)) + "\n\n"
    if (out / REPORT_FILE).is_file():
        text += report_text(_read_json(out / REPORT_FILE))
    return text


def warnings_of(out: Path) -> list[str]:
    """Return what a person should do something about before an export is served."""
    if not (out / REPORT_FILE).is_file():
        return []
    warnings: list[str] = _read_json(out / REPORT_FILE)["warnings"]
    return warnings


def format_of_training(manifest: Manifest) -> str:
    """Return the format that has the weights a forward pass of training has used last."""
    return "bf16" if quantized_by(manifest) is None else "mxfp4"


def warnings_of_masters(manifest: Manifest, format_name: str) -> list[str]:
    """Return a warning if a format leaves experts unrounded that were trained with rounding."""
    is_rounded = format_name != "mxfp4" and quantized_by(manifest) is not None
    return [MASTERS] if is_rounded else []


def _cost_section(costs: Sequence[Json]) -> str:
    rows = markdown_table(COST_HEADER, cost_rows(costs))
    return f"## Cost of MXFP4, bits per byte of held-out text\n\n{rows}"


def _vllm_sentences(out: Path) -> list[str]:
    file = out / "config.json"
    return vllm_differences(_read_json(file)) if file.is_file() else []


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

"""The model card of an export: what the model was trained on, and how.

It is made from the checkpoint and the run's metrics alone. Paths, hosts and user names of the
training machine stay out of it; files appear with their own names only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cpt.checkpoint.adapter_state import AdapterState
from cpt.checkpoint.lineage import lineage_of_checkpoint, lineage_text
from cpt.checkpoint.manifest import Manifest
from cpt.checkpoint.run_state import RunState
from cpt.export.logged_facts import LoggedFacts
from cpt.telemetry.model_label import model_label
from data_pipeline.text.language import UNTESTABLE

Json = dict[str, Any]

STORAGE = {
    "bf16": "Weights are stored in bf16.",
    "fp32": "Weights are the fp32 master weights of training.",
    "mxfp4": (
        "Expert matrices are rounded to MXFP4 (round to nearest), the rest is stored in bf16."
    ),
    "peft": "The files hold the adapter alone, in PEFT's format.",
}
"""How the weights are stored, by format."""
MERGED_FP32 = "Weights are stored in fp32."
"""The same of a base with an adapter added, in fp32."""
TRAINING_KEYS = (
    "seq_len",
    "global_batch_size",
    "lr",
    "min_lr_ratio",
    "schedule",
    "warmup_steps",
    "weight_decay",
    "dtype",
)
"""Keys of the run YAML's `train` section that are shown."""
NO_FACTS = (
    "The log of the run could not be read when this was written, so the predicted tokens of each "
    "source and the results on held-out text are not shown."
)


def model_card(
    manifest: Manifest,
    facts: LoggedFacts | None,
    format_name: str,
    sections: Sequence[str] = (),
) -> str:
    """Return the README.md of an exported checkpoint.

    Args:
        manifest: The checkpoint's manifest.
        facts: What the run's log says; None if it cannot be read, and the card says so.
        format_name: `bf16`, `mxfp4`, `fp32` or `peft`.
        sections: Further sections.
    """
    sources = _sources(manifest)
    parts = [
        _front_matter(sources, "peft" if format_name == "peft" else "transformers"),
        f"# gpt-oss after {'fine-tuning' if _conversations(sources) else 'continual pretraining'}",
        _origin(manifest, format_name),
        _kind_of_training(sources),
        _data(manifest, sources, facts),
        _held_out(manifest, facts),
        NO_FACTS if facts is None else "",
        *sections,
        _training(manifest),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with its first column to the left and the others to the right."""
    alignment = [":--"] + ["--:"] * (len(header) - 1)
    lines = []
    for row in [header, alignment, *rows]:
        lines.append(f"| {' | '.join(map(_escape, row))} |")
    return "\n".join(lines)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def _sources(manifest: Manifest) -> dict[str, Json]:
    """Return language and domain of every source that any part of the run drew from."""
    found: dict[str, Json] = {}
    for segment in _segments(manifest):
        found |= segment["settings"].get("sources", {})
    return found


def _segments(manifest: Manifest) -> list[Json]:
    """Return the parts of the run that had one data mix each, without phases still to come."""
    state = RunState.of(manifest)
    num_batches = manifest.step
    for first, last in (state.progress or {}).get("skip_ranges", []):
        num_batches += last - first
    begun = []
    for segment in (state.ledger or {}).get("segments", []):
        if not segment.get("phase") or segment["start_step"] < num_batches:
            begun.append(segment)
    return begun


def _weight(segment: Json, source: str) -> str:
    """Return the weight of a source in a part of the run, or both ends of its change."""
    first = f"{segment['weights'].get(source, 0):.4g}"
    last = f"{(segment.get('to_weights') or segment['weights']).get(source, 0):.4g}"
    return first if first == last else f"{first} to {last}"


def _front_matter(sources: dict[str, Json], library: str) -> str:
    """Return the YAML head that the Hugging Face hub reads."""
    languages: list[str] = []
    for source in sources.values():
        label = str(source["language"])
        if label not in UNTESTABLE and label not in languages:
            languages.append(label)
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if languages:
        lines.append(f"language: [{', '.join(sorted(languages))}]")
    kind = "sft" if _conversations(sources) else "continual-pretraining"
    lines += [f"tags: [gpt-oss, {kind}]", "---"]
    return "\n".join(lines)


def _origin(manifest: Manifest, format_name: str) -> str:
    config = RunState.of(manifest).config or {}
    base = lineage_text(lineage_of_checkpoint(manifest), quote="`")
    num_tokens = (RunState.of(manifest).progress or {}).get("tokens", 0)
    adapter = AdapterState.of(RunState.of(manifest), f"step {manifest.step}")
    is_merged = adapter is not None
    paragraphs = [
        f"Started from {base}. {manifest.step:,} optimizer steps, {num_tokens:,} predicted tokens. "
        f"{MERGED_FP32 if is_merged and format_name == 'fp32' else STORAGE[format_name]}"
    ]
    frozen = config.get("train", {}).get("freeze")
    if frozen:
        paragraphs.append(f"These weights were not trained: `{'`, `'.join(frozen)}`.")
    if adapter is not None:
        paragraphs.append(_adapter_text(adapter, format_name))
    return "\n\n".join(paragraphs)


def _conversations(sources: dict[str, Json]) -> list[str]:
    """Return the names of the sources of which only the assistant's tokens are learned."""
    return [name for name, source in sources.items() if source.get("loss") == "assistant"]


def _kind_of_training(sources: dict[str, Json]) -> str:
    names = _conversations(sources)
    if not names:
        return (
            "This is the result of training on raw text: no instruction tuning or safety "
            "evaluation followed."
        )
    return (
        "Of the conversations of these sources only tokens were learned that the assistant "
        f"generates: `{'`, `'.join(names)}`. No safety evaluation followed."
    )


def _adapter_text(adapter: AdapterState, format_name: str) -> str:
    """Return what the card says of an adapter."""
    section = adapter.section
    how = "This is" if format_name == "peft" else "It is that model with"
    added = "" if format_name == "peft" else " added in fp32"
    layers = "all layers"
    if section.layers:
        layers = f"layers {', '.join(map(str, section.layers))}"
    return (
        f"{how} an adapter ({section.kind}, rank {section.rank}, alpha {section.alpha:g}, "
        f"{', '.join(section.targets)}, {layers}){added}. Nothing else was trained."
    )


def _data(manifest: Manifest, sources: dict[str, Json], facts: LoggedFacts | None) -> str:
    segments = _segments(manifest)
    if not segments:
        return ""
    num_tokens = facts.tokens if facts is not None else {}
    total = sum(num_tokens.values())
    rows = []
    for name, source in sources.items():
        weights = []
        for segment in segments:
            weights.append(_weight(segment, name))
        count = num_tokens.get(name, 0)
        share = f"{100 * count / total:.2f} %" if total else ""
        rows.append(
            (
                name,
                str(source["language"]),
                str(source["domain"]),
                " -> ".join(weights),
                f"{count:,}" if facts is not None else "not known",
                share,
            )
        )
    header = ("source", "language", "domain", "weight", "predicted tokens", "share")
    text = f"## Data\n\n{markdown_table(header, rows)}"
    if len(segments) > 1:
        starts = []
        for segment in segments:
            starts.append(str(segment["start_step"]))
        text += (
            "\n\nThe mix was changed during the run; its weights hold from step "
            f"{', '.join(starts)} on, in this order."
        )
    return text


def _held_out(manifest: Manifest, facts: LoggedFacts | None) -> str:
    """Return the last measurement of every held-out domain."""
    if facts is None or not facts.held_out:
        return ""
    rows = []
    for name, result in facts.held_out.items():
        rows.append(
            (
                name,
                result.language,
                str(result.step),
                f"{result.baseline:.4f}",
                f"{result.bits_per_byte:.4f}",
                f"{result.delta_percent:+.2f} ({result.ci_low:+.2f} to {result.ci_high:+.2f})",
            )
        )
    baseline = ((RunState.of(manifest).config or {}).get("guard") or {}).get("baseline_model")
    before = f"`{model_label(baseline)}`" if baseline else "before training"
    header = ("domain", "language", "step", before, "now", "change in % (95 % interval)")
    return f"## Held-out text, bits per byte\n\n{markdown_table(header, rows)}"


def _training(manifest: Manifest) -> str:
    settings = (RunState.of(manifest).config or {}).get("train", {})
    rows = []
    for key in TRAINING_KEYS:
        if key in settings:
            rows.append((key, str(settings[key])))
    for key, value in [*manifest.layout.items(), *manifest.versions.items()]:
        rows.append((key, str(value)))
    return f"## Training\n\n{markdown_table(('setting', 'value'), rows)}"

"""The model card of an export: what was trained on what, from the checkpoint and the run's metrics
alone.

No path, host or user name of the training machine goes into it: of files only their own names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cpt.checkpoint.manifest import Manifest
from cpt.telemetry.metrics import read_events

LANGUAGES = {"ja", "en"}
"""Of the mix's labels those that are languages; `code` or `math` are none."""


def model_card(
    manifest: Manifest, metrics: Path, format_name: str, sections: Sequence[str] = ()
) -> str:
    """README.md of an exported checkpoint.

    Args:
        manifest: The checkpoint's.
        metrics: The run's metrics.jsonl; may be missing.
        format_name: `bf16`, `mxfp4` or `fp32`.
        sections: Further sections.
    """
    events = read_events(metrics) if metrics.is_file() else []
    settings = _sources(manifest)
    languages = sorted({str(s["language"]) for s in settings.values()} & LANGUAGES)
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"language: [{', '.join(languages)}]"] if languages else []
    front += ["tags: [gpt-oss, continual-pretraining]"]
    parts = [
        "\n".join(["---", *front, "---"]),
        "# gpt-oss after continual pretraining",
        _what(manifest, format_name),
        _data(manifest, settings, tokens_by_source(events, manifest.step)),
        _guard(events, manifest.step),
        *sections,
        _how(manifest),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def tokens_by_source(events: list[dict[str, Any]], last_step: int) -> dict[str, int]:
    """Predicted tokens of each source up to a step; of a step that was done twice the last line
    counts.
    """
    steps = {
        e["step"]: e["tokens_by_source"]
        for e in events
        if e["event"] == "step" and e["step"] <= last_step
    }
    total: Counter[str] = Counter()
    for counts in steps.values():
        total.update(counts)
    return dict(total)


def _sources(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Language and domain of every source that any part of the run drew from."""
    found: dict[str, dict[str, Any]] = {}
    for segment in manifest.state.get("ledger", {}).get("segments", []):
        found |= segment["settings"].get("sources", {})
    return found


def _what(manifest: Manifest, format_name: str) -> str:
    config, progress = manifest.state.get("config", {}), manifest.state.get("progress", {})
    model = config.get("model", {})
    base = (
        f"`{Path(model['path']).name}`"
        if model.get("path")
        else f"random weights (`{model.get('init')}`)"
    )
    stored = {
        "bf16": "Weights are stored in bf16.",
        "fp32": "Weights are the fp32 master weights of training.",
        "mxfp4": "Expert matrices are rounded to MXFP4 (round to nearest), the rest is stored in bf16.",
    }
    lines = [
        f"Started from {base}. {manifest.step:,} optimizer steps, {progress.get('tokens', 0):,} predicted tokens. "
        + stored[format_name]
    ]
    if frozen := config.get("train", {}).get("freeze"):
        lines.append(f"Left as they were: {', '.join(f'`{pattern}`' for pattern in frozen)}.")
    lines.append(
        "This is the result of training on raw text: no instruction tuning or safety evaluation followed."
    )
    return "\n\n".join(lines)


def _data(manifest: Manifest, sources: dict[str, dict[str, Any]], tokens: dict[str, int]) -> str:
    segments = manifest.state.get("ledger", {}).get("segments", [])
    if not segments:
        return ""
    total = sum(tokens.values())
    rows = []
    for name, source in sources.items():
        weights = [f"{segment['weights'].get(name, 0):.4g}" for segment in segments]
        count = tokens.get(name, 0)
        share = f"{100 * count / total:.2f} %" if total else ""
        rows.append(
            (
                name,
                str(source["language"]),
                str(source["domain"]),
                " -> ".join(weights),
                f"{count:,}",
                share,
            )
        )
    header = ("source", "language", "domain", "weight", "predicted tokens", "share")
    starts = ", ".join(str(segment["start_step"]) for segment in segments)
    note = (
        ""
        if len(segments) == 1
        else f"\n\nThe mix was changed during the run; its weights hold from step {starts} on."
    )
    return f"## Data\n\n{markdown_table(header, rows)}{note}"


def _guard(events: list[dict[str, Any]], last_step: int) -> str:
    """The last measurement of every held-out domain."""
    latest = {
        e["domain"]: e for e in events if e["event"] == "guard" and 0 < e["step"] <= last_step
    }
    if not latest:
        return ""
    rows = [
        (
            name,
            str(event["language"]),
            str(event["step"]),
            f"{event['baseline']:.4f}",
            f"{event['bits_per_byte']:.4f}",
            f"{event['delta_percent']:+.2f} ({event['ci_low']:+.2f} to {event['ci_high']:+.2f})",
        )
        for name, event in latest.items()
    ]
    header = ("domain", "language", "step", "before training", "now", "change in % (95 % interval)")
    return f"## Held-out text, bits per byte\n\n{markdown_table(header, rows)}"


def _how(manifest: Manifest) -> str:
    train = manifest.state.get("config", {}).get("train", {})
    keys = (
        "seq_len",
        "global_batch_size",
        "lr",
        "min_lr_ratio",
        "schedule",
        "warmup_steps",
        "weight_decay",
        "dtype",
    )
    rows = [(key, str(train[key])) for key in keys if key in train]
    rows += [
        (key, str(value)) for key, value in (*manifest.layout.items(), *manifest.versions.items())
    ]
    return f"## Training\n\n{markdown_table(('setting', 'value'), rows)}"

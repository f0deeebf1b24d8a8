"""`cpt checkpoints`: what a run directory holds, with a verdict on each folder; needs no DeepSpeed
and no engine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from cpt.checkpoint.manifest import MANIFEST, Manifest, check_listing, read_manifest, verify_files
from cpt.checkpoint.metadata import check_metadata
from cpt.checkpoint.reader import list_steps, reason_of, step_folder
from cpt.errors import CheckpointError

SET_ASIDE = {"rejected": "damaged, set aside", "superseded": "of an abandoned branch, set aside"}
HEAD = ("step", "tokens", "size", "world", "sp", "ep", "stage", "saved", "age", "verdict")


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """One folder."""

    folder: Path
    """Where it is."""
    manifest: Manifest | None
    """None if it cannot be read."""
    verdict: str
    """`verified`, `sizes match`, or what is wrong."""
    good: bool
    """Whether a run could go on from it, as far as was looked."""


def list_checkpoints(run_dir: Path, *, verify: bool) -> list[Listed]:
    """Every folder that is a checkpoint, was to become one, or was one; newest step first.

    Args:
        run_dir: The run directory.
        verify: Read and hash every file; else only manifests, names and sizes are compared.
    """
    found = [_judge(step_folder(run_dir, step), verify) for step in list_steps(run_dir)]
    parent = run_dir / "checkpoints"
    for folder in sorted(parent.glob(".*-step-*")) if parent.is_dir() else []:
        kind = folder.name[1:].partition("-step-")[0]
        verdict = SET_ASIDE.get(kind, "incomplete: being written, or left by a crash")
        found.append(Listed(folder=folder, manifest=_manifest(folder), verdict=verdict, good=False))
    return found


def _judge(folder: Path, verify: bool) -> Listed:
    if not (folder / MANIFEST).exists():
        verdict = f"incomplete: no {MANIFEST}"
        return Listed(folder=folder, manifest=None, verdict=verdict, good=False)

    def check() -> None:
        manifest = read_manifest(folder)
        if verify:
            verify_files(folder, manifest)
            check_metadata(folder, manifest)
        else:
            check_listing(folder, manifest)

    reason = reason_of(check)
    verdict = f"damaged: {reason}" if reason else "verified" if verify else "sizes match"
    return Listed(folder=folder, manifest=_manifest(folder), verdict=verdict, good=reason is None)


def _manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except CheckpointError:
        return None


def table(listed: list[Listed], *, now: float | None = None) -> str:
    """The folders for people, one a line."""
    rows = [HEAD, *(_row(one, time.time() if now is None else now) for one in listed)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD) - 1)]
    lines = []
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]))
    return "\n".join(lines)


def _row(one: Listed, now: float) -> tuple[str, ...]:
    step = one.folder.name.partition("step-")[2].lstrip("0") or "0"
    try:
        saved = one.folder.stat().st_mtime
        size = sum(entry.stat().st_size for entry in one.folder.iterdir() if entry.is_file())
    except OSError:  # pruned while we look
        saved, size = now, 0
    manifest = one.manifest
    progress = manifest.state.get("progress", {}) if manifest else {}
    tokens = (
        f"{progress['tokens']:,}" if isinstance(progress, dict) and "tokens" in progress else "-"
    )
    layout = manifest.layout if manifest else {}
    sizes = [
        str(layout.get(key, "-")) for key in ("world_size", "sp_size", "ep_size", "zero_stage")
    ]
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(saved))
    return (step, tokens, readable(size), *sizes, date, age(now - saved), one.verdict)


def readable(count: int) -> str:
    """Bytes for people."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def age(seconds: float) -> str:
    """A duration for people, in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"

"""The list of a run's checkpoints with the condition of each, for `cpt checkpoints`.

It needs neither DeepSpeed nor an engine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from cpt.checkpoint.manifest import MANIFEST, Manifest, check_listing, read_manifest, verify_files
from cpt.checkpoint.range_index import read_range_index
from cpt.checkpoint.reader import list_steps, reason_of, step_folder
from cpt.errors import CheckpointError
from data_pipeline.escaping import escaped_line

SET_ASIDE = {"rejected": "damaged, set aside", "superseded": "of an abandoned branch, set aside"}
LAYOUT_KEYS = ("world_size", "sp_size", "ep_size", "zero_stage")
MAX_LISTED = 1000
"""Folders that are looked at: the newest; a run that keeps more is none of ours."""
HEAD = ("step", "tokens", "size", "world", "sp", "ep", "stage", "saved", "age", "verdict")


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedCheckpoint:
    """One folder of a run's checkpoints."""

    folder: Path
    """Path of the folder."""
    manifest: Manifest | None
    """Its manifest; None if it cannot be read."""
    condition: str
    """`verified`, `sizes match`, or a description of what is wrong."""
    is_usable: bool
    """Whether a run could go on from it, as far as was looked."""


def list_checkpoints(run_dir: Path, *, verify: bool) -> list[ListedCheckpoint]:
    """Return every folder that is, was to become, or was a checkpoint, newest step first.

    Args:
        run_dir: The run directory.
        verify: Read and hash every file; else only manifests, names and sizes are compared.
    """
    steps = list_steps(run_dir)
    found = [_inspect(step_folder(run_dir, step), verify) for step in steps[:MAX_LISTED]]
    for folder in sorted((run_dir / "checkpoints").glob(".*-step-*"))[:MAX_LISTED]:
        kind = folder.name[1:].partition("-step-")[0]
        condition = SET_ASIDE.get(kind, "incomplete: being written, or left by a crash")
        found.append(
            ListedCheckpoint(
                folder=folder, manifest=_manifest(folder), condition=condition, is_usable=False
            )
        )
    return found


def _inspect(folder: Path, verify: bool) -> ListedCheckpoint:
    if not (folder / MANIFEST).exists():
        return ListedCheckpoint(
            folder=folder, manifest=None, condition=f"incomplete: no {MANIFEST}", is_usable=False
        )

    def check() -> None:
        manifest = read_manifest(folder)
        if verify:
            verify_files(folder, manifest)
            read_range_index(folder, manifest)
        else:
            check_listing(folder, manifest)

    reason = reason_of(check)
    if reason is not None:
        condition = f"damaged: {reason}"
    elif verify:
        condition = "verified"
    else:
        condition = "sizes match"
    return ListedCheckpoint(
        folder=folder, manifest=_manifest(folder), condition=condition, is_usable=reason is None
    )


def _manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except CheckpointError:
        return None


def checkpoint_table(listed: list[ListedCheckpoint], *, now: float | None = None) -> str:
    """Return a table of the folders for people, one a line."""
    if now is None:
        now = time.time()
    rows: list[tuple[str, ...]] = [HEAD]
    for one in listed:
        rows.append(tuple(escaped_line(cell) for cell in _row(one, now)))
    columns = list(zip(*rows, strict=True))[:-1]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]))
    return "\n".join(lines)


def _row(one: ListedCheckpoint, now: float) -> tuple[str, ...]:
    step = one.folder.name.partition("step-")[2].lstrip("0") or "0"
    try:
        saved = one.folder.stat().st_mtime
        size = 0
        for entry in one.folder.iterdir():
            if entry.is_file():
                size += entry.stat().st_size
    except OSError:  # pruned while we look
        saved = now
        size = 0
    layout: dict[str, int] = {}
    tokens = "-"
    if one.manifest is not None:
        layout = one.manifest.layout
        progress = one.manifest.state.get("progress", {})
        # only the run state knows what is in it, and anybody may have written it
        if isinstance(progress, dict) and type(progress.get("tokens")) is int:
            tokens = f"{progress['tokens']:,}"
    sizes = [str(layout.get(key, "-")) for key in LAYOUT_KEYS]
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(saved))
    return (step, tokens, readable(size), *sizes, date, age(now - saved), one.condition)


def readable(num_bytes: int) -> str:
    """Return a number of bytes for people, in the largest fitting unit."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    value = float(num_bytes)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 1000:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def age(seconds: float) -> str:
    """Return a duration for people, in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"

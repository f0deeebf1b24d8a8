"""Reads the files that Weights & Biases leaves in offline mode, as `wandb sync` does.

A `run-ID.wandb` file is seven bytes (`:W&B`, a magic number, a version), then a LevelDB log: blocks
of 32 KiB with chunks of (checksum 4, length 2, kind 1) bytes, which make up records.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

FILE_HEADER_BYTES = 7
BLOCK_BYTES = 32768
CHUNK_HEADER_BYTES = 7
LAST_KINDS = (1, 4)
"""Chunks that end a record: a full one, and the last of several."""


@dataclass(kw_only=True)
class Recorded:
    """What one start of a run has recorded."""

    run: Any = None
    """The record of the run itself: id, project, tags, configuration."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the history, in order."""
    metrics: list[Any] = field(default_factory=list)
    """Definitions of metrics."""
    alerts: list[Any] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None
    """None if the run was never finished."""

    def series(self, name: str) -> dict[int, Any]:
        """Return the values of one name by step."""
        return {row["step"]: row[name] for row in self.rows if name in row}


def read_recorded(file: Path) -> Recorded:
    """Read one offline file."""
    found = Recorded()
    for data in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
        elif kind == "history":
            found.rows.append(_row(record.history))
        elif kind == "metric":
            found.metrics.append(record.metric)
        elif kind == "alert":
            found.alerts.append(record.alert)
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def recorded_starts(run_dir: Path) -> list[Recorded]:
    """Return what every start of a run directory has recorded, in order of time."""
    files = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda f: f.stat().st_mtime)
    return [read_recorded(file) for file in files]


def _row(history: Any) -> dict[str, Any]:
    row = {}
    for item in history.item:
        name = item.key or ".".join(item.nested_key)
        row[name] = json.loads(item.value_json)
    return row


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file; one that a kill cut off is left out."""
    position = FILE_HEADER_BYTES
    parts = b""
    while position + CHUNK_HEADER_BYTES <= len(data):
        left_in_block = BLOCK_BYTES - position % BLOCK_BYTES
        if left_in_block < CHUNK_HEADER_BYTES:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        start = position + CHUNK_HEADER_BYTES
        if kind == 0 or start + length > len(data):
            return
        parts += data[start : start + length]
        position = start + length
        if kind in LAST_KINDS:
            yield parts
            parts = b""

"""A checkpoint on disk without a run: small files with the right names, a real `.metadata`, a real
range index and a real manifest.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from cpt.checkpoint.manifest import (
    MANIFEST,
    METADATA,
    PARTS,
    RANGES,
    Manifest,
    TensorRecord,
    record_file,
    write_manifest,
)
from cpt.checkpoint.metadata import write_metadata
from cpt.checkpoint.range_index import WrittenRange, group_ranges, write_range_index
from cpt.checkpoint.reader import step_folder

SHARDS = {"__0_0.distcp": bytes(range(256)) * 160, "__1_0.distcp": b"\x00" * 40000 + b"end"}
FILES = sorted([*SHARDS, METADATA, RANGES])
TENSORS = {
    "lm_head.weight": TensorRecord(shape=(96, 64), dtype="float32"),
    "model.norm.weight": TensorRecord(shape=(64,), dtype="float32"),
}


def manifest_of(folder: Path, step: int = 100) -> Manifest:
    return Manifest(
        step=step,
        files=tuple(record_file(folder / name) for name in FILES),
        tensors=TENSORS,
        layout={"world_size": 2, "sp_size": 2, "ep_size": 1, "zero_stage": 3},
        versions={"torch": "2.13.0"},
        state={
            "progress": {"step": step, "tokens": 123, "batch_chain": "ab"},
            "lr": 0.125,
            "mix": None,
            "done": True,
            "model_config": {},
        },
    )


def ranges_of(tensors: dict[str, TensorRecord]) -> list[WrittenRange]:
    """Return the ranges of all tensors, each in two halves, one in each shard."""
    found = []
    place = 0
    for part in PARTS:
        for name, record in tensors.items():
            numel = math.prod(record.shape)
            half = numel // 2
            for index, file in enumerate(sorted(SHARDS)):
                key = f"{part}/{name}"
                first = index * half
                found.append(WrittenRange(key, first, half, numel, file, place, half * 4, place))
            place += half * 4
    return found


def write_checkpoint(run_dir: Path, step: int) -> Path:
    folder = step_folder(run_dir, step)
    folder.mkdir(parents=True)
    for name, content in SHARDS.items():
        (folder / name).write_bytes(content)
    grouped = group_ranges(ranges_of(TENSORS))
    write_metadata(folder, grouped)
    write_range_index(folder, grouped)
    write_manifest(folder, manifest_of(folder, step))
    return folder


def flip(file: Path, position: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def sign_again(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and give it a valid checksum, as a forger would."""
    body = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del body["checksum"]
    change(body)
    body["checksum"] = xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(body), encoding="utf-8")


def sign_file(folder: Path, name: str) -> None:
    """Give a changed file a true record, as a forger who can write the manifest would."""
    record = record_file(folder / name)

    def replace_record(manifest: dict[str, Any]) -> None:
        for listed in manifest["files"]:
            if listed["name"] == name:
                listed.update(bytes=record.bytes, xxh3_128=record.xxh3_128)

    sign_again(folder, replace_record)


OLD_CHECKPOINT = Path(__file__).parents[1] / "checkpoint" / "format-1" / "step-00000003"
"""A checkpoint that the last version with format 1 wrote: two ranks, one tensor trained and one
frozen. Element i of part p (0 to 2) of tensor t (model.norm.weight, lm_head.weight) is
i + 1000 p + 10000 t.
"""


def old_checkpoint(run_dir: Path) -> Path:
    """Put a copy of the old checkpoint into a run."""
    return Path(shutil.copytree(OLD_CHECKPOINT, step_folder(run_dir, 3)))


def as_format_1(folder: Path) -> None:
    """Make a checkpoint what the code of format 1 would have written."""
    (folder / RANGES).unlink()

    def older(manifest: dict[str, Any]) -> None:
        manifest["format"] = 1
        manifest["files"] = [file for file in manifest["files"] if file["name"] != RANGES]

    sign_again(folder, older)


class EndlessReading:
    """Stands for `refusal_of` of a checkpoint that is never read to its end."""

    def __init__(self) -> None:
        self.began = threading.Event()

    def __call__(self, folder: Path, at_chunk: Callable[[], object]) -> str | None:
        self.began.set()
        while True:
            at_chunk()
            time.sleep(0.01)

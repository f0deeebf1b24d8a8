"""A checkpoint on disk without a run: small files with the right names, a real `.metadata` and a
real manifest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from cpt.checkpoint.manifest import MANIFEST, Manifest, TensorRecord, record_file, write_manifest
from cpt.checkpoint.metadata import METADATA, PARTS, WrittenRange, write_metadata
from cpt.checkpoint.reader import step_folder

SHARDS = {"__0_0.distcp": bytes(range(256)) * 40, "__1_0.distcp": b"\x00" * 5000 + b"end"}
FILES = sorted([*SHARDS, METADATA])
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
    for part in PARTS:
        for name, record in tensors.items():
            numel = math.prod(record.shape)
            half = numel // 2
            for index, file in enumerate(sorted(SHARDS)):
                key = f"{part}/{name}"
                found.append(WrittenRange(key, index * half, half, numel, file, 0, 100))
    return found


def write_checkpoint(run_dir: Path, step: int) -> Path:
    folder = step_folder(run_dir, step)
    folder.mkdir(parents=True)
    for name, content in SHARDS.items():
        (folder / name).write_bytes(content)
    write_metadata(folder, ranges_of(TENSORS))
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

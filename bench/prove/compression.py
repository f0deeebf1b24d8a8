"""Measure what zstd makes of the state in a checkpoint, by kind of tensor.

    python bench/prove/compression.py CHECKPOINT [--most_mb 64]

Every part (master weights and moments) is measured for the embeddings and for all other trained
tensors, as the values lie and with their bytes sorted into planes (the first bytes of all values,
then the second, ...), which is what helps a compressor most with floats.  Ratios are bytes before
to bytes after; rates are MB of values a second on one thread, compressing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from backports import zstd  # noqa: E402

from cpt.checkpoint.flat_range import FlatRange  # noqa: E402
from cpt.checkpoint.manifest import read_manifest  # noqa: E402
from cpt.checkpoint.range_index import read_range_index  # noqa: E402
from cpt.checkpoint.reader import read_ranges  # noqa: E402

LEVELS = (1, 3)


def values_of(folder: Path, part: str, *, embeddings: bool, most_bytes: int) -> bytes:
    """Return the values of one part of the embeddings, or of all other trained tensors."""
    manifest = read_manifest(folder)
    index = read_range_index(folder, manifest)
    taken = []
    left = most_bytes // 4
    for name, record in sorted(manifest.tensors.items()):
        is_embedding = "embed_tokens" in name or "lm_head" in name
        if is_embedding != embeddings or part not in record.parts or left <= 0:
            continue
        numel = int(np.prod(record.shape))
        tensor = torch.empty(min(left, numel))
        ranges = {f"{part}/{name}": FlatRange(tensor=tensor, offset=0, global_numel=numel)}
        read_ranges(folder, index, ranges)
        left -= tensor.numel()
        taken.append(tensor.numpy().tobytes())
    return b"".join(taken)


def in_planes(values: bytes) -> bytes:
    """Return the bytes of fp32 values, sorted by their place in a value."""
    return np.frombuffer(values, dtype=np.uint8).reshape(-1, 4).T.tobytes()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--most_mb", type=int, default=64, help="values of each kind, in MB")
    options = parser.parse_args()
    print(f"{'part':<12} {'tensors':<11} {'form':<7} {'level':>5} {'ratio':>6} {'MB/s':>6}")
    for part in ("master", "exp_avg", "exp_avg_sq"):
        for embeddings in (True, False):
            values = values_of(
                options.checkpoint, part, embeddings=embeddings, most_bytes=options.most_mb * 10**6
            )
            tensors = "embeddings" if embeddings else "others"
            for form, content in (("values", values), ("planes", in_planes(values))):
                for level in LEVELS:
                    began = time.process_time()
                    size = len(zstd.compress(content, level))
                    rate = len(content) / 1e6 / (time.process_time() - began)
                    line = f"{part:<12} {tensors:<11} {form:<7} {level:>5}"
                    print(f"{line} {len(content) / size:>6.2f} {rate:>6.0f}", flush=True)


if __name__ == "__main__":
    main()

"""The last stage of a build on synthetic documents: time, memory and bytes, per document.

    python bench/last_stage.py --documents 1000000 5000000 --near_share 0 0.2

No text is needed: content hashes and MinHash signatures are drawn by seed and written as parts of
100,000 documents. `--near_share` of the documents are near copies of an earlier one, and a tenth of
those exact copies. Each step runs in a process of its own with one worker. `in memory` is the
reference of the tests, which decides the same fates with all hashes and signatures at hand, as the
build did before it had tasks; the fates of both are compared.

CPU is that of the process, memory its own peak above what it had at the start, without mapped
files; bytes are what it asked the system to read and write.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PART_DOCUMENTS = 100_000
SHARES = [0.0001]
THRESHOLD = 0.8
MEAN_TOKENS = 1000
SEQ_LEN = 8192
STEPS = ("exact", "exact in memory", "near", "near in memory", "pack")


def write_parts(work_dir: Path, documents: int, near_share: float) -> None:
    """Write hashes and signatures, part by part."""
    from data_pipeline.reading.content_hashes import HASH_DTYPE

    rng = np.random.default_rng(documents)
    folder = work_dir / "parts" / "s"
    folder.mkdir(parents=True)
    for number, first in enumerate(range(0, documents, PART_DOCUMENTS)):
        count = min(PART_DOCUMENTS, documents - first)
        hashes = np.empty(count, HASH_DTYPE)
        hashes["high"] = rng.integers(0, 2**64, count, np.uint64)
        hashes["low"] = rng.integers(0, 2**64, count, np.uint64)
        signatures = rng.integers(0, 2**32, (count, 128), np.uint32)
        copies = np.flatnonzero(rng.random(count) < near_share)
        originals = rng.integers(0, count, len(copies))
        changed = rng.random((len(copies), 128)) < 0.1
        signatures[copies] = np.where(changed, signatures[copies], signatures[originals])
        exact = rng.random(len(copies)) < 0.1
        hashes[copies[exact]] = hashes[originals[exact]]
        np.save(folder / f"{number:05d}.npy", hashes)
        (folder / f"{number:05d}.npy").rename(folder / f"{number:05d}.hashes")
        np.save(folder / f"{number:05d}.npy", signatures)
        (folder / f"{number:05d}.npy").rename(folder / f"{number:05d}.minhash")


def run_step(work_dir: Path, documents: int, step: str) -> str:
    """Run one step, and return a hash of what it gives."""
    from data_pipeline.build.packed_split import pack_split
    from data_pipeline.engine.local import LocalExecutor
    from data_pipeline.fates.exact_copies import decide_exact
    from data_pipeline.fates.near_copies import mark_near_copies
    from data_pipeline.store.packing import Segments
    from tests.support.array_parts import source_of_arrays
    from tests.support.fates_in_memory import decide_fates, mark_near_duplicates

    executor = LocalExecutor(1)
    counts = []
    for first in range(0, documents, PART_DOCUMENTS):
        counts.append(min(PART_DOCUMENTS, documents - first))
    gathered = [source_of_arrays(work_dir, "s", counts)]
    parts = [(part.hashes_path, part.signatures_path) for part in gathered[0].parts]
    if step == "exact":
        fates, _ = decide_exact(gathered, SHARES, work_dir, executor)
        np.save(work_dir / "fates.npy", fates)
    elif step == "exact in memory":
        hashes = np.concatenate([np.load(path) for path, _ in parts])
        fates = decide_fates([hashes], SHARES)[0].fates
    elif step == "near":
        fates = np.load(work_dir / "fates.npy")
        mark_near_copies(fates, gathered, THRESHOLD, work_dir, executor)
    elif step == "near in memory":
        fates = np.load(work_dir / "fates.npy")
        mark_near_duplicates(fates, [np.load(path, mmap_mode="r") for _, path in parts], THRESHOLD)
    else:
        rng = np.random.default_rng(1)
        tokens = rng.lognormal(np.log(MEAN_TOKENS) - 0.5, 1, documents).astype(np.int64) + 2
        segments = Segments.whole(np.arange(documents), tokens)
        packed = pack_split(work_dir / "rows", segments, SEQ_LEN, "best_fit", work_dir, executor)
        return str(packed)
    return xxhash.xxh3_128_hexdigest(fates.tobytes()) + f" dropped {np.count_nonzero(fates > 1)}"


class _Peak:
    """Highest anonymous memory of this process, looked at every 10 ms."""

    def __init__(self) -> None:
        self.bytes = 0
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Peak:
        self._before = _anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._thread.join()
        self.bytes -= self._before

    def _watch(self) -> None:
        while not self._is_done.wait(0.01):
            self.bytes = max(self.bytes, _anonymous_bytes())


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) * 1024


def _io() -> tuple[int, int]:
    text = Path("/proc/self/io").read_text()
    found = dict(line.split(": ") for line in text.splitlines())
    return int(found["rchar"]), int(found["wchar"])


def measure(work_dir: Path, documents: int, step: str) -> dict[str, Any]:
    """Run one step in this process and return its figures."""
    import duckdb  # noqa: F401  # imports are not measured
    import pyarrow  # noqa: F401

    read, written = _io()
    cpu = time.process_time()
    with _Peak() as peak:
        result = run_step(work_dir, documents, step)
    cpu = time.process_time() - cpu
    read_after, written_after = _io()
    return {
        "us": cpu / documents * 1e6,
        "memory": peak.bytes,
        "read": (read_after - read) / documents,
        "written": (written_after - written) / documents,
        "result": result,
    }


def main() -> None:
    """Print one line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 5_000_000])
    parser.add_argument("--near_share", type=float, nargs="+", default=[0.0, 0.2])
    parser.add_argument("--work", type=Path, help="folder for files; default: a temporary one")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        work_dir, documents, step = args.child
        print(json.dumps(measure(Path(work_dir), int(documents), step)))
        return
    print("documents  near  step             us CPU  MiB  B read  B written  (a document)")
    for documents in args.documents:
        for near_share in args.near_share:
            with tempfile.TemporaryDirectory(dir=args.work) as name:
                write_parts(Path(name), documents, near_share)
                _print_steps(Path(name), documents, near_share)


def _print_steps(work_dir: Path, documents: int, near_share: float) -> None:
    results: dict[str, str] = {}
    for step in STEPS:
        command = [sys.executable, __file__, "--child", str(work_dir), str(documents), step]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        results[step] = found["result"]
        print(
            f"{documents:>9}  {near_share:>4}  {step:<15}  {found['us']:>6.2f}  "
            f"{found['memory'] / 2**20:>4.0f}  {found['read']:>6.0f}  {found['written']:>9.0f}  "
            f"{found['result'][33:]}",
            flush=True,
        )
    for step in ("exact", "near"):
        assert results[step] == results[f"{step} in memory"], f"{step}: the fates differ"


if __name__ == "__main__":
    main()

"""The last stage of a build at 1, 5 and 20 million documents, and what follows for 400 million.

    python bench/prove/data_scale.py --out scale.json [--documents 1000000 5000000 20000000]
    python bench/prove/data_scale.py --out old.json --tree CHECKOUT      # as it was in b2a4cc9

Arrays are drawn by seed: content hashes, MinHash signatures, lengths, tokens; no text is needed. A
twentieth of the documents are copies and a twentieth near copies. Each stage runs in a process of
its own with one worker, and tells the time, the memory and the bytes of that process:

    exact           held-out documents and exact copies
    near            near copies
    pack            rows of 4,096 tokens
    open            the index of the shards, as training opens them
    decontaminate   the search for held-out text, by tokens of training and of held-out text

Own memory is RssAnon, what the process alone holds; mapped is RssFile, pages of files that the
kernel may drop. Both are peaks, sampled 20 times a second. Shards are sparse files: stages that do
not read tokens need none.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (1_000_000, 5_000_000, 20_000_000)
STAGES = ("exact", "near", "pack", "open")
PART_DOCUMENTS = 250_000
MEAN_TOKENS = 1000
SEQ_LEN = 4096
HELD_OUT_SHARE = 0.0001
THRESHOLD = 0.8
NUM_HASHES = 128
SOURCE = "synthetic"
HELD_OUT_TOKENS = (100_000, 1_000_000, 4_000_000, 16_000_000)
SCANNED_TOKENS = 20_000_000
RUN_TOKENS = 50
GIB = 2**30
CORPORA = (10e9, 100e9, 400e9)
"""Tokens of the extrapolated corpora."""
CORES_PER_NODE = 16
Integers = npt.NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data_scale.json"), help="figures")
    parser.add_argument("--documents", type=int, nargs="+", default=list(DOCUMENTS))
    parser.add_argument("--stages", nargs="+", default=[*STAGES, "decontaminate"])
    parser.add_argument("--folder", type=Path, help="for the arrays: about 1 KB a document")
    parser.add_argument("--tree", type=Path, help="checkout of b2a4cc9 to measure")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sys.path.insert(0, str(options.tree or ROOT))
        figures = measure(options.child, options.size, options.folder, options.tree is not None)
        print(json.dumps(figures))
        return
    records = list(measure_all(options))
    options.out.write_text(json.dumps({"records": records}, indent=1) + "\n", encoding="utf-8")
    print(describe(records))


def measure_all(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of every stage at every size."""
    by_documents = [stage for stage in options.stages if stage != "decontaminate"]
    for size in sorted(options.documents) if by_documents else []:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            run_child(options, "draw", size, folder)
            for stage in by_documents:
                record = run_child(options, stage, size, folder)
                print(json.dumps(record), file=sys.stderr)
                yield record
    if "decontaminate" in options.stages:
        for size in HELD_OUT_TOKENS:
            with tempfile.TemporaryDirectory(dir=options.folder) as name:
                record = run_child(options, "decontaminate", size, Path(name))
                print(json.dumps(record), file=sys.stderr)
                yield record


def run_child(options: argparse.Namespace, stage: str, size: int, folder: Path) -> dict[str, Any]:
    """Measure one stage in a process of its own."""
    command = [sys.executable, __file__, "--child", stage, "--size", str(size)]
    command += ["--folder", str(folder)]
    if options.tree and stage != "draw":  # arrays are drawn by today's code
        command += ["--tree", str(options.tree)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(stage: str, size: int, folder: Path, is_old: bool) -> dict[str, Any]:
    """Run a stage, and return its figures."""
    work: Callable[[], dict[str, Any] | None]
    if stage == "draw":
        draw(size, folder)
        return {}
    if stage == "decontaminate":
        work = prepare_decontamination(size, is_old)
    elif is_old:
        work = prepare_old(stage, folder)
    else:
        work = prepare_new(stage, folder)
    before = read_io()
    with MemorySampler() as memory:
        started = time.perf_counter()
        cpu = time.process_time()
        found = work()
        cpu = time.process_time() - cpu
        seconds = time.perf_counter() - started
    after = read_io()
    return {
        "stage": stage,
        "size": size,
        "cpu_seconds": round(cpu, 2),
        "seconds": round(seconds, 2),
        "own_bytes": memory.own_bytes,
        "mapped_bytes": memory.mapped_bytes,
        "read_bytes": after["rchar"] - before["rchar"],
        "written_bytes": after["wchar"] - before["wchar"],
        **(found or {}),
    }


class MemorySampler(threading.Thread):
    """Notes the peaks of the memory of this process, above what it had at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self._before = read_status()
        self.own_bytes = 0
        self.mapped_bytes = 0

    def __enter__(self) -> MemorySampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while True:
            now = read_status()
            own = now["RssAnon"] + now["RssShmem"] - self._before["RssAnon"]
            mapped = now["RssFile"] - self._before["RssFile"]
            self.own_bytes = max(self.own_bytes, own)
            self.mapped_bytes = max(self.mapped_bytes, mapped)
            if self._ended.wait(0.05):
                return


def read_status() -> dict[str, int]:
    """Return the memory of this process by kind, in bytes."""
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name.startswith("Rss"):
            found[name] = 1024 * int(value.split()[0])
    return found


def read_io() -> dict[str, int]:
    """Return the bytes that this process has read and written through calls, not through maps."""
    found = {}
    for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        found[name] = int(value)
    return found


# --- the arrays


def draw(num_documents: int, folder: Path) -> None:
    """Write the parts of a source: hashes, signatures, sparse shards, accounts."""
    from data_pipeline.parts.part import Account
    from data_pipeline.reading.content_hashes import HASH_DTYPE
    from data_pipeline.store.files import write_json
    from data_pipeline.text.cleaning import Tally

    generator = np.random.default_rng(7)
    previous: tuple[Any, Any] | None = None
    for part in parts_of(num_documents, folder):
        count = min(PART_DOCUMENTS, num_documents - part.number * PART_DOCUMENTS)
        hashes = np.empty(count, HASH_DTYPE)
        for half in ("high", "low"):
            hashes[half] = generator.integers(0, 2**64, count, np.uint64)
        signatures = generator.integers(0, 2**32, (count, NUM_HASHES), np.uint32)
        if previous is not None:
            chosen = generator.permutation(count)
            copies = chosen[: count // 20]
            near = chosen[count // 20 : count // 10]
            hashes[copies] = previous[0][copies]
            signatures[copies] = previous[1][copies]
            signatures[near, :120] = previous[1][near, :120]
        previous = hashes, signatures
        lengths = 2 + generator.lognormal(math.log(MEAN_TOKENS) - 0.5, 1.0, count).astype(np.int64)
        part.shard_path.parent.mkdir(parents=True, exist_ok=True)
        part.account_path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            part.hashes_path: hashes,
            part.signatures_path: signatures,
            part.places_path: np.arange(count, dtype=np.uint64),
        }
        for path, values in arrays.items():
            with path.open("wb") as file:
                np.save(file, values)
        write_sparse_shard(part.shard_path, lengths)
        account = Account(
            tally=Tally(accepted=count),
            num_documents=count,
            num_tokens=int(lengths.sum()),
            num_duplicates=0,
            num_duplicate_tokens=0,
            shard_bytes=part.shard_path.stat().st_size,
            shard_sha256="0" * 64,
        )
        write_json(part.account_path, account.to_json())


def parts_of(num_documents: int, folder: Path) -> list[Any]:
    """Return the parts of the one source."""
    from data_pipeline.config.source_config import SourceConfig
    from data_pipeline.parts.part import Part
    from data_pipeline.reading.units import Unit

    source = SourceConfig(name=SOURCE, language="en", domain="web", path="none", weight=1.0)
    parts = []
    for number in range(-(-num_documents // PART_DOCUMENTS)):
        unit = Unit(format="jsonl", size_bytes=1)
        parts.append(
            Part(
                source=source,
                unit=unit,
                number=number,
                work_dir=folder,
                near_duplicates=True,
                seq_len=SEQ_LEN,
            )
        )
    return parts


def write_sparse_shard(path: Path, lengths: Integers) -> None:
    """Write a shard whose tokens are a hole in the file."""
    from data_pipeline.store import shards

    num_tokens = int(lengths.sum())
    header = json.dumps(
        {"dtype": "uint32", "num_documents": len(lengths), "num_tokens": num_tokens}
    ).encode("ascii")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<u8")
    with path.open("wb") as file:
        file.write(shards.MAGIC)
        file.write(np.array([shards.VERSION, len(header)], "<u4").tobytes())
        file.write(header.ljust(shards.HEADER_BYTES - 16))
        file.seek(shards.HEADER_BYTES + 4 * num_tokens + -4 * num_tokens % 8)
        file.write(offsets.tobytes())
        file.write((4 * lengths).astype("<u8").tobytes())


# --- the stages of today


def prepare_new(stage: str, folder: Path) -> Callable[[], dict[str, Any] | None]:
    """Return the work of a stage, imports and small files done."""
    from data_pipeline.build.packed_split import pack_split
    from data_pipeline.engine.local import LocalExecutor
    from data_pipeline.fates.exact_copies import decide_exact
    from data_pipeline.fates.near_copies import mark_near_copies
    from data_pipeline.parts.source_parts import SourceParts
    from data_pipeline.store.packing import Segments

    num_parts = len(list((folder / "parts" / SOURCE).glob("*.json")))
    parts = parts_of(num_parts * PART_DOCUMENTS, folder)
    gathered = [SourceParts.gather(parts[0].source, parts)]
    executor = LocalExecutor(1)

    def exact() -> dict[str, Any]:
        fates, _ = decide_exact(gathered, [HELD_OUT_SHARE], folder, executor)
        np.save(folder / "fates.npy", fates)
        return {"not_trained_on": int(np.count_nonzero(fates))}

    def near() -> dict[str, Any]:
        fates = np.load(folder / "fates.npy")
        before = np.count_nonzero(fates)
        mark_near_copies(fates, gathered, THRESHOLD, folder, executor)
        return {"near_copies": int(np.count_nonzero(fates) - before)}

    def pack() -> dict[str, Any]:
        tokens = gathered[0].open_shards().document_tokens
        train = np.flatnonzero(np.load(folder / "fates.npy") == 0)
        segments = Segments.whole(train, tokens[train])
        packed = pack_split(folder / "rows", segments, SEQ_LEN, "best_fit", folder, executor)
        return {"rows": packed.num_rows}

    def open_shards() -> dict[str, Any]:
        shards = gathered[0].open_shards()
        return {"documents": shards.num_documents}

    return {"exact": exact, "near": near, "pack": pack, "open": open_shards}[stage]


def prepare_decontamination(held_out_tokens: int, is_old: bool) -> Callable[[], dict[str, Any]]:
    """Return the search through tokens that hold none of the held-out text."""
    generator = np.random.default_rng(3)
    held_out = generator.integers(0, 150_000, held_out_tokens, np.uint32)
    texts = np.array_split(held_out, max(held_out_tokens // MEAN_TOKENS, 1))
    tokens = generator.integers(0, 150_000, SCANNED_TOKENS, np.uint32)
    offsets = np.arange(0, SCANNED_TOKENS + 1, MEAN_TOKENS)
    train = np.ones(len(offsets) - 1, np.bool_)
    search: Callable[[], Any]
    before = read_status()["RssAnon"]
    if is_old:
        old = old_module("decontaminate")
        old_runs = old.HeldOutRuns.from_documents(texts, RUN_TOKENS)

        def search() -> None:
            old.count_runs(tokens, offsets, train, old_runs)
            old.contaminated(tokens, offsets, old_runs)
    else:
        from data_pipeline.fates.decontamination import HeldOutRuns, find_hits

        runs = HeldOutRuns.from_documents(texts, RUN_TOKENS)

        def search() -> None:
            find_hits(tokens, offsets, train, runs)

    table_bytes = read_status()["RssAnon"] - before

    def work() -> dict[str, Any]:
        search()
        return {"scanned_tokens": SCANNED_TOKENS, "table_bytes": table_bytes}

    return work


# --- the stages of b2a4cc9


def old_module(name: str) -> Any:
    """Return a module of data_pipeline that only the old checkout has."""
    return importlib.import_module(f"data_pipeline.{name}")


def prepare_old(stage: str, folder: Path) -> Callable[[], dict[str, Any] | None]:
    """Return the work of a stage as it was: whole arrays in one process."""
    dedup, near, pack, shards = map(old_module, ("dedup", "near", "pack", "shards"))

    places = sorted((folder / "parts" / SOURCE).glob("*.hashes"))
    names = [f"documents-{path.stem}{shards.SUFFIX}" for path in places]

    def exact() -> dict[str, Any]:
        hashes = np.concatenate([np.load(path, mmap_mode="r") for path in places])
        (assignment,) = dedup.assign([hashes], [HELD_OUT_SHARE])
        np.save(folder / "fates.npy", assignment.fates)
        return {"not_trained_on": int(np.count_nonzero(assignment.fates))}

    def mark() -> dict[str, Any]:
        fates = np.load(folder / "fates.npy")
        before = np.count_nonzero(fates)
        parts = [np.load(path.with_suffix(".minhash"), mmap_mode="r") for path in places]
        near.mark_near_duplicates(fates, parts, THRESHOLD)
        return {"near_copies": int(np.count_nonzero(fates) - before)}

    def pack_rows() -> dict[str, Any]:
        tokens = open_all().document_tokens
        train = np.flatnonzero(np.load(folder / "fates.npy") == 0)
        rows = pack.pack(train, tokens[train], SEQ_LEN)
        return {"rows": len(rows.row_offsets) - 1}

    def open_all() -> Any:
        return shards.Shards(folder / "build" / SOURCE, names, verify=False)

    def open_shards() -> dict[str, Any]:
        return {"documents": open_all().num_documents}

    return {"exact": exact, "near": mark, "pack": pack_rows, "open": open_shards}[stage]


# --- what follows


def describe(records: list[dict[str, Any]]) -> str:
    """Return the tables of a page."""
    lines = [
        "| stage | documents | CPU, us a document | own memory, B a document | own memory, GiB |"
        " mapped, GiB | read, B a document | written, B a document |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        if record["stage"] == "decontaminate":
            continue
        size = record["size"]
        lines.append(
            f"| {record['stage']} | {size:,} | {record['cpu_seconds'] / size * 1e6:.2f} "
            f"| {record['own_bytes'] / size:.0f} | {record['own_bytes'] / GIB:.2f} "
            f"| {record['mapped_bytes'] / GIB:.2f} | {record['read_bytes'] / size:.0f} "
            f"| {record['written_bytes'] / size:.0f} |"
        )
    lines += ["", "| held-out tokens | tokens searched a CPU second |", "|---|---|"]
    for record in records:
        if record["stage"] == "decontaminate":
            rate = record["scanned_tokens"] / record["cpu_seconds"]
            lines.append(f"| {record['size']:,} | {rate / 1e6:.1f} M |")
    return "\n".join([*lines, "", *extrapolation(records)])


def growth(records: list[dict[str, Any]], stage: str, key: str) -> float:
    """Return the exponent by which a figure of a stage grows between its two largest sizes."""
    points = sorted((record["size"], record[key]) for record in records if record["stage"] == stage)
    if len(points) < 2 or min(value for _, value in points) <= 0:
        return 1.0
    (small, low), (large, high) = points[-2:]
    return math.log(high / low) / math.log(large / small)


def on_the_line(records: list[dict[str, Any]], stage: str, size: int) -> float:
    """Return the own bytes of a stage at a size, on the line through the two largest sizes."""
    points = sorted((one["size"], one["own_bytes"]) for one in records if one["stage"] == stage)
    last, last_bytes = points[-1]
    if len(points) < 2:
        return last_bytes * size / last
    before, bytes_before = points[-2]
    slope = max((last_bytes - bytes_before) / (last - before), 0.0)
    return float(last_bytes + slope * (size - last))


def extrapolation(records: list[dict[str, Any]]) -> list[str]:
    """Return the table of larger corpora.

    CPU is that of the largest size * (documents / size)^growth, growth at least 1, divided by the
    cores. Memory of one worker goes on the line through the two largest sizes. Held-out text is
    16 M tokens.
    """
    lines = [
        "| stage | growth of CPU | growth of memory | "
        + " | ".join(
            f"{tokens / 1e9:,.0f} B tokens: CPU hours, own GiB, hours on 1 node, on 16"
            for tokens in CORPORA
        )
        + " |",
        "|---|---|---|" + "---|" * len(CORPORA),
    ]
    for stage in ("exact", "near", "pack"):
        measured = [record for record in records if record["stage"] == stage]
        if not measured:
            continue
        largest = max(measured, key=lambda record: record["size"])
        by_cpu = max(growth(records, stage, "cpu_seconds"), 1.0)
        by_memory = max(growth(records, stage, "own_bytes"), 0.0)
        cells = []
        for tokens in CORPORA:
            factor = tokens / MEAN_TOKENS / largest["size"]
            hours = largest["cpu_seconds"] * factor**by_cpu / 3600
            documents = int(tokens / MEAN_TOKENS)
            memory = on_the_line(records, stage, documents) / GIB
            cells.append(f"{hours:.2f} h, {memory:.1f} GiB, {on_nodes(hours)}")
        lines.append(f"| {stage} | {by_cpu:.2f} | {by_memory:.2f} | " + " | ".join(cells) + " |")
    searches = [record for record in records if record["stage"] == "decontaminate"]
    if searches:
        slowest = max(searches, key=lambda record: record["size"])
        cells = []
        for tokens in CORPORA:
            seconds = slowest["cpu_seconds"] * tokens / slowest["scanned_tokens"]
            hours = seconds / 3600
            memory = (slowest["own_bytes"] + slowest["table_bytes"]) / GIB
            cells.append(f"{hours:.2f} h, {memory:.1f} GiB, {on_nodes(hours)}")
        lines.append("| decontaminate | 1.00 | 0.00 | " + " | ".join(cells) + " |")
    return lines


def on_nodes(hours: float) -> str:
    """Return CPU hours divided by the cores of one node and of 16."""
    return f"{hours / CORES_PER_NODE:.2f}, {hours / CORES_PER_NODE / 16:.2f}"


if __name__ == "__main__":
    main()

"""Prove what a rank reads and holds when a run starts on a build of 400 billion tokens.

    python bench/prove/data_open.py [--scale 1.0]

The build is simulated at its true size: 40,000 shards, 400 million documents and 42 million rows of
8,192 tokens in 6 sources, in sparse files, of which only headers, manifest, note and the tokens of
the rows have content (0.4 GB of disk, some minutes). Hashes in the manifest are made up: the note
says that they were verified, as `build` leaves it. It ends with 1 if a bound is broken.

A first rank looks at the build, as `cpt.job.build_check` does; a second one opens it after that;
both choose the rows of the first and of the last steps of a run. Shown are seconds of CPU, bytes
read by system calls (/proc/self/io), and anonymous memory (RssAnon) beyond that of the imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from data_pipeline.mixture.ledger import Ledger, Segment  # noqa: E402
from data_pipeline.store.manifest import (  # noqa: E402
    FORMAT_VERSION,
    BuildManifest,
    FileEntry,
    SourceEntry,
    read_manifest,
)
from data_pipeline.store.packing import ARRAY_NAMES  # noqa: E402
from data_pipeline.store.row_files import (  # noqa: E402
    DOCUMENT_BYTES_FILE,
    DOCUMENT_TOKENS_FILE,
    ROW_TOKENS_FILE,
    SHARD_DOCUMENTS_FILE,
    save_array,
)
from data_pipeline.store.shards import (  # noqa: E402
    HEADER_BYTES,
    MAGIC,
    VERSION,
    ShardLayout,
)
from data_pipeline.store.verification import inspect, leave_note  # noqa: E402

SEQ_LEN = 8192
RANKS = 64
MOST_ANONYMOUS_BYTES = 2**30
SHARES = {"web": 0.5, "en": 0.2, "code": 0.1, "math": 0.1, "wiki": 0.05, "chat": 0.05}
PIECES_PER_ROW = 10
GLOBAL_BATCH = 128
SHOWN_STEPS = 5


def main() -> None:
    """Write the build, let ranks open it, print a table, and check the bounds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size")
    parser.add_argument("--rank", choices=["first", "other"], help="run as a rank (internal)")
    parser.add_argument("--build", type=Path, help="the simulated build (internal)")
    options = parser.parse_args()
    if options.rank:
        print(json.dumps(measure(options.build, is_first=options.rank == "first")))
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "build"
        index_bytes = write_build(directory, options.scale)
        ranks = {name: run_rank(directory, name) for name in ("first", "other")}
    sys.exit(0 if report(ranks, index_bytes) else 1)


def run_rank(directory: Path, name: str) -> dict[str, Any]:
    """Return what a process of its own measures."""
    command = [sys.executable, __file__, "--rank", name, "--build", str(directory)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def report(ranks: dict[str, dict[str, Any]], index_bytes: int) -> bool:
    """Print the figures; return whether the bounds hold."""
    for name, found in ranks.items():
        for step, figures in found["steps"].items():
            print(
                f"{name:6s} {step:24s} {figures['seconds']:7.2f} s CPU, "
                f"{figures['read'] / 1e6:6.1f} MB read, "
                f"{figures['anonymous'] / 1e6:6.1f} MB anonymous"
            )
        print(f"{name:6s} peak anonymous memory {found['peak'] / 1e6:.0f} MB beyond the imports")
    read = ranks["first"]["opened_read"] + (RANKS - 1) * ranks["other"]["opened_read"]
    print(f"index {index_bytes / 1e9:.2f} GB; {RANKS} ranks read {read / 1e9:.2f} GB to open it")
    peak = max(found["peak"] for found in ranks.values())
    return read <= 2 * index_bytes and peak <= MOST_ANONYMOUS_BYTES


def measure(directory: Path, *, is_first: bool) -> dict[str, Any]:
    """Open the build as a rank does, and choose rows."""
    from data_pipeline.dataset import BuiltData
    from data_pipeline.mixture.mixture import Mixture

    steps: dict[str, Any] = {}
    start = anonymous_bytes()
    peak = Peak()

    def step(name: str, action: Any) -> Any:
        read, seconds = bytes_read(), time.process_time()
        result = action()
        steps[name] = {
            "seconds": time.process_time() - seconds,
            "read": bytes_read() - read,
            "anonymous": anonymous_bytes() - start,
        }
        return result

    if is_first:
        manifest = step("read the manifest", lambda: read_manifest(directory))
        found = step("look at all files", lambda: inspect(directory, manifest))
        assert not found.unverified
        del manifest, found
    data = step("open", lambda: BuiltData.open(directory, is_checked=True))
    opened_read = sum(figures["read"] for figures in steps.values())
    num_rows = sum(data.num_rows(number) for number in range(len(data.source_names)))
    segment = Segment(start_step=0, weights=SHARES, max_epochs={}, mix_hash="")
    mixture = Mixture(data, Ledger((segment,)), 1)
    step("first batch", lambda: mixture.global_batch(0, GLOBAL_BATCH))
    last = num_rows // GLOBAL_BATCH - SHOWN_STEPS
    step("jump to the last steps", lambda: mixture.global_batch(last, GLOBAL_BATCH))
    return {"steps": steps, "opened_read": opened_read, "peak": peak.stop() - start}


class Peak(threading.Thread):
    """Looks at the anonymous memory of this process all the time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._most = 0
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        """Look every 5 ms."""
        while not self._stopped.wait(0.005):
            self._most = max(self._most, anonymous_bytes())

    def stop(self) -> int:
        """Return the largest value that was seen."""
        self._stopped.set()
        self.join()
        return self._most


def anonymous_bytes() -> int:
    """Return this process's anonymous memory."""
    return status_bytes("RssAnon")


def status_bytes(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


def bytes_read() -> int:
    """Return the bytes that this process has read by system calls."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise ValueError("rchar")


def write_build(directory: Path, scale: float) -> int:
    """Write the simulated build; return the bytes of its index: all but tokens and headers."""
    files: dict[str, FileEntry] = {}
    sources = []
    index_bytes = 0
    for name, share in SHARES.items():
        num_shards = int(40_000 * share * scale)
        num_rows = int(42e6 * share * scale)
        layout = ShardLayout(num_documents=10_000, num_tokens=10_000_000, num_control_tokens=None)
        folder = directory / name
        folder.mkdir(parents=True)
        for number in range(num_shards):
            write_sparse_shard(folder / f"documents-{number:05d}.tokens", layout)
        save_array(folder / SHARD_DOCUMENTS_FILE, np.full(num_shards, layout.num_documents))
        write_rows(folder / "train", num_rows)
        write_held_out(folder / "held_out")
        index_bytes += num_shards * 16 * layout.num_documents
        index_bytes += sum(path.stat().st_size for path in (folder / "train").iterdir())
        sources.append(source_entry(name, num_rows, num_shards * layout.num_documents))
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            entry = FileEntry(bytes=path.stat().st_size, sha256="0" * 64)
            files[path.relative_to(directory).as_posix()] = entry
    manifest = BuildManifest(
        format_version=FORMAT_VERSION,
        fingerprint="simulated",
        tokenizer="",
        tokenizer_sha256="",
        seq_len=SEQ_LEN,
        sources=tuple(sources),
        guard_domains=(),
        files=files,
    )
    manifest.write(directory)
    leave_note(directory, manifest, inspect(directory, manifest).facts)
    return index_bytes


def write_sparse_shard(path: Path, layout: ShardLayout) -> None:
    """Write the header of a shard, and nothing else."""
    content = {"dtype": "uint32", "num_documents": layout.num_documents}
    header = json.dumps({**content, "num_tokens": layout.num_tokens}).encode()
    prefix = MAGIC + VERSION.to_bytes(4, "little") + len(header).to_bytes(4, "little")
    with path.open("wb") as file:
        file.write(prefix + header.ljust(HEADER_BYTES - 16))
        file.truncate(layout.file_bytes)


def write_rows(folder: Path, num_rows: int) -> None:
    """Write the arrays of training rows: the tokens of each row, and holes."""
    folder.mkdir()
    lengths = {name: num_rows * PIECES_PER_ROW for name in ARRAY_NAMES}
    lengths["row_offsets"] = num_rows + 1
    for name, length in lengths.items():
        write_sparse_array(folder / f"{name}.npy", length)
    tokens = np.random.default_rng(0).integers(SEQ_LEN - 200, SEQ_LEN, num_rows, dtype=np.int32)
    save_array(folder / ROW_TOKENS_FILE, tokens)


def write_sparse_array(path: Path, length: int) -> None:
    """Write an array of zeros as a hole."""
    with path.open("wb") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 8 * length)


def write_held_out(folder: Path) -> None:
    """Write a split without rows."""
    folder.mkdir()
    for name in ARRAY_NAMES:
        save_array(folder / f"{name}.npy", np.zeros(int(name == "row_offsets"), np.int64))
    for name in (DOCUMENT_TOKENS_FILE, DOCUMENT_BYTES_FILE):
        save_array(folder / name, np.zeros(0, np.int64))
    save_array(folder / ROW_TOKENS_FILE, np.zeros(0, np.int32))


def source_entry(name: str, num_rows: int, num_documents: int) -> SourceEntry:
    """Return the entry of a source in the manifest; what does not matter here is 0."""
    counts = dict.fromkeys(("tokens", "bytes", "duplicates", "near_duplicates"), 0)
    counts |= dict.fromkeys(("held_out_documents", "held_out_rows", "held_out_tokens"), 0)
    counts |= dict.fromkeys(("contaminated", "held_out_copies", "held_out_found"), 0)
    texts = {"name": name, "language": "en", "domain": "web", "held_out_hash": ""}
    return SourceEntry(
        **texts,
        **counts,
        base_model="",
        documents=num_documents,
        predicted_tokens=0,
        rows=num_rows,
        rejects={},
        notes={},
    )


if __name__ == "__main__":
    main()

"""What decontamination costs: text of real code and documents, and time at 16 M held-out tokens.

    python bench/decontamination.py loss --packages DIR [--max_mib 64]
    python bench/decontamination.py speed [--held_out 16000000]

loss    the Python files, and the texts beside them, of each package in DIR (such as a folder
        site-packages) are joined to one document; 2 % of the documents are held out. The build runs
        under four rules: documents lose a stretch or go as a whole, with and without stock text.
speed   random tokens are searched for random held-out text, in CPU seconds of one process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_pipeline.build.build import build  # noqa: E402
from data_pipeline.config.mix_file import load_mix  # noqa: E402
from data_pipeline.fates.decontamination import HeldOutRuns, find_hits  # noqa: E402
from data_pipeline.fates.dropped import CONTAMINATED, STRETCHES  # noqa: E402
from data_pipeline.store.manifest import SourceEntry  # noqa: E402
from data_pipeline.tables import table  # noqa: E402

KINDS = {"code": (".py",), "text": (".md", ".rst", ".txt")}
RULES = {
    "whole documents, runs in more than 10 may stay": (10**9, 1e-12),
    "whole documents": (10**9, 0.0),
    "stretches, runs in more than 10 may stay": (200, 1e-12),
    "stretches (the default)": (200, 0.0),
}
"""min_kept_tokens and stock_text of each rule."""
MIN_CHARACTERS = 200
SEARCHED_TOKENS = 20_000_000
DOCUMENT_TOKENS = 1000
VOCABULARY = 200_000


def joined_texts(packages: Path, suffixes: tuple[str, ...], max_bytes: int) -> Iterator[str]:
    """Yield the texts of each package as one document, until `max_bytes` are reached."""
    num_bytes = 0
    for folder in sorted(packages.iterdir()):
        pieces = []
        for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
            if path.suffix in suffixes and path.is_file():
                pieces.append(path.read_text(encoding="utf-8", errors="ignore"))
        text = "\n\n".join(pieces)
        if len(text) >= MIN_CHARACTERS:
            num_bytes += len(text)
            yield text
        if num_bytes > max_bytes:
            return


def measure_loss(packages: Path, max_mib: int) -> str:
    """Return a table of the documents and tokens lost under each rule."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, suffixes in KINDS.items():
            with (folder / f"{kind}.jsonl").open("w", encoding="utf-8") as file:
                for text in joined_texts(packages, suffixes, max_mib * 2**20):
                    file.write(json.dumps({"text": text}) + "\n")
        for number, (rule, (min_kept_tokens, stock_text)) in enumerate(RULES.items()):
            mix_file = write_mix(folder, min_kept_tokens, stock_text)
            out = folder / f"built{number}"
            manifest = build(load_mix(mix_file), out, False, cache_dir=folder / "cache")
            rows += [loss_row(rule, entry) for entry in manifest.sources]
    header = ("rule", "source", "documents", "tokens", "dropped", "cut", "lost", "stock text kept")
    return table(header, rows)


def write_mix(folder: Path, min_kept_tokens: int, stock_text: float) -> Path:
    """Write a mix of the two kinds of text."""
    sources = []
    for kind in KINDS:
        sources.append(
            {
                "name": kind,
                "language": "code" if kind == "code" else "en",
                "domain": kind,
                "path": f"{kind}.jsonl",
                "weight": 0.5,
                "held_out_share": 0.02,
            }
        )
    mix = {
        "seq_len": 4096,
        "seed": 1,
        "max_reject_share": 0.5,
        "decontamination": {"min_kept_tokens": min_kept_tokens, "stock_text": stock_text},
        "guard": {"min_documents": 1, "min_tokens": 1},
        "sources": sources,
    }
    path = folder / "mix.yaml"
    path.write_text(json.dumps(mix).replace("1e-12", "0.000000000001"), encoding="utf-8")
    return path


def loss_row(rule: str, entry: SourceEntry) -> tuple[str, ...]:
    """Return what one source lost under one rule."""
    whole = entry.dropped.get(CONTAMINATED, {"documents": 0, "tokens": 0})
    cut = entry.dropped.get(STRETCHES, {"tokens": 0, "cut_documents": 0})
    kept = sum(counts["tokens"] for counts in entry.exempted.values())
    lost = whole["tokens"] + cut["tokens"]
    return (
        rule,
        entry.name,
        f"{entry.read_documents:,}",
        f"{entry.read_tokens:,}",
        f"{whole['documents'] / entry.read_documents:.1%}",
        f"{cut['cut_documents'] / entry.read_documents:.1%}",
        f"{lost / entry.read_tokens:.2%}",
        f"{kept / entry.read_tokens:.2%}",
    )


def measure_speed(num_held_out: int) -> str:
    """Return how fast tokens are searched."""
    rng = np.random.default_rng(0)
    held_out = rng.integers(0, VOCABULARY, num_held_out).astype(np.uint32)
    tokens = rng.integers(0, VOCABULARY, SEARCHED_TOKENS).astype(np.uint32)
    offsets = np.arange(0, SEARCHED_TOKENS + 1, DOCUMENT_TOKENS)
    train = np.ones(len(offsets) - 1, dtype=bool)
    start = time.process_time()
    documents = np.split(held_out, max(num_held_out // DOCUMENT_TOKENS, 1))
    runs = HeldOutRuns.from_documents(documents, 50)
    built = time.process_time()
    hits = find_hits(tokens, offsets, train, runs)
    searched = time.process_time()
    # one document in a hundred has 100 tokens of a held-out one
    for number in range(0, len(train), 100):
        place = number * DOCUMENT_TOKENS + 300
        source = rng.integers(0, num_held_out // DOCUMENT_TOKENS) * DOCUMENT_TOKENS
        tokens[place : place + 100] = held_out[source : source + 100]
    again = time.process_time()
    found = find_hits(tokens, offsets, train, runs)
    done = time.process_time()
    return (
        f"{num_held_out:,} held-out tokens: tables of {runs.hashes.nbytes / 2**20:.0f} MiB and "
        f"{runs.filter.nbytes / 2**20:.0f} MiB in {built - start:.1f} s; "
        f"{SEARCHED_TOKENS / (searched - built) / 1e6:.0f} M tokens/s of a core without hits "
        f"({len(hits.places)}), {SEARCHED_TOKENS / (done - again) / 1e6:.0f} M with hits in one "
        f"document of a hundred ({len(found.places):,})"
    )


def main() -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    loss = commands.add_parser("loss")
    loss.add_argument("--packages", type=Path, required=True)
    loss.add_argument("--max_mib", type=int, default=64)
    speed = commands.add_parser("speed")
    speed.add_argument("--held_out", type=int, default=16_000_000)
    options = parser.parse_args()
    if options.command == "loss":
        print(measure_loss(options.packages, options.max_mib))
    else:
        print(measure_speed(options.held_out))


if __name__ == "__main__":
    main()

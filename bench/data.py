"""Tokenizing and reading: this pipeline against `datasets` with Hugging Face's tokenizers.

    python bench/corpus.py --out CORPUS
    python bench/data.py --corpus CORPUS --rounds 5

Both read the same files. Every measurement is a process of its own on one core; the two contestants
take turns, so a busy machine slows both. The figures are medians; on a shared machine only the
ratios mean something.

    build   ours: read, hash, exact and near copies, decontamination, tokens, best-fit rows,
                checksums, fsync
            theirs: load_dataset("json"), map(tokenize), map(group into rows), save_to_disk,
                without cleaning or removal of copies
    read    ours: the mixture's choice of rows and BuiltData.read_row, which gives ids, labels,
                positions and document bounds
            theirs: interleave_datasets of the shuffled saved datasets, as numpy: ids alone
    chat    conversations with tools -> tokens, and which of them are learned
            ours: the reader of `format: harmony`, its checks included
            theirs: apply_chat_template of the exported template with return_assistant_tokens_mask
    --only chat needs no corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SEQ_LEN = 4096
LANGUAGES = ("ja", "en")
DEFAULT_CORPUS = ROOT / "data" / "corpus"
READ_ROWS = 20_000
NUM_CHATS = 1_500
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Searches a collection of documents.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string", "description": "Words to look for"},
                "limit": {"type": "integer", "default": 10},
                "language": {"type": "string", "enum": ["ja", "en"]},
            },
            "required": ["query"],
        },
    },
}


def ours_build(work: Path) -> int:
    from data_pipeline.build.build import build
    from data_pipeline.config.mix_file import load_mix
    from data_pipeline.store.shards import Shards

    shutil.rmtree(work / "ours", ignore_errors=True)
    manifest = build(load_mix(work / "mix.yaml"), work / "ours", progress=False)
    shards = (
        Shards(work / "ours" / name, manifest.shard_names(name), verify=False) for name in LANGUAGES
    )
    return sum(int(shard.document_tokens.sum()) for shard in shards)


def theirs_build(work: Path) -> int:
    import datasets
    import tokenizers

    datasets.disable_progress_bars()
    shutil.rmtree(work / "theirs", ignore_errors=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {
            "input_ids": [
                [*e.ids, end]
                for e in tokenizer.encode_batch(batch["text"], add_special_tokens=False)
            ]
        }

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = [token for ids in batch["input_ids"] for token in ids]
        usable = len(joined) // SEQ_LEN * SEQ_LEN
        return {
            "input_ids": [joined[start : start + SEQ_LEN] for start in range(0, usable, SEQ_LEN)]
        }

    total = 0
    for language in LANGUAGES:
        file = str(work / "corpus" / f"{language}.jsonl")
        cache = str(work / "theirs" / "cache")
        loaded = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache)
        tokens = loaded.map(tokenize, batched=True, remove_columns=loaded.column_names)
        total += sum(len(ids) for ids in tokens.with_format("numpy")["input_ids"])
        tokens.map(group, batched=True).save_to_disk(str(work / "theirs" / language))
    return total


def ours_read(work: Path) -> int:
    from data_pipeline.config.mix_file import load_mix
    from data_pipeline.dataset import BuiltData
    from data_pipeline.mixture.ledger import Ledger
    from data_pipeline.mixture.mixture import Mixture

    mix = load_mix(work / "mix.yaml")
    built = BuiltData.open(work / "ours", verify=False, mix=mix)
    mixture, tokens = Mixture(built, Ledger.start(mix), mix.seed), 0
    for step in range(READ_ROWS // 64):
        batch = mixture.global_batch(step, 64)
        for source, row in zip(batch.sources.tolist(), batch.rows.tolist(), strict=True):
            tokens += len(built.read_row(source, row).input_ids)
    return tokens


def theirs_read(work: Path) -> int:
    import datasets

    datasets.disable_progress_bars()
    parts = [
        datasets.load_from_disk(str(work / "theirs" / language)).shuffle(seed=1)
        for language in LANGUAGES
    ]
    mixed = datasets.interleave_datasets(
        parts, [0.5, 0.5], seed=1, stopping_strategy="all_exhausted"
    )
    mixed, tokens, number = mixed.with_format("numpy"), 0, 0
    while number < READ_ROWS // 10:
        for row in mixed:
            tokens += len(row["input_ids"])
            number += 1
            if number >= READ_ROWS // 10:
                break
    return tokens


def ours_chat(work: Path) -> int:
    from data_pipeline.config.source_config import SourceConfig
    from data_pipeline.reading.sources import read_documents
    from data_pipeline.reading.units import split_into_units
    from data_pipeline.text.cleaning import Tally

    source = SourceConfig(
        name="chat",
        language="en",
        domain="chat",
        path=str(work / "chat.jsonl"),
        format="harmony",
        loss="assistant",
        weight=1.0,
    )
    total = 0
    for unit in split_into_units(source):
        for document in read_documents(source, unit, Tally()):
            assert document.loss is not None
            tokens = document.tokenize()
            assert document.loss().any()
            total += len(tokens)
    return total


def theirs_chat(work: Path) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    total = 0
    with (work / "chat.jsonl").open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            found = tokenizer.apply_chat_template(
                record["messages"],
                tools=record["tools"],
                reasoning_effort=record.get("reasoning_effort", "medium"),
                current_date="2025-08-05",
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            assert any(found["assistant_masks"])
            total += len(found["input_ids"])
    return total


def write_chats(path: Path) -> None:
    """Write conversations of the sample, each with a tool that is called before its last answer."""
    sample = ROOT / "data_pipeline" / "sample" / "en_chat.jsonl"
    records = [json.loads(line) for line in sample.read_text(encoding="utf-8").splitlines()]
    lines = []
    for number in range(NUM_CHATS):
        *before, answer = records[number % len(records)]["messages"]
        arguments = {"query": f"question {number}", "limit": number % 7}
        call = {"type": "function", "function": {"name": "search", "arguments": arguments}}
        calling = {"role": "assistant", "thinking": "I look it up.", "tool_calls": [call]}
        result = {"role": "tool", "name": "search", "content": f"document {number}: as asked"}
        messages = [*before, calling, result, answer]
        lines.append(json.dumps({"messages": messages, "tools": [TOOL]}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


CONTESTANTS: dict[str, Callable[[Path], int]] = {
    f.__name__: f
    for f in (ours_build, theirs_build, ours_read, theirs_read, ours_chat, theirs_chat)
}
KINDS = ("build", "read", "chat")


def measure(name: str, work: Path) -> None:
    """Print one measurement as JSON: tokens, rate without the start of Python, peak memory."""
    from data_pipeline.text.tokenizer import encoding

    encoding()  # half a second, once a process
    start = time.perf_counter()
    tokens = CONTESTANTS[name](work)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens": tokens, "tokens_per_second": tokens / seconds, "peak_bytes": peak}))


def call(name: str, work: Path) -> dict[str, Any]:
    """One measurement in a process of its own, on one core."""
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(work / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(Path(__file__)), "--run", name, "--work", str(work)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def save_tokenizer(directory: Path) -> None:
    """Write the tokenizer in a process of its own: a child starts with its parent's peak memory."""
    code = (
        "import sys; from pathlib import Path; from cpt.export.tokenizer import save_tokenizer; "
        "save_tokenizer(Path(sys.argv[1]), 131072)"
    )
    subprocess.run([sys.executable, "-c", code, str(directory)], cwd=ROOT, check=True)


def write_mix(path: Path) -> None:
    """Write a mix of both languages, half of the tokens each."""
    lines = [f"seq_len: {SEQ_LEN}", "seed: 1", "sources:"]
    for language in LANGUAGES:
        lines.append(
            f"  - {{name: {language}, language: {language}, domain: docs, "
            f"path: corpus/{language}.jsonl, weight: 0.5, held_out_share: 0.02}}"
        )
    path.write_text("\n".join(lines) + "\n")


def measure_all(
    corpus: Path, rounds: int, kinds: tuple[str, ...]
) -> dict[str, list[dict[str, Any]]]:
    """Return the measurements of each contestant, who take turns."""
    results: dict[str, list[dict[str, Any]]] = {}
    for name in CONTESTANTS:
        if name.endswith(kinds):
            results[name] = []
    with tempfile.TemporaryDirectory(prefix="bench-data-") as temporary:
        work = Path(temporary)
        (work / "corpus").symlink_to(corpus.resolve())
        save_tokenizer(work / "tokenizer")
        write_mix(work / "mix.yaml")
        write_chats(work / "chat.jsonl")
        for _ in range(rounds):
            for name in results:
                results[name].append(call(name, work))
    return results


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the medians of each contestant, and the ratios."""
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, Python {platform.python_version()}")
    medians = {}
    for name, runs in results.items():
        rates = [run["tokens_per_second"] for run in runs]
        medians[name] = statistics.median(rates)
        peak = statistics.median(run["peak_bytes"] for run in runs)
        print(
            f"{name:14} {medians[name] / 1e6:8.2f} M tokens/s "
            f"(from {min(rates) / 1e6:.2f} to {max(rates) / 1e6:.2f}), "
            f"peak {peak / 2**20:,.0f} MiB, {runs[0]['tokens']:,} tokens"
        )
    for kind in KINDS:
        if f"ours_{kind}" not in medians:
            continue
        ratio = medians[f"ours_{kind}"] / medians[f"theirs_{kind}"]
        print(f"{kind}: ours / theirs = {ratio:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        default=DEFAULT_CORPUS,
        help="folder with ja.jsonl and en.jsonl (default: data/corpus)",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=KINDS, help="measure only this")
    parser.add_argument("--run", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        measure(options.run, options.work)
        return
    kinds = KINDS if options.only is None else (options.only,)
    if kinds != ("chat",) and options.corpus == DEFAULT_CORPUS and not options.corpus.exists():
        print(f"skipped: there is no {options.corpus}. `make corpus` fetches one.")
        return
    show(measure_all(options.corpus, options.rounds, kinds))


if __name__ == "__main__":
    main()

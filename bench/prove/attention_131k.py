"""Prove that attention's memory is linear: a layer at 131,072 tokens stays within 8 GiB.

    python bench/prove/attention_131k.py [--tokens 131072] [--heads 8] [--limit_gib 8]

One window layer and one full layer run forward and backward in bf16.  They have 8 query heads and 1
key/value head, which is what a rank of gpt-oss-20b holds at SP = 8.  Each layer runs in a process
of its own, whose whole resident memory counts, torch included.  The full layer takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1]


def main() -> None:
    """Print time and peak of each layer; exit with 1 if a peak is above the limit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=1)
    parser.add_argument("--limit_gib", type=float, default=8)
    options = parser.parse_args()
    any_above = False
    for kind in ("window", "full"):
        command = [sys.executable, str(BENCH / "attention.py")]
        command += ["--peak_of", "auto", "--device", "cpu"]
        command += ["--layers", kind, "--lengths", str(options.tokens)]
        command += ["--heads", str(options.heads), "--kv_heads", str(options.kv_heads)]
        started = time.perf_counter()
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ
        )
        seconds = time.perf_counter() - started
        peak_gib = json.loads(done.stdout.splitlines()[-1])["largest_bytes"] / 2**30
        above = peak_gib > options.limit_gib
        any_above |= above
        verdict = "above" if above else "within"
        print(
            f"{kind} layer, {options.tokens} tokens, {options.heads} heads: "
            f"{seconds:.0f} s with the start of the process, "
            f"peak {peak_gib:.2f} GiB, {verdict} {options.limit_gib:g} GiB",
            flush=True,
        )
    sys.exit(any_above)


if __name__ == "__main__":
    main()

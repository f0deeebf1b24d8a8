"""Compare sink attention with Hugging Face's eager attention and with attention without sinks.

    python bench/attention.py [--lengths 1024 4096 8192] [--rounds 5] [--json FILE] [--svg FILE]

A measurement is one attention layer, forward and backward in bf16, full or with a window of 128.
Every round times each contender once, one after the other, so that a noisy machine disturbs all
alike.  Figures are medians, and ratios are medians of the rounds' ratios.  Peak memory is that of
one pass beyond its inputs; on a CPU it is measured in a process of its own.

On a CPU the layer has 16 query and 2 key/value heads of 64.  The kernel without sinks is plain
scaled_dot_product_attention, which knows no window.

On a GPU the layer has the 64/8 heads of gpt-oss, with rows of 4k, 32k and 128k tokens.  Every
backend that runs there is measured (flex among them).  The kernel without sinks is torch's
variable-length FlashAttention with the same window.  The share of the chip's bf16 peak is printed.

On a machine that others use at the same time, `--clock cpu --threads 1` counts the CPU seconds of
the process instead of wall time.

Eager holds about 4.5 matrices of heads x tokens x tokens, and is left out where these do not fit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import measuring  # noqa: E402
from attention_parts import contenders, drawing, memory  # noqa: E402
from attention_parts.contenders import EAGER, PLAIN, WINDOW, Layer  # noqa: E402

LENGTHS = {"cpu": [1024, 4096, 8192, 16_384], "cuda": [4096, 32_768, 131_072]}
HEADS = {"cpu": (16, 2), "cuda": (64, 8)}
HEAD_DIM = 64
PEAK_TFLOPS = {
    "A100": 312,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "GB200": 2500,
}
"""Dense bf16 rate of the data sheets; the longest name that a device's name contains counts."""


def main(arguments: list[str] | None = None) -> None:
    """Print a table, and write the figures and the plot if asked."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.peak_of:
        return print_peaks(options)
    results = []
    for kind in options.layers:
        for length in options.lengths:
            results.append(measure(make_layer(options, kind, length), options))
            print(line_of(results[-1]), flush=True)
    growth = growth_per_doubling(results)
    for kind, text in growth.items():
        print(f"{kind:>6} growth of time per doubling of the length: {text}")
    report = {"machine": machine(options), "results": results, "growth per doubling": growth}
    measuring.publish(report, options, drawing.draw)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line, whose defaults depend on the device."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the row, one document")
    parser.add_argument(
        "--layers", choices=["full", "window"], nargs="+", default=["full", "window"]
    )
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv_heads", type=int)
    parser.add_argument(
        "--only",
        nargs="+",
        help="leave out all contenders but this project's and these",
        default=None,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU seconds of all threads"
    )
    parser.add_argument(
        "--eager_share", type=float, default=0.6, help="of the free memory that eager may take"
    )
    parser.add_argument("--no_memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--peak_of", help="only print the peak memory of this contender")
    options = parser.parse_args(arguments)
    options.lengths = options.lengths or LENGTHS[options.device]
    default_heads = HEADS[options.device]
    options.heads = options.heads or default_heads[0]
    options.kv_heads = options.kv_heads or default_heads[1]
    return options


def make_layer(options: argparse.Namespace, kind: str, length: int) -> Layer:
    """Return the layer of one case of the command line."""
    return Layer(
        tokens=length,
        window=None if kind == "full" else WINDOW,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=HEAD_DIM,
        device=torch.device(options.device),
    )


def measure(layer: Layer, options: argparse.Namespace) -> dict[str, Any]:
    """Return median times, ratios and peaks of all contenders that fit."""
    names = contenders.contender_names(layer)
    left_out = {}
    if options.only is not None:
        names = [name for name in names if name == names[0] or name in options.only]
    eager_fits = measuring.fits(layer.eager_bytes, options.eager_share, layer.device)
    if EAGER in names and not eager_fits:
        left_out[EAGER] = f"needs about {layer.eager_bytes / 2**30:.0f} GiB"
        names.remove(EAGER)
    peaks = {name: peak_of(name, layer, options) for name in names}
    steps = {name: contenders.make_step(name, layer) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for step in steps.values():
        step()
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(measuring.seconds(step, layer.device, options.clock))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "layer": layer.kind,
        "tokens": layer.tokens,
        "ours": names[0],
        "ms": {name: 1e3 * value for name, value in median.items()},
        "ratio to ours": measuring.median_ratios(times, names[0]),
        "peak MiB": measuring.in_mib(peaks),
        "left out": left_out,
        "TFLOP/s of ours": layer.flops / median[names[0]] / 1e12,
        "share of bf16 peak": share_of_peak(layer, median[names[0]]),
    }


def share_of_peak(layer: Layer, pass_seconds: float) -> float | None:
    """Return the share of the data sheet's dense bf16 rate, or None unless on a GPU it lists."""
    if layer.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(layer.device)
    known = max((gpu for gpu in PEAK_TFLOPS if gpu in name), key=len, default=None)
    if known is None:
        return None
    return layer.flops / pass_seconds / (PEAK_TFLOPS[known] * 1e12)


def peak_of(name: str, layer: Layer, options: argparse.Namespace) -> int | None:
    """Return the peak memory of one pass in bytes; on a CPU, that of a fresh process."""
    if options.no_memory or not measuring.can_measure_memory(layer.device):
        return None
    if layer.device.type == "cuda":
        return memory.peak_bytes(name, layer)[0]
    command = [sys.executable, __file__, "--device", "cpu", "--peak_of", name]
    command += ["--layers", layer.kind, "--lengths", str(layer.tokens)]
    command += ["--heads", str(layer.heads), "--kv_heads", str(layer.kv_heads)]
    command += ["--threads", str(options.threads)]
    environment = {**os.environ, **measuring.RETURN_MEMORY}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def print_peaks(options: argparse.Namespace) -> None:
    """Print one line of JSON per kind of layer and length."""
    for kind in options.layers:
        for length in options.lengths:
            peak, largest = memory.peak_bytes(options.peak_of, make_layer(options, kind, length))
            found = {"layer": kind, "tokens": length, "peak_bytes": peak, "largest_bytes": largest}
            print(json.dumps(found))


def growth_per_doubling(results: list[dict[str, Any]]) -> dict[str, str]:
    """Say by which factor time grows when the length doubles, from each length to the next."""
    growth = {}
    for kind in dict.fromkeys(result["layer"] for result in results):
        own = [(r["tokens"], r["ms"][r["ours"]]) for r in results if r["layer"] == kind]
        parts = []
        for (short, before), (long, after) in itertools.pairwise(own):
            factor = (after / before) ** (1 / math.log2(long / short))
            parts.append(f"{short} to {long}: {factor:.2f}")
        growth[kind] = ", ".join(parts) or "one length only"
    return growth


def line_of(result: dict[str, Any]) -> str:
    """Return a row of the table."""
    parts = measuring.figures_of(result, result["ours"])
    parts.append(f"{result['TFLOP/s of ours']:.3g} TFLOP/s")
    share = result["share of bf16 peak"]
    if share is not None:
        parts.append(f"{share:.0%} of bf16 peak")
    return f"{result['layer']:>6} {result['tokens']:>6} tokens: " + ", ".join(parts)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Return where the figures come from."""
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "rounds": options.rounds,
        "clock": options.clock,
        "heads": f"{options.heads}/{options.kv_heads} of {HEAD_DIM}",
        "without sinks": PLAIN,
        "device": measuring.device_name(torch.device(options.device)),
    }
    if options.device == "cpu":
        facts["threads"] = options.threads
    return facts


if __name__ == "__main__":
    main()

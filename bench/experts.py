"""Compare this project's MoE layer with transformers' eager, grouped_mm and batched_mm.

    python bench/experts.py [--experts 32 128] [--rounds 5] [--json FILE] [--svg FILE]

A measurement is one layer of gpt-oss, forward and backward in bf16, with 4,096 tokens, top 4, and a
model and expert size of 512 (2,880 on a GPU).  Every round times each contender once, one after the
other, so that a noisy machine disturbs all alike.  Figures are medians, and ratios are medians of
the rounds' ratios.  Peak memory is that of one pass beyond weights and input, gradients included;
on a CPU it is measured in a process of its own.

`--recompute` measures both settings of model.expert_recompute instead, in two processes that share
the experts.

batched_mm copies the weights of its expert for every row, and is left out where these do not fit.
On a machine that others use at the same time, `--clock cpu --threads 1` counts the CPU seconds of
the process instead of wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import measuring  # noqa: E402
from experts_parts import drawing, recompute  # noqa: E402
from experts_parts.contenders import BATCHED, NAMES, OURS, Layer, make_step  # noqa: E402

SIZES = {"cpu": 512, "cuda": 2880}


def main(arguments: list[str] | None = None) -> None:
    """Print a table, and write the figures and the plot if asked."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.peak_of:
        return print_peak(options)
    if options.recompute:
        return compare_recompute(options)
    results = []
    for experts in options.experts:
        results.append(measure(make_layer(options, experts), options))
        print(line_of(results[-1]), flush=True)
    report = {"machine": machine(options), "results": results}
    measuring.publish(report, options, drawing.draw)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line, whose defaults depend on the device."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--top_k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--expert_size", type=int)
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, help="contenders besides this project"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU seconds of all threads"
    )
    parser.add_argument(
        "--batched_share",
        type=float,
        default=0.4,
        help="of the free memory that batched_mm may copy",
    )
    parser.add_argument("--no_memory", action="store_true", help="leave peak memory out")
    parser.add_argument(
        "--recompute", action="store_true", help="compare the settings of model.expert_recompute"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--peak_of", help="only print the peak memory of this contender")
    options = parser.parse_args(arguments)
    options.hidden = options.hidden or SIZES[options.device]
    options.expert_size = options.expert_size or SIZES[options.device]
    return options


def make_layer(options: argparse.Namespace, experts: int) -> Layer:
    """Return the layer of one case of the command line."""
    return Layer(
        experts=experts,
        top_k=options.top_k,
        tokens=options.tokens,
        hidden=options.hidden,
        expert_size=options.expert_size,
        device=torch.device(options.device),
    )


def measure(layer: Layer, options: argparse.Namespace) -> dict[str, Any]:
    """Return median times, ratios and peaks of all contenders that fit."""
    names = [name for name in NAMES if name == OURS or name in options.only]
    left_out = {}
    batched_fits = measuring.fits(layer.batched_bytes, options.batched_share, layer.device)
    if BATCHED in names and not batched_fits:
        gib = layer.batched_bytes / 2**30
        left_out[BATCHED] = f"would copy {gib:.1f} GiB of weights in the forward alone"
        names.remove(BATCHED)
    peaks = {name: peak_of(name, layer, options) for name in names}
    steps = {name: make_step(name, layer) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for step in steps.values():
        step()
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(measuring.seconds(step, layer.device, options.clock))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "experts": layer.experts,
        "ms": {name: 1e3 * value for name, value in median.items()},
        "ratio to ours": measuring.median_ratios(times, OURS),
        "peak MiB": measuring.in_mib(peaks),
        "left out": left_out,
        "TFLOP/s of ours": layer.flops / median[OURS] / 1e12,
    }


def peak_of(name: str, layer: Layer, options: argparse.Namespace) -> int | None:
    """Return the peak memory of one pass in bytes; on a CPU, that of a fresh process."""
    if options.no_memory or not measuring.can_measure_memory(layer.device):
        return None
    if layer.device.type == "cuda":
        step = make_step(name, layer)
        step()
        return measuring.peak_bytes(step, layer.device)[0]
    command = [sys.executable, __file__, "--device", "cpu", "--peak_of", name]
    command += ["--experts", str(layer.experts), "--top_k", str(layer.top_k)]
    command += ["--tokens", str(layer.tokens), "--threads", str(options.threads)]
    command += ["--hidden", str(layer.hidden), "--expert_size", str(layer.expert_size)]
    environment = {**os.environ, **measuring.RETURN_MEMORY}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def compare_recompute(options: argparse.Namespace) -> None:
    """Print a table of the settings of model.expert_recompute."""
    for experts in options.experts:
        layer = make_layer(options, experts)
        found = recompute.compare(
            layer, rounds=options.rounds, threads=options.threads, clock=options.clock
        )
        for way, figures in found.items():
            print(
                f"{experts:>4} experts, {recompute.LAYERS} layers, EP {recompute.RANKS}, {way}: "
                f"{figures['seconds']:.3f} s ({figures['ratio']:.3f}x recompute), "
                f"peak {figures['peak_bytes'] / 2**20:.0f} MiB, "
                f"sent {figures['sent_bytes'] / 2**20:.1f} MiB",
                flush=True,
            )
    print(json.dumps(machine(options)))


def print_peak(options: argparse.Namespace) -> None:
    """Print one line of JSON."""
    layer = make_layer(options, options.experts[0])
    warm_up = make_step(options.peak_of, replace(layer, experts=4, tokens=16))
    warm_up()  # loads what is loaded on first use
    peak, largest = measuring.peak_bytes(make_step(options.peak_of, layer), layer.device)
    print(json.dumps({"experts": layer.experts, "peak_bytes": peak, "largest_bytes": largest}))


def line_of(result: dict[str, Any]) -> str:
    """Return a row of the table."""
    parts = measuring.figures_of(result, OURS)
    parts.append(f"{result['TFLOP/s of ours']:.3g} TFLOP/s")
    return f"{result['experts']:>4} experts: " + ", ".join(parts)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Return where the figures come from."""
    return {
        **measuring.origin(torch.device(options.device), options),
        "tokens": options.tokens,
        "top_k": options.top_k,
        "sizes": f"model {options.hidden}, experts {options.expert_size}",
    }


if __name__ == "__main__":
    main()

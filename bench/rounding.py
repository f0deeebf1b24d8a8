"""Compare the rounding of experts to MXFP4 with its definition, in speed; the bits are the same.

    python bench/rounding.py [--experts 2] [--inputs 2880] [--outputs 5760] [--rounds 5]
        [--threads 1] [--clock cpu] [--json FILE]

A matrix of experts is rounded in place, as after each optimizer step of a run with
`train.quantize`: by the operator of cpt/model/kernels/block_rounding.py, and by
`mxfp4.rounded`, which makes codes and decodes them.  Both take turns; figures are medians, and
ratios are medians of the rounds' ratios.  The default clock counts CPU seconds of the process,
which others on the machine disturb least.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import measuring  # noqa: E402

from cpt.config.precision_sections import ExponentRule  # noqa: E402
from cpt.model.kernels.block_rounding import round_into  # noqa: E402
from cpt.model.weights import mxfp4  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OPERATOR = "operator"
DEFINITION = "definition"


def main() -> None:
    """Print a line for each rule and dtype, and write the figures if asked."""
    options = parse()
    torch.set_num_threads(options.threads)
    results = []
    for name in DTYPES:
        for rule in mxfp4.EXPONENT_RULES:
            result = measure(rule, name, options)
            results.append(result)
            print(line_of(result), flush=True)
    measuring.publish({"machine": machine(options), "results": results}, options)


def measure(rule: ExponentRule, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return million weights a second of both, and the median ratio of their times."""
    shape = (options.experts, options.inputs, options.outputs)
    generator = torch.Generator().manual_seed(0)
    values = 0.02 * torch.randn(shape, generator=generator).to(DTYPES[dtype])
    out = torch.empty_like(values)
    contenders = {
        OPERATOR: functools.partial(round_into, values, rule, out),
        DEFINITION: lambda: mxfp4.rounded(values, rule),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds + 1):
        for name, step in contenders.items():
            seconds = measuring.seconds(step, values.device, options.clock)
            if number:  # the first round warms up
                times[name].append(seconds)
    speeds = {}
    for name, seconds_of_rounds in times.items():
        speeds[name] = values.numel() / statistics.median(seconds_of_rounds) / 1e6
    return {
        "rule": rule,
        "dtype": dtype,
        "million weights a second": speeds,
        "times as fast": measuring.median_ratios(times, OPERATOR)[DEFINITION],
        "same bits": torch.equal(out, mxfp4.rounded(values, rule)),
    }


def line_of(result: dict[str, Any]) -> str:
    """Return a row of the table."""
    speeds = result["million weights a second"]
    same = "same bits" if result["same bits"] else "OTHER BITS"
    return (
        f"{result['rule']:<6} {result['dtype']}: {speeds[OPERATOR]:6.0f} M weights/s, "
        f"definition {speeds[DEFINITION]:4.0f}, {result['times as fast']:5.1f} x, {same}"
    )


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Return where the figures come from."""
    return {
        **measuring.origin(torch.device("cpu"), options),
        "matrix": f"{options.experts} x {options.inputs} x {options.outputs}",
    }


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--inputs", type=int, default=2880)
    parser.add_argument("--outputs", type=int, default=5760)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="cpu")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

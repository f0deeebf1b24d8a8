"""Compare the update of each `train.optimizer_state` with other optimizers, in time and bytes.

    python bench/optimizer.py [--elements 8388608] [--rounds 5] [--threads 1] [--clock cpu]
        [--drift] [--json FILE]

One flat partition of a matrix is updated, as on a host that holds the optimizer state.  All take
turns; figures are medians, and ratios are medians of the rounds' ratios.  `GB/s` is what the update
must read and write at least (weight and moments both ways, the gradient once) by its time; the line
`copy` is what this machine's memory does when a tensor is copied, so it bounds the others.

Beside this project's: torch's fused AdamW, DeepSpeed's Adam for hosts, which is compiled first, and
torchao's AdamW with 8-bit moments if torchao can be imported, which compiles its step.  One that
cannot run here says why.

`--drift` compares roundings of the moments with fp32 instead, over some thousand steps of made-up
gradients; see `drift`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import measuring  # noqa: E402

from cpt.storage.narrow_moments import CUT, add_half_, cut_  # noqa: E402
from cpt.storage.state_bytes import MOMENTS, MomentForm, optimizer_bytes  # noqa: E402
from cpt.training.narrow_adamw import NarrowAdamW  # noqa: E402

SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
OURS: tuple[MomentForm, ...] = ("bf16", "int8")
REFERENCE = "torch, fused, fp32"
GRADIENT_BYTES = 4
NOISES = (10.0, 0.1)
"""Gradients of `--drift`: ten times as noisy as their mean, and steady ones."""
Step = Callable[[], object]


def main() -> None:
    """Print a line for each optimizer, and write the figures if asked."""
    options = parse()
    torch.set_num_threads(options.threads)
    if options.drift:
        results = []
        for noise, beta in itertools.product(NOISES, (0.9, 0.95, 0.999)):
            results += drift(beta, noise)
        print("\n".join(drift_line(found) for found in results))
    else:
        results = measure(options)
    origin = measuring.origin(torch.device("cpu"), options)
    measuring.publish({"machine": origin, "results": results}, options)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all optimizers in turns; return their figures, and print them."""
    numel = options.elements
    steps, bytes_of = contenders(numel)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 1):
        for name, step in steps.items():
            seconds = measuring.seconds(step, torch.device("cpu"), options.clock)
            if number:  # the first round warms up
                times[name].append(seconds)
    ratios = measuring.median_ratios(times, REFERENCE)
    results = []
    for name, seconds_of_rounds in times.items():
        median = statistics.median(seconds_of_rounds)
        moved = 2 * bytes_of[name] + (0 if name == "copy" else GRADIENT_BYTES * numel)
        result = {
            "optimizer": name,
            "bytes a parameter": bytes_of[name] / numel,
            "ns a parameter": 1e9 * median / numel,
            "GB/s": moved / median / 1e9,
            "times the time of the first": ratios.get(name, 1.0),
        }
        results.append(result)
        print(
            f"{name:<26} {result['bytes a parameter']:6.2f} bytes, "
            f"{result['ns a parameter']:6.2f} ns, {result['GB/s']:5.1f} GB/s, "
            f"{result['times the time of the first']:5.2f} x the time",
            flush=True,
        )
    return results


def contenders(numel: int) -> tuple[dict[str, Step], dict[str, int]]:
    """Return the updates that run here, and the bytes of state of each, by name."""
    steps: dict[str, Step] = {}
    sizes: dict[str, int] = {}

    def add(name: str, make: Callable[[torch.nn.Parameter], Any], size: int) -> None:
        torch.manual_seed(1)
        parameter = torch.nn.Parameter(torch.randn(numel))
        parameter.grad = 1e-3 * torch.randn(numel)
        try:
            optimizer = make(parameter)
            optimizer.step()
        except Exception as error:  # builds and compilers fail in every way there is
            reason = str(error).splitlines()[:1]
            print(f"{name:<26} does not run here: {type(error).__name__}: {reason}", flush=True)
            return
        steps[name] = optimizer.step
        sizes[name] = size

    add(REFERENCE, lambda p: torch.optim.AdamW([p], fused=True, **SETTINGS), 12 * numel)
    for form in OURS:
        add(f"{form} (this project)", partial(ours, form=form), optimizer_bytes(numel, form))
    add("DeepSpeedCPUAdam, fp32", deepspeed_adam, 12 * numel)
    add("torchao, 8 bits", torchao_adam, 6 * numel + 2 * 4 * numel // 256)
    source = torch.randn(numel)
    target = torch.empty_like(source)
    steps["copy"] = lambda: target.copy_(source)
    sizes["copy"] = source.nbytes
    return steps, sizes


def ours(parameter: torch.nn.Parameter, form: MomentForm) -> NarrowAdamW:
    """Return this project's AdamW that holds moments in a form."""
    decay = SETTINGS["weight_decay"]
    moments = dict.fromkeys(MOMENTS, form)
    group = {"params": [parameter], "weight_decay": decay, "moments": moments}
    rest = {name: value for name, value in SETTINGS.items() if name != "weight_decay"}
    optimizer = NarrowAdamW([group], seed=1, **rest)
    optimizer.place_whole({"matrix": parameter})
    return optimizer


def deepspeed_adam(parameter: torch.nn.Parameter) -> Any:
    """Return DeepSpeed's Adam for hosts; it is compiled first."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam([parameter], adamw_mode=True, **SETTINGS)


def torchao_adam(parameter: torch.nn.Parameter) -> Any:
    """Return torchao's AdamW with 8-bit moments; its step is compiled."""
    from torchao.optim import AdamW8bit

    return AdamW8bit([parameter], **SETTINGS)


def drift(
    beta: float, noise: float, steps: int = 4000, elements: int = 4096
) -> list[dict[str, Any]]:
    """Compare means that are rounded after every step with fp32, at the end.

    The gradients of an element are noise around a mean, and fall to a tenth in the course of the
    steps, as they do in a training.  A first moment is a mean of them, a second of their squares.

    Args:
        beta: Decay rate of the mean.
        noise: Standard deviation of the gradients, in units of their mean.
        steps: Steps.
        elements: Elements, each with a mean of its own.
    """
    generator = torch.Generator().manual_seed(7)
    scale = 10.0 ** (-4 * torch.rand(elements, generator=generator))
    exact = {name: torch.zeros(elements) for name in MOMENTS}
    roundings = [(form, kind) for form in OURS for kind in ("nearest", "stochastic")]
    held = {key: {name: torch.zeros(elements) for name in MOMENTS} for key in roundings}
    for step in range(steps):
        fall = 10.0 ** (-step / steps)
        gradients = (1 + noise * torch.randn(elements, generator=generator)) * scale * fall
        for name, values in (("exp_avg", gradients), ("exp_avg_sq", gradients.square())):
            exact[name].lerp_(values, 1 - beta)
            for (form, kind), moments in held.items():
                moments[name].lerp_(values, 1 - beta)
                round_(moments[name], form, generator if kind == "stochastic" else None)
    found = []
    for (form, kind), moments in held.items():
        for name in MOMENTS:
            error = (moments[name] - exact[name]) / exact[name].abs()
            rms = (moments[name] - exact[name]).square().sum() / exact[name].square().sum()
            found.append(
                {
                    "moment": name,
                    "form": form,
                    "rounding": kind,
                    "beta": beta,
                    "noise": noise,
                    "median error": float((error * exact[name].sign()).median()),
                    "error of the sum of squares": float(rms.sqrt()),
                }
            )
    return found


def round_(values: torch.Tensor, form: MomentForm, generator: torch.Generator | None) -> None:
    """Round the mantissas of fp32 values in place, to the nearest or stochastically."""
    if generator is None:
        add_half_(values, form)
    else:
        bits = values.view(torch.int32)
        most = 1 << CUT[form]
        bits.add_(torch.randint(0, most, values.shape, generator=generator, dtype=torch.int32))
    cut_(values, form)


def drift_line(found: dict[str, Any]) -> str:
    """Return a row of the table."""
    return (
        f"noise {found['noise']:<4} beta {found['beta']:<6} {found['moment']:<11} "
        f"{found['form']:<5} {found['rounding']:<11} "
        f"median error {100 * found['median error']:+8.2f} %, "
        f"rms {100 * found['error of the sum of squares']:7.2f} %"
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--elements", type=int, default=2**23)
    parser.add_argument("--rounds", type=int, default=5, help="at least 1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="cpu")
    parser.add_argument("--drift", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, must be at least 1")
    return options


if __name__ == "__main__":
    main()

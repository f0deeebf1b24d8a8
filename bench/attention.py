"""Sink attention against what a user would pick instead: Hugging Face eager, and attention without sinks.

    python bench/attention.py [--lengths 1024 4096 8192] [--rounds 5] [--threads 2] [--json FILE]

Forward + backward in bf16, 16 query and 2 key/value heads of 64.  Every round times each contender once, one after the
other, so that a noisy machine disturbs all alike; figures are medians, and ratios are medians of the rounds' ratios.
Eager builds rows x rows matrices and is left out above --eager_limit tokens.  On a GPU the same script times the
backend that `auto` takes there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cpt.model.attention import PackedRows
from cpt.model.attention.choice import chosen_backend

QUERY_HEADS, KV_HEADS, HEAD_DIM, WINDOW = 16, 2, 64, 128
SCALE = HEAD_DIM**-0.5
Step = Callable[[], None]


def draw(length: int, device: torch.device) -> list[torch.Tensor]:
    """Query, key, value and output gradient, heads first, and sinks."""
    shapes = [(QUERY_HEADS, length), (KV_HEADS, length), (KV_HEADS, length), (QUERY_HEADS, length)]
    tensors = [torch.randn(*shape, HEAD_DIM, dtype=torch.bfloat16, device=device) for shape in shapes]
    return [*tensors, torch.linspace(-3, 9, QUERY_HEADS, device=device).bfloat16()]


def contenders(length: int, window: int | None, device: torch.device, eager_limit: int) -> dict[str, Step]:
    """Name -> one forward and backward pass."""
    q, k, v, d_out, sinks = draw(length, device)
    backend = chosen_backend("auto", device=device, dtype=q.dtype, head_dim=HEAD_DIM)
    rows = PackedRows.from_bounds([[0, length]], length)

    def leaves() -> list[torch.Tensor]:
        return [x.detach().requires_grad_() for x in (q, k, v, sinks)]

    def ours() -> None:
        a, b, c, s = leaves()
        backend.attention(a, b, c, s, rows, window, SCALE).backward(d_out)

    def plain() -> None:
        """Causal attention without sinks: what the kernel costs by itself; it knows no window."""
        a, b, c, _ = leaves()
        out = F.scaled_dot_product_attention(a[None], b[None], c[None], is_causal=True, enable_gqa=True)
        out[0].backward(d_out)

    found: dict[str, Step] = {f"ours ({backend.name})": ours, "sdpa without sinks": plain}
    if length <= eager_limit:
        index = torch.arange(length, device=device)
        back = index[:, None] - index
        hidden = (back < 0) | (back >= (window or length))
        mask = torch.zeros(length, length, dtype=q.dtype, device=device).masked_fill_(hidden, float("-inf"))

        def eager() -> None:
            """The formula of transformers' eager_attention_forward for gpt-oss."""
            a, b, c, s = leaves()
            group = QUERY_HEADS // KV_HEADS
            scores = a @ b.repeat_interleave(group, 0).transpose(1, 2) * SCALE + mask
            scores = torch.cat([scores, s.view(-1, 1, 1).expand(-1, length, 1)], -1)
            probability = (scores - scores.max(-1, keepdim=True).values).softmax(-1)[..., :-1]
            (probability @ c.repeat_interleave(group, 0)).backward(d_out)

        found["Hugging Face eager"] = eager
    return found


def seconds(step: Step, device: torch.device) -> float:
    """Wall time of one pass."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(length: int, window: int | None, device: torch.device, rounds: int, eager_limit: int) -> dict[str, object]:
    """Medians of all contenders for one length and layer kind."""
    steps = contenders(length, window, device, eager_limit)
    for step in steps.values():
        step()
    times = {name: [] for name in steps}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    first = next(iter(steps))
    ratios = {
        name: statistics.median(other / own for other, own in zip(times[name], times[first], strict=True))
        for name in steps
        if name != first
    }
    medians = {name: round(1e3 * statistics.median(values), 2) for name, values in times.items()}
    return {"layer": "window" if window else "full", "tokens": length, "ms": medians, "times ours": ratios}


def main() -> None:
    """Print a table, and write the figures as JSON if asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager_limit", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for window in (None, WINDOW):
        for length in options.lengths:
            result = measure(length, window, device, options.rounds, options.eager_limit)
            results.append(result)
            figures = ", ".join(f"{name} {value} ms" for name, value in result["ms"].items())  # type: ignore[attr-defined]
            ratios = ", ".join(f"{name} {value:.1f}x" for name, value in result["times ours"].items())  # type: ignore[attr-defined]
            print(f"{result['layer']:>6} {length:>6} tokens: {figures}; against ours: {ratios}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

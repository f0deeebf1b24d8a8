"""Write the tables of measured figures in docs/gpu.md from the results of two acceptance runs.

    python bench/gpu/page.py --before RESULTS.jsonl --after RESULTS.jsonl --page docs/gpu.md
        --svg docs/gpu_measured.svg

The first line of a results file describes the run: date, card, software, commit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from gpu.drawing import Pairs, draw  # noqa: E402

BEGIN = "<!-- measured: begin -->"
END = "<!-- measured: end -->"
ENGINE = "engine"
"""Group of the stages of the training engine, with the kernels that a run uses."""


class Run:
    """The results of one acceptance run."""

    def __init__(self, path: Path) -> None:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.description: dict[str, str] = lines[0]
        self._stages: dict[str, Any] = {}
        for line in lines[1:]:
            if line["state"] == "ok" and line.get("group", ENGINE) != "without fused kernels":
                self._stages[line["stage"]] = line["result"]

    def of(self, stage: str) -> dict[str, Any]:
        """Return the result of a stage."""
        found: dict[str, Any] = self._stages[stage]
        return found


def main() -> None:
    """Replace what stands between the markers of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--svg", type=Path, required=True)
    options = parser.parse_args()
    before, after = Run(options.before), Run(options.after)
    parts = [origin(before, after), steps(before, after), experts(before, after), ceilings(after)]
    text = options.page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    body = "\n\n".join(parts)
    options.page.write_text(f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}", encoding="utf-8")
    run = after.description
    source = f"{run['card']}, {run['date']}, torch 2.11; gray: before any fusion"
    picture = draw(step_pairs(before, after), expert_pairs(before, after), source)
    options.svg.write_text(picture, encoding="utf-8")


def origin(before: Run, after: Run) -> str:
    """Return where the figures come from."""
    run = after.description
    return (
        f"{run['card']}, {run['date']}; {run['software']}.\n"
        f"Before any fusion: commit {before.description['commit']}; today: commit {run['commit']}."
    )


def steps(before: Run, after: Run) -> str:
    """Return the table of optimizer steps."""
    lines = [
        "| tokens of the row | step before, ms | step today, ms | faster | tokens/s | peak, GB |",
        "|---|---|---|---|---|---|",
    ]
    old, new = before.of("training_steps"), after.of("training_steps")
    for tokens in (4096, 8192, 16384, 32768):
        first = 1e3 * min(old[str(tokens)]["seconds"][1:])
        now = 1e3 * min(new[str(tokens)]["seconds"][1:])
        peaks = f"{old[str(tokens)]['peak_GB']:.1f} to {new[str(tokens)]['peak_GB']:.1f}"
        speed = new[str(tokens)]["tokens_per_second"]
        cells = (f"{tokens:,}", f"{first:.0f}", f"{now:.0f}", f"{first / now:.2f} x")
        lines.append(f"| {' | '.join(cells)} | {speed:,.0f} | {peaks} |")
    return "\n".join(lines)


def step_pairs(before: Run, after: Run) -> Pairs:
    """Return the best time of a step by the length of the row."""
    found: Pairs = {}
    old, new = before.of("training_steps"), after.of("training_steps")
    for tokens in (4096, 8192, 16384, 32768):
        times = [1e3 * min(run[str(tokens)]["seconds"][1:]) for run in (old, new)]
        found[f"{tokens:,} tokens"] = (times[0], times[1])
    return found


def expert_pairs(before: Run, after: Run) -> Pairs:
    """Return the time of an expert layer by tokens and direction."""
    found: Pairs = {}
    old, new = before.of("experts_speed"), after.of("experts_speed")
    for tokens in ("4096", "16384"):
        for what, key in (("forward", "forward_ms"), ("both ways", "forward_backward_ms")):
            found[f"{int(tokens):,}, {what}"] = (old[tokens][key], new[tokens][key])
    return found


def experts(before: Run, after: Run) -> str:
    """Return the table of one expert layer."""
    lines = [
        "| one layer of 32 experts | before, ms | today, ms | its grouped products alone, ms |",
        "|---|---|---|---|",
    ]
    old, new = before.of("experts_speed"), after.of("experts_speed")
    for tokens in ("4096", "16384"):
        products = new[tokens]["product_ms"]
        for what, key, factor in (
            ("forward", "forward_ms", 1),
            ("forward and backward", "forward_backward_ms", 3),
        ):
            times = (old[tokens][key], new[tokens][key], factor * products)
            cells = " | ".join(f"{time:.1f}" for time in times)
            lines.append(f"| {int(tokens):,} tokens, {what} | {cells} |")
    return "\n".join(lines)


def ceilings(after: Run) -> str:
    """Return what the card reached on its own."""
    found = after.of("ceilings")
    return (
        f"The card copied {found['copy_TB_s']:.2f} TB/s (bytes read and written), a bf16 product\n"
        f"of 8,192 x 8,192 x 8,192 ran at {found['product_TFLOP_s']:.0f} TFLOP/s, and a small\n"
        f"operation took {found['us_per_small_op']:.1f} us from Python."
    )


if __name__ == "__main__":
    main()

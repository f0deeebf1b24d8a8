"""The table of the proof: means over seeds with 95 % intervals, per release, rate, rule and method.

An interval is that of Student's t over the seeds, of which there are few: it is wide, and honest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cpt.guard.student import student_quantile
from cpt.model.weights.mxfp4 import EXPONENT_RULES
from mxfp4_parts.cells import METHODS, SECOND_RUN
from mxfp4_parts.releases import ARMS

LEAST_WORTH = 0.0005
"""Bits per byte that the experts must have learned before a share of it is told."""

Measure = Callable[[dict[str, Any]], float]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds, and half the width of its 95 % interval; NaN with a single seed."""

    mean: float
    half: float
    count: int

    def text(self, spec: str) -> str:
        """Return it for a table, in a format such as `.1f`."""
        if math.isnan(self.half):
            return format(self.mean, spec)
        return f"{self.mean:{spec}} \u00b1 {self.half:{spec.lstrip('+')}}"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of some values with its interval."""
    mean = statistics.fmean(values)
    count = len(values)
    if count < 2:
        return Interval(mean, math.nan, count)
    half = student_quantile(0.025, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, half, count)


def worth(result: dict[str, Any]) -> float:
    """Return what the experts' matrices learned, in bits per byte of Japanese."""
    trained: float = result["trained"]["japanese"]
    without: float = result["base_experts"]["japanese"]
    return without - trained


def survived(result: dict[str, Any], method: str, rule: str) -> float:
    """Return the share of what the experts learned that an export still has; NaN if it is noise."""
    learned = worth(result)
    if learned < LEAST_WORTH:
        return math.nan
    exported: float = result[method][rule]["held_out"]["japanese"]
    without: float = result["base_experts"]["japanese"]
    return (without - exported) / learned


def cost(result: dict[str, Any], method: str, rule: str, domain: str) -> float:
    """Return the bits per byte that an export has more than the model trained without rounding."""
    exported: float = result[method][rule]["held_out"][domain]
    trained: float = result["trained"][domain]
    return exported - trained


def saved(result: dict[str, Any], rule: str) -> float:
    """Return the bits per byte of Japanese that MXFP4-aware training saves, by the same rule."""
    return cost(result, "plain", rule, "japanese") - cost(result, "aware", rule, "japanese")


def groups(results: Sequence[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Return the results by release and learning rate, in their order."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault((result["arm"], result["lr"]), []).append(result)
    return dict(sorted(found.items(), key=lambda item: (_arm_order(item[0][0]), item[0][1])))


def _arm_order(arm: str) -> tuple[bool, int]:
    is_second_run = arm.endswith(SECOND_RUN)
    name = arm.removesuffix(SECOND_RUN)
    return is_second_run, [one.name for one in ARMS].index(name)


def mean_of(group: Sequence[dict[str, Any]], measure: Measure) -> Interval:
    """Return the mean of a measure over the seeds of a group, without those where it is NaN."""
    values = [value for value in map(measure, group) if not math.isnan(value)]
    return interval(values) if values else Interval(math.nan, math.nan, 0)


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every release, rate, method and rule as JSON: means with half widths of intervals.

    A mean of nothing and the interval of a single seed are null.
    """
    rows = []
    for (arm, lr), group in groups(results).items():
        for method in METHODS:
            for rule in EXPONENT_RULES:
                rows.append(_row(arm, lr, group, method, rule))
    return rows


def _row(
    arm: str, lr: float, group: Sequence[dict[str, Any]], method: str, rule: str
) -> dict[str, Any]:
    measures: dict[str, Measure] = {
        "survived": lambda result: survived(result, method, rule),
        "cost_japanese": lambda result: cost(result, method, rule, "japanese"),
        "cost_english": lambda result: cost(result, method, rule, "english"),
        "kept": lambda result: float(result[method][rule]["kept"]),
        "noise": lambda result: float(result[method][rule]["noise"]),
        "changed": lambda result: float(result[method][rule]["changed"]),
        "error": lambda result: float(result[method][rule]["error"]),
    }
    row: dict[str, Any] = {"arm": arm, "lr": lr, "method": method, "rule": rule}
    row["seeds"] = len(group)
    for name, measure in measures.items():
        found = mean_of(group, measure)
        row[name] = [None if math.isnan(value) else value for value in (found.mean, found.half)]
    return row


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the table of Markdown: one line for each release and learning rate."""
    header = ["release", "lr", "moved, %", "learned, bits / 1,000 bytes"]
    for method in METHODS:
        header += [f"{method}: {rule}" for rule in EXPONENT_RULES]
    lines = []
    for (arm, lr), group in groups(results).items():
        line = [arm, rate_text(lr)]
        line.append(mean_of(group, lambda result: 100 * float(result["moved"])).text(".1f"))
        line.append(mean_of(group, lambda result: 1000 * worth(result)).text(".1f"))
        for method in METHODS:
            for rule in EXPONENT_RULES:
                line.append(_survived_text(group, method, rule))
        lines.append(line)
    return markdown_table(header, lines)


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    rows = [f"| {' | '.join(row)} |" for row in [header, *lines]]
    return "\n".join([rows[0], "|" + "---|" * len(header), *rows[1:]])


def rate_text(lr: float) -> str:
    """Return a learning rate for tables, such as 2e-4."""
    return f"{lr:.0e}".replace("e-0", "e-")


def _survived_text(group: Sequence[dict[str, Any]], method: str, rule: str) -> str:
    return mean_of(group, lambda result: 100 * survived(result, method, rule)).text(".0f")


def english_table(results: Sequence[dict[str, Any]]) -> str:
    """Return the table of what an export changes in held-out English, in bits per 1,000 bytes."""
    header = ["release", "lr", "training"]
    for method in METHODS:
        header += [f"{method}: {rule}" for rule in EXPONENT_RULES]
    lines = []
    for (arm, lr), group in groups(results).items():
        line = [arm, rate_text(lr), mean_of(group, _english_by_training).text("+.1f")]
        for method in METHODS:
            for rule in EXPONENT_RULES:
                line.append(_english_text(group, method, rule))
        lines.append(line)
    return markdown_table(header, lines)


def _english_by_training(result: dict[str, Any]) -> float:
    return 1000 * float(result["trained"]["english"] - result["released"]["english"])


def _english_text(group: Sequence[dict[str, Any]], method: str, rule: str) -> str:
    measured = mean_of(group, lambda result: 1000 * cost(result, method, rule, "english"))
    return measured.text("+.1f")


def kept_table(results: Sequence[dict[str, Any]]) -> str:
    """Return the table of what plain exports keep of the movement, and of their relative error."""
    header = ["release", "lr", *(f"kept: {rule}" for rule in EXPONENT_RULES)]
    header += [f"error: {rule}, %" for rule in EXPONENT_RULES]
    lines = []
    for (arm, lr), group in groups(results).items():
        line = [arm, rate_text(lr)]
        for rule in EXPONENT_RULES:
            line.append(_figure_text(group, rule, "kept", 1, ".2f"))
        for rule in EXPONENT_RULES:
            line.append(_figure_text(group, rule, "error", 100, ".1f"))
        lines.append(line)
    return markdown_table(header, lines)


def _figure_text(
    group: Sequence[dict[str, Any]], rule: str, name: str, factor: float, spec: str
) -> str:
    measured = mean_of(group, lambda result: factor * float(result["plain"][rule][name]))
    return format(measured.mean, spec)


def releases_table(facts: Sequence[dict[str, Any]]) -> str:
    """Return the table of the releases: how long they were trained, and their scores."""
    header = ["release", "seed", "steps", "tokens", "English, bits per byte", "Japanese"]
    lines = []
    for one in facts:
        scores = one["held_out"]
        line = [one["arm"], str(one["seed"]), f"{one['steps']:,}", f"{one['tokens']:,}"]
        lines.append([*line, f"{scores['english']:.3f}", f"{scores['japanese']:.3f}"])
    return markdown_table(header, lines)


def verdict(results: Sequence[dict[str, Any]]) -> str:
    """Return in words how often each rule lost least, and how often training for it helped."""
    lines = []
    for method in METHODS:
        best = dict.fromkeys(EXPONENT_RULES, 0)
        for result in results:
            best[min(EXPONENT_RULES, key=_japanese_cost(result, method))] += 1
        counts = ", ".join(f"{rule} {count}" for rule, count in best.items())
        lines.append(f"{method}: lowest loss of Japanese by {counts} of {len(results)} cells")
    for rule in EXPONENT_RULES:
        helped = sum(saved(result, rule) > 0 for result in results)
        lines.append(f"{rule}: MXFP4-aware training helped in {helped} of {len(results)} cells")
    return "\n".join(lines)


def _japanese_cost(result: dict[str, Any], method: str) -> Callable[[str], float]:
    return lambda rule: cost(result, method, rule, "japanese")

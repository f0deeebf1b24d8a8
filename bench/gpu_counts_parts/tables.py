"""The table of counts, and its comparison with the one before the fusions."""

from __future__ import annotations

from typing import Any

from tests.support.gpu_rehearsal.launch import whole_model
from tests.support.gpu_rehearsal.shapes import LAYERS_OF_PRESET, SHAPES, two_layers

PEAK_FLOPS_PER_SECOND = 989e12
"""Dense bf16 of an H100 SXM, by its data sheet."""

ONCE = ("loss head", "embedding", "engine")
"""Parts that a model has once, not in every layer."""

QUANTITIES = ("launches", "num_bytes", "product_bytes", "flops", "seconds")


def table_of(found: dict[str, Any]) -> dict[str, Any]:
    """Return the table from what the rehearsals of all shapes counted."""
    from tests.support.gpu_rehearsal import constants

    shapes = {}
    for shape in SHAPES:
        few = found[two_layers(shape).name]["parts"]
        parts = whole_model(shape, few, found[shape.name]["parts"])
        shapes[shape.name] = {
            "preset": shape.preset,
            "layers": LAYERS_OF_PRESET[shape.preset],
            "tokens": shape.tokens,
            "ep_size": shape.ep_size,
            "sp_size": shape.sp_size,
            "documents": shape.documents,
            "parts": {part: rounded(parts[part]) for part in sorted(parts)},
        }
    assumed = {
        "memory_bytes_per_second": constants.MEMORY_BYTES_PER_SECOND,
        "product_flops_per_second": constants.PRODUCT_FLOPS_PER_SECOND,
        "launch_seconds": constants.LAUNCH_SECONDS,
    }
    return {"unit": "one micro step of one rank", "assumed": assumed, "shapes": shapes}


def rounded(phases: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the quantities of a part with seconds to the nanosecond."""
    result = {}
    for phase in sorted(phases):
        result[phase] = {**phases[phase], "seconds": round(phases[phase]["seconds"], 9)}
    return result


def sums(phases: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the sum of each quantity over the phases of a part."""
    return {name: sum(values[name] for values in phases.values()) for name in QUANTITIES}


def milliseconds(shape: dict[str, Any]) -> dict[str, float]:
    """Return the least time of every part."""
    return {part: 1e3 * sums(phases)["seconds"] for part, phases in shape["parts"].items()}


def whole(shape: dict[str, Any]) -> dict[str, float]:
    """Return the sum of each quantity over all parts."""
    return sums({part: sums(phases) for part, phases in shape["parts"].items()})


def by_time(table: dict[str, Any]) -> list[str]:
    """Return the parts of all shapes, the longest first."""
    longest: dict[str, float] = {}
    for shape in table["shapes"].values():
        for part, spent in milliseconds(shape).items():
            longest[part] = max(spent, longest.get(part, 0.0))
    return sorted(longest, key=lambda part: -longest[part])


def markdown(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the two tables of docs/gpu.md."""
    return "\n".join([*_parts_table(before, now), "", *_sums_table(before, now)]) + "\n"


def _parts_table(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = list(now["shapes"])
    lines = [f"| ms | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for part in dict.fromkeys([*by_time(before), *by_time(now)]):
        cells = []
        for name in names:
            old = milliseconds(before["shapes"][name]).get(part, 0.0)
            new = milliseconds(now["shapes"][name]).get(part, 0.0)
            cells.append(change(old, new))
        lines.append(f"| {part} | {' | '.join(cells)} |")
    cells = []
    for name in names:
        old = 1e3 * whole(before["shapes"][name])["seconds"]
        new = 1e3 * whole(now["shapes"][name])["seconds"]
        cells.append(f"**{change(old, new)}**")
    return [*lines, f"| all | {' | '.join(cells)} |"]


def change(old: float, new: float) -> str:
    """Return both figures, or one if they look the same."""
    shown_old = f"{old:,.1f}" if old < 100 else f"{old:,.0f}"
    shown_new = f"{new:,.1f}" if new < 100 else f"{new:,.0f}"
    if shown_old == shown_new == "0.0":
        return "-"
    return shown_new if shown_old == shown_new else f"{shown_old} to {shown_new}"


def _sums_table(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = list(now["shapes"])
    assumed = now["assumed"]
    rows: dict[str, list[str]] = {
        "GB that move outside products": [],
        "products alone, ms": [],
        "launches": [],
        "launches, ms of the host": [],
        "launches of a layer, recomputed ones too": [],
        "share of the bf16 peak": [],
    }
    for name in names:
        old = whole(before["shapes"][name])
        new = whole(now["shapes"][name])
        products = 1e3 * new["flops"] / assumed["product_flops_per_second"]
        spent = [1e3 * assumed["launch_seconds"] * counts["launches"] for counts in (old, new)]
        cells = [
            change(_outside_products(old), _outside_products(new)),
            f"{products:,.0f}",
            f"{old['launches']:,.0f} to {new['launches']:,.0f}",
            change(*spent),
            f"{_of_a_layer(before['shapes'][name])} to {_of_a_layer(now['shapes'][name])}",
            f"{_share_of_peak(old):.0%} to {_share_of_peak(new):.0%}",
        ]
        for values, cell in zip(rows.values(), cells, strict=True):
            values.append(cell)
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    return lines + [f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items()]


def _outside_products(quantities: dict[str, float]) -> float:
    return (quantities["num_bytes"] - quantities["product_bytes"]) / 1e9


def _of_a_layer(shape: dict[str, Any]) -> int:
    """Return the launches of one layer, both ways."""
    launches = 0.0
    for part, phases in shape["parts"].items():
        if part not in ONCE:
            launches += sums(phases)["launches"]
    return round(launches / shape["layers"])


def _share_of_peak(quantities: dict[str, float]) -> float:
    """Return the FLOPs of all products, recomputed ones too, over what the peak could do."""
    return quantities["flops"] / quantities["seconds"] / PEAK_FLOPS_PER_SECOND

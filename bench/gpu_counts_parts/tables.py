"""The table of counts, and its comparison with the one before the fusions."""

from __future__ import annotations

from typing import Any

from tests.support.gpu_rehearsal.launch import whole_model
from tests.support.gpu_rehearsal.shapes import LAYERS_OF_PRESET, SHAPES, two_layers

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


def comparison(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return a Markdown table for each shape: time, bytes outside products, and launches."""
    lines = []
    for name, shape in now["shapes"].items():
        lines += ["", f"**{name}** ({shape['layers']} layers, one micro step)", ""]
        lines.append("| part | ms | was | GB outside products | was | launches | was |")
        lines.append("|---|---|---|---|---|---|---|")
        lines += _rows(before["shapes"][name]["parts"], shape["parts"])
    return "\n".join(lines[1:])


def _rows(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    figures = {}
    for part in {**now, **before}:
        old = sums(before.get(part, {}))
        new = sums(now.get(part, {}))
        figures[part] = [*_shown(old), *_shown(new)]
    order = sorted(figures, key=lambda part: -figures[part][0])
    total = [sum(values) for values in zip(*figures.values(), strict=True)]
    lines = [_row(part, figures[part]) for part in order]
    return [*lines, _row("**all**", total)]


def _shown(quantities: dict[str, float]) -> tuple[float, float, float]:
    outside = quantities["num_bytes"] - quantities["product_bytes"]
    return 1e3 * quantities["seconds"], outside / 1e9, quantities["launches"]


def _row(part: str, values: list[float]) -> str:
    old_ms, old_gb, old_launches, ms, gb, launches = values
    cells = [part, f"{ms:.1f}", f"{old_ms:.1f}", f"{gb:.1f}", f"{old_gb:.1f}"]
    cells += [f"{launches:,.0f}", f"{old_launches:,.0f}"]
    return f"| {' | '.join(cells)} |"

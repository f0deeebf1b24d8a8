"""Peak memory of one pass, beyond its inputs."""

from __future__ import annotations

from dataclasses import replace

import measuring

from attention_parts.contenders import Layer, make_step


def peak_bytes(name: str, layer: Layer) -> tuple[int, int]:
    """Return how far memory grows during one pass, and its largest size in bytes.

    `measuring.peak_bytes` says what counts.
    """
    warm_up = make_step(name, replace(layer, tokens=64))
    warm_up()  # loads what is loaded on first use
    return measuring.peak_bytes(make_step(name, layer), layer.device)

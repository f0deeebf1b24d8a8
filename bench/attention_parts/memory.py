"""Peak memory of one pass, beyond its inputs."""

from __future__ import annotations

import measuring

from attention_parts.contenders import Layer, make_step


def peak_bytes(name: str, layer: Layer) -> tuple[int, int]:
    """How far memory grows during one pass, and its largest size; see `measuring.peak_bytes`."""
    small = Layer(
        tokens=64,
        window=layer.window,
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        device=layer.device,
    )
    make_step(name, small)()  # loads what is loaded on first use
    return measuring.peak_bytes(make_step(name, layer), layer.device)

"""The colors of the page in daylight and in the dark.

CSS variables carry those of the page.  Charts are painted on canvases, which know no variables:
they are drawn in the light colors, and the script of the page exchanges each for its dark
counterpart.
Text has a contrast of at least 4.5 and lines have at least 3 (WCAG 2.2, 1.4.3 and 1.4.11).
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterable

from data_pipeline.charts import ALARM, GRID, INK, MUTED, PALETTE

CARD = "#ffffff"
"""The surface that charts are drawn on."""
AMBER = PALETTE[1]
GREEN = PALETTE[2]
LIGHT = {
    "page": "#f3f4f6",
    "card": CARD,
    "inset": "#f9fafb",
    "ink": INK,
    "muted": "#596270",
    "border": GRID,
    "good": "#00704f",
    "busy": "#0063a0",
    "warning": "#8a5800",
    "alarm": "#b84a00",
}
"""Surfaces (`page`, `card`, `inset`), colors of text upon them, and of borders."""
DARK = {
    "page": "#0d1117",
    "card": "#161c24",
    "inset": "#1c242e",
    "ink": "#e6eaf0",
    "muted": "#9ba6b4",
    "border": "#2c3642",
    "good": "#45cf9f",
    "busy": "#62b5f0",
    "warning": "#f0b84a",
    "alarm": "#ff8f55",
}
SURFACES = ("page", "card", "inset")
TEXTS = ("ink", "muted", "good", "busy", "warning", "alarm")
DARK_PALETTE = (
    "#4aa8e8",
    "#f0b030",
    "#2fc79a",
    "#e592bd",
    "#9ad4ff",
    "#d96a9f",
    "#c9c95a",
    "#9d90f5",
    "#63cfbd",
)
"""The counterparts of `PALETTE`."""
COUNTERPARTS = {
    **dict(zip(PALETTE, DARK_PALETTE, strict=True)),
    CARD: DARK["card"],
    INK: DARK["ink"],
    MUTED: DARK["muted"],
    GRID: DARK["border"],
    ALARM: DARK["alarm"],
}
"""Dark counterparts of the colors that charts are drawn in; shades of them are computed."""
HEX_COLOR = re.compile(r"#[0-9a-f]{6}\b")


def dark_of(color: str) -> str:
    """Return the dark counterpart of a color such as #0072b2; of a shade, one of the same hue."""
    if color in COUNTERPARTS:
        return COUNTERPARTS[color]
    red, green, blue = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    # the darkest ink becomes the lightest, and the lightest shade stays visible
    channels = colorsys.hls_to_rgb(hue, 0.95 - 0.6 * lightness, saturation)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)


def counterparts(texts: Iterable[str]) -> dict[str, str]:
    """Return the dark counterpart of every color that stands in any of the texts."""
    found: set[str] = set()
    for text in texts:
        found.update(HEX_COLOR.findall(text))
    return {color: dark_of(color) for color in sorted(found)}


def css_variables() -> str:
    """Return the style rules that define the colors; paper is always light."""
    light = _declarations(LIGHT)
    dark = _declarations(DARK)
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colors, 1 to 21 (WCAG 2.2, definition of contrast ratio)."""
    lights = sorted((_luminance(first), _luminance(second)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _declarations(colors: dict[str, str]) -> str:
    return ";".join(f"--{name}:{color}" for name, color in colors.items())


def _luminance(color: str) -> float:
    """Return the relative luminance of a color (WCAG 2.2)."""
    channels = []
    for at in (1, 3, 5):
        value = int(color[at : at + 2], 16) / 255
        channels.append(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]

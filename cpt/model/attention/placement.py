"""The documents of a micro batch on their way to a device, and those of a rank's part of the rows.

Layers take them from `PackedRows`, where they are kept. `place_documents` puts them there before
the first layer runs, so that no layer has to make them.
"""

from __future__ import annotations

import torch

from cpt.model.attention.rows import PackedRows
from cpt.model.attention.varlen import Documents
from cpt.parallel.halo import WindowHalo


def local_rows(rows: PackedRows, halo: WindowHalo) -> PackedRows:
    """Return the documents of this rank's tokens, from those of the whole rows."""
    return rows.derive(("local rows",), lambda: halo.local_rows(rows))


def edge_rows(rows: PackedRows, halo: WindowHalo) -> PackedRows:
    """Return the documents of a window layer's edge, from those of the whole rows."""
    return rows.derive(("edge rows", halo.window), lambda: halo.edge_rows(rows))


def place_documents(rows: PackedRows, device: torch.device, halo: WindowHalo | None = None) -> None:
    """Copy the offsets of documents that a step's layers need to a GPU, without waiting.

    Args:
        rows: The whole rows.
        device: The device that computes; on a CPU nothing is placed.
        halo: The exchange of the window layers, if these do not see whole rows.
    """
    if device.type != "cuda":
        return
    Documents.on(rows, device)
    if halo is not None:
        Documents.on(local_rows(rows, halo), device)
        Documents.on(edge_rows(rows, halo), device)

"""The halo saves traffic, as counted by the code that sends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launcher import ROOT, launch

pytestmark = pytest.mark.dist


def test_halo_layers_bring_a_20b_step_at_32k_to_at_most_55_percent_of_plain_ulysses(
    tmp_path: Path,
) -> None:
    """Half of the layers are window layers; a pair of layers stands for the model."""
    file = tmp_path / "bytes.json"
    assert launch(ROOT / "tests" / "dist" / "bytes_worker.py", 4, [str(file)]) == [0] * 4
    full_layer, window_layer = json.loads(file.read_text())
    # q, k, v out, output back, and the same backward; three quarters of each leave the rank; 2
    # bytes per value
    assert full_layer == 32_768 * (64 + 8 + 8 + 64) * 64 * 2 * 2 * 3 // 4
    # keys and values of 127 tokens from three ranks to their right neighbors, and their gradients
    # back
    assert window_layer == 3 * 127 * (8 + 8) * 64 * 2 * 2
    assert (full_layer + window_layer) / (2 * full_layer) <= 0.55

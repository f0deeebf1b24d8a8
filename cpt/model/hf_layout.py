"""Names of a Hugging Face gpt-oss directory: its files, and which of its tensors hold experts."""

from __future__ import annotations

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EXPERT_TENSORS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""Per layer, under `mlp.experts.`; the first axis counts experts."""

BLOCKS, SCALES = "_blocks", "_scales"
"""Suffixes of the two tensors that stand for an expert matrix in the released MXFP4 layout."""


def is_expert_name(name: str) -> bool:
    """Whether a tensor of this name has an expert axis."""
    return ".experts." in name and name.rsplit(".", 1)[1] in EXPERT_TENSORS

"""PEFT loads an exported adapter unedited: its logits are those of the merged export."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench.oracle.expected import logits_of
from bench.oracle.models import tokens

MERGED = 1e-6
"""Largest difference of logits of two merged models in fp32."""
LOADED = 1e-3
"""Largest difference of logits in fp32 where PEFT adds s B A x to W x, which rounds otherwise."""


@torch.no_grad()
def main(folder: Path) -> str:
    """Return the largest differences.

    Raises:
        AssertionError: something differs.
    """
    base = AutoModelForCausalLM.from_pretrained(
        str(folder / "fp32"), dtype=torch.float32, attn_implementation="eager"
    )
    base.config._experts_implementation = "eager"
    untouched = logits(base)
    with warnings.catch_warnings():
        # peft says that the patterns of experts matched nothing, and applies them
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match")
        model = PeftModel.from_pretrained(base, str(folder / "peft"))
    merged_export = logits_of(folder / "merged")
    loaded = (logits(model) - merged_export).abs().max().item()
    merged = (logits(model.merge_and_unload()) - merged_export).abs().max().item()
    effect = (merged_export - untouched).abs().max().item()
    assert loaded < LOADED, loaded
    assert merged < MERGED, merged
    assert effect > 1000 * LOADED, f"an adapter that is lost would not show: {effect:.1e}"
    return (
        f"logits differ by {loaded:.1e}, after merging by {merged:.1e} (the adapter: {effect:.1f})"
    )


def logits(model: Any) -> torch.Tensor:
    """Return (tokens, vocabulary) logits."""
    return model.eval()(tokens()[None]).logits[0]


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))

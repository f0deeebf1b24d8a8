"""lm-evaluation-harness loads an export and scores text with the model's own probabilities."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file

TOLERANCE = 1e-3
"""Largest difference of sums of 39 and of 170 log probabilities, in nats."""


def main(folder: Path) -> str:
    """Return the largest difference.

    Raises:
        AssertionError: a score differs.
    """
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    model = HFLM(
        pretrained=str(folder / "fp32"),
        dtype="float32",
        device="cpu",
        attn_implementation="eager",
    )
    logits = load_file(folder / "expected.safetensors")["fp32"]
    log_probabilities = torch.log_softmax(logits.double(), dim=-1)
    tokens = expected["tokens"]
    worst = 0.0
    for start, stop in ((1, 40), (150, 320)):
        # positions count from the beginning, so the context is all that comes before
        request = (("", ""), tokens[:start], tokens[start:stop])
        ((found, _),) = model._loglikelihood_tokens([request], disable_tqdm=True)
        places = torch.arange(start, stop)
        wanted = log_probabilities[places - 1, torch.tensor(tokens)[places]].sum().item()
        worst = max(worst, abs(found - wanted))
    assert worst < TOLERANCE, worst
    text = Instance("loglikelihood", {}, ("Hello, ", "world"), 0)
    ((score, _),) = model.loglikelihood([text], disable_tqdm=True)
    assert score < 0
    return f"sums of log probabilities differ by {worst:.1e} at most"


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))

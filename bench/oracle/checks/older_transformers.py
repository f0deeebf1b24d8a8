"""transformers 4: tokenizer, chat template, RoPE, dtype and logits of an export are those of 5.

Nothing of this project is imported: it needs transformers 5.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-4
"""Largest difference of logits, of which the largest are about 20: fp32, other orders of sums."""


def main(folder: Path) -> str:
    """Return what was compared.

    Raises:
        AssertionError: something differs.
    """
    assert transformers.__version__.startswith("4."), transformers.__version__
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    export = str(folder / "fp32")
    tokenizer = AutoTokenizer.from_pretrained(export)
    for text, ids in zip(expected["texts"], expected["ids"], strict=True):
        assert tokenizer(text)["input_ids"] == ids, text
    rendering = tokenizer.apply_chat_template(
        expected["conversation"], tools=expected["tools"], current_date=expected["date"]
    )
    assert rendering == expected["rendering"], tokenizer.decode(rendering)
    config = AutoConfig.from_pretrained(export)
    written = json.loads((folder / "fp32" / "config.json").read_text("utf-8"))
    rope = written["rope_parameters"]
    assert config.rope_theta == rope["rope_theta"], config.rope_theta
    for key in ("factor", "original_max_position_embeddings", "truncate"):
        assert config.rope_scaling[key] == rope[key], (key, config.rope_scaling)
    bf16 = AutoConfig.from_pretrained(str(folder / "bf16"))
    assert bf16.torch_dtype == torch.bfloat16, bf16.torch_dtype
    return f"tokenizer, chat template, RoPE and dtype are equal; {_logits(folder, expected)}"


@torch.no_grad()
def _logits(folder: Path, expected: dict[str, list[int]]) -> str:
    model = AutoModelForCausalLM.from_pretrained(
        str(folder / "fp32"), torch_dtype=torch.float32, attn_implementation="eager"
    )
    found = model.eval()(torch.tensor(expected["tokens"])[None]).logits[0]
    difference = (found - load_file(folder / "expected.safetensors")["fp32"]).abs()
    shown = f"logits differ by {difference.max():.1e} at most"
    assert difference.max() < TOLERANCE, f"{shown}, at token {int(difference.amax(1).argmax())}"
    return shown


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))

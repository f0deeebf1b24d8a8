"""OpenAI's reference model in PyTorch: logits of an export in fp32 and of one in MXFP4.

The weights get the names of OpenAI's own checkpoints, and its code decodes the MXFP4 blocks.  It
computes in fp32 here; as published it would in bf16, which hides mistakes.  Each of MISTAKES, made
in the reference model on purpose, must show: otherwise the model of this check is too weak.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from gpt_oss.torch.model import ModelConfig, Transformer
from gpt_oss.torch.weights import Checkpoint
from safetensors.torch import load_file

TOLERANCE = 1e-4
"""Largest difference of logits, of which the largest are about 20: fp32, other orders of sums."""

MISTAKES = {
    "the clamp of experts": {"swiglu_limit": 6.0},
    "the factor of YaRN": {"rope_scaling_factor": 8.0},
    "the base of RoPE": {"rope_theta": 60_000.0},
    "the original length of YaRN": {"initial_context_length": 512},
    "the window": {"sliding_window": 33},
}
"""Values that are not the model's, by what they are."""
LEAST_SHOWN = 100 * TOLERANCE


def main(folder: Path) -> str:
    """Return the largest differences.

    Raises:
        AssertionError: logits differ by more than the tolerance.
    """
    expected = load_file(folder / "expected.safetensors")
    tokens = torch.tensor(json.loads((folder / "expected.json").read_text("utf-8"))["tokens"])
    parts = []
    for name in ("fp32", "mxfp4"):
        with torch.no_grad():
            found = reference(folder / name, {})(tokens)
        difference = (found - expected[name]).abs()
        where = int(difference.amax(1).argmax())
        shown = f"{name}: largest {difference.max():.1e}, mean {difference.mean():.1e}"
        assert difference.max() < TOLERANCE, f"{shown}, largest at token {where}"
        parts.append(shown)
    for name, wrong in MISTAKES.items():
        with torch.no_grad():
            found = reference(folder / "fp32", wrong)(tokens)
        shown_by = (found - expected["fp32"]).abs().max()
        assert shown_by > LEAST_SHOWN, f"a mistake in {name} would not show: {shown_by:.1e}"
    return f"{'; '.join(parts)}; {len(MISTAKES)} mistakes on purpose show"


def reference(export: Path, wrong: dict[str, Any]) -> Transformer:
    """Return OpenAI's model with the weights of an export, and some wrong values."""
    values = json.loads((export / "config.json").read_text("utf-8"))
    rope = values["rope_parameters"]
    config = ModelConfig(
        num_hidden_layers=values["num_hidden_layers"],
        num_experts=values["num_local_experts"],
        experts_per_token=values["num_experts_per_tok"],
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        swiglu_limit=values["swiglu_limit"],
        head_dim=values["head_dim"],
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values["num_key_value_heads"],
        sliding_window=values["sliding_window"],
        initial_context_length=rope["original_max_position_embeddings"],
        rope_theta=rope["rope_theta"],
        rope_scaling_factor=rope["factor"],
        rope_ntk_alpha=rope["beta_slow"],
        rope_ntk_beta=rope["beta_fast"],
    )
    config = dataclasses.replace(config, **wrong)
    model = Transformer(config, device=torch.device("cpu")).float()
    model.load_state_dict(weights(export, config.num_hidden_layers))
    return model.eval()


def weights(export: Path, num_layers: int) -> dict[str, torch.Tensor]:
    """Return the weights of an export under the names of OpenAI's model, in fp32."""
    stored = load_file(export / "model.safetensors")
    found = {
        "embedding.weight": stored["model.embed_tokens.weight"],
        "norm.scale": stored["model.norm.weight"],
        "unembedding.weight": stored["lm_head.weight"],
    }
    for number in range(num_layers):
        layer = f"model.layers.{number}"
        block = f"block.{number}"
        for kind in ("weight", "bias"):
            parts = [stored[f"{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            found[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
            found[f"{block}.attn.out.{kind}"] = stored[f"{layer}.self_attn.o_proj.{kind}"]
            found[f"{block}.mlp.gate.{kind}"] = stored[f"{layer}.mlp.router.{kind}"]
        found[f"{block}.attn.sinks"] = stored[f"{layer}.self_attn.sinks"]
        found[f"{block}.attn.norm.scale"] = stored[f"{layer}.input_layernorm.weight"]
        found[f"{block}.mlp.norm.scale"] = stored[f"{layer}.post_attention_layernorm.weight"]
        for ours, theirs in (("gate_up_proj", "mlp1"), ("down_proj", "mlp2")):
            name = f"{layer}.mlp.experts.{ours}"
            found[f"{block}.mlp.{theirs}_bias"] = stored[f"{name}_bias"]
            if name in stored:
                found[f"{block}.mlp.{theirs}_weight"] = stored[name].transpose(1, 2)
                continue
            decoder = Checkpoint(str(export), torch.device("cpu"))
            found[f"{block}.mlp.{theirs}_weight"] = decoder._get_mxfp4_tensor(
                f"{name}_blocks", f"{name}_scales"
            )
    return {name: value.float() for name, value in found.items()}


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))

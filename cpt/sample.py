"""Continue a text with trained weights, in one process, through plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

from cpt.errors import ConfigError
from cpt.model.hf_layout import tensor_files
from cpt.state.manifest import read_manifest
from cpt.state.stored import read_weights
from data_pipeline.tokenizer import END_OF_TEXT, decode, encode

STOP_IDS = [200_002, END_OF_TEXT, 200_012]
"""<|return|>, <|endoftext|>, <|call|>."""


def load_for_sampling(model_dir: Path | None, checkpoint: Path | None) -> Any:
    """The model of an exported directory, or of a verified checkpoint (in bf16)."""
    if model_dir is not None:
        if not (model_dir / "config.json").is_file():
            raise ConfigError(f"--model {model_dir}: no config.json there. Give a directory that `cpt export` wrote.")
        tensor_files(model_dir)  # refuses pickles and names missing files
        return AutoModelForCausalLM.from_pretrained(str(model_dir), dtype="auto", use_safetensors=True).eval()
    assert checkpoint is not None
    manifest = read_manifest(checkpoint)
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**manifest.state["model_config"]))
    weights = read_weights(checkpoint, sorted(manifest.tensors), manifest)
    model.load_state_dict({name: value.bfloat16() for name, value in weights.items()}, assign=True)
    rotary = type(model.model.rotary_emb)(config=model.config)  # its frequencies are no weights: built again in fp32
    model.model.rotary_emb = rotary
    return model.eval()


@torch.no_grad()
def sample(model: Any, prompt: str, *, max_new_tokens: int, temperature: float, seed: int) -> str:
    """The prompt's continuation as text; control tokens appear by name."""
    ids = torch.from_numpy(encode(prompt).astype("int64"))[None]
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    out = model.generate(
        ids.to(model.device),
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=STOP_IDS,
        pad_token_id=END_OF_TEXT,
        **sampling,
    )
    return decode(out[0, ids.shape[1] :].cpu().numpy())

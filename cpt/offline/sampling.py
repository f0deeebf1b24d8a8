"""Continue a text, or answer a question, with trained weights: in one process, through plain
transformers.

What is printed from an export is what `AutoModelForCausalLM.generate` gives with the same settings;
a checkpoint is sampled in bf16, as its export would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.weights import CheckpointWeights
from cpt.errors import ConfigError
from cpt.model.weights.hf_layout import read_json, tensor_files
from data_pipeline.text.harmony import STOP_IDS
from data_pipeline.text.harmony_reply import parse_reply
from data_pipeline.text.tokenizer import END_OF_TEXT, encoding


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int = 64
    """Tokens to generate at most."""
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Smallest set of tokens of this probability is drawn from."""
    seed: int = 0
    """Of the draws."""

    def problems(self) -> list[str]:
        """What cannot be right, as the command line says it."""
        found = []
        if self.max_new_tokens < 1:
            found.append(f"--max_new_tokens {self.max_new_tokens} must be >= 1.")
        if not 0 <= self.temperature < float("inf"):
            found.append(f"--temperature {self.temperature} must be >= 0.")
        if not 0 < self.top_p <= 1:
            found.append(f"--top_p {self.top_p} must be in (0, 1].")
        if self.top_p < 1 and self.temperature == 0:
            found.append(
                f"--top_p {self.top_p} has no meaning at --temperature 0: give a temperature."
            )
        return found


def load_for_sampling(model_dir: Path | None, checkpoint: Path | None) -> Any:
    """The model of an exported directory, or of a verified checkpoint (in bf16), on the GPU if
    there is one.
    """
    model = _from_directory(model_dir) if model_dir is not None else _from_checkpoint(checkpoint)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _from_directory(path: Path) -> Any:
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"--model {path}: no config.json there. Give a directory that `cpt export` wrote."
        )
    tensor_files(path)  # refuses pickles and names missing files
    # MXFP4 kernels are for some GPUs only; decoded weights give the same on every machine
    quantised = "quantization_config" in read_json(path / "config.json")
    settings = {"quantization_config": Mxfp4Config(dequantize=True)} if quantised else {}
    return AutoModelForCausalLM.from_pretrained(
        str(path), dtype="auto", use_safetensors=True, **settings
    )


def _from_checkpoint(folder: Path | None) -> Any:
    assert folder is not None
    manifest = read_manifest(folder)
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**manifest.state["model_config"]))
    source = CheckpointWeights(folder, manifest, torch.bfloat16)
    weights = {}
    for name, parameter in model.named_parameters():
        flat = torch.empty(parameter.numel(), dtype=torch.bfloat16)
        for start, values in source.pieces(name, 0, flat.numel()):
            flat[start : start + values.numel()] = values
        weights[name] = flat.view(parameter.shape)
    model.load_state_dict(weights, assign=True)
    rotary = type(model.model.rotary_emb)(
        config=model.config
    )  # its frequencies are no weights: built again in fp32
    model.model.rotary_emb = rotary
    return model


@torch.no_grad()
def generate(model: Any, prompt: Sequence[int], sampling: Sampling) -> list[int]:
    """The tokens that follow a prompt; the one that ended the generation is the last."""
    ids = torch.tensor([list(prompt)], device=model.device)
    torch.manual_seed(sampling.seed)
    drawn = {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
    }
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(STOP_IDS),
        pad_token_id=END_OF_TEXT,
        **(drawn if sampling.temperature > 0 else {"do_sample": False}),
    )
    return [int(token) for token in out[0, ids.shape[1] :].cpu()]


def as_text(tokens: Sequence[int]) -> str:
    """Text of tokens; control tokens appear by name."""
    return encoding().decode(list(tokens))


def as_channels(tokens: Sequence[int]) -> str:
    """A reply for people: each of its messages under the name of its channel."""
    parts = parse_reply(tokens)
    blocks = []
    for part in parts:
        name = part.channel or "no channel"
        blocks.append(f"[{name}{f' to {part.recipient}' if part.recipient else ''}]\n{part.text}")
    if not tokens or tokens[-1] not in STOP_IDS:
        blocks.append("[cut off by --max_new_tokens]")
    return "\n".join(blocks)

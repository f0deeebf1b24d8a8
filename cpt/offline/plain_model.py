"""A gpt-oss model of plain transformers, from an export or from a checkpoint, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.run_state import RunState
from cpt.checkpoint.weights import CheckpointWeights
from cpt.model.configuration import load_config
from cpt.model.weights.hf_layout import read_json, tensor_files


def load_export(path: Path) -> Any:
    """Return the model of a Hugging Face directory, on the GPU if there is one.

    Raises:
        ConfigError: the directory holds no sound configuration, no weights, or pickled ones.
    """
    load_config(path, None, option="--model")  # transformers itself checks little of it
    tensor_files(path)  # refuses pickles and names missing files
    settings = {}
    if read_json(path / "config.json").get("quantization_config") is not None:
        # MXFP4 kernels are for some GPUs only; decoded weights give the same on every machine
        settings["quantization_config"] = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(path), dtype="auto", use_safetensors=True, **settings
    )
    return _ready(model)


def load_checkpoint(folder: Path) -> Any:
    """Return the model of a verified checkpoint in bf16, as its export would be."""
    manifest = read_manifest(folder)
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**RunState.of(manifest).model_config))
    source = CheckpointWeights(folder, manifest, torch.bfloat16)
    weights = {}
    for name, parameter in model.named_parameters():
        flat = torch.empty(parameter.numel(), dtype=torch.bfloat16)
        for start, values in source.pieces(name, 0, flat.numel()):
            flat[start : start + values.numel()] = values
        weights[name] = flat.view(parameter.shape)
    model.load_state_dict(weights, assign=True)
    # rotary frequencies are no weights: they are built again, in fp32
    rotary_class = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary_class(config=model.config)
    return _ready(model)


def _ready(model: Any) -> Any:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

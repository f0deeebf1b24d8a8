"""A gpt-oss model of plain transformers, from an export or from a checkpoint, in one process.

A model that is larger than one GPU is spread by accelerate over all GPUs of the machine, then its
memory, then files in a temporary folder: what lies in memory or in files is slow, and exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from accelerate import dispatch_model, infer_auto_device_map
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.run_state import RunState
from cpt.checkpoint.weights import CheckpointWeights
from cpt.model.configuration import load_config
from cpt.model.weights.hf_layout import read_json, tensor_files

LAYER = "GptOssDecoderLayer"
"""Class of the modules that are not divided between devices."""
DeviceMap = Literal["one", "auto"] | Mapping[str, str | int]
"""Where the parts of a model go: one device, wherever there is room, or a device by module."""


def load_export(path: Path, device_map: DeviceMap = "one") -> Any:
    """Return the model of a Hugging Face directory.

    Args:
        path: The directory.
        device_map: `one` is the first GPU, or memory if there is no GPU.

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
    return _placed(model, device_map)


def load_checkpoint(folder: Path, device_map: DeviceMap = "one") -> Any:
    """Return the model of a verified checkpoint in bf16, as its export would be.

    Args:
        folder: The checkpoint.
        device_map: See `load_export`.
    """
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
    return _placed(model, device_map)


def _placed(model: Any, device_map: DeviceMap) -> Any:
    """Put a model that lies in memory where it is to compute."""
    model.eval()
    if device_map == "one":
        return model.to("cuda" if torch.cuda.is_available() else "cpu")
    devices: Mapping[str, str | int]
    if device_map == "auto":
        devices = infer_auto_device_map(model, no_split_module_classes=[LAYER])
    else:
        devices = device_map
    folder = TemporaryDirectory(prefix="cpt-offload-")
    placed = dispatch_model(model, dict(devices), offload_dir=folder.name)
    placed.offload_folder = folder  # removed with the model
    return placed

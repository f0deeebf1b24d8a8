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
from transformers import GenerationConfig, GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.model_config import model_config_of
from cpt.checkpoint.served_weights import served_weights
from cpt.model.configuration import load_config
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.source import WeightSource, fill_parts
from cpt.offline.plain_tokenizer import BOS
from data_pipeline.text.harmony import STOP_IDS
from data_pipeline.text.tokenizer import END_OF_TEXT, encoding

LAYER = "GptOssDecoderLayer"
"""Class of the modules that are not divided between devices."""
DeviceMap = Literal["one", "auto"] | Mapping[str, str | int]
"""Where the parts of a model go: one device, wherever there is room, or a device by module."""


def load_export(path: Path, device_map: DeviceMap = "one") -> Any:
    """Return the model of a Hugging Face directory.

    Its config.json is checked and its weights are read as training reads them. No loader of
    transformers sees the directory, so that nothing in it can name code, adapters or other files.

    Args:
        path: The directory.
        device_map: `one` is the first GPU, or memory if there is no GPU.

    Raises:
        ConfigError: the directory holds no sound configuration or weights, or pickled ones.
    """
    config = load_config(path, None, option="--model")
    source = DirectoryWeights(path, parameter_shapes(config))
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else _stored_dtype(source)
    model = _filled(config, source, dtype)
    source.refuse_unusable([source.seen_json()])
    return _placed(model, device_map)


def load_checkpoint(folder: Path, device_map: DeviceMap = "one", base: Path | None = None) -> Any:
    """Return the model of a verified checkpoint in bf16, as it would be served.

    Args:
        folder: The checkpoint.
        device_map: See `load_export`.
        base: Directory of the model below an adapter; None for where it was in training.

    Raises:
        CheckpointError: its manifest holds no sound configuration.
        ConfigError: the base of an adapter is not there, or is another model.
    """
    manifest = read_manifest(folder)
    source = served_weights(folder, manifest, base)
    return _placed(_filled(model_config_of(manifest), source, torch.bfloat16), device_map)


def _stored_dtype(source: DirectoryWeights) -> torch.dtype:
    """Return the dtype of the embedding, which MXFP4 does not touch."""
    _, values = next(source.pieces("model.embed_tokens.weight", 0, 1))
    return values.dtype


def _filled(config: GptOssConfig, source: WeightSource, dtype: torch.dtype) -> Any:
    """Return a model in memory with the weights of a source, in one dtype."""
    config.dtype = dtype
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    weights = {}
    targets = {}
    for name, parameter in model.named_parameters():
        flat = torch.empty(parameter.numel(), dtype=dtype)
        weights[name] = flat.view(parameter.shape)
        targets[name] = (flat, 0)
    fill_parts(targets, source)
    model.load_state_dict(weights, assign=True)
    # rotary frequencies are no weights: they are built again, in fp32
    rotary_class = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary_class(config=model.config)
    # the settings of our own exports, whatever a generation_config.json beside the weights says
    model.generation_config = GenerationConfig(
        bos_token_id=encoding()._special_tokens[BOS],
        eos_token_id=list(STOP_IDS),
        pad_token_id=END_OF_TEXT,
    )
    return model


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

"""Hugging Face directories in and out: which file holds which tensor, and this rank's part of it.

Only safetensors are read: a pickle can run code.  Every key of the directory must be one the model has and the other
way round; a tensor is never dropped or invented.  Expert matrices may be in the released MXFP4 layout: a rank decodes
its own experts, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import GptOssConfig

from cpt.errors import ConfigError
from cpt.model import mxfp4
from cpt.model.gpt_oss import PRESETS, GptOssForCPT
from cpt.model.hf_layout import (
    BLOCKS,
    INDEX_FILE,
    SCALES,
    is_expert_name,
    open_tensors,
    read_json,
    tensor_files,
)

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
CODE_DTYPES = ("U8",)
"""Dtypes, in the words of safetensors, of plain tensors and of MXFP4 codes."""


def load_config(path: Path | None, preset: str | None) -> GptOssConfig:
    """The model's configuration, from a directory's config.json or a preset of `init`.

    Raises:
        ConfigError: no gpt-oss configuration there, or one that this project cannot train.
    """
    if path is None:
        return GptOssConfig(**PRESETS[str(preset)])
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(f"model.path: {file} does not exist. Give a Hugging Face directory with a config.json.")
    values = read_json(file)
    if values.get("model_type") != "gpt_oss":
        raise ConfigError(f"{file}: model_type is {values.get('model_type')!r}, must be 'gpt_oss'.")
    method = values.pop("quantization_config", {}).get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise ConfigError(
            f"{file}: the weights are quantised by {method}; training starts from bf16, fp32 or the released MXFP4."
        )
    return GptOssConfig(**values)


def expected_shapes(model: GptOssForCPT) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor, whatever part of it this rank holds."""
    num_experts = model.config.num_local_experts
    return {
        name: (num_experts, *parameter.shape[1:]) if is_expert_name(name) else tuple(parameter.shape)
        for name, parameter in model.named_parameters()
    }


def stored_shapes(model: GptOssForCPT, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes that a directory must hold: of each expert matrix the tensor itself, or its MXFP4 blocks and scales."""
    names = set(names)
    stored: dict[str, tuple[int, ...]] = {}
    for name, shape in expected_shapes(model).items():
        if len(shape) == 3 and name not in names and name + BLOCKS in names:
            experts, inputs, rows = shape
            stored[name + BLOCKS] = (experts, rows, inputs // mxfp4.BLOCK, mxfp4.BLOCK // 2)
            stored[name + SCALES] = (experts, rows, inputs // mxfp4.BLOCK)
        else:
            stored[name] = shape
    return stored


def check_directory(path: Path, model: GptOssForCPT) -> dict[str, Path]:
    """Compare a directory's keys and shapes with the model's, before any memory is taken.

    Returns:
        Tensor name -> file.

    Raises:
        ConfigError: every missing, unknown or misshapen tensor, with its file.
    """
    files, problems = tensor_files(path), []
    expected = stored_shapes(model, files)
    problems += [f"{path}: tensor '{name}' is missing." for name in sorted(expected.keys() - files.keys())]
    problems += [f"{files[name]}: unknown tensor '{name}'." for name in sorted(files.keys() - expected.keys())]
    for file in sorted(set(files.values())):
        with open_tensors(file) as opened:
            held = set(opened.keys())
            for name in sorted(name for name, where in files.items() if where == file and name in expected):
                if name not in held:
                    problems.append(f"{file}: tensor '{name}' is missing, though {INDEX_FILE} says it is here.")
                    continue
                stored = opened.get_slice(name)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                if shape != expected[name]:
                    problems.append(f"{file}: tensor '{name}' has shape {shape}, expected {expected[name]}.")
                wanted = CODE_DTYPES if name.endswith((BLOCKS, SCALES)) else FLOAT_DTYPES
                if dtype not in wanted:
                    problems.append(f"{file}: tensor '{name}' has dtype {dtype}, expected {' or '.join(wanted)}.")
            unlisted = held - {name for name, where in files.items() if where == file}
            problems += [f"{file}: tensor '{name}' is not in {INDEX_FILE}." for name in sorted(unlisted)]
    if problems:
        raise ConfigError(problems)
    return files


@torch.no_grad()
def fill_from_directory(model: GptOssForCPT, path: Path) -> None:
    """Fill a materialised model tensor by tensor; of expert tensors only this rank's experts are read.

    Raises:
        ConfigError: see `check_directory`.
    """
    files = check_directory(path, model)
    first_expert = model.model.layers[0].mlp.experts.first_expert
    with ExitStack() as stack:
        opened = {file: stack.enter_context(open_tensors(file)) for file in sorted(set(files.values()))}

        def experts_of(name: str, count: int) -> torch.Tensor:
            return opened[files[name]].get_slice(name)[first_expert : first_expert + count]

        for name, target in model.named_parameters():
            if not is_expert_name(name):
                target.copy_(opened[files[name]].get_tensor(name))
            elif name in files:
                target.copy_(experts_of(name, target.shape[0]))
            else:
                blocks, scales = (experts_of(name + suffix, target.shape[0]) for suffix in (BLOCKS, SCALES))
                target.copy_(mxfp4.decode(blocks, scales))

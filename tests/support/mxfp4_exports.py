"""Small releases in MXFP4, checkpoints of runs that started from them, and text to score."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import GptOssConfig

from cpt.checkpoint.manifest import TensorRecord
from cpt.checkpoint.run_state import RunState
from cpt.checkpoint.writer import write_alone
from cpt.config.precision_sections import ExponentRule
from cpt.export.huggingface import QUANTIZATION_CONFIG
from cpt.guard.score import ScoredSet
from cpt.model.parameters import parameter_shapes
from cpt.model.weights import mxfp4
from cpt.model.weights.hf_layout import BLOCKS, SCALES, SINGLE_FILE, is_expert_matrix
from data_pipeline.dataset import PackedRow

STEP = 4
"""Step of the checkpoints."""
SEQ_LEN = 24
Tensors = dict[str, torch.Tensor]


def tiny_config() -> GptOssConfig:
    """Return a model whose expert matrices are a few blocks wide."""
    return GptOssConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=95,
        bos_token_id=94,
        eos_token_id=93,
    )


def release(rule: ExponentRule = "ceil", *, idle: bool = True) -> tuple[Tensors, Tensors]:
    """Return a release as it is stored, and its values in bf16.

    Args:
        rule: The rule by which blocks were made.
        idle: Whether every fourth block does not use its range; half of these hold zeros of both
            signs only, with any scale.
    """
    generator = torch.Generator().manual_seed(0)
    stored: Tensors = {}
    values: Tensors = {}
    for name, shape in parameter_shapes(tiny_config()).items():
        random = torch.randn(shape, generator=generator) * 0.3
        if not is_expert_matrix(name, shape):
            stored[name] = values[name] = random.bfloat16()
            continue
        blocks, scales = mxfp4.encode(random.bfloat16(), rule)
        if idle:
            blocks[:, ::4] &= 0x99  # codes of 0 and 0.5 and their negatives
            blocks[:, ::8] &= 0x88  # those of 0
            scales[:, ::8] += torch.randint(0, 9, scales[:, ::8].shape, generator=generator).byte()
        stored[name + BLOCKS] = blocks
        stored[name + SCALES] = scales
        values[name] = mxfp4.decode(blocks, scales)
    return stored, values


def save_model(path: Path, stored: Tensors) -> Path:
    """Save tensors as a Hugging Face directory."""
    path.mkdir(parents=True)
    save_file(stored, str(path / SINGLE_FILE), metadata={"format": "pt"})
    content = {**tiny_config().to_dict(), "dtype": "bfloat16"}
    if any(name.endswith(BLOCKS) for name in stored):
        content["quantization_config"] = QUANTIZATION_CONFIG
    (path / "config.json").write_text(json.dumps(content))
    return path


def save_checkpoint(
    run_dir: Path,
    values: Mapping[str, torch.Tensor],
    base: Path | None,
    quantize: dict[str, Any] | None = None,
    frozen: Collection[str] = (),
    starting_model: Mapping[str, Any] | None = None,
) -> Path:
    """Save a checkpoint of a run.

    Args:
        run_dir: The run directory.
        values: All tensors of the model.
        base: What the run started from; None for random weights.
        quantize: The `train.quantize` section, if the experts were rounded.
        frozen: Tensors that the run has not trained.
        starting_model: What the run says that it started from (`RunState.starting_model`).
    """
    tensors = {}
    records = {}
    for name, value in values.items():
        tensors[f"master/{name}"] = value.float()
        is_trained = quantize is not None and name not in frozen  # moments take time to write
        if is_trained:
            tensors[f"exp_avg/{name}"] = tensors[f"exp_avg_sq/{name}"] = torch.zeros(value.shape)
        records[name] = TensorRecord(shape=tuple(value.shape), dtype="float32", trained=is_trained)
    config: dict[str, Any] = {"model": {"path": None if base is None else str(base)}}
    config["data"] = {"mix": "mix.yaml", "build_dir": None}
    config["guard"] = {"max_documents": 100}
    config["train"] = {"quantize": quantize or {}}
    state = RunState(
        model_config=tiny_config().to_dict(), config=config, starting_model=starting_model
    )
    plain = state.to_json()
    if quantize is not None:
        plain["quantize"] = {"exponent": quantize["exponent"]}
    return write_alone(run_dir, STEP, tensors, records, plain)


def moved(values: Tensors, size: float, seed: int = 1) -> Tensors:
    """Return a model whose expert matrices went a random step, `size` deviations long."""
    generator = torch.Generator().manual_seed(seed)
    found = dict(values)
    for name, value in values.items():
        if is_expert_matrix(name, value.shape):
            step = torch.randn(value.shape, generator=generator) * size * float(value.float().std())
            found[name] = value.float() + step
    return found


def held_out_text(name: str, num_documents: int = 12, seed: int = 5) -> ScoredSet:
    """Return a held-out domain of random tokens, one document in a row."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(num_documents):
        ids = generator.integers(0, 90, SEQ_LEN)
        labels = np.append(ids[1:], -100)
        rows.append(
            PackedRow(
                input_ids=ids,
                labels=labels,
                position_ids=np.arange(SEQ_LEN),
                bounds=[0, SEQ_LEN],
                documents=np.asarray([number]),
            )
        )
    packed = SimpleNamespace(num_rows=num_documents, read_row=lambda index: rows[index])
    domain: Any = SimpleNamespace(
        name=name,
        language="en",
        seq_len=SEQ_LEN,
        document_bytes=np.full(num_documents, 60),
        pack=lambda documents: packed,
    )
    return ScoredSet(domain, np.arange(num_documents))

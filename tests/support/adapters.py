"""Checkpoints of adapters with random values, without a run."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GptOssConfig

from cpt.checkpoint.adapter_state import AdapterBase, AdapterState
from cpt.checkpoint.manifest import TensorRecord
from cpt.checkpoint.run_state import RunState
from cpt.checkpoint.writer import write_alone
from cpt.config.adapter_section import AdapterSection
from cpt.model.adapters.layout import adapter_shapes


def random_adapter(
    section: AdapterSection, config: GptOssConfig, seed: int = 11
) -> dict[str, torch.Tensor]:
    """Return values of all adapter tensors; B is not zero, so that everything counts."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in adapter_shapes(section, config).items():
        values[name] = torch.randn(shape, generator=generator) * 0.1
        if name.endswith("magnitude"):
            values[name] += 0.5
    return values


def write_adapter(
    run_dir: Path,
    base: Path | None,
    section: AdapterSection,
    config: GptOssConfig,
    *,
    step: int = 3,
    dtype: str = "fp32",
    imported: bool = False,
) -> dict[str, torch.Tensor]:
    """Write the checkpoint of a random adapter and return its tensors; its base may be random."""
    values = random_adapter(section, config)
    state = RunState(
        model_config=config.to_dict(),
        adapter=AdapterState(
            section=section,
            base=AdapterBase.of(base, 0, config),
            dtype=dtype,
            imported=imported,
        ).to_json(),
    )
    records = {}
    tensors = {}
    for name, value in values.items():
        records[name] = TensorRecord(shape=tuple(value.shape), dtype="float32", trained=False)
        tensors[f"master/{name}"] = value
    write_alone(run_dir, step, tensors, records, state.to_json())
    return values

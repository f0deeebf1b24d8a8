"""A model whose expert matrices are packed, and their values from a directory.

    patch -> pack -> materialize, materialize_packed -> engine -> fill_packed

Decisions
    - Packed matrices are no parameters and no buffers, but plain attributes of the modules that
      hold the experts: neither ZeRO nor a broadcast nor a cast nor a checkpoint ever sees them.
    - A rank holds its experts as they are stored. They are divided by expert parallelism only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from cpt.model.experts.layer import LocalExperts
from cpt.model.experts.packed import PackedMatrices
from cpt.model.weights.hf_layout import EXPERT_TENSORS
from cpt.model.weights.packed_codes import CodeSource
from data_pipeline.console.progress import show_progress


def pack(model: nn.Module) -> int:
    """Put packed matrices without values in place of the expert matrices of a meta model.

    Returns:
        The number of parameters that are none any more.
    """
    count = 0
    for _, experts in _expert_modules(model):
        for name in EXPERT_TENSORS:
            parameter = getattr(experts, name)
            if parameter.dim() == 3:
                delattr(experts, name)
                setattr(experts, name, PackedMatrices.empty(tuple(parameter.shape), "meta"))
                count += 1
    return count


def materialize_packed(model: nn.Module, device: torch.device) -> None:
    """Allocate the codes of this rank's experts, without values."""
    for name, experts, packed in _packed(model):
        last = name.rpartition(".")[2]
        setattr(experts, last, PackedMatrices.empty(packed.shape, device))


def packed_matrices(model: nn.Module) -> dict[str, PackedMatrices]:
    """Return this rank's packed matrices, by the name that the parameter would have."""
    return {name: packed for name, _, packed in _packed(model)}


def fill_packed(model: nn.Module, source: CodeSource) -> None:
    """Read the codes of this rank's experts; without packed matrices, do nothing.

    Raises:
        StorageError: a file could not be read.
        ConfigError: a stored matrix has values that MXFP4 does not have.
    """
    matrices = list(_packed(model))
    total = sum(packed.num_experts for _, _, packed in matrices)
    with show_progress(total, "reading packed experts", "expert", leave=False) as bar:
        for name, experts, packed in matrices:
            for local in range(packed.num_experts):
                blocks_Nb16, scales_Nb = source.codes(name, experts.first_expert + local)
                packed.blocks_ENb16[local].copy_(blocks_Nb16)
                packed.scales_ENb[local].copy_(scales_Nb)
                bar.update(1)


def _expert_modules(model: nn.Module) -> Iterator[tuple[str, LocalExperts]]:
    for name, module in model.named_modules():
        if isinstance(module, LocalExperts):
            yield name, module


def _packed(model: nn.Module) -> Iterator[tuple[str, LocalExperts, PackedMatrices]]:
    """Yield (name that the parameter would have, module that holds it, its codes)."""
    for prefix, experts in _expert_modules(model):
        for name in EXPERT_TENSORS:
            matrices: Any = getattr(experts, name)
            if isinstance(matrices, PackedMatrices):
                yield f"{prefix}.{name}", experts, matrices

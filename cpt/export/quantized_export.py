"""The expert matrices of an MXFP4 export: rounded, written, and told of.

    whole experts in fp32 -> bf16 -> codes (cpt/export/expert_rounding.py) -> weight files
                               base -^                   sums -> report

Memory holds one expert of the model and the same one of the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from cpt.checkpoint.manifest import Manifest
from cpt.errors import ConfigError
from cpt.export.expert_rounding import ExpertRounder, FiniteCheck
from cpt.export.exponent_choice import ExponentChoice
from cpt.export.export_base import choose_base
from cpt.export.mxfp4_report import rounding_report, with_held_out
from cpt.model.weights import mxfp4
from cpt.model.weights.hf_layout import BLOCKS, SCALES, is_expert_matrix
from cpt.model.weights.writer import DirectoryWriter, Entry


class QuantizedExport:
    """Writes the expert matrices of one checkpoint and keeps account."""

    def __init__(
        self, folder: Path, manifest: Manifest, choice: ExponentChoice, given: Path | None
    ) -> None:
        """Open the base, if there is one.

        Args:
            folder: The checkpoint.
            manifest: Its manifest.
            choice: The rule of the exponents.
            given: The model to compare with (`--base`); None for what the run started from.

        Raises:
            ConfigError: the given model cannot be read, or is another architecture.
        """
        found = choose_base(folder, manifest, given)
        self._base = found.base
        self._absent = found.absent
        self._choice = choice
        self._manifest = manifest
        self._rounder = ExpertRounder(choice.rule)
        self._finite = FiniteCheck()

    def look(self, name: str, values: torch.Tensor) -> None:
        """Take a piece of a tensor into account that is not rounded, in bf16."""
        self._finite.look(name, values)

    def write(
        self, writer: DirectoryWriter, name: str, first_expert: int, experts: torch.Tensor
    ) -> None:
        """Round and write consecutive whole experts of a matrix.

        Args:
            writer: The weight files.
            name: Name of the tensor.
            first_expert: Number of the first expert.
            experts: (experts, inputs, rows) in fp32.
        """
        for index, expert in enumerate(experts, start=first_expert):
            exact = expert.unsqueeze(0).to(torch.bfloat16)
            self._finite.look(name, exact)
            own = None if self._base is None else self._base.expert(name, index)
            blocks, scales = self._rounder.round(name, exact, own)
            writer.write(name + BLOCKS, index * blocks.numel(), blocks)
            writer.write(name + SCALES, index * scales.numel(), scales)

    def report(self, checkpoint: str) -> dict[str, Any]:
        """Return what `REPORT_FILE` holds; everything must have been written.

        Args:
            checkpoint: Name of the checkpoint.

        Raises:
            CheckpointError: the checkpoint has values that are not finite.
            ConfigError: so has the base.
        """
        self._finite.refuse(checkpoint)
        if self._base is not None:
            self._base.refuse_unusable()
        sums = self._rounder.sums
        frozen = frozen_tensors(self._manifest, sums)
        report = rounding_report(self._choice, self._base, self._absent, sums, frozen)
        return with_held_out(report, [])


def frozen_tensors(manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Return those of some tensors of a checkpoint that its run did not train."""
    stored = manifest.tensors
    return [name for name in names if name in stored and not stored[name].trained]


def quantized_entries(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
    """Return the tensors of an MXFP4 export, in order of writing.

    Raises:
        ConfigError: an expert matrix does not consist of whole blocks.
    """
    entries: dict[str, Entry] = {}
    for name, shape in sorted(shapes.items()):
        if not is_expert_matrix(name, shape):
            entries[name] = Entry(shape=shape, dtype=torch.bfloat16)
            continue
        experts, inputs, rows = shape
        if inputs % mxfp4.BLOCK:
            raise ConfigError(
                f"{name} has {inputs} inputs; MXFP4 needs a multiple of {mxfp4.BLOCK}. Use bf16."
            )
        blocks = (experts, rows, inputs // mxfp4.BLOCK)
        entries[name + BLOCKS] = Entry(shape=(*blocks, mxfp4.BLOCK // 2), dtype=torch.uint8)
        entries[name + SCALES] = Entry(shape=blocks, dtype=torch.uint8)
    return entries

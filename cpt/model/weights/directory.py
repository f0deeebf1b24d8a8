"""Weights from a Hugging Face directory: its tensors are checked first, then read by byte ranges.

Only safetensors are read: a pickle can run code. The directory must hold exactly the tensors that
the model has; none is dropped or invented. A rank reads only the byte ranges that it keeps: its
part of each tensor after expert parallelism and ZeRO. Expert matrices may be in the released MXFP4
layout and are decoded while they are read, a few megabytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from cpt.errors import ConfigError
from cpt.model.weights import mxfp4
from cpt.model.weights.byte_ranges import TensorFile
from cpt.model.weights.hf_layout import (
    BLOCKS,
    INDEX_FILE,
    SCALES,
    is_expert_matrix,
    open_tensors,
    tensor_files,
)

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
CODE_DTYPES = ("U8",)
"""Dtypes, in the words of safetensors, of plain tensors and of MXFP4 codes."""
PIECE_NUMEL = 2**20
"""Elements that are in memory at once while weights are read."""


def stored_shapes(
    shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a directory with tensors of these names must hold.

    An expert matrix is stored as the tensor itself, or as its MXFP4 blocks and scales.
    """
    names = set(names)
    stored: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        in_blocks = name not in names and name + BLOCKS in names
        if in_blocks and is_expert_matrix(name, shape):
            experts, inputs, rows = shape
            stored[name + BLOCKS] = (experts, rows, inputs // mxfp4.BLOCK, mxfp4.BLOCK // 2)
            stored[name + SCALES] = (experts, rows, inputs // mxfp4.BLOCK)
        else:
            stored[name] = shape
    return stored


def check_directory(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Path]:
    """Compare a directory's keys and shapes with the model's, before any memory is taken.

    Returns:
        Tensor name -> file.

    Raises:
        ConfigError: every missing, unknown or misshapen tensor, with its file.
    """
    files, problems = tensor_files(path), []
    expected = stored_shapes(shapes, files)
    problems += [
        f"{path}: tensor '{name}' is missing." for name in sorted(expected.keys() - files.keys())
    ]
    problems += [
        f"{files[name]}: unknown tensor '{name}'."
        for name in sorted(files.keys() - expected.keys())
    ]
    for file in sorted(set(files.values())):
        with open_tensors(file) as opened:
            held = set(opened.keys())
            for name in sorted(
                name for name, where in files.items() if where == file and name in expected
            ):
                if name not in held:
                    problems.append(
                        f"{file}: tensor '{name}' is missing, though {INDEX_FILE} says it is here."
                    )
                    continue
                stored = opened.get_slice(name)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                if shape != expected[name]:
                    problems.append(
                        f"{file}: tensor '{name}' has shape {shape}, expected {expected[name]}."
                    )
                wanted = CODE_DTYPES if name.endswith((BLOCKS, SCALES)) else FLOAT_DTYPES
                if dtype not in wanted:
                    problems.append(
                        f"{file}: tensor '{name}' has dtype {dtype}, expected {' or '.join(wanted)}."
                    )
            unlisted = held - {name for name, where in files.items() if where == file}
            problems += [
                f"{file}: tensor '{name}' is not in {INDEX_FILE}." for name in sorted(unlisted)
            ]
    if problems:
        raise ConfigError(problems)
    return files


class DirectoryWeights:
    """A Hugging Face directory, read by byte ranges; MXFP4 experts are decoded as they are read."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check the directory against the shapes of a model's parameters and open its files.

        Raises:
            ConfigError: see `check_directory`.
        """
        where = check_directory(path, shapes)
        self.path = path
        self._opened = {file: TensorFile(file) for file in sorted(set(where.values()))}
        self._files = {name: self._opened[file] for name, file in where.items()}

    @property
    def files(self) -> list[Path]:
        """The safetensors files."""
        return sorted(self._opened)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far."""
        return sum(file.bytes_read for file in self._opened.values())

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """See `WeightSource`; a piece has at most `PIECE_NUMEL` elements, rounded up to whole MXFP4
        blocks.
        """
        if name in self._files:
            for low in range(start, stop, PIECE_NUMEL):
                yield low, self._files[name].elements(name, low, min(stop, low + PIECE_NUMEL))
            return
        _, rows, num_blocks, _ = self._files[name + BLOCKS].shape(name + BLOCKS)
        numel = (
            num_blocks * mxfp4.BLOCK * rows
        )  # of one expert, stored as (rows, inputs), wanted as (inputs, rows)
        for expert in range(start // numel, -(-stop // numel)):
            low, high = max(start - expert * numel, 0), min(stop - expert * numel, numel)
            for position, values in self._decoded(name, expert, low, high):
                yield expert * numel + position, values

    def _decoded(
        self, name: str, expert: int, start: int, stop: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Elements [start, stop) of one expert, flattened as (inputs, rows)."""
        _, rows, num_blocks, _ = self._files[name + BLOCKS].shape(name + BLOCKS)
        block_numel = mxfp4.BLOCK * rows  # a block column: 32 inputs of every row
        first, last = start // block_numel, -(-stop // block_numel)
        codes_Rb16, scales_Rb = self._columns(name, expert, rows, num_blocks, first, last)
        step = max(1, PIECE_NUMEL // block_numel)
        for at in range(first, last, step):
            end = min(last, at + step)
            columns = slice(at - first, end - first)
            flat = mxfp4.decode(codes_Rb16[None, :, columns], scales_Rb[None, :, columns]).flatten()
            low, high = max(start, at * block_numel), min(stop, end * block_numel)
            yield low, flat[low - at * block_numel : high - at * block_numel]

    def _columns(
        self, name: str, expert: int, rows: int, num_blocks: int, first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Block columns [first, last) of one expert: codes (rows, columns, 16) and scales (rows,
        columns).
        """
        half = mxfp4.BLOCK // 2
        found = []
        for suffix, width in ((BLOCKS, half), (SCALES, 1)):
            file, start = self._files[name + suffix], expert * rows * num_blocks
            if (first, last) == (0, num_blocks):
                flat = file.elements(
                    name + suffix, start * width, (start + rows * num_blocks) * width
                )
            else:
                begins = range(start + first, start + rows * num_blocks, num_blocks)
                parts = [
                    file.elements(name + suffix, b * width, (b + last - first) * width)
                    for b in begins
                ]
                flat = torch.cat(parts)
            found.append(flat.view(rows, last - first, *([half] if width > 1 else [])))
        return found[0], found[1]

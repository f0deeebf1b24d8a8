"""Weights from a Hugging Face directory: its tensors are checked first, then read by byte ranges.

Only safetensors are read: a pickle can run code. The directory must hold exactly the tensors that
the model has; none is dropped or invented. A rank reads only the byte ranges that it keeps: its
part of each tensor after expert parallelism and ZeRO. Expert matrices may be in the released MXFP4
layout and are decoded while they are read, a few megabytes at a time.

Every value that is read is looked at (`cpt.model.weights.values`). Values that are not finite and
tensors of zeros are refused once all ranks have read their parts, in one message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from cpt.errors import ConfigError
from cpt.model.weights import mxfp4
from cpt.model.weights.byte_ranges import TensorFile
from cpt.model.weights.downloads import unfinished_hint, unfinished_problems
from cpt.model.weights.hf_layout import (
    BLOCKS,
    INDEX_FILE,
    SCALES,
    is_expert_matrix,
    open_tensors,
    tensor_files,
)
from cpt.model.weights.packed_codes import look_at_codes, packed_exactly
from cpt.model.weights.values import MAX_TENSORS, ValuesSeen, describe_values, joined
from data_pipeline.escaping import escaped_line

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
CODE_DTYPES = ("U8",)
"""Dtypes, in the words of safetensors, of plain tensors and of MXFP4 codes."""
MAX_PROBLEMS = 1000
"""Problems with tensors that a message tells; an index of others may name any number of them."""
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

    Only the headers of its files are read.

    Returns:
        The file of each tensor, by tensor name.

    Raises:
        ConfigError: Files are missing, cut off or still being fetched, or tensors are missing,
            unknown or misshapen; all of them, each with its file.
    """
    try:
        files = tensor_files(path)
    except ConfigError as error:
        raise ConfigError([*error.problems, *unfinished_hint(path)]) from error
    expected = stored_shapes(shapes, files)
    problems = unfinished_problems(path, set(files.values()))
    for name in sorted(expected.keys() - files.keys()):
        problems.append(f"{path}: tensor '{name}' is missing.")
    for name in sorted(files.keys() - expected.keys()):
        problems.append(f"{files[name]}: unknown tensor '{name}'.")
    for file in sorted(set(files.values())):
        listed = {name for name, where in files.items() if where == file}
        try:
            problems += _problems_of_file(file, listed, expected)
        except ConfigError as error:  # it is no whole file; the others are looked at all the same
            problems += [*error.problems, *unfinished_hint(path)]
    problems = list(dict.fromkeys(map(escaped_line, problems)))  # names of tensors hold anything
    left = len(problems) - MAX_PROBLEMS
    if left > 0:
        problems = [*problems[:MAX_PROBLEMS], f"{path}: {left:,} more problems with tensors."]
    if problems:
        raise ConfigError(problems)
    return files


def _problems_of_file(
    file: Path, listed: set[str], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Return what is wrong with a file's tensors: those listed for it, and those it has besides."""
    problems = []
    with open_tensors(file) as opened:
        held = set(opened.keys())
        for name in sorted(listed & expected.keys()):
            if name in held:
                stored = opened.get_slice(name)
                shape = tuple(stored.get_shape())
                for problem in _problems_of_tensor(name, shape, stored.get_dtype(), expected[name]):
                    problems.append(f"{file}: {problem}")
            else:
                problems.append(
                    f"{file}: tensor '{name}' is missing, though {INDEX_FILE} says it is here."
                )
    for name in sorted(held - listed):
        problems.append(f"{file}: tensor '{name}' is not in {INDEX_FILE}.")
    return problems


def _problems_of_tensor(
    name: str, shape: tuple[int, ...], dtype: str, expected_shape: tuple[int, ...]
) -> list[str]:
    problems = []
    if shape != expected_shape:
        problems.append(f"tensor '{name}' has shape {shape}, expected {expected_shape}.")
    dtypes = CODE_DTYPES if name.endswith((BLOCKS, SCALES)) else FLOAT_DTYPES
    if dtype not in dtypes:
        problems.append(f"tensor '{name}' has dtype {dtype}, expected {' or '.join(dtypes)}.")
    return problems


class DirectoryWeights:
    """The `WeightSource` of a Hugging Face directory; it decodes MXFP4 experts as it reads."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check the directory against the shapes of a model's parameters and open its files.

        Raises:
            ConfigError: The directory does not hold these tensors; see `check_directory`.
        """
        where = check_directory(path, shapes)
        self.path = path
        self.seen: dict[str, ValuesSeen] = {}
        """What was seen of the values read so far, by parameter."""
        self._shapes = dict(shapes)
        self._opened = {file: TensorFile(file) for file in sorted(set(where.values()))}
        self._files = {name: self._opened[file] for name, file in where.items()}

    @property
    def files(self) -> list[Path]:
        """The safetensors files of the directory."""
        return sorted(self._opened)

    @property
    def bytes_read(self) -> int:
        """The bytes of tensors that were read so far."""
        return sum(file.bytes_read for file in self._opened.values())

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the values piece by piece; see `cpt.model.weights.source.WeightSource`.

        A piece has at most `PIECE_NUMEL` elements, rounded up to whole MXFP4 blocks.
        """
        seen = self.seen.setdefault(name, ValuesSeen())
        for position, values in self._pieces(name, start, stop):
            seen.look(position, values)
            yield position, values

    def holds_codes(self, name: str) -> bool:
        """Return whether an expert matrix is stored as MXFP4 codes."""
        return name not in self._files

    def codes(self, name: str, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the MXFP4 codes of an expert: blocks (R, b, 16) and scales (R, b).

        Raises:
            StorageError: The file could not be read.
            ConfigError: It is stored in floating point, with values that MXFP4 does not have.
        """
        seen = self.seen.setdefault(name, ValuesSeen())
        _, inputs, rows = self._shapes[name]
        numel = inputs * rows
        if name in self._files:
            file = self._files[name]
            values = file.elements(name, expert * numel, (expert + 1) * numel)
            seen.look(expert * numel, values)
            if seen.first_bad >= 0:  # it is refused with the others that are not finite
                values = torch.zeros_like(values)
            return packed_exactly(values.view(inputs, rows), name, expert, file.file)
        num_blocks = inputs // mxfp4.BLOCK
        blocks_Rb16 = self._columns(name + BLOCKS, expert, 0, num_blocks, mxfp4.BLOCK // 2)
        scales_Rb = self._columns(name + SCALES, expert, 0, num_blocks, 1)[..., 0]
        look_at_codes(seen, expert * numel, blocks_Rb16, scales_Rb)
        return blocks_Rb16, scales_Rb

    def refuse_unusable(self, of_ranks: Iterable[Mapping[str, list[float | int | str]]]) -> None:
        """Refuse the tensors whose values cannot be weights.

        Args:
            of_ranks: What every rank has seen (`seen_json`); together they have read all tensors.

        Raises:
            ConfigError: values are not finite, or tensors hold only zeros; each with its file.
        """
        problems = []
        for name, seen in sorted(joined(of_ranks).items()):
            told = describe_values(name, seen, self._shapes[name])
            if told:
                problems.append(f"{self._file_of(name, is_finite=seen.first_bad < 0)}: {told}")
        if not problems:
            return
        left = len(problems) - MAX_TENSORS
        problems = problems[:MAX_TENSORS]
        if left > 0:
            problems.append(f"{left} more tensors of {self.path} are so.")
        problems.append(
            "These are no weights of a trained model: a file that was allocated but not fetched "
            "whole, or a model that had diverged when it was saved. Fetch the files again and "
            "compare their SHA-256, or give another model.path."
        )
        raise ConfigError(problems)

    def seen_json(self) -> dict[str, list[float | int | str]]:
        """Return what was seen so far, as other ranks get it."""
        found = {}
        for name, seen in self.seen.items():
            found[name] = seen.to_json()
        return found

    def _file_of(self, name: str, *, is_finite: bool) -> Path:
        """Return the file of a parameter; of MXFP4 experts, only scales can be not finite."""
        if name in self._files:
            return self._files[name].file
        return self._files[name + (BLOCKS if is_finite else SCALES)].file

    def _pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        if name in self._files:
            for low in range(start, stop, PIECE_NUMEL):
                yield low, self._files[name].elements(name, low, min(stop, low + PIECE_NUMEL))
            return
        _, rows, num_blocks, _ = self._files[name + BLOCKS].shape(name + BLOCKS)
        # An expert is stored as (rows, inputs) and wanted as (inputs, rows).
        expert_numel = num_blocks * mxfp4.BLOCK * rows
        for expert in range(start // expert_numel, -(-stop // expert_numel)):
            first = expert * expert_numel
            low = max(start - first, 0)
            high = min(stop - first, expert_numel)
            for position, values in self._decoded(name, expert, low, high):
                yield first + position, values

    def _decoded(
        self, name: str, expert: int, start: int, stop: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield elements [start, stop) of one expert, flattened as (inputs, rows)."""
        _, rows, _, _ = self._files[name + BLOCKS].shape(name + BLOCKS)
        column_numel = mxfp4.BLOCK * rows  # a block column: 32 inputs of every row
        first = start // column_numel
        last = -(-stop // column_numel)
        codes_Rb16 = self._columns(name + BLOCKS, expert, first, last, mxfp4.BLOCK // 2)
        scales_Rb1 = self._columns(name + SCALES, expert, first, last, 1)
        codes_Rb16 = codes_Rb16[None]
        scales_Rb = scales_Rb1[None, :, :, 0]
        step = max(1, PIECE_NUMEL // column_numel)
        for column in range(first, last, step):
            end = min(last, column + step)
            chosen = slice(column - first, end - first)
            flat = mxfp4.decode(codes_Rb16[:, :, chosen], scales_Rb[:, :, chosen]).flatten()
            piece_start = column * column_numel
            low = max(start, piece_start)
            high = min(stop, end * column_numel)
            yield low, flat[low - piece_start : high - piece_start]

    def _columns(self, name: str, expert: int, first: int, last: int, width: int) -> torch.Tensor:
        """Return block columns [first, last) of one expert: (rows, columns, width).

        Args:
            name: Name of the stored tensor, with its suffix.
            expert: Index of the expert.
            first: First block column.
            last: Block column after the last one.
            width: Bytes of a block in this tensor.
        """
        file = self._files[name]
        _, rows, num_blocks = file.shape(name)[:3]
        start = expert * rows * num_blocks
        if (first, last) == (0, num_blocks):
            flat = file.elements(name, start * width, (start + rows * num_blocks) * width)
        else:
            parts = []
            for row_start in range(start, start + rows * num_blocks, num_blocks):
                low = (row_start + first) * width
                high = (row_start + last) * width
                parts.append(file.elements(name, low, high))
            flat = torch.cat(parts)
        return flat.view(rows, last - first, width)

"""Interpolations between the weights before and after training, read and written in windows.

    base, tuned -> windows of both -> (1 - alpha) base + alpha tuned -> one directory per alpha

Interpolating with the original weights gives back some of what training took (WiSE-FT, arXiv
2109.01903). Both models are read once for all alphas. Values are computed in fp32; alpha 0 is the
base model and alpha 1 the tuned one, bit for bit.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GptOssConfig

from cpt.errors import ConfigError
from cpt.export.reader_forms import exported_config, generation_config
from cpt.export.tokenizer import save_tokenizer
from cpt.model.configuration import load_config
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.hf_layout import is_expert_matrix
from cpt.model.weights.source import read_window
from cpt.model.weights.tokenizer_check import tokenizer_problems
from cpt.model.weights.writer import DirectoryWriter, Entry, check_weights_space
from data_pipeline.console.progress import show_progress
from data_pipeline.store.files import AtChunk, no_call, write_json

log = logging.getLogger("cpt.export.merge")

WINDOW_NUMEL = 2**24
"""Elements of each model that are in memory at once."""
NOT_COMPARED = {
    "quantization_config",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
}
"""Keys of config.json that may differ: they say how a model is stored, not what it is."""
MAX_ALPHAS = 101
_RANGE = re.compile(r"([0-9.]+):([0-9.]+):([0-9.]+)")


def parse_alphas(text: str) -> list[float]:
    """Return the shares of the tuned model in ascending order.

    Args:
        text: `FROM:TO:STEP` with both ends included, such as `0:1:0.1`, or a list `0,0.3,1`.

    Raises:
        ConfigError: the text is neither, or a share is outside [0, 1].
    """
    match = _RANGE.fullmatch(text.strip())
    try:
        values = _range(*match.groups()) if match else list(map(float, text.split(",")))
    except ValueError:
        values = []
    alphas = sorted({round(value, 6) for value in values})
    all_inside = all(0 <= alpha <= 1 for alpha in alphas)
    if not alphas or len(alphas) > MAX_ALPHAS or not all_inside:
        raise ConfigError(
            f"--alpha {text} is neither FROM:TO:STEP nor a list A,B,C of at most {MAX_ALPHAS} "
            "shares between 0 and 1."
        )
    return alphas


def _range(first: str, last: str, step: str) -> list[float]:
    """Return at most one value more than are allowed."""
    low = float(first)
    distance = float(step)
    if distance <= 0:
        return []
    count = math.floor((float(last) - low) / distance + 1e-9) + 1
    values = []
    for index in range(min(count, MAX_ALPHAS + 1)):
        values.append(low + index * distance)
    return values


def interpolate(
    base: torch.Tensor, tuned: torch.Tensor, alpha: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return (1 - alpha) base + alpha tuned, computed in fp32.

    The ends are copies, because the formula would lose the sign of a zero.
    """
    if alpha == 0.0:
        return base.to(dtype)
    if alpha == 1.0:
        return tuned.to(dtype)
    return torch.lerp(base.float(), tuned.float(), alpha).to(dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two models of one architecture."""

    base: DirectoryWeights
    """The model before training."""
    tuned: DirectoryWeights
    """The model after training."""
    config: GptOssConfig
    """Their common architecture."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every tensor, in the order of names."""

    def windows(self) -> Iterator[tuple[str, int, torch.Tensor, torch.Tensor]]:
        """Yield (name, first element, values of base, values of tuned) over all tensors."""
        for name, shape in self.shapes.items():
            numel = math.prod(shape)
            step = WINDOW_NUMEL
            if is_expert_matrix(name, shape):
                # whole experts: a cut inside one would read its MXFP4 codes in strips
                expert_numel = numel // shape[0]
                step = max(1, WINDOW_NUMEL // expert_numel) * expert_numel
            for start in range(0, numel, step):
                stop = min(numel, start + step)
                base = read_window(self.base, name, start, stop)
                tuned = read_window(self.tuned, name, start, stop)
                yield name, start, base, tuned


class MergedWeights:
    """An interpolation as a source of weights; nothing is written."""

    def __init__(self, pair: Pair, alpha: float) -> None:
        self._pair = pair
        self._alpha = alpha

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """See `cpt.model.weights.source.WeightSource`."""
        shape = self._pair.shapes[name]
        step = math.prod(shape[1:]) if is_expert_matrix(name, shape) else WINDOW_NUMEL
        for low in range(start, stop, step):
            high = min(stop, low + step)
            base = read_window(self._pair.base, name, low, high)
            tuned = read_window(self._pair.tuned, name, low, high)
            dtype = torch.promote_types(base.dtype, tuned.dtype)
            yield low, interpolate(base, tuned, self._alpha, dtype)


def open_pair(base: Path, tuned: Path) -> Pair:
    """Open two directories and check that they hold models of one architecture.

    Raises:
        ConfigError: the architectures differ, or a directory lacks a tensor of its configuration.
    """
    config = load_config(base, None, option="--base")
    problems = _differences(base, config, tuned, load_config(tuned, None, option="--tuned"))
    if problems:
        raise ConfigError(problems)
    shapes = parameter_shapes(config)
    return Pair(
        base=DirectoryWeights(base, shapes),
        tuned=DirectoryWeights(tuned, shapes),
        config=config,
        shapes=dict(sorted(shapes.items())),
    )


def _differences(
    base: Path, base_config: GptOssConfig, tuned: Path, tuned_config: GptOssConfig
) -> list[str]:
    of_base = base_config.to_dict()
    of_tuned = tuned_config.to_dict()
    problems = []
    for key in sorted((of_base.keys() | of_tuned.keys()) - NOT_COMPARED):
        if of_base.get(key) != of_tuned.get(key):
            problems.append(
                f"--base and --tuned are of different models: {key} is {of_base.get(key)!r} in "
                f"{base}, {of_tuned.get(key)!r} in {tuned}."
            )
    return problems


def folder_name(alpha: float) -> str:
    """Return the name of the directory of an interpolation."""
    if alpha % 1 == 0:
        return f"alpha-{alpha:.0f}"
    return f"alpha-{alpha:.6f}".rstrip("0")


def write_merged(
    pair: Pair,
    alphas: Sequence[float],
    out: Path,
    base: Path,
    tuned: Path,
    at_chunk: AtChunk = no_call,
) -> None:
    """Write one Hugging Face directory per alpha into `out`; both models are read once.

    `at_chunk` is called after each piece that is written, and each file that is hashed.

    Raises:
        StorageError: there is too little room for all of them.
        ConfigError: values are not finite, or tensors hold only zeros.
    """
    check_merged_space(pair, alphas, out)
    entries = _entries(pair)
    with ExitStack() as stack:
        writers = {}
        for alpha in alphas:
            folder = out / folder_name(alpha)
            folder.mkdir()
            writers[alpha] = stack.enter_context(DirectoryWriter(folder, entries, at_chunk))
        total = sum(math.prod(shape) for shape in pair.shapes.values())
        bar = stack.enter_context(show_progress(total, "merge", "value", unit_scale=True))
        for name, start, before, after in pair.windows():
            bar.update(before.numel())
            for alpha, writer in writers.items():
                writer.write(name, start, interpolate(before, after, alpha, entries[name].dtype))
    for source in (pair.base, pair.tuned):
        source.refuse_unusable([source.seen_json()])
    dtype = "bfloat16"
    for entry in entries.values():
        if entry.dtype != torch.bfloat16:
            dtype = "float32"
    for alpha in alphas:
        folder = out / folder_name(alpha)
        _write_config(folder, pair.config, dtype)
        _write_card(folder, alpha, base, tuned)
    if _fits_our_tokenizer(tuned, pair.config.vocab_size):
        _write_tokenizers([out / folder_name(alpha) for alpha in alphas], pair.config)


def check_merged_space(pair: Pair, alphas: Sequence[float], folder: Path) -> None:
    """Refuse a folder that has too little room for all interpolations.

    Raises:
        StorageError: with both figures.
    """
    entries = _entries(pair).values()
    check_weights_space(folder, len(alphas) * sum(entry.num_bytes for entry in entries))


def _entries(pair: Pair) -> dict[str, Entry]:
    entries = {}
    for name, shape in pair.shapes.items():
        entries[name] = Entry(shape=shape, dtype=_dtype(pair, name))
    return entries


def _dtype(pair: Pair, name: str) -> torch.dtype:
    """Return the wider of the two stored dtypes; MXFP4 counts as bf16, which holds its values."""
    base = read_window(pair.base, name, 0, 1)
    tuned = read_window(pair.tuned, name, 0, 1)
    return torch.promote_types(base.dtype, tuned.dtype)


def _fits_our_tokenizer(tuned: Path, vocab_size: int) -> bool:
    """Return whether the merged models get our tokenizer, and tell of one that is not carried on.

    Files of the tuned model are not copied: a tokenizer_config.json, a chat template or a
    generation_config.json of another may hold code.
    """
    problems = tokenizer_problems(tuned, vocab_size)
    if problems:
        log.warning(
            "the merged models get no tokenizer: that of %s is not o200k_harmony. Copy its files "
            "by hand if they are yours. %s",
            tuned,
            problems[0],
        )
    return not problems


def _write_tokenizers(folders: Sequence[Path], config: GptOssConfig) -> None:
    """Write our tokenizer into the first directory, and copy it to the others: it takes seconds."""
    first = folders[0]
    before = set(first.iterdir())
    save_tokenizer(first, config.max_position_embeddings)
    written = sorted(set(first.iterdir()) - before)
    for folder in folders[1:]:
        for file in written:
            shutil.copyfile(file, folder / file.name)


def _write_config(folder: Path, config: GptOssConfig, dtype: str) -> None:
    values = exported_config(config, dtype)
    write_json(folder / "config.json", values, indent=2, sort_keys=True)
    settings = generation_config(values)
    write_json(folder / "generation_config.json", settings, indent=2, sort_keys=True)


def _write_card(folder: Path, alpha: float, base: Path, tuned: Path) -> None:
    card = (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags: [gpt-oss, merge]\n---\n\n"
        f"# {1 - alpha:g} x `{base.name}` + {alpha:g} x `{tuned.name}`\n\n"
        "Every tensor is the linear interpolation of the two models' tensors. The tokenizer and "
        "the chat template are those of gpt-oss (o200k_harmony, Harmony), not files of a model.\n"
    )
    (folder / "README.md").write_text(card, encoding="utf-8")

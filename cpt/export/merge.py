"""`cpt merge`: interpolations between the weights before and after training.

    base, tuned -> windows of both -> (1 - alpha) base + alpha tuned, for every alpha at once -> one
    directory each

Interpolating with the original weights gives back some of what training took (WiSE-FT, arXiv
2109.01903).  Windows are computed in fp32; alpha 0 is the base and alpha 1 the tuned model, bit for
bit.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig

from cpt.errors import ConfigError
from cpt.model.configuration import load_config
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.hf_layout import is_expert_matrix, read_json
from cpt.model.weights.source import WeightSource
from cpt.model.weights.writer import DirectoryWriter, Entry, check_space
from data_pipeline.store.files import write_json

WINDOW_NUMEL = 2**24
"""Elements of each model that are in memory at once."""
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Files of the tuned model that go into every directory."""
NOT_COMPARED = {
    "quantization_config",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
}
"""Keys of config.json that may differ: they say how a model is stored, not what it is."""
MOST_ALPHAS = 101
_RANGE = re.compile(r"([0-9.]+):([0-9.]+):([0-9.]+)")


def parse_alphas(text: str) -> list[float]:
    """`0:1:0.1` (both ends included) or `0,0.3,1` -> ascending shares of the tuned model.

    Raises:
        ConfigError: not one of these, or outside [0, 1].
    """
    match = _RANGE.fullmatch(text.strip())
    try:
        if match:
            low, high, step = (float(part) for part in match.groups())
            count = math.floor((high - low) / step + 1e-9) + 1 if step > 0 else 0
            values = [low + index * step for index in range(min(count, MOST_ALPHAS + 1))]
        else:
            values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    alphas = sorted({round(value, 6) for value in values})
    if not alphas or len(alphas) > MOST_ALPHAS or not all(0 <= alpha <= 1 for alpha in alphas):
        raise ConfigError(
            f"--alpha {text} is neither FROM:TO:STEP nor a list A,B,C of at most {MOST_ALPHAS} shares between 0 and 1."
        )
    return alphas


def interpolate(
    base: torch.Tensor, tuned: torch.Tensor, alpha: float, dtype: torch.dtype
) -> torch.Tensor:
    """(1 - alpha) base + alpha tuned, computed in fp32; the ends are copies, also of the sign of a
    zero.
    """
    if alpha in (0.0, 1.0):
        return (tuned if alpha else base).to(dtype)
    return torch.lerp(base.float(), tuned.float(), alpha).to(dtype)


def whole(source: WeightSource, name: str, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a flattened tensor in one piece."""
    return torch.cat([values for _, values in source.pieces(name, start, stop)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two models of one shape."""

    base: DirectoryWeights
    """The model before training."""
    tuned: DirectoryWeights
    """The model after it."""
    config: GptOssConfig
    """Of both."""
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor, in order of name."""

    def windows(self) -> Iterator[tuple[str, int, torch.Tensor, torch.Tensor]]:
        """(name, first element, values of base, values of tuned) over all tensors."""
        for name, shape in self.shapes.items():
            numel = math.prod(shape)
            unit = (
                numel // shape[0] if is_expert_matrix(name, shape) else 1
            )  # cutting an expert would read its codes in strips
            step = max(1, WINDOW_NUMEL // unit) * unit
            for start in range(0, numel, step):
                stop = min(numel, start + step)
                yield (
                    name,
                    start,
                    whole(self.base, name, start, stop),
                    whole(self.tuned, name, start, stop),
                )


class MergedWeights:
    """An interpolation as a source of weights; nothing is written."""

    def __init__(self, pair: Pair, alpha: float) -> None:
        self._pair, self._alpha = pair, alpha

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """See `cpt.model.weights.source.WeightSource`."""
        shape = self._pair.shapes[name]
        step = math.prod(shape[1:]) if is_expert_matrix(name, shape) else WINDOW_NUMEL
        for low in range(start, stop, step):
            high = min(stop, low + step)
            base, tuned = (
                whole(source, name, low, high) for source in (self._pair.base, self._pair.tuned)
            )
            yield (
                low,
                interpolate(base, tuned, self._alpha, torch.promote_types(base.dtype, tuned.dtype)),
            )


def open_pair(base: Path, tuned: Path) -> Pair:
    """Open two directories and compare them with each other.

    Raises:
        ConfigError: other architectures, or a directory that does not hold every tensor of its
            configuration.
    """
    configs = [load_config(path, None) for path in (base, tuned)]
    plain: list[dict[str, Any]] = [config.to_dict() for config in configs]
    different = sorted(
        key
        for key in plain[0].keys() | plain[1].keys()
        if key not in NOT_COMPARED and plain[0].get(key) != plain[1].get(key)
    )
    if different:
        raise ConfigError(
            [
                f"--base and --tuned are of different models: {key} is {plain[0].get(key)!r} in {base}, "
                f"{plain[1].get(key)!r} in {tuned}."
                for key in different
            ]
        )
    shapes = parameter_shapes(configs[0])
    return Pair(
        base=DirectoryWeights(base, shapes),
        tuned=DirectoryWeights(tuned, shapes),
        config=configs[0],
        shapes=dict(sorted(shapes.items())),
    )


def folder_name(alpha: float) -> str:
    """Name of the directory of an interpolation."""
    return f"alpha-{alpha:.6f}".rstrip("0").rstrip(".") if alpha % 1 else f"alpha-{alpha:.0f}"


def write_merged(pair: Pair, alphas: Sequence[float], out: Path, base: Path, tuned: Path) -> None:
    """Write one Hugging Face directory per alpha into `out`; both models are read once.

    Raises:
        StorageError: there is too little room for all of them.
    """
    entries = {
        name: Entry(shape=shape, dtype=_dtype(pair, name)) for name, shape in pair.shapes.items()
    }
    check_space(out, len(alphas) * sum(entry.num_bytes for entry in entries.values()))
    with ExitStack() as stack:
        writers = {}
        for alpha in alphas:
            folder = out / folder_name(alpha)
            folder.mkdir()
            writers[alpha] = stack.enter_context(DirectoryWriter(folder, entries))
        for name, start, before, after in pair.windows():
            for alpha, writer in writers.items():
                writer.write(name, start, interpolate(before, after, alpha, entries[name].dtype))
    dtypes = {entry.dtype for entry in entries.values()}
    for alpha in alphas:
        _write_other_files(out / folder_name(alpha), alpha, base, tuned, dtypes)


def _dtype(pair: Pair, name: str) -> torch.dtype:
    """The wider of the two stored dtypes; MXFP4 counts as bf16, which holds each of its values."""
    first, second = (next(source.pieces(name, 0, 1))[1].dtype for source in (pair.base, pair.tuned))
    return torch.promote_types(first, second)


def _write_other_files(
    folder: Path, alpha: float, base: Path, tuned: Path, dtypes: set[torch.dtype]
) -> None:
    config = {
        key: value
        for key, value in read_json(tuned / "config.json").items()
        if key != "quantization_config"
    }
    config.pop("torch_dtype", None)
    config["dtype"] = "bfloat16" if dtypes == {torch.bfloat16} else "float32"
    write_json(folder / "config.json", config, indent=2, sort_keys=True)
    for name in COPIED:
        if (tuned / name).is_file():
            shutil.copyfile(tuned / name, folder / name)
    card = (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt-oss, merge]\n---\n\n"
        f"# {1 - alpha:g} x `{base.name}` + {alpha:g} x `{tuned.name}`\n\n"
        "Every tensor is the linear interpolation of the two models' tensors.\n"
    )
    (folder / "README.md").write_text(card, encoding="utf-8")

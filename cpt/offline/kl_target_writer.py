"""`cpt kl_targets`: the base model's likeliest next tokens, for the training rows of some sources.

    packed training rows -> base model, one forward pass each -> top k and log-probabilities
        -> <source>.safetensors -> kl_targets.json, last

It runs once, before training, in one process; training reads the result
(cpt/training/kl_targets.py) and holds no second model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cpt.errors import ConfigError
from cpt.model.configuration import load_config
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.hf_layout import tensor_files
from cpt.model.weights.writer import (
    check_weights_space,
    published,
    refuse_existing,
)
from cpt.offline.model import OfflineModel, single_process
from cpt.training.kl_target_format import (
    Sidecar,
    TargetFileWriter,
    TargetsOfSource,
    bytes_per_token,
    hash_target_file,
    write_sidecar,
)
from cpt.training.loader import NO_SOURCE, make_micro_batch
from data_pipeline.build.self_replay import weights_hash
from data_pipeline.config.strict_yaml import nearest
from data_pipeline.dataset import BuiltData, PackedRow

LARGEST_TOP_K = 1024
"""Largest value that `--top_k` accepts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetsRequest:
    """A set of targets that is to be computed."""

    model_dir: Path
    """Hugging Face directory of the base model."""
    build_dir: Path
    """Directory of built shards."""
    sources: Sequence[str]
    """Sources whose training rows get targets."""
    top_k: int
    """Tokens listed per predicted token."""
    out: Path
    """Folder to write; it must not exist."""


TopKOfRow = Callable[[PackedRow], tuple[torch.Tensor, torch.Tensor]]
"""Returns, for a row's predicted tokens, (tokens, k) ids and (tokens, k + 1) log-probabilities on
the CPU.
"""


def write_targets(request: TargetsRequest) -> str:
    """Compute and write the targets, and return a sentence about them for people.

    Raises:
        ConfigError: the request makes no sense.
        DataError: the build is not usable.
        StorageError: there is too little space, or a write failed.
    """
    refuse_existing(request.out)
    config = load_config(request.model_dir, None)
    data = BuiltData.open(request.build_dir)
    _check(request, data, config.vocab_size)
    num_tokens = 0
    for name in request.sources:
        num_tokens += int(data.row_tokens(data.source_names.index(name)).sum())
    request.out.parent.mkdir(parents=True, exist_ok=True)
    check_weights_space(request.out.parent, num_tokens * bytes_per_token(request.top_k))
    weights = DirectoryWeights(request.model_dir, parameter_shapes(config))
    with single_process() as topology, published(request.out) as folder:
        model = OfflineModel(config, topology)
        model.load(weights)

        def top_k_of(row: PackedRow) -> tuple[torch.Tensor, torch.Tensor]:
            num_predicted = int((row.labels >= 0).sum())
            batch = make_micro_batch([row], [NO_SOURCE], topology)
            return model.top_k(batch, num_predicted, request.top_k)

        for name in request.sources:
            _write_source(folder, data, name, request.top_k, top_k_of)
        sidecar = _sidecar(request, data, folder, str(model.dtype).removeprefix("torch."))
        write_sidecar(folder, sidecar)
    num_rows = sum(source.rows for source in sidecar.sources.values())
    return (
        f"{request.out}: the {request.top_k} likeliest of {num_tokens} predicted tokens in "
        f"{num_rows} rows of {', '.join(request.sources)}, from the model "
        f"{sidecar.base_model[:16]}"
    )


def _sidecar(request: TargetsRequest, data: BuiltData, folder: Path, computed_in: str) -> Sidecar:
    row_hashes = data.manifest.row_hashes()
    sources = {}
    for name in request.sources:
        number = data.source_names.index(name)
        sources[name] = TargetsOfSource(
            rows=data.num_rows(number),
            tokens=int(data.row_tokens(number).sum()),
            row_hash=row_hashes[name],
            xxh3=hash_target_file(folder, name),
        )
    return Sidecar(
        base_model=weights_hash(sorted(set(tensor_files(request.model_dir).values()))),
        computed_in=computed_in,
        build=data.manifest.fingerprint,
        top_k=request.top_k,
        sources=sources,
    )


def _check(request: TargetsRequest, data: BuiltData, vocab_size: int) -> None:
    problems = []
    for name in request.sources:
        if name not in data.source_names:
            problems.append(
                f"--source {name}: {request.build_dir} has no such source."
                f"{nearest(name, data.source_names)}"
            )
        elif not data.num_rows(data.source_names.index(name)):
            problems.append(f"--source {name}: has no training rows.")
    if len(set(request.sources)) < len(request.sources):
        problems.append("--source names a source twice.")
    largest = min(LARGEST_TOP_K, vocab_size - 1)
    if not 1 <= request.top_k <= largest:
        problems.append(f"--top_k {request.top_k} must be between 1 and {largest}.")
    if problems:
        raise ConfigError(problems)


def _write_source(folder: Path, data: BuiltData, name: str, k: int, top_k_of: TopKOfRow) -> None:
    number = data.source_names.index(name)
    row_tokens = np.asarray(data.row_tokens(number))
    file = TargetFileWriter(folder, name, int(row_tokens.sum()), k)
    try:
        for row in tqdm(range(data.num_rows(number)), desc=name, unit="row"):
            ids, log_p = top_k_of(data.read_row(number, row))
            assert len(ids) == row_tokens[row], (
                f"row {row}: {len(ids)} predicted tokens, expected {row_tokens[row]}"
            )
            file.append(ids, log_p)
        file.finish()
    finally:
        file.close()

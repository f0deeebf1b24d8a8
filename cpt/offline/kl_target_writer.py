"""`cpt kl_targets`: the base model's likeliest next tokens, for the training rows of some sources.

    packed training rows, divided over the ranks -> base model, one forward pass each
        -> top k and log-probabilities -> pieces (cpt/offline/pieces.py)
    all pieces -> <source>.safetensors -> kl_targets.json, last

It runs once, before training; training reads the result (cpt/training/kl_targets.py) and holds no
second model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpt.errors import ConfigError
from cpt.model.configuration import load_config
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.checksums import model_hash
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.hf_layout import tensor_files
from cpt.model.weights.writer import (
    check_weights_space,
    published,
    refuse_existing,
)
from cpt.offline.model import OfflineModel
from cpt.offline.pieces import Compute, ItemSeries, Pieces, kept_pieces, partial_folder
from cpt.offline.rank_options import RankOptions
from cpt.offline.ranks import offline_ranks
from cpt.resilience.faults import fault_point
from cpt.training.kl_target_format import (
    Sidecar,
    TargetFileWriter,
    TargetsOfSource,
    bytes_per_token,
    hash_target_file,
    write_sidecar,
)
from cpt.training.loader import NO_SOURCE, filler_row, make_micro_batch
from data_pipeline.config.strict_yaml import nearest
from data_pipeline.dataset import BuiltData
from data_pipeline.store.files import AtChunk, make_folder

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


TopK = tuple[torch.Tensor, torch.Tensor]
"""(tokens, k) ids and (tokens, k + 1) log-probabilities of a row's predicted tokens, on the CPU."""


def write_targets(request: TargetsRequest, options: RankOptions | None = None) -> str:
    """Compute and write the targets, and return a sentence about them for people.

    All ranks of a launcher call it together. What another start has left is not computed again.

    Raises:
        ConfigError: the request makes no sense, or pieces of another one are there.
        DataError: the build is not usable.
        StorageError: there is too little space, or a write failed.
        RequeueRequested: a stop was asked for; what is computed stays for the next start.
    """
    config = load_config(request.model_dir, None, option="--model")
    data = BuiltData.open(request.build_dir)
    _check(request, data, config.vocab_size)
    weights = DirectoryWeights(request.model_dir, parameter_shapes(config))
    folder = partial_folder(request.out)
    with offline_ranks(config, folder, options or RankOptions()) as ranks:
        ranks.on_first(lambda: _check_place(request, data))
        model = OfflineModel(config, ranks.topology)
        computed_in = str(model.dtype).removeprefix("torch.")
        identity = ranks.on_first(lambda: _identity(request, data, computed_in))
        with kept_pieces(request.out, identity, ranks) as pieces:
            listed = [_series(data, name) for name in request.sources]
            if any(map(pieces.missing, listed)):
                model.load(weights)
            for series in listed:
                pieces.compute(series, _top_k_of(model, data, series, request.top_k), _joined)
            base_model = ranks.hash_of_weights(set(tensor_files(request.model_dir).values()))
            ranks.publish(partial(_publish, request, data, pieces, base_model, computed_in))
    num_rows = sum(series.num_items for series in listed)
    return (
        f"{request.out}: the {request.top_k} likeliest of {_num_tokens(request, data)} predicted "
        f"tokens in {num_rows} rows of {', '.join(request.sources)}, from the model "
        f"{base_model[:16]}"
    )


def _check_place(request: TargetsRequest, data: BuiltData) -> None:
    """Refuse a place that exists or is too small; the result is there twice for a moment."""
    refuse_existing(request.out)
    make_folder(request.out.parent)
    num_bytes = _num_tokens(request, data) * bytes_per_token(request.top_k)
    kept = 0
    folder = partial_folder(request.out)
    if folder.is_dir():
        kept = sum(file.stat().st_size for file in folder.iterdir())
    check_weights_space(request.out.parent, max(num_bytes, 2 * num_bytes - kept))


def _num_tokens(request: TargetsRequest, data: BuiltData) -> int:
    num_tokens = 0
    for name in request.sources:
        num_tokens += int(data.row_tokens(data.source_names.index(name)).sum())
    return num_tokens


def _identity(request: TargetsRequest, data: BuiltData, computed_in: str) -> dict[str, Any]:
    """Return what the targets are computed from."""
    row_hashes = data.manifest.row_hashes()
    return {
        "command": "kl_targets",
        "model": model_hash(request.model_dir, set(tensor_files(request.model_dir).values())),
        "build": data.manifest.fingerprint,
        "rows": {name: row_hashes[name] for name in sorted(request.sources)},
        "top_k": request.top_k,
        "computed_in": computed_in,
    }


def _series(data: BuiltData, name: str) -> ItemSeries:
    return ItemSeries(name=name, num_items=data.num_rows(data.source_names.index(name)), unit="row")


def _top_k_of(model: OfflineModel, data: BuiltData, series: ItemSeries, k: int) -> Compute[TopK]:
    number = data.source_names.index(series.name)
    row_tokens = np.asarray(data.row_tokens(number))

    def compute(row: int | None) -> TopK:
        packed = filler_row(data.seq_len) if row is None else data.read_row(number, row)
        batch = make_micro_batch([packed], [NO_SOURCE], model.topology)
        found = model.top_k(batch, k)
        if row is not None:
            assert batch.num_labels == row_tokens[row], (row, batch.num_labels, row_tokens[row])
        return found

    return compute


def _joined(rows: Sequence[TopK]) -> dict[str, torch.Tensor]:
    """Return the content of a piece, in the dtypes of the file."""
    return {
        "ids": torch.cat([ids for ids, _ in rows]).to(torch.int32),
        "log_p": torch.cat([log_p for _, log_p in rows]).float(),
    }


def _publish(
    request: TargetsRequest,
    data: BuiltData,
    pieces: Pieces,
    base_model: str,
    computed_in: str,
    at_chunk: AtChunk,
) -> None:
    """Join the pieces to the files of the result."""
    fault_point("offline_publish", 0)
    row_hashes = data.manifest.row_hashes()
    sources = {}
    with published(request.out) as folder:
        for name in request.sources:
            series = _series(data, name)
            number = data.source_names.index(name)
            num_tokens = int(data.row_tokens(number).sum())
            file = TargetFileWriter(folder, name, num_tokens, request.top_k)
            _join(pieces, series, file, at_chunk)
            sources[name] = TargetsOfSource(
                rows=series.num_items,
                tokens=num_tokens,
                row_hash=row_hashes[name],
                xxh3=hash_target_file(folder, name, at_chunk),
            )
        sidecar = Sidecar(
            base_model=base_model,
            computed_in=computed_in,
            build=data.manifest.fingerprint,
            top_k=request.top_k,
            sources=sources,
        )
        write_sidecar(folder, sidecar)


def _join(pieces: Pieces, series: ItemSeries, file: TargetFileWriter, at_chunk: AtChunk) -> None:
    try:
        for content in pieces.read(series):
            file.append(content["ids"], content["log_p"])
            at_chunk()
        file.finish()
    finally:
        file.close()


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

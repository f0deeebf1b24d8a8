"""Rows become the tensors of a rank on the host; copies to a device make nobody wait."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cpt.model.attention.placement import edge_rows, local_rows, place_documents
from cpt.model.attention.varlen import Documents
from cpt.model.loss.divergence import TopKTargets
from cpt.parallel.halo import WindowHalo
from cpt.storage import transfer
from cpt.training import loader
from cpt.training.loader import cut_rows, filler_row, pin, places_of_rank, read_micro_batch, send
from data_pipeline.dataset import PackedRow

SEQ_LEN = 8
CUDA = torch.device("cuda")


def packed_row(first: int) -> PackedRow:
    row = filler_row(SEQ_LEN)
    tokens = np.arange(first, first + SEQ_LEN)
    return PackedRow(
        input_ids=tokens,
        labels=tokens + 1,
        position_ids=row.position_ids,
        bounds=[0, 3, SEQ_LEN],
        documents=np.array([0, 1]),
    )


def part(sp_size: int = 1, sp_rank: int = 0, dp_size: int = 1, dp_rank: int = 0) -> Any:
    return SimpleNamespace(
        sp_size=sp_size,
        sp_rank=sp_rank,
        sp_group=None,
        dp_size=dp_size,
        dp_rank=dp_rank,
        device=torch.device("cpu"),
        traffic=None,
    )


def test_every_row_of_a_global_batch_is_of_one_rank_and_micro_step() -> None:
    batch: Any = SimpleNamespace(sources=np.arange(12) % 3, rows=np.arange(12))
    seen = []
    for micro_step in range(2):
        for dp_rank in range(3):
            seen += places_of_rank(batch, micro_step, 2, part(dp_size=3, dp_rank=dp_rank))
    assert seen == [(row % 3, row) for row in range(12)]


def test_a_rank_reads_its_part_of_the_rows_on_the_host() -> None:
    asked: list[slice] = []

    def read_row(source: int, row: int, slots: slice) -> PackedRow:
        asked.append(slots)
        whole = packed_row(100 * source + row)
        return dataclasses.replace(
            whole,
            input_ids=whole.input_ids[slots],
            labels=whole.labels[slots],
            position_ids=whole.position_ids[slots],
        )

    data: Any = SimpleNamespace(seq_len=SEQ_LEN, read_row=read_row)
    batch = read_micro_batch(data, ((0, 5), (2, 7)), part(sp_size=2, sp_rank=1))
    assert asked == [slice(4, 8)] * 2
    assert batch.input_ids.tolist() == [[9, 10, 11, 12], [211, 212, 213, 214]]
    assert batch.labels.tolist() == [[10, 11, 12, 13], [212, 213, 214, 215]]
    assert batch.position_ids.tolist() == [[4, 5, 6, 7]] * 2
    assert batch.packed_rows.bounds == (0, 3, 8, 11, 16)
    assert batch.source_of_row.tolist() == [0, 2] and batch.targets is None


def test_all_that_the_device_reads_goes_through_pinned_memory_and_the_rest_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[torch.Tensor] = []

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert device == CUDA
        sent.append(tensor)
        return tensor.clone()

    placed: list[Any] = []
    monkeypatch.setattr(loader, "to_device", to_device)
    monkeypatch.setattr(loader, "place_documents", lambda *arguments: placed.append(arguments))
    targets = TopKTargets(
        at_n=torch.tensor([1]), ids_nk=torch.tensor([[4]]), log_p_nK=torch.zeros(1, 2)
    )
    host = cut_rows([packed_row(0)], [1], part(), targets)
    halo: Any = object()
    batch = send(host, CUDA, halo)
    assert batch.targets is not None
    arrived = [batch.input_ids, batch.labels, batch.position_ids]
    arrived += [batch.targets.at_n, batch.targets.ids_nk, batch.targets.log_p_nK]
    assert len(sent) == len(arrived)
    assert {id(tensor) for tensor in arrived}.isdisjoint(id(tensor) for tensor in sent)
    assert batch.source_of_row is host.source_of_row
    assert placed == [(host.packed_rows, CUDA, halo)]
    for_device = {id(tensor) for tensor in sent}
    to_be_pinned: list[torch.Tensor] = []

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        to_be_pinned.append(tensor)
        return tensor

    monkeypatch.setattr(loader, "pinned", pinned)
    pin(host, torch.device("cpu"))
    assert to_be_pinned == []
    pin(host, CUDA)
    assert {id(tensor) for tensor in to_be_pinned} == for_device


def test_a_copy_to_a_gpu_starts_in_pinned_memory_and_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Any, bool]] = []

    class Pinned:
        def to(self, device: torch.device, non_blocking: bool) -> str:
            calls.append((device, non_blocking))
            return "copy"

    monkeypatch.setattr(transfer, "pinned", lambda tensor: Pinned())
    assert transfer.to_device(torch.zeros(1), CUDA) == "copy"
    assert calls == [(CUDA, True)]
    on_host = torch.zeros(1)
    assert transfer.to_device(on_host, torch.device("cpu")) is on_host


def test_documents_of_all_kinds_of_layers_are_placed_once_before_the_layers_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied: list[list[int]] = []

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert tensor.dtype == torch.int32
        copied.append(tensor.tolist())
        return tensor

    monkeypatch.setattr("cpt.model.attention.varlen.to_device", to_device)
    rows = cut_rows([packed_row(0)], [0], part()).packed_rows
    halo = WindowHalo(part(sp_size=2, sp_rank=1), window=3)
    place_documents(rows, torch.device("cpu"), halo)
    assert copied == []
    place_documents(rows, CUDA, halo)
    assert copied == [[0, 3, 8], [0, 4], [0, 1, 4]]
    place_documents(rows, CUDA, halo)
    assert len(copied) == 3
    found = [Documents.on(kind, CUDA) for kind in (rows, local_rows(rows, halo))]
    assert [documents.longest_tokens for documents in found] == [5, 4]
    assert Documents.on(edge_rows(rows, halo), CUDA).longest_tokens == 3
    assert len(copied) == 3

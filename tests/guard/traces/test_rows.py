"""Traces lie whole in rows, the prompt bears no loss, and every rank finds its own targets."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpt.guard.traces.rows import Trace, pack_traces, targets_of
from cpt.guard.traces.tokens import control_mask
from cpt.training.kl_target_format import TargetFileReader, TargetFileWriter
from data_pipeline.dataset import IGNORED_LABEL
from data_pipeline.text.harmony import CHANNEL, END, MESSAGE, RETURN, START
from data_pipeline.text.tokenizer import encode

SEQ_LEN = 24
LENGTHS = ((3, 5), (1, 1), (6, 9), (2, 4), (10, 12), (4, 1))
"""Tokens of prompt and reply of each trace."""


def some_traces() -> list[Trace]:
    traces = []
    for number, (prompt, reply) in enumerate(LENGTHS):
        tokens = [1000 * (number + 1) + index for index in range(prompt + reply)]
        traces.append(Trace(prompt=tokens[:prompt], reply=tokens[prompt:]))
    return traces


def part(sp_size: int, sp_rank: int) -> Any:
    return types.SimpleNamespace(sp_size=sp_size, sp_rank=sp_rank)


def test_rows_hold_all_traces_in_order_and_none_is_cut() -> None:
    traces = some_traces()
    found: list[Trace] = []
    for row in pack_traces(traces, SEQ_LEN):
        packed = row.packed
        for piece, number in enumerate(packed.documents.tolist()):
            begin, end = packed.bounds[piece : piece + 2]
            tokens = [*packed.input_ids[begin:end].tolist(), int(packed.labels[end - 1])]
            split = len(traces[number].prompt)
            found.append(Trace(prompt=tokens[:split], reply=tokens[split:]))
            assert packed.position_ids[begin:end].tolist() == list(range(end - begin))
        assert packed.bounds[-1] == SEQ_LEN
    assert found == traces


def test_labels_are_the_replies_alone() -> None:
    traces = some_traces()
    labels = []
    for row in pack_traces(traces, SEQ_LEN):
        labels += row.packed.labels[row.packed.labels != IGNORED_LABEL].tolist()
    replies: list[int] = []
    for trace in traces:
        replies += trace.reply
    assert labels == replies


def test_cell_of_a_slot_names_trace_and_kind_of_token() -> None:
    reply = [CHANNEL, *encode("final").tolist(), MESSAGE, *encode("Yes.").tolist(), RETURN]
    traces = [Trace(prompt=[5, 6], reply=[7, 8]), Trace(prompt=[9], reply=reply)]
    (row,) = pack_traces(traces, SEQ_LEN)
    cells = row.cells(part(1, 0)).tolist()
    text = len(encode("Yes."))
    assert cells == [0, 0, 3, 3, 3, *[2] * text, 3]


def test_names_of_role_and_channel_are_control_tokens() -> None:
    analysis = encode("analysis").tolist()
    words = encode("Add the analysis.").tolist()
    assistant = encode("assistant").tolist()
    reply = [CHANNEL, *analysis, MESSAGE, *words, END, START, *assistant, CHANNEL]
    expected = [True] * (2 + len(analysis)) + [False] * len(words)
    expected += [True] * (3 + len(assistant))
    assert control_mask(reply).tolist() == expected
    assert control_mask(words).tolist() == [False] * len(words)


@pytest.mark.parametrize("sp_size", [1, 2, 4])
def test_targets_of_all_ranks_together_are_those_of_the_file(sp_size: int, tmp_path: Path) -> None:
    traces = some_traces()
    num_tokens = sum(len(trace.reply) for trace in traces)
    ids = torch.arange(2 * num_tokens, dtype=torch.int32).view(-1, 2)
    writer = TargetFileWriter(tmp_path, "en", num_tokens, 2)
    writer.append(ids, torch.zeros(num_tokens, 3))
    writer.finish()
    file = TargetFileReader(tmp_path, "en", 2)
    place = 0
    for row in pack_traces(traces, SEQ_LEN):
        expected = np.flatnonzero(row.packed.labels != IGNORED_LABEL)
        found = []
        for sp_rank in range(sp_size):
            targets = targets_of([row], file, part(sp_size, sp_rank))
            if targets is not None:
                found += (targets.at_n + sp_rank * SEQ_LEN // sp_size).tolist()
                count = len(targets.at_n)
                assert torch.equal(targets.ids_nk, ids[place : place + count].long())
                place += count
        assert found == expected.tolist()
    assert place == num_tokens


def test_second_row_of_a_pass_is_counted_after_the_first(tmp_path: Path) -> None:
    traces = some_traces()
    num_tokens = sum(len(trace.reply) for trace in traces)
    writer = TargetFileWriter(tmp_path, "en", num_tokens, 2)
    writer.append(torch.zeros(num_tokens, 2, dtype=torch.int32), torch.zeros(num_tokens, 3))
    writer.finish()
    rows = pack_traces(traces, SEQ_LEN)[:2]
    targets = targets_of(rows, TargetFileReader(tmp_path, "en", 2), part(1, 0))
    assert targets is not None
    labels = np.concatenate([row.packed.labels for row in rows])
    assert targets.at_n.tolist() == np.flatnonzero(labels != IGNORED_LABEL).tolist()

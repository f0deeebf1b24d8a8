"""Greedy continuation of texts with the model in training, in any layout.

Every data-parallel rank works on the same rows, without a key/value cache: under ZeRO-3 and expert
parallelism all ranks have to take part in each forward pass anyway. A row has one length
throughout; the slots after the end of its text are not seen, since attention is causal. The choice
of the first data-parallel rank counts on all ranks, so that none stops alone.

Shape letters: B texts, T tokens of a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from cpt.parallel.topology import Topology
from cpt.training.engine import TrainingEngine
from cpt.training.loader import NO_SOURCE, filler_row, make_micro_batch


def continue_texts(
    engine: TrainingEngine,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    window: int,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """Continue all prompts; all ranks call it together and get the same tokens.

    Args:
        engine: The training engine.
        prompts: Tokens, at least one each.
        max_new_tokens: Largest number of tokens to add.
        window: Keys that a window layer's query sees; a rank must hold as many tokens for the
            exchange of the window layers.
        stop_ids: A text ends after one of these.

    Returns:
        The new tokens of each text.
    """
    topology = engine.topology
    longest = max(map(len, prompts)) + max_new_tokens
    local = math.ceil(longest / topology.sp_size)
    if topology.sp_size > 1:
        local = max(local, window)
    tokens_BT = np.zeros((len(prompts), local * topology.sp_size), dtype=np.int64)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    ends = [len(prompt) for prompt in prompts]
    running = [True] * len(prompts)
    for _ in range(max_new_tokens):
        chosen = _next_tokens(engine, topology, tokens_BT, ends)
        for index in range(len(prompts)):
            if running[index]:
                tokens_BT[index, ends[index]] = chosen[index]
                ends[index] += 1
                running[index] = chosen[index] not in stop_ids
        if not any(running):
            break
    continuations = []
    for row_T, prompt, end in zip(tokens_BT, prompts, ends, strict=True):
        continuations.append(row_T[len(prompt) : end].tolist())
    return continuations


def _next_tokens(
    engine: TrainingEngine, topology: Topology, tokens_BT: npt.NDArray[np.int64], ends: list[int]
) -> list[int]:
    """Return the likeliest token at position `ends` of each row, as the first data-parallel rank
    finds it.
    """
    seq_len = tokens_BT.shape[1]
    rows = [dataclasses.replace(filler_row(seq_len), input_ids=tokens_T) for tokens_T in tokens_BT]
    local = seq_len // topology.sp_size
    at = torch.tensor(ends) - 1
    mine = at // local == topology.sp_rank
    batch = make_micro_batch(rows, [NO_SOURCE] * len(rows), topology)
    logits_BV = engine.next_token_logits(batch, at % local)
    found = torch.where(mine & (topology.dp_rank == 0), logits_BV.argmax(-1), 0)
    # One rank has a value for each row, the others 0.
    dist.all_reduce(found, group=topology.control_group)
    tokens: list[int] = found.tolist()
    return tokens

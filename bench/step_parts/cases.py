"""The model and the packed rows that every contender trains on, and the turns they take.

The model is a small gpt-oss with the proportions of the real one.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import GptOssConfig

from data_pipeline.dataset import PackedRow

OURS = "this project"
EAGER = "Trainer, eager"
GROUPED = "Trainer, grouped_mm"
NAMES = (OURS, EAGER, GROUPED)
WARM_UP_STEPS = 2
LR = 1e-4
RANK = 32
EXPERT_RANK = 8
"""Ranks of adapters of attention and of every expert: RANK / experts of a token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One contender at one length."""

    contender: str
    """One of NAMES."""
    tokens: int
    """Tokens of a row; each rank has one row per step."""
    ranks: int
    """Processes."""
    steps: int
    """Measured steps, after WARM_UP_STEPS."""
    threads: int
    """Threads of each process."""
    experts: int
    """Experts per layer."""
    layers: int
    """Layers of the model."""
    clock: str
    """`wall`, or `cpu` for the CPU seconds of a process."""
    lora: bool = False
    """Whether adapters of RANK and EXPERT_RANK are trained in place of the model: those of this
    project, or PEFT's.
    """
    measures_memory: bool = False
    """Whether its steps report peak memory, in an environment that would spoil their times."""

    def dump(self) -> str:
        return json.dumps(asdict(self))


def model_config(case: Case) -> GptOssConfig:
    """Return a model with all parts of gpt-oss, whose hidden and expert sizes differ.

    It has window and full layers in turn, grouped heads, sinks, YaRN and top-4 experts.
    """
    return GptOssConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=384,
        num_hidden_layers=case.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=case.experts,
        num_experts_per_tok=4,
        sliding_window=128,
        max_position_embeddings=131_072,
        pad_token_id=8191,
        bos_token_id=8190,
        eos_token_id=8189,
    )


def row(case: Case, number: int) -> PackedRow:
    """Return row `number` of the data: documents of all lengths, and no padding."""
    generator = np.random.default_rng(number)
    tokens = generator.integers(0, 8000, size=case.tokens + 1)
    num_cuts = max(1, case.tokens // 700)
    cuts = generator.choice(np.arange(1, case.tokens), size=num_cuts, replace=False)
    bounds = [0, *np.sort(cuts).tolist(), case.tokens]
    labels = tokens[1:].copy()
    labels[np.asarray(bounds[1:]) - 1] = -100
    positions = np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(bounds)])
    return PackedRow(
        input_ids=tokens[:-1],
        labels=labels,
        position_ids=positions,
        bounds=bounds,
        documents=np.empty(0, dtype=np.int64),
    )


class Baton:
    """The files by which contenders take turns.

    The parent creates `go-N`, the ranks run step N, and the first rank leaves `done-N`.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._parent = os.getppid()

    def wait(self, step: int) -> None:
        """Wait until the parent wants this step; end the process if the parent is gone."""
        while not (self._folder / f"go-{step}").exists():
            if os.getppid() != self._parent:
                sys.exit("bench/step.py has ended")
            time.sleep(0.02)

    def done(self, step: int, result: dict[str, Any]) -> None:
        """Hand the first rank's result to the parent."""
        if self._rank == 0:
            temporary = self._folder / f".done-{step}"
            temporary.write_text(json.dumps(result))
            temporary.rename(self._folder / f"done-{step}")

"""How large the behavior proof is: the real one, and a small one that shows that all parts work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One round of post-training."""

    steps: int
    tasks_share: float
    """Share of tasks in the tokens; the rest is text."""
    lr: float
    """Peak of the learning rate, which ends at 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Sizes of all parts of the proof."""

    num_merges: int
    """Merges of the vocabulary."""
    model: dict[str, int]
    """Keys of the model's configuration that differ from the preset `tiny`."""
    text_bytes: int
    """UTF-8 bytes of the texts of one use, at most."""
    num_bases: int
    num_orders: int
    """Orders of the data of each base."""
    seq_len: int
    """Tokens of a row."""
    global_batch_size: int
    """Rows of a step."""
    pretrain_steps: int
    """Steps on text and tasks."""
    rounds: tuple[Round, ...]
    """Rounds of post-training; it ends after the first one whose model passes the gates."""
    steps: int
    """Steps of continual pretraining."""
    looks: int
    """Measurements on the way."""
    num_training_items: int
    """Task items of each family and language that are trained on, at most."""
    num_items: int
    """Items of each family in the end, half of them in each language."""
    num_prompts: int
    """Prompts of each language that the guard asks, of all families together."""
    num_own: int
    """Questions whose replies by the base are the source of own traces."""
    guard: dict[str, Any]
    """Keys of the run's guard section."""
    generation: dict[str, Any]
    """Keys of every domain of prompts."""
    traces: dict[str, Any]
    """Keys of every domain of own traces."""
    gates: bool
    """Whether a base that cannot do the tasks ends the proof."""

    @property
    def interval_steps(self) -> int:
        """Steps between two measurements."""
        return self.steps // self.looks


REAL = Scale(
    num_merges=4096,
    model={"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 4},
    text_bytes=12_000_000,
    num_bases=2,
    num_orders=3,
    seq_len=512,
    global_batch_size=8,
    pretrain_steps=2400,
    rounds=(
        *(3 * (Round(steps=600, tasks_share=0.8, lr=3e-3),)),
        *(6 * (Round(steps=100, tasks_share=1.0, lr=1e-3),)),
    ),
    steps=120,
    looks=6,
    num_training_items=12_000,
    num_items=1000,
    num_prompts=400,
    num_own=1500,
    # the default, 1 %, takes more than twice the documents
    guard={"tolerance_percent": 2.0, "max_documents": 400, "fresh_documents": 0},
    generation={"max_new_tokens": 160},
    traces={"max_new_tokens": 160, "num_traces": 200},
    gates=True,
)
SMOKE = Scale(
    num_merges=1024,
    model={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
    text_bytes=600_000,
    num_bases=1,
    num_orders=1,
    seq_len=256,
    global_batch_size=4,
    pretrain_steps=40,
    rounds=2 * (Round(steps=300, tasks_share=1.0, lr=3e-3),),
    steps=8,
    looks=2,
    num_training_items=600,
    num_items=50,
    num_prompts=96,
    num_own=60,
    guard={
        "tolerance_percent": 20.0,
        "hard_limit_percent": 50.0,
        "max_documents": 60,
        "fresh_documents": 0,
    },
    generation={
        "max_new_tokens": 96,
        "format_tolerance_points": 60.0,
        "accuracy_tolerance_points": 60.0,
        "hard_limit_points": 90.0,
    },
    traces={"max_new_tokens": 96, "tolerance": 4.0, "hard_limit": 8.0},
    gates=False,
)

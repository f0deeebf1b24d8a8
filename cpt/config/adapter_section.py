"""The run YAML's `adapter` section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cpt.config.unused_keys import unused_keys

RANK_STEP = 8
"""Grouped products in bf16 want rows that are multiples of 16 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSection:
    """The `adapter` section: what is trained beside a model that stays as it is
    (cpt/model/adapters)."""

    kind: Literal["none", "lora", "dora"] = "none"
    """Train the model itself (none), or low-rank matrices beside its weights, which stay as they
    are: lora, or dora (lora with a trained magnitude of each row), for attention only."""
    targets: tuple[str, ...] = ("attention", "experts")
    """Matrices that get an adapter: the words attention (q_proj, k_proj, v_proj, o_proj) and
    experts (gate_up_proj, down_proj), or name patterns such as `q_proj` or
    `model.layers.*.mlp.experts.*`."""
    layers: tuple[int | str, ...] = ()
    """Layers whose matrices get one: numbers from 0 and ranges such as `12-23`; without any, all
    layers."""
    rank: int = 32
    """Rank of an adapter of attention."""
    expert_rank: int | None = None
    """Rank of an adapter of an expert, a multiple of 8. The default is `rank` / experts per token,
    rounded to a multiple of 8, at least 8; with `share_experts` it is `rank`, rounded alike."""
    alpha: float = 32.0
    """Every adapter is multiplied by alpha / rank, those of experts too, whatever their rank."""
    share_experts: bool = False
    """One adapter for all experts of a layer, instead of one for each."""
    base: Literal["bf16", "mxfp4"] = "bf16"
    """How the weights below the adapters are kept: bf16 in the working precision of `train.dtype`,
    mxfp4 with the matrices of the experts in 4 bits as released."""

    @property
    def is_on(self) -> bool:
        """Whether adapters are trained."""
        return self.kind != "none"

    @property
    def scale(self) -> float:
        """The factor of every adapter, s in W + s B A."""
        return self.alpha / self.rank

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, message) of what is wrong in the section alone."""
        if self.rank < 1:
            yield "rank", f"is {self.rank}, must be >= 1."
        if not 0 < self.alpha < float("inf"):
            yield "alpha", f"is {self.alpha:g}, must be above 0: it scales every adapter."
        rank = self.expert_rank
        if rank is not None and (rank < RANK_STEP or rank % RANK_STEP):
            below = max(RANK_STEP, rank - rank % RANK_STEP)
            yield (
                "expert_rank",
                f"is {rank}, must be a multiple of {RANK_STEP}: the grouped products of experts "
                f"want rows of whole 16 bytes. Nearest: {below} or {below + RANK_STEP}.",
            )
        if not self.targets:
            yield "targets", "is empty, so nothing would be trained. Give attention or experts."
        told = (
            "adapter.kind is none, so there is no adapter. Give adapter.kind: lora, or remove it."
        )
        yield from unused_keys(self, self.is_on, told)

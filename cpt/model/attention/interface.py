"""The inputs of sink attention, and the protocols of the functions that compute on them.

Shape letters: B rows, S local tokens of a row, T tokens of all rows (flattened), H query heads, K
key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from cpt.model.attention.rows import PackedRows
from cpt.parallel.halo import WindowHalo


class AttentionInputs(NamedTuple):
    """Everything that one layer attends with, all rows flattened into one sequence of tokens."""

    q_HTD: torch.Tensor
    """Queries. H is a multiple of K, and query head h reads key/value head h // (H / K)."""
    k_KTD: torch.Tensor
    """Keys."""
    v_KTD: torch.Tensor
    """Values."""
    sinks_H: torch.Tensor
    """One logit per query head, of any floating dtype."""
    rows: PackedRows
    """The documents. A query sees only keys of its own document, none of them after itself."""
    window: int | None
    """The number of keys that a query sees, itself included, or None for no limit."""
    scale: float
    """Factor on q k^T. The sinks are not scaled."""


class Attention(Protocol):
    """Causal attention with sinks over packed rows, differentiable in its four tensors."""

    def __call__(self, inputs: AttentionInputs) -> torch.Tensor:
        """Return the output (H, T, D) in the dtype of the queries."""


class Kernel(Protocol):
    """A flash attention without sinks whose backward takes the output and the log-sum-exp.

    Neither method reads `inputs.sinks_H`. The last dimension of every tensor has stride 1; the
    others have any stride.
    """

    def forward(
        self, inputs: AttentionInputs
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return out (H, T, D), lse (H, T), and the tensors that only this backward needs, if any.

        Out and lse are new tensors, which the caller may overwrite. The lse is natural, includes
        the scale, and is float32 (float64 for float64). A query that sees no key has out 0 and lse
        +inf or -inf.
        """

    def backward(
        self,
        inputs: AttentionInputs,
        d_out_HTD: torch.Tensor,
        out_HTD: torch.Tensor,
        lse_HT: torch.Tensor,
        extra: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return dq, dk and dv, reading the softmax off `lse_HT` and its correction off `out_HTD`.

        The sums of dk and dv over the query heads of a group are taken in float32 at least.
        """


class Arriving(Protocol):
    """Heads on their way to this rank."""

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Wait, and return queries, keys and values."""


class SequenceParallel(Protocol):
    """The exchange of tokens for heads among the ranks that share a row.

    Source: DeepSpeed-Ulysses, arXiv 2309.14509. T counts the tokens of the whole row here.
    """

    head_groups: int
    """Groups that a rank's heads are exchanged in."""

    def start_qkv(
        self, q_BHSD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, group: int
    ) -> Arriving:
        """Begin to fetch the same with all T tokens and one group of the heads of this rank."""

    def local_sinks(self, sinks_H: torch.Tensor, group: int) -> torch.Tensor:
        """Return the sinks of the query heads of this rank in one group."""

    def start_out(self, out_BTHD: torch.Tensor) -> Any:
        """Begin to return the output of one group to the ranks of its tokens."""

    def join_out(self, returning: list[Any]) -> torch.Tensor:
        """Return the output with all heads and the tokens of this rank, (B, S, H, D).

        Args:
            returning: What `start_out` returned for each group, in order.
        """

    @property
    def halo(self) -> WindowHalo | None:
        """The cheaper exchange for layers of its window, or None."""

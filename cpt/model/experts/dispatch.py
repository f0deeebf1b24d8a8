"""The way of rows to the ranks of their experts and back: one sort, one all-to-all each way.

    spread (row of token i for each of its experts, sorted by expert) -> out -> arrange by local
    expert -> experts -> arrange by origin -> back -> collect (the rows of a token are added in a
    fixed order)

Decisions
    - Each step is a gather whose gradient is a gather, too: nothing is scattered. Sums over the
      experts of a token are taken in fp32 in a fixed order, forward and backward, so that neither
      the layout nor chance changes them.
    - The routing weight of a row travels beside it in the same exchange, padded to where the
      grouped products want rows to start (16 bytes). The rank of the expert applies it, so the rows
      that come back need not be kept.
    - Counts are exchanged first. Their sums are the only thing that the host waits for, and it does
      not wait at all with one rank.
    - Arrived rows are put in order by arithmetic on the counts, not by another sort.
    - Rows that travel in two halves (overlap.py) are sorted by half first: each half is the same
      part of every rank's experts, so it is one span of what is sent, and an expert's rows stay in
      the same order. One exchange of counts serves both.

Shape letters: N tokens, k experts per token, R = N k rows sorted by expert, A arrived rows, M model
size, E experts, g ranks of the expert-parallel group, e experts of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cpt.model import recomputation
from cpt.model.experts.grouped import ALIGNMENT_BYTES, Groups
from cpt.model.kernels.rows import combine_rows, gather_rows, pack_rows
from cpt.parallel.exchange import Route, Transfer, all_to_all
from cpt.parallel.traffic import Traffic


def count(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return how often each expert occurs; `bincount` would make the host wait for a GPU."""
    flat = experts.reshape(-1)
    return flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))


class _Spread(torch.autograd.Function):
    """Copy each token to its rows, (N, M) -> (R, M)."""

    @staticmethod
    def forward(
        ctx: Any, tokens_NM: torch.Tensor, tokens_R: torch.Tensor, places_Nk: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(tokens_R, places_Nk)
        return gather_rows(tokens_NM, tokens_R)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        tokens_R, places_Nk = ctx.saved_tensors
        return _Collect.apply(grads[0], tokens_R, places_Nk), None, None


class _Collect(torch.autograd.Function):
    """Add up the rows of each token, (R, M) -> (N, M)."""

    @staticmethod
    def forward(
        ctx: Any, rows_RM: torch.Tensor, tokens_R: torch.Tensor, places_Nk: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(tokens_R, places_Nk)
        if recomputation.is_second_run():
            return recomputation.unread(rows_RM, places_Nk.shape[0], rows_RM.shape[1])
        return combine_rows(rows_RM, places_Nk)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        tokens_R, places_Nk = ctx.saved_tensors
        return _Spread.apply(grads[0], tokens_R, places_Nk), None, None


class _Pack(torch.autograd.Function):
    """Copy each token with its weight for the expert, (N, M) and (N, k) -> (R, M + columns)."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens_NM: torch.Tensor,
        weights_Nk: torch.Tensor,
        order_R: torch.Tensor,
        places_Nk: torch.Tensor,
        columns: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(places_Nk)
        ctx.model_size = tokens_NM.shape[1]
        ctx.weights_dtype = weights_Nk.dtype
        return pack_rows(tokens_NM, weights_Nk, order_R, columns)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_payload,) = grads
        (places_Nk,) = ctx.saved_tensors
        d_tokens_NM = combine_rows(d_payload[:, : ctx.model_size], places_Nk)
        d_weights_R = d_payload[:, ctx.model_size].to(ctx.weights_dtype)
        d_weights_Nk = d_weights_R.index_select(0, places_Nk.reshape(-1)).view_as(places_Nk)
        return d_tokens_NM, d_weights_Nk, None, None, None


class _Permute(torch.autograd.Function):
    """Reorder rows: row `order[i]` becomes row i; if nobody reads them, return zeros."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, unread: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(order, inverse)
        if unread:
            return recomputation.unread(rows, *rows.shape)
        return gather_rows(rows, order)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grads[0], inverse, order, False), None, None, None


@dataclass(frozen=True, slots=True)
class Assignment:
    """The rows of this rank's tokens, sorted by expert."""

    tokens_R: torch.Tensor
    """The token that each row belongs to."""
    places_Nk: torch.Tensor
    """The rows that a token has, one for each of its experts."""
    order_R: torch.Tensor
    """Index of each row in the flattened choice."""
    counts_E: torch.Tensor
    """Rows of each expert."""

    @classmethod
    def of(cls, choice_Nk: torch.Tensor, num_experts: int) -> Assignment:
        """Sort the router's choice by expert."""
        flat = choice_Nk.reshape(-1)
        order_R = flat.argsort(stable=True)
        places = torch.empty_like(order_R)
        places[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        return cls(
            tokens_R=order_R // choice_Nk.shape[1],
            places_Nk=places.view_as(choice_Nk),
            order_R=order_R,
            counts_E=count(flat, num_experts),
        )

    def spread(self, tokens_NM: torch.Tensor) -> torch.Tensor:
        """Return the row of each assignment, (R, M)."""
        return _Spread.apply(tokens_NM, self.tokens_R, self.places_Nk)

    def sort_weights(self, weights_Nk: torch.Tensor) -> torch.Tensor:
        """Return the routing weight of each row, (R,)."""
        places = self.places_Nk.reshape(-1)
        return _Permute.apply(weights_Nk.reshape(-1), self.order_R, places, False)

    def pack(self, tokens_NM: torch.Tensor, weights_Nk: torch.Tensor) -> torch.Tensor:
        """Return the row of each assignment with its weight beside it, for `Exchange.out`."""
        columns = ALIGNMENT_BYTES // tokens_NM.element_size()
        return _Pack.apply(tokens_NM, weights_Nk, self.order_R, self.places_Nk, columns)

    def collect(self, rows_RM: torch.Tensor) -> torch.Tensor:
        """Return the sum of each token's rows, (N, M)."""
        return _Collect.apply(rows_RM, self.tokens_R, self.places_Nk)


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """The counts of one exchange, and the order of what arrives."""

    send: list[int]
    """Rows for each rank of the group."""
    receive: list[int]
    """Rows from each rank of the group."""
    by_expert_A: torch.Tensor
    """Arrived rows in the order of the local experts, origins in turn within each."""
    by_origin_A: torch.Tensor
    """The inverse of `by_expert_A`."""
    groups: Groups
    """Arrived rows of each local expert."""
    arriving_ge: torch.Tensor
    """Rows that arrive from each rank for each local expert."""


def make_plan(counts_E: torch.Tensor, group: dist.ProcessGroup) -> ExchangePlan:
    """Exchange the counts; the host waits for the device once."""
    ranks = dist.get_world_size(group)
    arriving_E = torch.empty_like(counts_E)
    dist.all_to_all_single(arriving_E, counts_E, group=group)
    send, receive = torch.stack([counts_E, arriving_E]).view(2, ranks, -1).sum(2).tolist()
    arriving_ge = arriving_E.view(ranks, -1)
    by_expert_A, by_origin_A = arrival_orders(arriving_ge, sum(receive))
    return ExchangePlan(
        send=send,
        receive=receive,
        by_expert_A=by_expert_A,
        by_origin_A=by_origin_A,
        groups=Groups(arriving_ge.sum(0)),
        arriving_ge=arriving_ge,
    )


def arrival_orders(arriving_ge: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the order that takes rows by (origin, expert) to (expert, origin), and its inverse."""
    ranks, experts = arriving_ge.shape
    lengths_eg = arriving_ge.t().reshape(-1)
    start_by_origin = (arriving_ge.reshape(-1).cumsum(0) - arriving_ge.reshape(-1)).view(
        ranks, experts
    )
    start_by_expert = (lengths_eg.cumsum(0) - lengths_eg).view(experts, ranks)
    rows = torch.arange(num_rows, device=arriving_ge.device)
    shift_eg = (start_by_origin.t() - start_by_expert).reshape(-1)
    shift_ge = (start_by_expert.t() - start_by_origin).reshape(-1)
    by_expert = rows + shift_eg.repeat_interleave(lengths_eg, output_size=num_rows)
    by_origin = rows + shift_ge.repeat_interleave(arriving_ge.reshape(-1), output_size=num_rows)
    return by_expert, by_origin


@dataclass(frozen=True, slots=True)
class Half:
    """The exchange of half of each rank's experts."""

    plan: ExchangePlan
    sent: slice
    """Its rows among those of this rank's tokens, sorted by `label_by_half`."""
    arrived: slice
    """Its rows among those of all local experts."""
    experts: slice
    """Its experts among the local ones."""


@dataclass(frozen=True, slots=True)
class PlanInHalves:
    """Two exchanges that follow each other."""

    halves: tuple[Half, Half]
    groups: Groups
    """Arrived rows of each local expert, of both halves."""

    @property
    def num_arrived(self) -> int:
        """Rows that arrive in both."""
        return self.halves[-1].arrived.stop


def label_by_half(experts: torch.Tensor, ranks: int, num_local: int) -> torch.Tensor:
    """Number experts anew: the first half of every rank's experts comes before all second halves.

    Args:
        experts: Numbers of experts, of any shape.
        ranks: Ranks of the expert-parallel group.
        num_local: Experts of each; if odd, the second half has one more.
    """
    first = num_local // 2
    rank = experts // num_local
    local = experts % num_local
    in_first = rank * first + local
    in_second = ranks * first + rank * (num_local - first) + (local - first)
    return torch.where(local < first, in_first, in_second)


def make_plan_in_halves(labeled_counts_E: torch.Tensor, group: dist.ProcessGroup) -> PlanInHalves:
    """Exchange the counts of both halves; the host waits for the device once.

    Args:
        labeled_counts_E: Rows of each expert, in the order of `label_by_half`.
        group: The ranks that exchange.
    """
    ranks = dist.get_world_size(group)
    num_experts = labeled_counts_E.numel()
    num_local = num_experts // ranks
    numbers = torch.arange(num_experts, device=labeled_counts_E.device)
    counts_E = labeled_counts_E.index_select(0, label_by_half(numbers, ranks, num_local))
    arriving_E = torch.empty_like(counts_E)
    dist.all_to_all_single(arriving_E, counts_E, group=group)
    arriving_ge = arriving_E.view(ranks, num_local)
    both = torch.stack([counts_E, arriving_E]).view(2, ranks, num_local)
    split = num_local // 2
    sums = torch.stack([both[:, :, :split].sum(2), both[:, :, split:].sum(2)]).tolist()
    first = _half(sums[0], arriving_ge, slice(0, split), sent=0, arrived=0)
    second = _half(
        sums[1],
        arriving_ge,
        slice(split, num_local),
        sent=first.sent.stop,
        arrived=first.arrived.stop,
    )
    return PlanInHalves(halves=(first, second), groups=Groups(arriving_ge.sum(0)))


def _half(
    sums: list[list[int]], arriving_ge: torch.Tensor, experts: slice, *, sent: int, arrived: int
) -> Half:
    """Return one half, whose rows begin at `sent` and `arrived`."""
    send, receive = sums
    arriving_ge = arriving_ge[:, experts]
    by_expert_A, by_origin_A = arrival_orders(arriving_ge, sum(receive))
    plan = ExchangePlan(
        send=send,
        receive=receive,
        by_expert_A=by_expert_A,
        by_origin_A=by_origin_A,
        groups=Groups(arriving_ge.sum(0)),
        arriving_ge=arriving_ge,
    )
    return Half(
        plan=plan,
        sent=slice(sent, sent + sum(send)),
        arrived=slice(arrived, arrived + sum(receive)),
        experts=experts,
    )


class Exchange:
    """The two exchanges of a layer; in a recomputation they do no more than the backward needs."""

    def __init__(self, group: dist.ProcessGroup, traffic: Traffic) -> None:
        self._group = group
        self._traffic = traffic

    def plan_in_halves(self, labeled_counts_E: torch.Tensor) -> PlanInHalves:
        """Exchange the counts of both halves; see `make_plan_in_halves`."""
        return make_plan_in_halves(labeled_counts_E, self._group)

    def start_out(self, rows: torch.Tensor, half: Half) -> Transfer:
        """Start to send the rows of one half to their experts, or gradients of results."""
        return Transfer(rows[half.sent], self._route(half.plan), async_op=True)

    def start_back(self, arranged: torch.Tensor, half: Half, into: torch.Tensor) -> Transfer:
        """Start to send results, or gradients of rows, to where the rows came from.

        Args:
            arranged: One row for each that arrived, by origin.
            half: The half that they belong to.
            into: A tensor of the rows of this rank's tokens; those of the half are written.
        """
        route = self._route(half.plan).reversed()
        return Transfer(arranged, route, async_op=True, into=into[half.sent])

    def out(
        self, payload: torch.Tensor, model_size: int, counts_E: torch.Tensor
    ) -> tuple[ExchangePlan, torch.Tensor, torch.Tensor]:
        """Send rows and weights, packed by `Assignment.pack`, to their experts.

        Returns:
            The plan, and the rows (A, M) and weights (A,) in the order of the local experts.
        """
        running = recomputation.current()
        if running is not None and running.keep and running.is_second:
            plan, arrived = running.take()
            arrived.requires_grad_(payload.requires_grad)
        else:
            plan = make_plan(counts_E, self._group)
            arrived = all_to_all(payload, self._route(plan))
            if running is not None and running.keep:
                running.put((plan, arrived.detach()))
        arrived = _Permute.apply(arrived, plan.by_expert_A, plan.by_origin_A, False)
        return plan, arrived[:, :model_size], arrived[:, model_size]

    def back(self, done_AM: torch.Tensor, plan: ExchangePlan) -> torch.Tensor:
        """Return the results (R, M) on the rank of their tokens.

        A recomputation gets zeros, because nobody reads its output.
        """
        second = recomputation.is_second_run()
        arranged = _Permute.apply(done_AM, plan.by_origin_A, plan.by_expert_A, second)
        if second:
            # Both runs must save the same tensors from here on, too.
            zeros = recomputation.unread(arranged, sum(plan.send), done_AM.shape[1])
            return zeros.requires_grad_(arranged.requires_grad)
        return all_to_all(arranged, self._route(plan).reversed())

    def _route(self, plan: ExchangePlan) -> Route:
        return Route(plan.send, plan.receive, self._group, self._traffic, kind="experts")

"""gpt-oss experts under expert parallelism: a drop-in for GptOssMLP with this rank's experts.

Decisions
    - The weights keep Hugging Face's names and layout (fused, gate and up interleaved, biases): a
      rank holds a contiguous slice of the expert axis of each tensor, and nothing else changes.
    - Rows are sorted by expert once and go out and back once (dispatch.py); the arithmetic is one
      autograd Function after another (function.py). With `model.expert_overlap: halves` both are
      one Function (overlap.py), which is called inside the module that holds the weights, because
      ZeRO-3 gathers them around the calls of a module.

Source of the maths: transformers, models/gpt_oss/modeling_gpt_oss.py (GptOssExperts); model card
arXiv 2508.10925.

Shape letters: N tokens, R rows sorted by expert, M model size, E experts, k top_k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cpt.deepspeed_adapter.experts import ExpertLayerBase, expert_group_name, mark_expert
from cpt.model import recomputation
from cpt.model.experts.adapter_products import ExpertAdapter, ExpertAdapters
from cpt.model.experts.dispatch import Assignment, Exchange, ExchangePlan, label_by_half
from cpt.model.experts.function import Activation, Parameters, apply_experts
from cpt.model.experts.grouped import Groups
from cpt.model.experts.overlap import apply_in_halves
from cpt.model.experts.router_watch import RouterWatch
from cpt.model.products.recipe import EightBit
from cpt.model.weights.hf_layout import EXPERT_TENSORS
from cpt.parallel.topology import Topology


class LocalExperts(nn.Module):
    """The experts [first, first + num_experts) of one layer."""

    def __init__(self, source: Any, first_expert: int, num_experts: int) -> None:
        super().__init__()
        self.first_expert = first_expert
        self.num_experts = num_experts
        self.activation = Activation(float(source.alpha), float(source.limit))
        for name in EXPERT_TENSORS:
            whole = getattr(source, name)
            part = whole.detach()[first_expert : first_expert + num_experts].clone()
            self.register_parameter(name, nn.Parameter(part))
        self.eight_bit: EightBit | None = None
        """How training computes products with the matrices; None for the working precision."""
        self._adapter_names: dict[str, tuple[str, str]] = {}
        self._adapter_scale = 1.0

    def add_adapter(
        self, matrix: str, a_name: str, a: nn.Parameter, b_name: str, b: nn.Parameter, scale: float
    ) -> None:
        """Put an adapter beside one of the two products.

        Args:
            matrix: gate_up_proj or down_proj.
            a_name: Name of A in this module.
            a: (E, in, r), or (in, r) if the experts share it.
            b_name: Name of B in this module.
            b: (E, r, out), or (r, out).
            scale: The factor of every adapter of this layer.
        """
        self.register_parameter(a_name, a)
        self.register_parameter(b_name, b)
        self._adapter_names[matrix] = (a_name, b_name)
        self._adapter_scale = scale

    @property
    def parameters_of_experts(self) -> Parameters:
        """The tensors of the experts."""
        return Parameters(*(getattr(self, name) for name in EXPERT_TENSORS))

    @property
    def adapters(self) -> ExpertAdapters:
        """The adapters beside them."""
        return ExpertAdapters(self._adapter_of("gate_up_proj"), self._adapter_of("down_proj"))

    def _adapter_of(self, matrix: str) -> ExpertAdapter | None:
        names = self._adapter_names.get(matrix)
        if names is None:
            return None
        a_name, b_name = names
        return ExpertAdapter(getattr(self, a_name), getattr(self, b_name), self._adapter_scale)

    @property
    def eight_bit_now(self) -> EightBit | None:
        """How products are computed in the present mode: evaluation rounds nothing."""
        return self.eight_bit if self.training else None

    def forward(
        self,
        rows_RM: torch.Tensor,
        weights_R: torch.Tensor,
        groups: Groups,
        grouped: bool | None = None,
    ) -> torch.Tensor:
        """Apply each expert to its rows and multiply by their weights; see `apply_experts`."""
        return apply_experts(
            rows_RM,
            weights_R,
            groups,
            self.parameters_of_experts,
            self.activation,
            adapters=self.adapters,
            eight_bit=self.eight_bit_now,
            grouped=grouped,
            skip_output=recomputation.is_second_run(),
        )

    def each_apart(
        self, rows_RM: torch.Tensor, weights_R: torch.Tensor, counts_E: torch.Tensor
    ) -> torch.Tensor:
        """Apply each expert to its rows in products and loops of their own.

        Vectorized loops and products may round differently where a tensor ends, or has one row. So
        an output depends on no rows but those of its own expert, which `forward` does not promise.

        It serves decoding and computes in the working precision.

        Args:
            rows_RM: Inputs sorted by expert.
            weights_R: Routing weight of each row.
            counts_E: Rows of each of these experts.

        Returns:
            The outputs (R, M).
        """
        parameters = self.parameters_of_experts
        adapters = self.adapters
        sizes = counts_E.tolist()
        rows_of = rows_RM.split(sizes)
        weights_of = weights_R.split(sizes)
        done = []
        for expert in range(self.num_experts):
            own = slice(expert, expert + 1)
            of_expert = parameters.of_experts(own)
            groups = Groups(counts_E[own])
            done.append(
                apply_experts(
                    rows_of[expert],
                    weights_of[expert],
                    groups,
                    of_expert,
                    self.activation,
                    adapters=adapters.of_experts(own),
                )
            )
        return torch.cat(done)


class LocalExpertsInHalves(LocalExperts):
    """The same experts, which exchange the rows of one half while they compute the other."""

    def forward(  # type: ignore[override]
        self, payload: torch.Tensor, counts_E: torch.Tensor, exchange: Exchange
    ) -> tuple[torch.Tensor, int]:
        """Send rows to their experts, compute and send back; see `apply_in_halves`."""
        return apply_in_halves(
            payload,
            counts_E,
            exchange,
            self.parameters_of_experts,
            self.activation,
            self.adapters,
            self.eight_bit_now,
        )


class ExpertParallelMLP(ExpertLayerBase):  # type: ignore[misc]
    """A drop-in for transformers' GptOssMLP with the experts spread over a group of ranks."""

    def __init__(self, source: Any, topology: Topology, *, in_halves: bool = False) -> None:
        """Take over the router and this rank's experts of `source`, a GptOssMLP.

        Args:
            source: The layer to replace.
            topology: The layout.
            in_halves: Whether exchange and computation overlap, which takes two ranks and two
                experts on each.
        """
        # The base class's constructor would repack the experts and drop their biases.
        nn.Module.__init__(self)
        self.num_experts = int(source.experts.num_experts)
        self.ep_size = topology.ep_size
        self.num_local_experts = self.num_experts // self.ep_size
        self.ep_group_name = expert_group_name(self.ep_size)
        self.ep_group = topology.ep_group
        self.exchange = Exchange(topology.ep_group, topology.traffic)
        self.watch: RouterWatch | None = None
        self.layer_index = 0
        self.router = source.router
        self.in_halves = in_halves
        self.apart = False
        """Whether the rows that an expert gets from a rank are computed apart from all others, so
        that the output is that of one process, bit for bit, in every layout. Not with halves.
        """
        experts_class = LocalExpertsInHalves if in_halves else LocalExperts
        self.experts = experts_class(
            source.experts, topology.ep_rank * self.num_local_experts, self.num_local_experts
        )
        for parameter in self.experts.parameters():
            mark_expert(parameter, self.ep_size)

    def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing when the engine calls this: the constructor has bound the group."""

    def forward(self, hidden_BSM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route, exchange, compute, exchange back, combine.

        Returns:
            The output (B, S, M) and the routing weights (N, k), as from GptOssMLP.
        """
        hidden_NM = hidden_BSM.reshape(-1, hidden_BSM.shape[-1])
        logits_NE, weights_Nk, choice_Nk = self.router(hidden_NM)
        watch = self.watch if self.training else None
        if watch is not None:
            weights_Nk = watch.observe(
                self.layer_index, hidden_NM, logits_NE, weights_Nk, choice_Nk
            )
        if self.in_halves:
            choice_Nk = label_by_half(choice_Nk, self.ep_size, self.num_local_experts)
        assignment = Assignment.of(choice_Nk, self.num_experts)
        if self.ep_size == 1:
            rows_RM = assignment.spread(hidden_NM)
            weights_R = assignment.sort_weights(weights_Nk)
            if self.apart:
                done_RM = self.experts.each_apart(rows_RM, weights_R, assignment.counts_E)
            else:
                done_RM = self.experts(rows_RM, weights_R, Groups(assignment.counts_E))
            num_computed = done_RM.shape[0]
        else:
            payload = assignment.pack(hidden_NM, weights_Nk)
            done_RM, num_computed = self._exchange_and_compute(
                payload, hidden_NM.shape[1], assignment.counts_E
            )
        if watch is not None:
            watch.computed(num_computed)
        return assignment.collect(done_RM).view_as(hidden_BSM), weights_Nk

    def _exchange_and_compute(
        self, payload: torch.Tensor, model_size: int, counts_E: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        """Return the results (R, M) of this rank's rows, and how many rows it computed."""
        if self.in_halves:
            done_RM, num_computed = self.experts(payload, counts_E, self.exchange)
            return done_RM, num_computed
        plan, rows_AM, weights_A = self.exchange.out(payload, model_size, counts_E)
        if self.apart:
            computed_AM = self._compute_apart(rows_AM, weights_A, plan)
        else:
            computed_AM = self.experts(rows_AM, weights_A, plan.groups)
        return self.exchange.back(computed_AM, plan), computed_AM.shape[0]

    def _compute_apart(
        self, rows_AM: torch.Tensor, weights_A: torch.Tensor, plan: ExchangePlan
    ) -> torch.Tensor:
        """Return the results (A, M), in the order of the local experts as the rows are."""
        rows_by_origin = rows_AM[plan.by_origin_A].split(plan.receive)
        weights_by_origin = weights_A[plan.by_origin_A].split(plan.receive)
        computed = []
        for rows, weights, counts_E in zip(
            rows_by_origin, weights_by_origin, plan.arriving_ge, strict=True
        ):
            computed.append(self.experts.each_apart(rows, weights, counts_E))
        return torch.cat(computed)[plan.by_expert_A]

"""The routers of all layers: two optional penalties on them, and statistics of their choices.

    auxiliary loss of a layer  = E * sum_e load_e * mean over tokens of p_e
    z-loss of a layer          = mean over tokens of logsumexp(logits)^2

with p the softmax over all experts. The auxiliary loss is 1 if every expert is equally likely. Each
loss is added to the training loss for every layer, times its coefficient; the loss that is reported
stays the language model's own.

Decisions
    - load_e is the share of expert e in the assignments of the whole previous global batch (equal
      shares before the first step). The shares of the present batch are known only after its last
      micro batch, and those of a part of it would make the gradient depend on how the batch is cut.
      With the previous shares every layout has the same gradient, and nothing is exchanged in the
      forward.
    - The means are over all positions of the global batch, padding included, and tokens whose
      labels bear no loss: experts compute for them all.
    - A penalty rides on the routing weights: its gradient starts when theirs arrives. So it needs
      no place in the outputs of the layers and is right under activation checkpointing.
    - Counting happens only in the first run of a checkpointed layer, only in training, and only in
      steps that need it.

Sources: Switch Transformer, arXiv 2101.03961, eq. 4; ST-MoE, arXiv 2202.08906, eq. 5; shares of the
global batch rather than of each micro batch: arXiv 2501.11873.

Shape letters: N tokens, k experts per token, E experts, L layers, S sources, M model size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from cpt.model import recomputation
from cpt.storage.transfer import to_device


class _Attach(torch.autograd.Function):
    """Pass `carrier` on, and give `penalty` the gradient 1 in the backward."""

    @staticmethod
    def forward(ctx: Any, carrier: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
        ctx.like = penalty.new_ones(())
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grads[0], ctx.like


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSums:
    """Statistics of the routers in one step, summed over all ranks; fp64 on the CPU."""

    counts_LSE: torch.Tensor
    """Assignments of tokens to experts, by layer and source."""
    entropy_L: torch.Tensor
    """Sum over tokens of the entropy of p in nats."""
    square_L: torch.Tensor
    """Sum over tokens of logsumexp(logits)^2."""
    probability_LE: torch.Tensor
    """Sum over tokens of p."""
    overlap_LS: torch.Tensor | None
    """Assignments that the router before training would have made, too; None if it is unknown."""
    rows_computed: int
    """Rows that went through experts."""
    top_k: int
    """Assignments of a token in each layer."""


class RouterWatch:
    """The penalties and statistics, shared by the expert layers of a model."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        aux_coef: float,
        z_coef: float,
        device: torch.device,
    ) -> None:
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._top_k = top_k
        self._aux_coef = aux_coef
        self._z_coef = z_coef
        self._device = device
        self.original: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Weight and bias of every layer's router before training; empty if unknown."""
        self._load_LE = torch.full((num_layers, num_experts), 1 / num_experts, device=device)
        self._scale = 0.0
        self._measuring = False
        self._rows_computed = 0
        self._sources_B = torch.zeros(0, dtype=torch.int64, device=device)
        self._sums: dict[str, torch.Tensor] = {}

    def attach(self, model: Any) -> None:
        """Make every expert layer of a patched model report here."""
        for index, layer in enumerate(model.model.layers):
            layer.mlp.watch = self
            layer.mlp.layer_index = index

    @property
    def is_counting(self) -> bool:
        """Whether this step needs the experts' shares."""
        return self._measuring or self._aux_coef > 0

    def begin(self, *, num_sources: int, positions: int, world_size: int, measure: bool) -> None:
        """Start an optimizer step.

        Args:
            num_sources: Sources that rows may come from.
            positions: Tokens of the global batch, padding included.
            world_size: Ranks over which the engine averages gradients.
            measure: Collect everything, not only what the penalties need.
        """
        self._scale = world_size / positions
        self._measuring = measure
        self._rows_computed = 0
        layers = self._num_layers
        experts = self._num_experts
        shapes: dict[str, tuple[int, ...]] = {"counts": (layers, num_sources, experts)}
        if measure:
            shapes |= {"entropy": (layers,), "square": (layers,), "probability": (layers, experts)}
        if measure and self.original:
            shapes["overlap"] = (layers, num_sources)
        self._sums = {}
        if self.is_counting:
            for name, shape in shapes.items():
                self._sums[name] = torch.zeros(shape, dtype=torch.float64, device=self._device)

    def enter(self, sources_B: torch.Tensor) -> None:
        """Note the sources of the rows of the next forward pass; they come from the host."""
        if self._sums:
            self._sources_B = to_device(sources_B, self._device)

    def observe(
        self,
        layer: int,
        hidden_NM: torch.Tensor,
        logits_NE: torch.Tensor,
        weights_Nk: torch.Tensor,
        choice_Nk: Any,
    ) -> torch.Tensor:
        """Count, and return the routing weights with the penalties attached."""
        if self._sums and not recomputation.is_second_run():
            with torch.no_grad():
                self._count(layer, hidden_NM, logits_NE, choice_Nk)
        if not (self._aux_coef or self._z_coef):
            return weights_Nk
        logits = logits_NE.float()
        penalty = (
            self._aux_coef
            * self._num_experts
            * (logits.softmax(1).sum(0) * self._load_LE[layer]).sum()
        )
        if self._z_coef:
            penalty = penalty + self._z_coef * logits.logsumexp(1).square().sum()
        return _Attach.apply(weights_Nk, penalty * self._scale)

    def _count(
        self, layer: int, hidden_NM: torch.Tensor, logits_NE: torch.Tensor, choice_Nk: torch.Tensor
    ) -> None:
        tokens, top_k = choice_Nk.shape
        sources_N = self._sources_B.repeat_interleave(
            tokens // len(self._sources_B), output_size=tokens
        )
        cells = (sources_N[:, None] * self._num_experts + choice_Nk).view(-1)
        ones = torch.ones_like(cells, dtype=torch.float64)
        self._sums["counts"][layer].view(-1).scatter_add_(0, cells, ones)
        self._rows_computed -= tokens * top_k
        if not self._measuring:
            return
        log_p = logits_NE.float().log_softmax(1)
        p = log_p.exp()
        self._sums["entropy"][layer] -= (p * log_p).sum(dtype=torch.float64)
        self._sums["square"][layer] += (
            logits_NE.float().logsumexp(1).square().sum(dtype=torch.float64)
        )
        self._sums["probability"][layer] += p.sum(0, dtype=torch.float64)
        if self.original:
            weight, bias = self.original[layer]
            before_Nk = (
                F.linear(hidden_NM, weight.to(hidden_NM.dtype), bias.to(hidden_NM.dtype))
                .topk(top_k)
                .indices
            )
            same_N = (choice_Nk[:, :, None] == before_Nk[:, None, :]).sum((1, 2)).double()
            self._sums["overlap"][layer].scatter_add_(0, sources_N, same_N)

    def computed(self, rows: int) -> None:
        """Count rows that went through the experts of this rank."""
        if self._sums and not recomputation.is_second_run():
            self._rows_computed += rows

    def finish(self, group: dist.ProcessGroup) -> RouterSums | None:
        """Add up over all ranks, and keep the experts' shares for the next step.

        Returns:
            The statistics, if this step was measured.
        """
        if not self._sums:
            return None
        extra = torch.tensor([float(self._rows_computed)], dtype=torch.float64)
        # The one wait for the device: everything comes in one piece.
        collected = torch.cat([sums.view(-1) for sums in self._sums.values()]).cpu()
        flat = torch.cat([collected, extra])
        dist.all_reduce(flat, group=group)
        total: dict[str, torch.Tensor] = {}
        first = 0
        for name, sums in self._sums.items():
            total[name] = flat[first : first + sums.numel()].view(sums.shape)
            first += sums.numel()
        counts_LE = total["counts"].sum(1)
        shares_LE = (counts_LE / counts_LE.sum(1, keepdim=True)).float()
        self._load_LE = to_device(shares_LE, self._device)
        self._sums = {}
        if not self._measuring:
            return None
        return RouterSums(
            counts_LSE=total["counts"],
            entropy_L=total["entropy"],
            square_L=total["square"],
            probability_LE=total["probability"],
            overlap_LS=total.get("overlap"),
            rows_computed=int(counts_LE.sum()) + int(flat[-1]),
            top_k=self._top_k,
        )

    def state(self) -> list[list[float]] | None:
        """Return the shares that the next step needs, for a checkpoint; JSON keeps fp32 exactly."""
        return self._load_LE.tolist() if self._aux_coef else None

    def restore(self, state: list[list[float]] | None) -> None:
        """Take over the result of `state`; None leaves equal shares."""
        if state is not None:
            self._load_LE = torch.tensor(state, dtype=torch.float32, device=self._device)


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights and biases of the routers, by name, layer by layer."""
    return {name: p for name, p in model.named_parameters() if ".mlp.router." in name}

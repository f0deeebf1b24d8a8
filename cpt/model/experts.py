"""gpt-oss experts under expert parallelism: this rank's experts, and the two exchanges around them.

Decisions
    The weights keep Hugging Face's names and layout (fused, gate and up interleaved, biases): a rank holds a
    contiguous slice of the expert axis of each tensor and nothing else changes.
    Assignments are sorted by expert once; equal experts are contiguous on both sides of the exchange.
    The top_k results of a token are added in a fixed order (reshape and sum), so the result does not depend on the
    layout or on the order of arrival.

Source of the maths: transformers, models/gpt_oss/modeling_gpt_oss.py (GptOssExperts); model card arXiv 2508.10925.

Shape letters: N tokens, R rows sorted by expert, M model size, I expert size, E experts, e local experts, k top_k.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cpt.deepspeed_internals import ExpertLayerBase, expert_group_name, mark_expert
from cpt.model.hf_layout import EXPERT_TENSORS
from cpt.parallel.exchange import all_to_all
from cpt.parallel.topology import Topology


class LocalExperts(nn.Module):
    """The experts [first, first + num_experts) of one layer."""

    def __init__(self, source: Any, first_expert: int, num_experts: int) -> None:
        super().__init__()
        self.first_expert, self.num_experts = first_expert, num_experts
        self.alpha, self.limit = float(source.alpha), float(source.limit)
        for name in EXPERT_TENSORS:
            whole = getattr(source, name)
            part = whole.detach()[first_expert : first_expert + num_experts].clone()
            self.register_parameter(name, nn.Parameter(part))

    def forward(self, rows_RM: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Apply expert i to its `counts[i]` rows.

        Args:
            rows_RM: Inputs sorted by local expert.
            counts: Rows of each local expert; zero is fine.

        Returns:
            (R, M) in the same order.
        """
        done = []
        # unbind, not indexing: the backward of indexing builds a full-size zero gradient per expert
        weights = zip(*(getattr(self, name).unbind(0) for name in EXPERT_TENSORS), strict=True)
        for x_RM, (gate_up_M2I, gate_up_bias_2I, down_IM, down_bias_M) in zip(
            rows_RM.split(counts), weights, strict=True
        ):
            gate_up = torch.addmm(gate_up_bias_2I, x_RM, gate_up_M2I)
            done.append(torch.addmm(down_bias_M, self.activate(gate_up), down_IM))
        return torch.cat(done)

    def activate(self, gate_up_R2I: torch.Tensor) -> torch.Tensor:
        """(up + 1) * gate * sigmoid(alpha * gate), clamped; even columns are gate, odd ones up."""
        gate = gate_up_R2I[:, ::2].clamp(max=self.limit)
        up = gate_up_R2I[:, 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


class ExpertParallelMLP(ExpertLayerBase):  # type: ignore[misc]
    """Drop-in for transformers' GptOssMLP whose experts are spread over an expert-parallel group."""

    def __init__(self, source: Any, topology: Topology) -> None:
        nn.Module.__init__(self)  # the base constructor would repack the experts and drop their biases
        self.num_experts = int(source.experts.num_experts)
        self.ep_size = topology.ep_size
        self.num_local_experts = self.num_experts // self.ep_size
        self.ep_group_name = expert_group_name(self.ep_size)
        self.ep_group = topology.ep_group
        self.traffic = topology.traffic
        self.router = source.router
        self.experts = LocalExperts(source.experts, topology.ep_rank * self.num_local_experts, self.num_local_experts)
        for parameter in self.experts.parameters():
            mark_expert(parameter, self.ep_size)

    def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Called by the engine on every expert layer; the group is bound by the constructor."""

    def forward(self, hidden_BSM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route, exchange, compute, exchange back, combine.

        Returns:
            (B, S, M) and the routing weights (N, k), as GptOssMLP does.
        """
        hidden_NM = hidden_BSM.reshape(-1, hidden_BSM.shape[-1])
        _, weight_Nk, choice_Nk = self.router(hidden_NM)
        top_k = choice_Nk.shape[1]
        order = choice_Nk.reshape(-1).argsort(stable=True)
        counts_E = torch.bincount(choice_Nk.reshape(-1), minlength=self.num_experts)
        rows_RM = hidden_NM[order // top_k]
        if self.ep_size == 1:
            done_RM = self.experts(rows_RM, counts_E.tolist())
        else:
            done_RM = self._exchange_and_compute(rows_RM, counts_E)
        back_NkM = torch.empty_like(done_RM).index_copy(0, order, done_RM).view(*choice_Nk.shape, -1)
        out_NM = (back_NkM * weight_Nk.unsqueeze(-1)).sum(1)
        return out_NM.view_as(hidden_BSM), weight_Nk

    def _exchange_and_compute(self, rows_RM: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        arriving = torch.empty_like(counts_E)
        dist.all_to_all_single(arriving, counts_E, group=self.ep_group)
        counts = torch.stack([counts_E, arriving]).view(2, self.ep_size, self.num_local_experts).cpu()
        send, receive = counts[0].sum(1).tolist(), counts[1].sum(1).tolist()
        arrived_RM = self._send(rows_RM, send, receive)
        # rows arrive ordered by (origin, expert); the experts want them ordered by (expert, origin)
        experts = torch.arange(self.num_local_experts, device=rows_RM.device).repeat(self.ep_size)
        by_expert = experts.repeat_interleave(arriving, output_size=sum(receive)).argsort(stable=True)
        done_RM = self.experts(arrived_RM[by_expert], counts[1].sum(0).tolist())
        done_RM = torch.empty_like(done_RM).index_copy(0, by_expert, done_RM)
        return self._send(done_RM, receive, send)

    def _send(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        return all_to_all(rows, send, receive, group=self.ep_group, traffic=self.traffic, kind="experts")

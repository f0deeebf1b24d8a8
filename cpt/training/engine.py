"""The DeepSpeed engine: one optimizer step, and scoring without one.

The loss that a rank hands to the engine is

    sum over its own tokens of nll / predicted tokens of the global batch * world_size

so that the engine's mean over ranks, and its sum over accumulation steps, is the mean over the global batch in every
layout.  `backward` is told not to divide by the accumulation steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from cpt import deepspeed_internals
from cpt.config import RunConfig, TrainSection
from cpt.errors import InternalError
from cpt.faults import fault_point
from cpt.model.attention import Attention
from cpt.model.gpt_oss import GptOssForCPT
from cpt.parallel.topology import Topology
from cpt.parallel.traffic import KINDS
from cpt.parallel.ulysses import Ulysses
from cpt.training.loader import MicroBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """One optimizer step, summed over all ranks."""

    loss: float
    """Nats per predicted token over the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    nll_by_source: list[float]
    """Sum of nats per source."""
    tokens_by_source: list[int]
    """Predicted tokens per source."""
    bytes_sent: dict[str, int]
    """Bytes on the wire by kind."""
    stop_requested: bool
    """Whether any rank wants to stop."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay; biases, norms and sinks do not; frozen parameters are in none.

    gpt-oss stores an expert bias as a matrix (one row per expert), so names decide, not the number of axes.
    """
    kept: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last = name.rsplit(".", 1)[-1]
        plain = last.endswith("bias") or last == "sinks" or "norm" in name
        (kept if plain else decayed).append(parameter)
    return [
        {"name": "decay", "params": decayed, "weight_decay": weight_decay},
        {"name": "no_decay", "params": kept, "weight_decay": 0.0},
    ]


def _optimizer(model: GptOssForCPT, train: TrainSection, config: dict[str, Any]) -> torch.optim.Optimizer:
    groups = deepspeed_internals.separate_experts(parameter_groups(model, train.weight_decay))
    settings: dict[str, Any] = {"lr": train.lr, "betas": (train.beta1, train.beta2), "eps": train.eps}
    offload = config["zero_optimization"].get("offload_optimizer", {}).get("device")
    if offload in ("cpu", "nvme"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles a kernel on import of its builder

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=model.device.type == "cuda", **settings)


def _check_expert_marks(model: GptOssForCPT) -> None:
    """Without the marks ZeRO-3 trains different experts as if they were replicas, and says nothing."""
    for name, parameter in model.named_parameters():
        expert = ".mlp.experts." in name
        if expert != deepspeed_internals.is_expert(parameter):
            raise InternalError(f"{name} {'lacks' if expert else 'has'} the marks of an expert parameter.")


class TrainingEngine:
    """A patched model in a DeepSpeed engine, with the attention kernel and the exchanges it was built for."""

    def __init__(
        self, model: GptOssForCPT, config: RunConfig, topology: Topology, kernel: Attention, exchange: Ulysses | None
    ) -> None:
        if config.model.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        _check_expert_marks(model)
        self.topology = topology
        self._sequence_parallel = exchange
        self._kernel = kernel
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=_optimizer(model, config.train, config.engine_json), config=config.engine_json
        )

    def set_learning_rate(self, lr: float) -> None:
        """Use `lr` for the next optimizer step."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr

    def token_losses(self, batch: MicroBatch) -> torch.Tensor:
        """(B, S) nats of this rank's tokens, 0 where there is no label."""
        return self.deepspeed(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            labels=batch.labels,
            packed_rows=batch.packed_rows,
            sequence_parallel=self._sequence_parallel,
            kernel=self._kernel,
        )

    def step(
        self, micro_batches: Iterable[MicroBatch], tokens_by_source: list[int], *, step: int, stop_requested: bool
    ) -> StepResult:
        """Forward, backward and update on one global batch.

        Args:
            micro_batches: This rank's part.
            step: The optimizer step being done, counted from 1; names it to `fault_point`.
            tokens_by_source: Predicted tokens of the whole global batch, by source; known from the row ids.
            stop_requested: Whether this rank wants to stop; all ranks learn whether any does.

        Raises:
            InternalError: on all ranks alike: the loss is not finite, and no rank has applied the update; or the
                gradient norm is not, and the weights in memory are lost.
        """
        total_tokens = sum(tokens_by_source)
        nll_by_source = torch.zeros(len(tokens_by_source), dtype=torch.float64)
        loss_scale = self.topology.world_size / total_tokens
        pending = False
        for batch in micro_batches:
            if pending:
                self.deepspeed.step()  # between accumulation steps this only advances the engine's counter
            nll_BS = self.token_losses(batch) * fault_point("forward", step)
            fault_point("backward", step)
            share = loss_scale * fault_point("gradient", step)
            self.deepspeed.backward(nll_BS.sum() * share, scale_wrt_gas=False)
            by_row = nll_BS.detach().sum(1).double().cpu()
            nll_by_source.index_add_(0, batch.row_labels.cpu(), by_row)
            pending = True
        nll_by_source, bytes_sent, stop = self._sum_over_ranks(nll_by_source, stop_requested)
        loss = float(nll_by_source.sum()) / total_tokens
        if not torch.isfinite(nll_by_source).all():
            raise InternalError(f"the loss is {loss}; the update was not applied. The last checkpoint is intact.")
        fault_point("optimizer_step", step)
        self.deepspeed.step()
        grad_norm = float(self.deepspeed.get_global_grad_norm())
        if not math.isfinite(grad_norm):
            raise InternalError(f"the gradient norm is {grad_norm}; nothing was saved. The last checkpoint is intact.")
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            nll_by_source=nll_by_source.tolist(),
            tokens_by_source=tokens_by_source,
            bytes_sent=bytes_sent,
            stop_requested=stop,
        )

    def _sum_over_ranks(
        self, nll_by_source: torch.Tensor, stop_requested: bool
    ) -> tuple[torch.Tensor, dict[str, int], bool]:
        """The one bookkeeping collective of a step."""
        sent = self.topology.traffic.take()
        extra = torch.tensor([*(sent[kind] for kind in KINDS), int(stop_requested)], dtype=torch.float64)
        everything = torch.cat([nll_by_source, extra])
        dist.all_reduce(everything, group=self.topology.control_group)
        nll, rest = everything[: nll_by_source.numel()], everything[nll_by_source.numel() :]
        return nll, {kind: int(value) for kind, value in zip(KINDS, rest, strict=False)}, bool(rest[-1] > 0)

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> torch.Tensor:
        """Token losses without a backward pass; (B, S) on the CPU.  Its traffic is not counted."""
        self.deepspeed.eval()
        try:
            return self.token_losses(batch).cpu()
        finally:
            self.deepspeed.train()
            self.topology.traffic.take()

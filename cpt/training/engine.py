"""The DeepSpeed engine: one optimizer step, and scoring without one.

The loss that a rank hands to the engine is

    sum over its own tokens of nll / predicted tokens of the global batch * world_size

so that the engine's mean over ranks, and its sum over accumulation steps, is the mean over the
global batch in every layout.  With targets of another model (`train.kl_targets`) `train.kl_weight`
times the divergence from them is added in the same way.  `backward` is told not to divide by the
accumulation steps.

Whether an update is made is decided before it, from the loss and the squared gradient norm summed
over all ranks, so that all ranks decide alike and nothing that is not finite reaches weights or
Adam's state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from cpt.config import RunConfig, TrainSection
from cpt.deepspeed_adapter.engine import initialize
from cpt.deepspeed_adapter.experts import is_expert, separate_experts
from cpt.deepspeed_adapter.gradients import discard_gradients, squared_gradient_norm
from cpt.deepspeed_adapter.offload import file_bytes, nvme_paths
from cpt.errors import InternalError
from cpt.model.attention import Attention
from cpt.model.experts.router_watch import RouterSums, RouterWatch
from cpt.model.gpt_oss import GptOssForCPT
from cpt.model.weights.hf_layout import is_expert_name
from cpt.parallel.agreement import together
from cpt.parallel.topology import Topology
from cpt.parallel.traffic import KINDS
from cpt.parallel.ulysses import Ulysses
from cpt.resilience.faults import fault_point
from cpt.resilience.phase import PhaseClock
from cpt.storage.file_memory import FileMemory
from cpt.training.activation_checkpointing import enable_checkpointing
from cpt.training.loader import MicroBatch

log = logging.getLogger("cpt.training")

LARGEST_GRAD_NORM = 1e18
"""A norm from here on counts as not finite: its square is near the largest fp32 number, which
DeepSpeed sums in.
"""


class Votes(NamedTuple):
    """What each rank tells the others in the bookkeeping collective of a step, where the values are
    summed.
    """

    stop: int = 0
    """1 if this rank has been asked to stop."""
    save_settled: int = 0
    """1 if this rank's part of the save in flight is on disk, or has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """One optimizer step, summed over all ranks."""

    loss: float
    """Nats per predicted token over the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    applied: bool
    """Whether the update was made; if not, it was made on no rank, because something was not
    finite.
    """
    nll_by_source: list[float]
    """Sum of nats per source."""
    tokens_by_source: list[int]
    """Predicted tokens per source."""
    kl_by_source: list[float] | None = None
    """Sum of nats per source of the divergence from the targets, which is in no loss here; None
    without targets.
    """
    bytes_sent: dict[str, int]
    """Bytes on the wire by kind."""
    votes: Votes
    """How many ranks said what."""
    router: RouterSums | None = None
    """What the routers did, if that was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sums:
    """What the ranks know together."""

    by_source: torch.Tensor
    bytes_sent: dict[str, int]
    squared_grad_norm: float
    votes: Votes


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay; biases, norms and sinks do not; frozen parameters are in
    none.

    gpt-oss stores an expert bias as a matrix (one row per expert), so names decide, not the number
    of axes.
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


def _optimizer(model: GptOssForCPT, train: TrainSection) -> torch.optim.Optimizer:
    """Of offloaded state, too: on a host torch's kernel is as fast as DeepSpeed's, and nothing has
    to be compiled.
    """
    groups = separate_experts(parameter_groups(model, train.weight_decay))
    betas = (train.beta1, train.beta2)
    return torch.optim.AdamW(groups, lr=train.lr, betas=betas, eps=train.eps, fused=True)


def _files(model: GptOssForCPT, config: RunConfig, topology: Topology) -> dict[str, FileMemory]:
    """Memory for the state that goes to NVMe; if one rank finds no room, all refuse."""
    folders = nvme_paths(config.engine_json)
    if not folders:
        return {}
    sizes = file_bytes(model, config.engine_json)
    for name, size in sizes.items():
        log.info(
            "%s: %.3f GB of each rank in files in %s", name, size / 1e9, folders[name].resolve()
        )
    return together(
        topology.control_group,
        lambda: {name: FileMemory(folders[name], size) for name, size in sizes.items()},
    )


def _check_expert_marks(model: GptOssForCPT) -> None:
    """Without the marks ZeRO-3 trains different experts as if they were replicas, and says
    nothing.
    """
    for name, parameter in model.named_parameters():
        expert = is_expert_name(name)
        if expert != is_expert(parameter):
            raise InternalError(
                f"{name} {'lacks' if expert else 'has'} the marks of an expert parameter."
            )


def _router_watch(model: GptOssForCPT, config: RunConfig, topology: Topology) -> RouterWatch:
    watch = RouterWatch(
        num_layers=model.config.num_hidden_layers,
        num_experts=model.config.num_local_experts,
        top_k=model.config.num_experts_per_tok,
        aux_coef=config.model.router_aux_loss_coef,
        z_coef=config.model.router_z_loss_coef,
        device=topology.device,
    )
    watch.attach(model)
    return watch


class TrainingEngine:
    """A patched model in a DeepSpeed engine, with the attention kernel and the exchanges it was
    built for.
    """

    def __init__(
        self,
        model: GptOssForCPT,
        config: RunConfig,
        topology: Topology,
        kernel: Attention,
        exchange: Ulysses | None,
        clock: PhaseClock,
    ) -> None:
        if config.model.activation_checkpointing:
            keep = config.model.expert_recompute == "keep"
            enable_checkpointing(
                model, offload=config.model.offload_checkpoints, keep_exchanged_rows=keep
            )
        model.train()
        _check_expert_marks(model)
        self.topology = topology
        self._clock = clock
        self._sequence_parallel = exchange
        self._kernel = kernel
        self._positions = config.train.global_batch_size * config.train.seq_len
        self._num_losses = 1 if config.train.kl_targets is None else 2
        self._kl_weight = config.train.kl_weight or 0.0
        self.router_watch = _router_watch(model, config, topology)
        optimizer, files = _optimizer(model, config.train), _files(model, config, topology)
        self.deepspeed = initialize(model, optimizer, config.engine_json, files)

    def set_learning_rate(self, lr: float) -> None:
        """Use `lr` for the next optimizer step."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr

    def token_losses(self, batch: MicroBatch) -> torch.Tensor:
        """(B, S) nats of this rank's tokens, 0 where there is no label; (2, B, S) if the batch has
        targets.
        """
        return self.deepspeed(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            labels=batch.labels,
            targets=batch.targets,
            packed_rows=batch.packed_rows,
            sequence_parallel=self._sequence_parallel,
            kernel=self._kernel,
        )

    def step(
        self,
        micro_batches: Iterable[MicroBatch],
        tokens_by_source: list[int],
        *,
        step: int,
        votes: Callable[[], Votes] = Votes,
        measure_routers: bool = False,
    ) -> StepResult:
        """Forward, backward and update on one global batch.

        Args:
            micro_batches: This rank's part.
            step: The optimizer step being done, counted from 1; names it to `fault_point`.
            tokens_by_source: Predicted tokens of the whole global batch, by source; known from the
                row ids.
            votes: Called once, when the ranks exchange their sums; all learn how many said what.
            measure_routers: Fill `StepResult.router`.

        Returns:
            What happened.  If loss or gradient norm is not finite anywhere, no rank has applied the
            update.
        """
        total_tokens = sum(tokens_by_source)
        by_source = torch.zeros(self._num_losses, len(tokens_by_source), dtype=torch.float64)
        loss_scale = self.topology.world_size / total_tokens
        pending = False
        self.router_watch.begin(
            num_sources=len(tokens_by_source),
            positions=self._positions,
            world_size=self.topology.world_size,
            measure=measure_routers,
        )
        for batch in micro_batches:
            if pending:
                self.deepspeed.step()  # between accumulation steps this only advances the engine's counter
            self._clock.enter("forward", step)
            self.router_watch.enter(batch.row_labels)
            losses = self.token_losses(batch)
            losses_LBS = losses.view(-1, *batch.labels.shape)
            self._clock.enter("backward", step)
            total = losses_LBS[0].sum() + self._kl_weight * losses_LBS[1:].sum()
            self.deepspeed.backward(total * loss_scale, scale_wrt_gas=False)
            by_row_LB = losses_LBS.detach().sum(2).double().cpu()
            by_source[: len(by_row_LB)].index_add_(1, batch.row_labels.cpu(), by_row_LB)
            pending = True
        self._clock.enter("gradient", step)
        sums = self._sum_over_ranks(by_source, votes())
        router = self.router_watch.finish(self.topology.control_group)
        grad_norm = math.sqrt(sums.squared_grad_norm)  # NaN and infinity stay what they are
        applied = bool(torch.isfinite(sums.by_source).all()) and grad_norm < LARGEST_GRAD_NORM
        self._clock.enter("optimizer_step", step)
        fault_point("optimizer_step", step)
        self._finish(applied=applied)
        return StepResult(
            loss=float(sums.by_source[0].sum()) / total_tokens,
            grad_norm=grad_norm,
            applied=applied,
            nll_by_source=sums.by_source[0].tolist(),
            tokens_by_source=tokens_by_source,
            kl_by_source=sums.by_source[1].tolist() if self._num_losses == 2 else None,
            bytes_sent=sums.bytes_sent,
            votes=sums.votes,
            router=router,
        )

    def _finish(self, *, applied: bool) -> None:
        if not applied:
            discard_gradients(self.deepspeed)
            return
        self.deepspeed.step()
        if not self.deepspeed.was_step_applied():
            raise InternalError(
                "DeepSpeed dropped an update whose loss and gradient norm are finite."
            )

    def _sum_over_ranks(self, by_source: torch.Tensor, votes: Votes) -> _Sums:
        """The one bookkeeping collective of a step."""
        sent = self.topology.traffic.take()
        squares = squared_gradient_norm(self.deepspeed)
        extra = [*(sent[kind] for kind in KINDS), squares, *votes]
        everything = torch.cat([by_source.view(-1), torch.tensor(extra, dtype=torch.float64)])
        dist.all_reduce(everything, group=self.topology.control_group)
        losses, rest = everything[: by_source.numel()], everything[by_source.numel() :].tolist()
        return _Sums(
            by_source=losses.view_as(by_source),
            bytes_sent={kind: int(value) for kind, value in zip(KINDS, rest, strict=False)},
            squared_grad_norm=rest[len(KINDS)],
            votes=Votes(*(int(value) for value in rest[len(KINDS) + 1 :])),
        )

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> torch.Tensor:
        """Token losses without a backward pass; (B, S) on the CPU.  Its traffic is not counted."""
        self.deepspeed.eval()
        try:
            return self.token_losses(batch).cpu()
        finally:
            self.deepspeed.train()
            self.topology.traffic.take()

    @torch.no_grad()
    def next_token_logits(self, batch: MicroBatch, at: torch.Tensor) -> torch.Tensor:
        """(B, V) fp32 logits at one local position per row, on the CPU; the labels of the batch are
        not read.
        """
        self.deepspeed.eval()
        try:
            logits_B1V = self.deepspeed(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                logits_at=at.to(self.topology.device),
                packed_rows=batch.packed_rows,
                sequence_parallel=self._sequence_parallel,
                kernel=self._kernel,
            )
            return logits_B1V.squeeze(1).float().cpu()
        finally:
            self.deepspeed.train()
            self.topology.traffic.take()

"""The training engine: one optimizer step, and scoring without one.

The loss that a rank hands to the engine is

    sum over its own tokens of nll / predicted tokens of the global batch * world_size

so that the engine's mean over ranks, and its sum over accumulation steps, is the mean over the
global batch in every layout. With targets of another model (`train.kl_targets`), the divergence
from them is added in the same way, times `train.kl_weight` or what the guard makes of it.
`backward` is told not to divide by the accumulation steps.

With loss weights of sources the mean is a weighted one: the nll of a token is multiplied by the
weight of its source, and divided by the sum of the weights of all predicted tokens of the global
batch. The divergence is not weighted, nor is anything that is reported.

The decision whether to make an update is taken before it, from the loss and the squared gradient
norm summed over all ranks. So all ranks decide alike, and nothing that is not finite reaches the
weights or Adam's state.

A micro batch waits for nothing: its losses stay on the device. The host reads those of all micro
batches and the gradient norm together, once per optimizer step.

Shape letters: L losses (the loss and, with targets, the divergence), B rows, S local tokens,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from cpt.config import RunConfig
from cpt.deepspeed_adapter.engine import initialize
from cpt.deepspeed_adapter.experts import is_expert
from cpt.deepspeed_adapter.fragments import fragments_of
from cpt.deepspeed_adapter.gradients import apply_update, discard_gradients, squared_gradient_norm
from cpt.deepspeed_adapter.running_modules import recomputed_modules_forgotten
from cpt.errors import InternalError
from cpt.model.attention import Attention
from cpt.model.decoding import PromptPass, TokenPass, next_token_logits
from cpt.model.experts.router_watch import RouterSums, RouterWatch
from cpt.model.gpt_oss import GptOssForCPT
from cpt.model.weights.hf_layout import is_expert_name
from cpt.parallel.topology import Topology
from cpt.parallel.traffic import KINDS
from cpt.parallel.ulysses import Ulysses
from cpt.resilience.faults import fault_point
from cpt.resilience.phase import PhaseClock
from cpt.storage.transfer import to_device
from cpt.training.activation_checkpointing import enable_checkpointing
from cpt.training.loader import MicroBatch, send
from cpt.training.muon import MatrixOptimizer
from cpt.training.narrow_adamw import NarrowAdamW
from cpt.training.optimizer import ROUTER_GROUPS, create_optimizer, reserve_files
from cpt.training.rounding import ExpertRounding

LARGEST_GRAD_NORM = 1e18
"""Gradient norm from which on a step counts as not finite.

The squares are summed in fp32, and the square of this norm is near the largest fp32 number.
"""


class Votes(NamedTuple):
    """One rank's contribution to the bookkeeping collective of a step, in which the ranks' values
    are summed.
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
    """Whether the update was made; if something was not finite, it was made on no rank."""
    nll_by_source: list[float]
    """Sum of nats per source."""
    tokens_by_source: list[int]
    """Predicted tokens per source."""
    kl_by_source: list[float] | None = None
    """Divergence from the targets, which `loss` does not include: sum of nats per source; None
    without targets.
    """
    bytes_sent: dict[str, int]
    """Bytes on the wire by kind."""
    votes: Votes
    """Sums of the ranks' votes."""
    router: RouterSums | None = None
    """Measurements of the routers, if they were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pass:
    """The part of one micro batch in the bookkeeping of its step."""

    nats_LB: torch.Tensor
    """(L, B) fp64 on the device: nats per row."""
    source_of_row: torch.Tensor
    """(B,) on the CPU: number of each row's source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Own:
    """This rank's sums in one step."""

    nats_by_source: torch.Tensor
    """(L, sources) fp64 on the CPU."""
    squared_grad_norm: float
    """This rank's share of the square of the global gradient norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sums:
    """Sums over all ranks that the bookkeeping collective of a step yields."""

    by_source: torch.Tensor
    """(losses, sources) nats: the loss, then the divergence if there are targets."""
    bytes_sent: dict[str, int]
    """Bytes on the wire by kind."""
    squared_grad_norm: float
    """Square of the global gradient norm."""
    votes: Votes
    """Sums of the ranks' votes."""


def _check_expert_marks(model: GptOssForCPT) -> None:
    """Refuse a model whose expert parameters lack their marks.

    Without the marks ZeRO-3 trains different experts as if they were replicas, and says nothing.
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


def loss_factors(loss_weights: Sequence[float], tokens_by_source: Sequence[int]) -> torch.Tensor:
    """Return what the mean loss of a batch becomes a weighted mean by, (sources,) fp64 on the CPU.

    With weights w_i and predicted tokens t_i it is w_i * sum_j t_j / sum_j (w_j t_j): so the mean
    over the tokens of a batch is 1, whatever the weights are. It is 0 for all if no token counts.
    """
    weights = torch.tensor(loss_weights, dtype=torch.float64)
    tokens = torch.tensor(tokens_by_source, dtype=torch.float64)
    total = float((weights * tokens).sum())
    if total == 0:
        return torch.zeros_like(weights)
    return weights * (float(tokens.sum()) / total)


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
        """Build the engine; the weights may still be without values.

        Args:
            model: A patched model.
            config: The validated configuration.
            topology: The layout.
            kernel: Computes attention.
            exchange: Exchanges around attention between ranks that share rows; None if none do.
            clock: Learns the phase of this rank.
        """
        if config.model.activation_checkpointing:
            enable_checkpointing(
                model,
                offload=config.model.offload_checkpoints,
                keep_exchanged_rows=config.model.expert_recompute == "keep",
            )
        model.train()
        _check_expert_marks(model)
        self.topology = topology
        self.model_config = model.config
        self.dtype = config.dtype
        self.adapter = config.adapter
        self.seed = config.train.seed
        self._clock = clock
        self._sequence_parallel = exchange
        self._kernel = kernel
        self._positions = config.train.global_batch_size * config.train.seq_len
        self._has_targets = config.train.kl_targets is not None
        self._kl_weight = config.train.kl_weight or 0.0
        self.router_watch = _router_watch(model, config, topology)
        separate_routers = config.guard.router_lever == "freeze"
        optimizer = create_optimizer(
            model, config.train, separate_routers=separate_routers, device=topology.device
        )
        files = reserve_files(model, optimizer, config, topology)
        self.deepspeed = initialize(model, optimizer, config.engine_json, files)
        if isinstance(optimizer, NarrowAdamW):
            optimizer.place(fragments_of(self.deepspeed, topology.ep_rank))
        if isinstance(optimizer, MatrixOptimizer):
            optimizer.hold_partitions(self.deepspeed, topology)
        self._save_wait_seconds = 0.0
        self.rounding = ExpertRounding(
            config.train.quantize, self.deepspeed, topology.device, clock
        )

    def set_learning_rate(self, lr: float, *, routers_frozen: bool = False) -> None:
        """Use `lr` for the next optimizer step.

        Args:
            lr: The learning rate.
            routers_frozen: Leave the routers as they are; `guard.router_lever` must be `freeze`. A
                rate of 0 does that: AdamW multiplies its decay by the rate, too.
        """
        for group in self.deepspeed.optimizer.param_groups:
            is_frozen = routers_frozen and group.get("name") in ROUTER_GROUPS
            group["lr"] = 0.0 if is_frozen else lr

    def set_kl_weight(self, weight: float) -> None:
        """Use `weight` for the divergence from the targets in the next optimizer step."""
        self._kl_weight = weight

    def send(self, batch: MicroBatch) -> MicroBatch:
        """Copy a micro batch from the host to the device; the host does not wait."""
        halo = None if self._sequence_parallel is None else self._sequence_parallel.halo
        return send(batch, self.topology.device, halo)

    def token_losses(self, batch: MicroBatch) -> torch.Tensor:
        """Return (B, S) nats of this rank's tokens, 0 where there is no label.

        If the batch has targets, the result is (2, B, S): the loss, then the divergence.
        """
        return self.deepspeed(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            labels=batch.labels,
            targets=batch.targets,
            num_labels=batch.num_labels,
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
        loss_weights: Sequence[float] | None = None,
    ) -> StepResult:
        """Do forward, backward and update on one global batch.

        Args:
            micro_batches: This rank's part of the batch.
            tokens_by_source: Predicted tokens of the whole global batch, by source; known from the
                row ids.
            step: The optimizer step in progress, counted from 1.
            votes: Called once, when the ranks exchange their sums; all ranks learn the sums.
            measure_routers: Fill `StepResult.router`.
            loss_weights: How much the loss of each token of a source counts; None if all count
                alike.

        Returns:
            The sums over all ranks. If loss or gradient norm is not finite anywhere, no rank has
            applied the update.
        """
        num_sources = len(tokens_by_source)
        total_tokens = sum(tokens_by_source)
        self.router_watch.begin(
            num_sources=num_sources,
            positions=self._positions,
            world_size=self.topology.world_size,
            measure=measure_routers,
        )
        loss_scale = self.topology.world_size / total_tokens
        factors = None
        if loss_weights is not None:
            factors = loss_factors(loss_weights, tokens_by_source)
        passes = self._accumulate(micro_batches, step, loss_scale, factors)
        self._clock.enter("gradient", step)
        sums = self._sum_over_ranks(self._read(passes, num_sources), votes())
        router = self.router_watch.finish(self.topology.control_group)
        grad_norm = math.sqrt(sums.squared_grad_norm)  # NaN and infinity stay what they are
        applied = bool(torch.isfinite(sums.by_source).all()) and grad_norm < LARGEST_GRAD_NORM
        if applied:
            self._wait_for_save(step)
        self._clock.enter("optimizer_step", step)
        fault_point("optimizer_step", step)
        if applied:
            apply_update(self.deepspeed, grad_norm)
        else:
            discard_gradients(self.deepspeed)
        self.rounding.after_step(step, applied=applied)
        return StepResult(
            loss=float(sums.by_source[0].sum()) / total_tokens,
            grad_norm=grad_norm,
            applied=applied,
            nll_by_source=sums.by_source[0].tolist(),
            tokens_by_source=tokens_by_source,
            kl_by_source=sums.by_source[1].tolist() if self._has_targets else None,
            bytes_sent=sums.bytes_sent,
            votes=sums.votes,
            router=router,
        )

    def _wait_for_save(self, step: int) -> None:
        """Wait until a save has read the state that the update of this step changes."""
        reading = self.deepspeed.state_reading
        if reading.is_open:
            self._clock.enter("save", step)
            reading.wait()
            self._save_wait_seconds += reading.waited_seconds

    def take_save_wait(self) -> float:
        """Return the seconds that updates have waited for a save since the last call."""
        taken = self._save_wait_seconds
        self._save_wait_seconds = 0.0
        return taken

    def _accumulate(
        self,
        micro_batches: Iterable[MicroBatch],
        step: int,
        loss_scale: float,
        loss_factors: torch.Tensor | None,
    ) -> list[_Pass]:
        """Add up the gradients of all micro batches, and return what is to be read of each.

        Nothing here waits for the device.
        """
        passes = []
        for micro_step, batch in enumerate(micro_batches):
            if micro_step > 0:
                # Between accumulation steps this only advances the engine's counter.
                self.deepspeed.step()
            with recomputed_modules_forgotten():
                nats_LB = self._backward(batch, step, loss_scale, loss_factors)
            passes.append(_Pass(nats_LB=nats_LB, source_of_row=batch.source_of_row))
        return passes

    def _read(self, passes: list[_Pass], num_sources: int) -> _Own:
        """Wait for the device, once, and return this rank's sums."""
        squared_norm = squared_gradient_norm(self.deepspeed)
        pieces = [one.nats_LB.view(-1) for one in passes]
        pieces.append(squared_norm.to(self.topology.device).view(1))
        values = torch.cat(pieces).cpu()
        num_losses = 2 if self._has_targets else 1
        nats_by_source = torch.zeros(num_losses, num_sources, dtype=torch.float64)
        first = 0
        for one in passes:
            nats_LB = values[first : first + one.nats_LB.numel()].view_as(one.nats_LB)
            nats_by_source[: len(nats_LB)].index_add_(1, one.source_of_row, nats_LB)
            first += nats_LB.numel()
        return _Own(nats_by_source=nats_by_source, squared_grad_norm=float(values[first]))

    def _backward(
        self,
        batch: MicroBatch,
        step: int,
        loss_scale: float,
        loss_factors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Do forward and backward of one micro batch.

        Args:
            batch: The micro batch.
            step: The optimizer step in progress.
            loss_scale: Factor of a token's loss; see the module's docstring.
            loss_factors: What `loss_factors` returns; None if all tokens count alike.

        Returns:
            (L, B) fp64 on the device: sums of nats per row, of the loss and, if the batch has
            targets, of the divergence.
        """
        self._clock.enter("forward", step)
        self.router_watch.enter(batch.source_of_row)
        losses_LBS = self.token_losses(batch).view(-1, *batch.labels.shape)
        self._clock.enter("backward", step)
        if loss_factors is None:
            nats = losses_LBS[0].sum()
        else:
            factor_B = to_device(loss_factors[batch.source_of_row], self.topology.device)
            nats = (losses_LBS[0].sum(1) * factor_B.to(losses_LBS.dtype)).sum()
        total = nats + self._kl_weight * losses_LBS[1:].sum()
        self.deepspeed.backward(total * loss_scale, scale_wrt_gas=False)
        return losses_LBS.detach().sum(2).double()

    def _sum_over_ranks(self, own: _Own, votes: Votes) -> _Sums:
        """Run the one bookkeeping collective of a step."""
        nats_by_source = own.nats_by_source
        sent = self.topology.traffic.take()
        extra: list[float] = [sent[kind] for kind in KINDS]
        extra.append(own.squared_grad_norm)
        extra += votes
        everything = torch.cat([nats_by_source.view(-1), torch.tensor(extra, dtype=torch.float64)])
        dist.all_reduce(everything, group=self.topology.control_group)
        summed_nats = everything[: nats_by_source.numel()]
        summed_extra = everything[nats_by_source.numel() :].tolist()
        return _Sums(
            by_source=summed_nats.view_as(nats_by_source),
            bytes_sent={kind: int(value) for kind, value in zip(KINDS, summed_extra, strict=False)},
            squared_grad_norm=summed_extra[len(KINDS)],
            votes=Votes(*(int(value) for value in summed_extra[len(KINDS) + 1 :])),
        )

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> torch.Tensor:
        """Return (B, S) token losses on the CPU, without a backward pass.

        The traffic is not counted.
        """
        with self._evaluating():
            return self.token_losses(batch).cpu()

    @torch.no_grad()
    def top_k(self, batch: MicroBatch, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k likeliest next tokens of this rank's tokens that have a label.

        The traffic is not counted.

        Returns:
            The output of `LossHead.top_k` for these tokens in their order, on the CPU.
        """
        with self._evaluating():
            ids, log_p = self.deepspeed(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                labels=batch.labels,
                top_k=k,
                packed_rows=batch.packed_rows,
                sequence_parallel=self._sequence_parallel,
                kernel=self._kernel,
            )
            return ids.cpu(), log_p.cpu()

    @torch.no_grad()
    def next_token_logits(self, cache_pass: PromptPass | TokenPass) -> torch.Tensor:
        """Run a pass of decoding; see `cpt.model.decoding.next_token_logits`.

        The traffic is not counted.
        """
        with self._evaluating():
            return next_token_logits(self.deepspeed, cache_pass, self._kernel)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put the model into evaluation mode inside the block, and forget the block's traffic."""
        self.deepspeed.eval()
        try:
            yield
        finally:
            self.deepspeed.train()
            self.topology.traffic.take()

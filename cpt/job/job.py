"""One run, ready to train: what the loop reads, and the ways in which it changes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt.checkpoint.adapter_state import AdapterState
from cpt.checkpoint.given_up_batches import Ranges, batch_of_step, read_rollbacks, skipped_by
from cpt.checkpoint.loading import LoadedState
from cpt.checkpoint.run_state import RunState
from cpt.checkpoint.saver import Saver
from cpt.config import RunConfig
from cpt.deepspeed_adapter.shards import set_optimizer_step
from cpt.errors import DataError
from cpt.guard.guard import Guard
from cpt.guard.ladder import GuardState
from cpt.guard.replay_share import ReplayShares
from cpt.guard.requirements import acts
from cpt.job.context import RunContext
from cpt.job.progress import (
    Progress,
    forgotten_levers,
    known_at,
    newest_guard_state,
    read_guard_pause,
    read_guard_rollbacks,
)
from cpt.job.resumption import RunIdentity, StartingPoint, starting_point
from cpt.parallel.agreement import on_first_rank
from cpt.parallel.topology import Topology
from cpt.resilience.faults import fault_point
from cpt.resilience.phase import PhaseClock
from cpt.resilience.stop import StopRequest
from cpt.telemetry.mailbox import EventMailbox
from cpt.telemetry.metrics import Telemetry
from cpt.telemetry.report.periodic import PeriodicReport
from cpt.training.engine import TrainingEngine
from cpt.training.kl_targets import KLTargets
from cpt.training.loader import MicroBatch, Places, pin, places_of_rank, read_micro_batch
from cpt.training.read_ahead import ReadAhead
from cpt.training.stability import Stability
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.ledger import Ledger, Segment
from data_pipeline.mixture.mixture import GlobalBatch, Mixture
from data_pipeline.mixture.stages import StagePlan, mixture_of

log = logging.getLogger("cpt.job.job")


@dataclass(kw_only=True)
class Job:
    """One run on this rank.

    `restore` and `reweigh` are the only ways in which the ledger and the mixture are replaced.
    """

    context: RunContext
    data: BuiltData
    kl_targets: KLTargets | None
    """The base model's distributions for rows of some sources; None if the run does not ask."""
    ledger: Ledger
    """The mixtures of the run by batch, raises of replay by the guard included."""
    mixture: Mixture
    engine: TrainingEngine
    guard: Guard | None
    replay: ReplayShares
    """Of the mix as it is written; `present_replay` is that of the phase."""
    saver: Saver
    telemetry: Telemetry
    progress: Progress
    stability: Stability
    router_overlap: float | None = None
    """Share of the newest measured routing choices that the untouched routers would make too, mean
    over the layers; the same on all ranks. None if none was measured since the start.
    """
    data_wait_seconds: float = 0.0
    """Time that this rank has waited for rows since the last `take_data_wait`."""
    stages: StagePlan | None = None
    """Where the stages of the run begin; None for a run without stages."""
    adapter: AdapterState | None = None
    """The adapter that is trained and its base; None if the model itself is trained."""
    report: PeriodicReport | None = None
    """Draws report.html while the run goes on; only the first rank has it."""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """The models that the first weights came from (`cpt.checkpoint.lineage`)."""
    starting_model: Mapping[str, Any] | None = None
    """What the model of the first weights is known by (`RunState.starting_model`)."""
    has_begun: bool = False
    """Whether everything that comes before the first step is done. Until then the weights of step 0
    are those of the untouched model, which the guard measures."""
    reader: ReadAhead[Places, MicroBatch] = field(init=False)
    """Reads the micro batch after the one that is computed."""
    _foreseen: GlobalBatch | None = field(default=None, init=False)
    """The batch of the next step, if nothing comes in between; it is of the present mixture."""

    def __post_init__(self) -> None:
        self.reader = ReadAhead(self._read)

    @property
    def config(self) -> RunConfig:
        """The validated configuration."""
        return self.context.config

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.context.run_dir

    @property
    def topology(self) -> Topology:
        """The layout of the run and this rank's place in it."""
        return self.context.topology

    @property
    def clock(self) -> PhaseClock:
        """The phase of this rank."""
        return self.context.clock

    @property
    def mailbox(self) -> EventMailbox:
        """Events of other threads for metrics.jsonl."""
        return self.context.mailbox

    @property
    def stop(self) -> StopRequest:
        """Requests to stop, as they arrive."""
        return self.context.stop

    @property
    def mix(self) -> MixConfig:
        """The data mix as the user wrote it."""
        return self.context.mix

    @property
    def loss_weights(self) -> tuple[float, ...] | None:
        """How much the loss of each token of a source counts; None if all count alike."""
        weights = tuple(source.loss_weight for source in self.mix.sources)
        return None if set(weights) == {1.0} else weights

    @property
    def kl_weight(self) -> float:
        """The weight of the divergence in the next step: the run YAML's, or the guard's.

        Where the guard no longer moves it, the YAML's holds again.
        """
        configured = self.config.train.kl_weight or 0.0
        is_moved = self.guard is not None and self.config.guard.kl_lever != "off"
        if self.guard is None or not is_moved or self.guard.state.kl_weight is None:
            return configured
        return self.guard.state.kl_weight

    @property
    def last_step(self) -> int:
        """The step after which the run ends."""
        settings = self.config.train
        return settings.total_steps if settings.stop_at_step is None else settings.stop_at_step

    @property
    def next_stage(self) -> int:
        """Number of the stage of the next batch; that of another one needs another layout."""
        return 0 if self.stages is None else self.stages.stage_of(self.progress.next_batch)

    @property
    def last_batch(self) -> int:
        """The last batch of the run, or of the present stage."""
        if self.stages is None:
            return self.num_batches - 1
        _, stop = self.stages.batches_of(self.config.stage, self.num_batches)
        return stop - 1

    @property
    def num_batches(self) -> int:
        """Batches of the whole run, with those that were given up."""
        last_step = self.config.train.total_steps - 1
        return batch_of_step(last_step, self.progress.skip_ranges) + 1

    def next_global_batch(self) -> GlobalBatch:
        """Return the rows of the next step."""
        foreseen = self._foreseen
        if foreseen is not None and foreseen.step == self.progress.next_batch:
            return foreseen
        return self._global_batch(self.progress.next_batch)

    def micro_batches(self, batch: GlobalBatch) -> Iterator[MicroBatch]:
        """Yield this rank's forward passes of one global batch.

        While the caller works on one micro batch, the next is read, which after the last one is
        probably the first of the next step.
        """
        step = self.progress.step + 1
        micro_steps = self.config.gradient_accumulation_steps
        for micro_step in range(micro_steps):
            self.clock.enter("data", step)
            started = time.perf_counter()
            fault_point("data", step)
            read = self.reader.take(self._places(batch, micro_step))
            if micro_step + 1 < micro_steps:
                self.reader.begin(self._places(batch, micro_step + 1))
            loaded = self.engine.send(read)
            self.data_wait_seconds += time.perf_counter() - started
            yield loaded
        self._foresee_next_step()

    def _foresee_next_step(self) -> None:
        """Begin to read for the step after the one in progress, if there will be one."""
        following = self.progress.step + 1
        number = batch_of_step(following, self.progress.skip_ranges)
        if following >= self.last_step or number > self.last_batch:
            return
        try:
            batch = self._global_batch(number)
        except DataError:
            return  # the step itself will refuse it, unless the mix changes before
        self._foreseen = batch
        self.reader.begin(self._places(batch, 0))

    def _global_batch(self, number: int) -> GlobalBatch:
        return self.mixture.global_batch(number, self.config.train.global_batch_size)

    def _places(self, batch: GlobalBatch, micro_step: int) -> Places:
        return places_of_rank(batch, micro_step, self.config.micro_batch_size, self.topology)

    def _read(self, places: Places) -> MicroBatch:
        read = read_micro_batch(self.data, places, self.topology, self.kl_targets)
        return pin(read, self.topology.device)

    def take_data_wait(self) -> float:
        """Return the seconds spent waiting for rows since the last call."""
        taken = self.data_wait_seconds
        self.data_wait_seconds = 0.0
        return taken

    def reweigh(self, state: GuardState) -> None:
        """Mix as the guard's state says from the next batch on, in all phases to come."""

        def adjusted(segment: Segment, planned: Mapping[str, float]) -> Mapping[str, float]:
            return self._replay_in(segment, planned).weights(state)

        ledger = self.ledger.adjust(self.mix, self.progress.next_batch, adjusted)
        if ledger is not self.ledger:
            self._follow(ledger)

    def present_replay(self) -> ReplayShares:
        """Return the shares of replay where the plan of the mix is at the next batch."""
        segment = self.ledger.planned_segment(self.mix, self.progress.next_batch)
        return self._replay_in(segment, segment.weights)

    def _replay_in(self, segment: Segment, planned: Mapping[str, float]) -> ReplayShares:
        if not segment.phase:
            return self.replay
        return self.replay.at(planned, segment.languages())

    def restore(
        self, loaded: LoadedState, *, accept_mix_change: bool, given_up: Ranges = ()
    ) -> None:
        """Go on from a checkpoint whose tensors were just loaded.

        Args:
            loaded: The checkpoint.
            accept_mix_change: Go on although the mix was edited since.
            given_up: Batches to leave out, besides those that earlier rollbacks have given up.

        Raises:
            ConfigError: the checkpoint belongs to another run, or its mix was edited and that is
                not accepted.
        """
        state = loaded.state
        start = start_from_loaded(
            self.context,
            self.data,
            loaded,
            accept_mix_change=accept_mix_change,
            given_up=given_up,
        )
        self.saver.trust(loaded.step)
        self.stages = start.stages
        # in place: the loop holds the same object
        self.progress.restore(start.progress, start.progress.skip_ranges)
        self.stability.restore(_dict(state.stability))
        self.engine.router_watch.restore(state.router_load)
        self.router_overlap = None  # what was measured may be of weights that the run has left
        set_optimizer_step(self.engine.deepspeed, self.progress.updates)
        if self.progress.step > 0 or self.has_begun:
            self.engine.rounding.publish(self.progress.step)
        self._follow(start.ledger)
        self._restore_guard(state)

    def _restore_guard(self, state: RunState) -> None:
        if self.guard is None:
            forgotten = forgotten_levers(state.guard or {})
            if forgotten and self.topology.rank == 0:
                log.warning(
                    "guard.enabled is false: the guard of this run had seen to it that %s. From "
                    "here that no longer holds. Lower train.lr if it should stay low, or switch "
                    "the guard on with guard.policy: warn.",
                    ", and ".join(forgotten),
                )
            return
        step, run_dir = self.progress.step, self.run_dir
        rollbacks, pause = on_first_rank(
            self.context.control_group,
            lambda: (read_guard_rollbacks(run_dir), read_guard_pause(run_dir, step)),
        )
        saved = _dict(state.guard)
        newest = newest_guard_state(saved, rollbacks, pause, went_on=self.has_begun)
        known = known_at(step, newest, saved)
        self.guard.state = GuardState.from_json(known)
        if known != newest and not self.context.observe:
            event = {"event": "guard_restored", "step": step, "after": self.guard.state.to_json()}
            self.telemetry.log(event)
        if self.guard.state.green_step is not None and acts(self.config.guard):
            self.saver.keep(self.guard.state.green_step)
        before = self.ledger
        self.reweigh(self.guard.state)
        if saved is None and self.ledger is not before and self.topology.rank == 0:
            log.warning(
                "step %d was saved without a guard, so it is not known what replay one had given: "
                "from here the mix holds as it is planned. Raise the weights of what is replayed "
                "if more of it should stay.",
                step,
            )

    def _follow(self, ledger: Ledger) -> None:
        """Take the rows of the next batches from a ledger."""
        self.ledger = ledger
        self._foreseen = None
        self.mixture = mixture_of(self.data, ledger, self.mix.seed, self.stages)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps besides tensors, as JSON values."""
        state = RunState(
            model_config=self.context.model_config.to_dict(),
            lineage=self.lineage,
            starting_model=self.starting_model,
            config=self.config.to_plain(),
            identity=RunIdentity.of(self.config).to_json(self.stages),
            progress=self.progress.to_json(),
            ledger=self.ledger.to_json(),
            guard=None if self.guard is None else self.guard.state.to_json(),
            stability=self.stability.to_json(),
            router_load=self.engine.router_watch.state(),
            adapter=None if self.adapter is None else self.adapter.to_json(),
            quantize=self.config.train.quantize.state_after(self.progress.step),
        )
        return state.to_json()


def start_from_loaded(
    context: RunContext,
    data: BuiltData,
    loaded: LoadedState,
    *,
    accept_mix_change: bool,
    given_up: Ranges = (),
) -> StartingPoint:
    """Return where a run goes on from a checkpoint that was loaded; all ranks call this.

    Args:
        context: The start of the run.
        data: The build of its mix.
        loaded: The checkpoint.
        accept_mix_change: As in `Job.restore`.
        given_up: As in `Job.restore`.

    Raises:
        ConfigError, CheckpointError: see `starting_point`.
    """
    rollbacks = on_first_rank(context.control_group, lambda: read_rollbacks(context.run_dir))
    return starting_point(
        loaded.state,
        loaded.folder.name,
        context.config,
        context.model_config,
        context.mix,
        data,
        given_up=[*skipped_by(rollbacks), *given_up],
        accept_mix_change=accept_mix_change,
    )


def _dict(part: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if part is None else dict(part)

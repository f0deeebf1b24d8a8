"""The ranks that do an offline command together: one process, or all that a launcher started.

    cpt kl_targets ...                                      one process, without a port
    deepspeed --num_gpus 8 cpt/cli.py kl_targets ...        8 ranks; torchrun -m cpt.cli works, too

Decisions
    RANK and WORLD_SIZE in the environment decide; no option repeats what the launcher says.
    Experts are spread over `ep_size` ranks. Every rank has rows of its own to compute, so the other
    parameters, 2 % of gpt-oss-120b, are on all ranks and ZeRO is not needed.
    A request to stop is agreed on between two rounds of work (cpt/offline/pieces.py). A rank that
    fails or hangs ends the others, as in a run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import GptOssConfig

from cpt.config import WatchdogSection
from cpt.deepspeed_adapter.groups import CONTROL_TIMEOUT, create_topology, init_distributed
from cpt.errors import ConfigError, RequeueRequested
from cpt.offline.rank_options import RankOptions
from cpt.parallel.agreement import gather_json, on_first_rank, together
from cpt.parallel.topology import Topology
from cpt.planning.memory import parameter_counts
from cpt.resilience.agreed_stop import agreed_reason
from cpt.resilience.devices import this_device
from cpt.resilience.environment import LaunchEnvironment, is_launched, read_environment
from cpt.resilience.followed_work import followed_by_all
from cpt.resilience.job_secret import take_job_secret
from cpt.resilience.phase import PhaseClock
from cpt.resilience.stop import watch_launcher
from cpt.resilience.watchdog import watching
from data_pipeline.build.self_replay import joined_hash
from data_pipeline.store.files import AtChunk, xxh3_of

STOP_MARGIN_SECONDS = 300.0
"""How long before the end of its Slurm job a command stops; a round must fit into it."""
STOP_BUDGET_SECONDS = 600.0
"""How long ranks without a launcher may take to finish their round."""
LARGEST_SHARE = 0.9
"""Share of a device's memory that the weights may take."""

T = TypeVar("T")
log = logging.getLogger("cpt.offline.ranks")


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineRanks:
    """The ranks of an offline command, as this one sees them."""

    topology: Topology
    """The layout."""
    options: RankOptions
    """How they work together."""
    clock: PhaseClock
    """The phase of this rank, which the watchdog reads."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes the result and talks to people."""
        return self.topology.rank == 0

    def on_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0; its JSON-able result, or its error, reaches every rank."""
        return on_first_rank(self.topology.control_group, action)

    def publish(self, work: Callable[[AtChunk], None]) -> None:
        """Do work on rank 0 that may take hours; see `followed_by_all`."""
        followed_by_all(self.topology.control_group, self.clock, 0, work)

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it failed on any, raise on all."""
        return together(self.topology.control_group, action)

    def leave_if_asked(self, done: Callable[[], str]) -> None:
        """Leave on all ranks if any of them has been asked to stop.

        Args:
            done: Returns what is done and what happens to it, for people.

        Raises:
            RequeueRequested: on all ranks.
        """
        reason = agreed_reason(self.options.stop, self.topology.control_group)
        if reason:
            self.options.stop.consume()
            raise RequeueRequested(f"stopped on request: {reason}. {done()}")

    def refuse_different(self, name: str) -> None:
        """Refuse ranks that look at different models, as where a run saves while they start.

        Args:
            name: Name of the checkpoint or directory that this rank looks at.

        Raises:
            ConfigError: on all ranks, with the names.
        """
        found = sorted(set(gather_json(name, self.topology.control_group)))
        if len(found) > 1:
            raise ConfigError(
                f"the ranks found different checkpoints: {', '.join(found)}. Name one with --step."
            )

    def hash_of_weights(self, files: Iterable[Path]) -> str:
        """Return `weights_hash` of weight files; each rank reads some of them."""
        own = []
        for index, file in enumerate(sorted(files)):
            if index % self.topology.world_size == self.topology.rank:
                own.append((file.name, file))
        found = self.together(lambda: [(name, xxh3_of(file)) for name, file in own])
        listed: list[tuple[str, str]] = []
        for part in gather_json(found, self.topology.control_group):
            listed += [(name, digest) for name, digest in part]
        return joined_hash(listed)


@contextmanager
def offline_ranks(
    config: GptOssConfig, folder: Path, options: RankOptions
) -> Iterator[OfflineRanks]:
    """Join the ranks of this command, whose model has the sizes of `config`.

    Args:
        config: The model that the ranks will hold.
        folder: Folder of the unfinished result: a file STOP in it stops the command, and stacks of
            hung ranks go there. It need not exist.
        options: How the ranks work together.

    Raises:
        ConfigError: the environment is not that of a launcher, or the model does not fit.
    """
    environment = read_environment() if is_launched() else None
    with options.stop.listening(), _process_group(environment) as device:
        ep_size = _agreed_ep_size(config, environment, options.ep_size, device)
        topology = create_topology(sp_size=1, ep_size=ep_size, device=device)
        if environment is not None:
            watch_launcher(options.stop, STOP_BUDGET_SECONDS)
        if topology.rank == 0:
            options.stop.watch_run(folder, STOP_MARGIN_SECONDS)
            if topology.world_size > 1:
                log.info("%d ranks, experts over %d", topology.world_size, ep_size)
        # the watchdog needs the store of a launcher, and one process waits for nobody
        watchdog = WatchdogSection(enabled=environment is not None, straggler_ratio=0)
        clock = PhaseClock()
        with watching(folder, topology, watchdog, clock, _log_event, secret=take_job_secret()):
            yield OfflineRanks(topology=topology, options=options, clock=clock)


def _log_event(event: dict[str, Any]) -> None:
    log.warning("%s", event)


@contextmanager
def _process_group(environment: LaunchEnvironment | None) -> Iterator[torch.device]:
    """Join a launcher's process group, or make one of this process; yield this rank's device."""
    if environment is not None:
        device = this_device(environment)
        init_distributed(device)
        yield device
        # after an error the other ranks may be gone, and the process ends anyway
        dist.destroy_process_group()
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        init_distributed(device)
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def single_process() -> Iterator[Topology]:
    """Yield the layout of one process, whatever a launcher says."""
    with _process_group(None) as device:
        yield create_topology(sp_size=1, ep_size=1, device=device)


def _agreed_ep_size(
    config: GptOssConfig,
    environment: LaunchEnvironment | None,
    wanted: int | None,
    device: torch.device,
) -> int:
    """Return the expert-parallel size that fits on the smallest device of all ranks."""
    device_bytes = None
    if device.type == "cuda":
        device_bytes = torch.cuda.get_device_properties(device).total_memory
    local_world_size = environment.local_world_size if environment is not None else 1
    group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    of_ranks = gather_json([device_bytes, local_world_size], group)
    known = [found for found, _ in of_ranks if found is not None]
    return choose_ep_size(
        config,
        wanted,
        world_size=len(of_ranks),
        local_world_size=math.gcd(*(size for _, size in of_ranks)),
        device_bytes=min(known) if known else None,
    )


def check_fit(config: GptOssConfig) -> None:
    """Refuse a model that does not fit on this rank's GPU in the best layout of these ranks.

    Raises:
        ConfigError: with both figures.
    """
    environment = read_environment() if is_launched() else None
    world_size = environment.world_size if environment is not None else 1
    local_rank = environment.local_rank if environment is not None else 0
    choose_ep_size(
        config,
        None,
        world_size=world_size,
        local_world_size=environment.local_world_size if environment is not None else 1,
        device_bytes=torch.cuda.get_device_properties(local_rank).total_memory,
    )


def weight_bytes(config: GptOssConfig, ep_size: int, bytes_per_parameter: int) -> int:
    """Return the bytes of the weights that a rank holds: its experts, and all that is no expert."""
    dense, experts = parameter_counts(config)
    return (dense + experts // ep_size) * bytes_per_parameter


def choose_ep_size(
    config: GptOssConfig,
    wanted: int | None,
    *,
    world_size: int,
    local_world_size: int,
    device_bytes: int | None,
) -> int:
    """Return over how many ranks the experts are spread.

    The default is the largest size that divides the ranks of a node, so that the exchange of the
    experts stays inside nodes. If the weights do not fit so, it is the next larger one that fits.

    Args:
        config: The model.
        wanted: `--ep_size`; None for the default.
        world_size: Number of ranks.
        local_world_size: Ranks of a node.
        device_bytes: Memory of a GPU, which holds the weights in bf16; None on CPUs, for which
            nothing is refused.

    Raises:
        ConfigError: the size divides ranks or experts with a remainder, or the weights do not fit.
    """
    num_experts = config.num_local_experts
    possible = []
    for size in range(1, min(num_experts, world_size) + 1):
        if num_experts % size == 0 and world_size % size == 0:
            possible.append(size)
    if wanted is not None and wanted not in possible:
        raise ConfigError(
            f"--ep_size {wanted} must divide the {world_size} ranks and the {num_experts} experts. "
            f"Possible here: {', '.join(map(str, possible))}."
        )
    preferred = max(size for size in possible if local_world_size % size == 0)
    candidates = [size for size in possible if size >= preferred]
    if wanted is not None:
        candidates = [wanted]
    for size in candidates:
        if device_bytes is None or weight_bytes(config, size, 2) <= LARGEST_SHARE * device_bytes:
            return size
    needed = weight_bytes(config, candidates[-1], 2)
    assert device_bytes is not None
    raise ConfigError(
        f"the weights take {needed / 2**30:.1f} GiB of each GPU with the experts over "
        f"{candidates[-1]} of {world_size} ranks; a GPU has {device_bytes / 2**30:.1f} GiB, of "
        f"which {LARGEST_SHARE:.0%} may be weights. Start more ranks (deepspeed --num_gpus N) or a "
        "larger --ep_size."
    )

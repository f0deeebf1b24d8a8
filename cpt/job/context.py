"""The facts of one start of a run, which everything that is built for it receives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.job.ending import Ending
from cpt.parallel.topology import Topology
from cpt.resilience.phase import PhaseClock
from cpt.resilience.stop import StopRequest
from cpt.telemetry.mailbox import EventMailbox
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.mixture.data_plan import DataPlan
from data_pipeline.mixture.staged_plan import StagedPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """One start of a run on this rank."""

    config: RunConfig
    model_config: GptOssConfig
    """The architecture, from config.json or a preset."""
    mix: MixConfig
    """The data mix as the user wrote it, with the weights that its epochs mean once the build is
    open."""
    run_dir: Path
    resume: str
    """`auto`, `never` or a step."""
    observe: bool
    """Nothing in the run directory is changed: another job may be at work there."""
    plan: DataPlan | StagedPlan | None
    """The data plan of the gate; None on other ranks than the first, or for a mix not built yet."""
    topology: Topology
    clock: PhaseClock
    """The phase of this rank."""
    mailbox: EventMailbox
    """Events of other threads for metrics.jsonl."""
    stop: StopRequest
    """Requests to stop, as they arrive."""
    ending: Ending
    """Records how this start ends."""

    @property
    def control_group(self) -> dist.ProcessGroup:
        """All ranks, over gloo."""
        return self.topology.control_group

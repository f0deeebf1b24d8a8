"""What a start knows once it has passed the gate (`cpt.job.gate`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.errors import CptError
from cpt.job.resumption import ExpectedCheckpoint
from cpt.job.run_dir import RoomNeeded
from cpt.job.seam import Seam
from cpt.planning.fit import Card
from cpt.resilience.environment import LaunchEnvironment
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.mixture.data_plan import DataPlan
from data_pipeline.mixture.staged_plan import StagedPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class PassedGate:
    """A configuration that can be right, as far as this rank has looked."""

    config: RunConfig
    """That of the stage in which the run goes on, as far as this rank knows."""
    configs: tuple[RunConfig, ...]
    """Those of all stages; one for a run without stages."""
    model_config: GptOssConfig
    """The architecture, from config.json or a preset."""
    mix: MixConfig
    run_dir: Path
    resume: str
    """`auto`, `never` or a step."""
    plan: DataPlan | StagedPlan | None
    """The data plan; None on other ranks than the first, or if the mix is not built yet."""
    checkpoint: ExpectedCheckpoint | None
    """What the run will probably go on from; None on other ranks than the first, or at the
    beginning of a run.
    """
    seam: Seam | None
    """What changes since that checkpoint; None without one."""
    room: RoomNeeded | None
    """The space that checkpoints will take; None on other ranks than the first."""
    card: Card | None
    """The GPU that the memory of a rank was compared with; None on other ranks than the first, or
    if there is none.
    """
    environment: LaunchEnvironment
    """What the launcher tells this rank."""
    refusal: CptError | None
    """Everything that the first rank refuses; on the others, what is wrong with their node."""

    def in_stage(self, number: int) -> PassedGate:
        """Return the same start with the configuration of a stage, counted from 0."""
        return replace(self, config=self.configs[number])

    def refuse(self) -> None:
        """Raise what this rank refuses; a run makes it known to all ranks.

        Raises:
            CptError: everything found, in one message.
        """
        if self.refusal is not None:
            raise self.refusal

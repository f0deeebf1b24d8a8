"""The state of a run besides its tensors: one dataclass, stored in the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from cpt.checkpoint.manifest import Manifest
from cpt.config.precision_sections import ExponentRule
from cpt.errors import CheckpointError
from data_pipeline.escaping import escaped_line

Plain = Mapping[str, Any]
"""A JSON object."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """The state of a run at one step, as JSON values.

    Each part is written and read by its owner. A part that the run does not have is None.
    """

    model_config: Plain
    """Hugging Face's configuration of the model."""
    lineage: Sequence[Plain] | None = None
    """The models that the first weights came from (`cpt.checkpoint.lineage`)."""
    starting_model: Plain | None = None
    """What the directory or checkpoint of the first weights is known by, as `hash` and `sums`
    (`cpt.checkpoint.adapter_state.AdapterBase`); None if they were random, below an adapter, which
    says it itself, or in a run of an older version.
    """
    config: Plain | None = None
    """`RunConfig.to_plain` of the run that wrote the checkpoint."""
    identity: Plain | None = None
    """The settings that may not change when a run is resumed."""
    progress: Plain | None = None
    """Steps, batches and tokens done (`cpt.job.progress.Progress`)."""
    ledger: Plain | None = None
    """The mixtures of the run, by batch (`data_pipeline.mixture.ledger.Ledger`)."""
    guard: Plain | None = None
    """State of the guard (`cpt.guard.ladder.GuardState`)."""
    stability: Plain | None = None
    """Recent losses and gradient norms (`cpt.training.stability.Stability`)."""
    router_load: list[list[float]] | None = None
    """Load of the experts in the last step, by layer; None without a load-balancing loss."""
    adapter: Plain | None = None
    """The adapter and its base (`cpt.checkpoint.adapter_state.AdapterState`); None if the tensors
    are those of a whole model.
    """
    quantize: Plain | None = None
    """The rule by which the run's working weights are the tensors rounded to MXFP4, as `exponent`;
    None if they are not rounded.
    """

    @property
    def begins_a_run(self) -> bool:
        """Whether no run has trained what the checkpoint holds: its tensors came from elsewhere."""
        return self.progress is None and (self.adapter or {}).get("imported") is True

    def to_json(self) -> dict[str, Any]:
        """Return the parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, plain: Plain, checkpoint: str) -> RunState:
        """Read what `to_json` returned.

        Args:
            plain: `Manifest.state`; parts that are missing become None.
            checkpoint: Name of the checkpoint, for the message.

        Raises:
            CheckpointError: the model's configuration is missing.
        """
        known = {field.name for field in fields(cls)}
        parts = {name: value for name, value in plain.items() if name in known}
        if "model_config" not in parts:
            raise CheckpointError(f"{checkpoint}: its manifest has no state.model_config.")
        return cls(**parts)

    @classmethod
    def of(cls, manifest: Manifest) -> RunState:
        """Read the state that a manifest holds.

        Raises:
            CheckpointError: see `from_json`.
        """
        return cls.from_json(manifest.state, f"checkpoint of step {manifest.step}")

    def part(self, name: str, checkpoint: str) -> Plain:
        """Return a part that a run cannot go on without.

        Raises:
            CheckpointError: the checkpoint does not have it.
        """
        value = getattr(self, name)
        if value is None:
            raise CheckpointError(
                f"{checkpoint}: its manifest has no state.{name}, so no run can go on from it. "
                "Resume from another checkpoint with --resume STEP."
            )
        return value


def quantized_by(manifest: Manifest) -> ExponentRule | None:
    """Return the rule by which training rounded the experts of a checkpoint; None if it did not.

    The tensors are the fp32 master weights all the same: an MXFP4 export by this rule is the model
    that was trained, bit for bit.

    Raises:
        CheckpointError: the manifest names a rule that this version does not know, or has no state.
    """
    checkpoint = f"checkpoint of step {manifest.step}"
    quantize = RunState.of(manifest).quantize
    if quantize is None:
        return None
    rule = quantize.get("exponent") if isinstance(quantize, Mapping) else None
    for known in get_args(ExponentRule):
        if rule == known:
            return known  # type: ignore[no-any-return]
    raise CheckpointError(
        f"{checkpoint}: its experts were rounded by '{escaped_line(rule, 80)}', which is none of "
        f"{', '.join(get_args(ExponentRule))}. Use the version of gpt-oss-cpt that wrote it."
    )

"""The run YAML's `train.muon`: the settings of Muon, the optimizer of matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cpt.config.unused_keys import unused_keys

MOST_NEWTON_SCHULZ_STEPS = 20
"""Steps of the iteration that no published run has needed by far; each takes three products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MuonSection:
    """The `train.muon` section: how `train.optimizer: muon` updates matrices."""

    momentum: float = 0.95
    """Decay rate of the running mean of gradients."""
    nesterov: bool = True
    """Look ahead: orthogonalize the mean of gradient and running mean in place of the running mean
    alone."""
    newton_schulz_steps: int = 5
    """Steps of the Newton-Schulz iteration that orthogonalizes; 5 bring most singular values
    between 0.7 and 1.2."""
    update_rms: float = 0.2
    """Root mean square of an update, in units of the learning rate. AdamW with `beta1: 0.9` makes
    updates of about 0.2 where gradients are mostly noise, so the rate and the weight decay of a run
    with AdamW carry over (arXiv 2502.16982)."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, message) of what is wrong in the section alone."""
        if not 0 <= self.momentum < 1:
            yield "momentum", f"is {self.momentum}, must be in [0, 1)."
        if not 1 <= self.newton_schulz_steps <= MOST_NEWTON_SCHULZ_STEPS:
            yield (
                "newton_schulz_steps",
                f"is {self.newton_schulz_steps}, must be between 1 and "
                f"{MOST_NEWTON_SCHULZ_STEPS}; 5 are usual.",
            )
        if not 0 < self.update_rms <= 1:
            yield (
                "update_rms",
                f"is {self.update_rms}, must be in (0, 1]: 0.2 makes updates as large as those of "
                "AdamW.",
            )

    def problems_without_use(self) -> Iterator[tuple[str, str]]:
        """Yield (key, message) of every key that is given though the optimizer is another."""
        told = "train.optimizer is adamw, which has no use for it. Remove it."
        yield from unused_keys(self, False, told)

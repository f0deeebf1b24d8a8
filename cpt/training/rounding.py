"""Training that is aware of MXFP4 (`train.quantize`): when the working weights are rounded.

Decisions
    Whether the weights are rounded after a step follows from the number of steps alone, so a run
    that stops, resumes or rolls back sees what one without a break sees.
    A skipped update leaves the working weights as they are. Only if `start_step` steps are done
    with it, they are rounded for the first time.
    The untouched model is measured before anything is rounded: whoever measures it asks for the
    first rounding afterwards (`start_step: 0`).
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from cpt.config.precision_sections import ExponentRule, QuantizeSection
from cpt.deepspeed_adapter.rounding import (
    block_columns,
    expert_matrices,
    publish_rounded_experts,
)
from cpt.model.kernels.block_rounding import round_blocks, round_blocks_
from cpt.model.weights import mxfp4
from cpt.resilience.faults import fault_point
from cpt.resilience.phase import PhaseClock

log = logging.getLogger("cpt.training.rounding")


class ExpertRounding:
    """Keeps the working weights of the experts' matrices at values that MXFP4 has."""

    def __init__(
        self, section: QuantizeSection, deepspeed: Any, device: torch.device, clock: PhaseClock
    ) -> None:
        """Prepare to round; the weights may still be without values.

        Args:
            section: The `train.quantize` section.
            deepspeed: The DeepSpeed engine.
            device: The device that computes.
            clock: Learns the phase of this rank.
        """
        self._section = section
        self._deepspeed = deepspeed
        self._device = device
        self._clock = clock
        self._is_told = False

    def after_step(self, step: int, *, applied: bool) -> None:
        """Round the weights after a step, if it is time; all ranks call it together.

        Args:
            step: The step just done, counted from 1.
            applied: Whether it has changed the master weights.
        """
        if applied or not self._section.is_on_after(step - 1):
            self.publish(step)

    def publish(self, steps_done: int) -> None:
        """Round the working weights if a run has rounded ones after so many steps.

        They hold the master weights, or what this made of them before.
        """
        if not self._section.is_on_after(steps_done):
            return
        self._clock.enter("rounding", steps_done)
        fault_point("rounding", steps_done)
        in_place = partial(round_blocks_, rule=self._section.exponent)
        publish_rounded_experts(self._deepspeed, in_place, mxfp4.BLOCK, self._device)
        if not self._is_told:
            self._is_told = True
            self._tell(steps_done)

    def _tell(self, steps_done: int) -> None:
        """Log that rounding begins, and warn of frozen experts that an export would change."""
        rule = self._section.exponent
        log.info(
            "after step %d: experts are rounded to MXFP4 from here on, exponents by the rule %s",
            steps_done,
            rule,
        )
        frozen = expert_matrices(self._deepspeed, trained=False)
        odd = [matrix for matrix in frozen if not _is_rounded(matrix, rule)]
        if odd:
            log.warning(
                "%d frozen expert matrices have values that MXFP4 does not have. They stay as they "
                "are, and an MXFP4 export rounds them, so it is another model than the one that is "
                "trained. Take them out of train.freeze, or begin from weights in MXFP4.",
                len(odd),
            )


def _is_rounded(matrix: Any, rule: ExponentRule) -> bool:
    """Return whether rounding leaves the first blocks of this rank's part of a matrix alone."""
    first_1BR = block_columns(matrix, mxfp4.BLOCK)[:1]
    return torch.equal(round_blocks(first_1BR, rule), first_1BR)

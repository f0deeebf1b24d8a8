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

from cpt.config.precision_sections import QuantizeSection
from cpt.deepspeed_adapter.rounding import publish_rounded_experts, separate_masters
from cpt.model.kernels.block_rounding import round_blocks_
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
        if section.is_on:
            separate_masters(deepspeed)

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
        rule = self._section.exponent
        publish_rounded_experts(
            self._deepspeed, partial(round_blocks_, rule=rule), mxfp4.BLOCK, self._device
        )
        if not self._is_told:
            self._is_told = True
            log.info(
                "after step %d: experts are rounded to MXFP4 from here on (exponents: %s)",
                steps_done,
                rule,
            )

"""Working weights are rounded when their number of steps says so, and at no other time."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from cpt.config.precision_sections import QuantizeSection
from cpt.deepspeed_adapter.experts import mark_expert
from cpt.model.weights import mxfp4
from cpt.resilience.phase import PhaseClock
from cpt.training.rounding import ExpertRounding


class EngineOfExperts:
    """An engine of ZeRO-2 with one layer of experts, a matrix, its bias and a router."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Module()
        for name, shape in {"matrix": (2, 64, 5), "bias": (2, 5), "router": (64, 2)}.items():
            parameter = nn.Parameter(torch.randn(shape))
            if name != "router":
                mark_expert(parameter, 1)
            self.module.register_parameter(name, parameter)
        self.first = {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def zero_optimization_stage(self) -> int:
        return 2

    def parameters_that_changed(self) -> list[str]:
        named = self.module.named_parameters()
        return [name for name, p in named if not torch.equal(p, self.first[name])]


def rounding_of(engine: EngineOfExperts, **section: Any) -> tuple[ExpertRounding, PhaseClock]:
    clock = PhaseClock()
    chosen = QuantizeSection(experts="mxfp4", **section)
    made = ExpertRounding(chosen, engine, torch.device("cpu"), clock)
    return made, clock


def test_nothing_is_rounded_before_the_start_step_and_the_matrices_alone_from_it_on() -> None:
    engine = EngineOfExperts()
    rounding, clock = rounding_of(engine, start_step=2, exponent="ceil")
    rounding.publish(0)
    rounding.after_step(1, applied=True)
    assert engine.parameters_that_changed() == [] and clock.now().count == 0
    rounding.after_step(2, applied=True)
    assert engine.parameters_that_changed() == ["matrix"]
    expected = mxfp4.rounded(engine.first["matrix"], "ceil")
    assert torch.equal(engine.module.matrix, expected)
    assert (clock.now().phase, clock.now().step) == ("rounding", 2)


def test_skipped_update_publishes_nothing_but_the_first_rounding_does_not_wait_for_an_update() -> (
    None
):
    engine = EngineOfExperts()
    rounding, clock = rounding_of(engine, start_step=2)
    rounding.after_step(1, applied=False)
    assert engine.parameters_that_changed() == []
    rounding.after_step(2, applied=False)
    assert engine.parameters_that_changed() == ["matrix"]
    visits = clock.now().count
    rounding.after_step(3, applied=False)
    assert clock.now().count == visits


def test_run_without_the_section_rounds_nothing() -> None:
    engine = EngineOfExperts()
    rounding = ExpertRounding(QuantizeSection(), engine, torch.device("cpu"), PhaseClock())
    rounding.publish(0)
    rounding.after_step(1, applied=True)
    assert engine.parameters_that_changed() == []


@pytest.mark.parametrize(("is_odd", "warnings"), [(True, 1), (False, 0)])
def test_frozen_matrices_that_an_export_would_change_are_warned_of_once(
    is_odd: bool, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = EngineOfExperts()
    if not is_odd:
        engine.module.matrix.data = mxfp4.rounded(engine.module.matrix.data)
    engine.module.matrix.requires_grad_(False)
    before = engine.module.matrix.detach().clone()
    rounding, _ = rounding_of(engine, start_step=0)
    with caplog.at_level(logging.INFO, "cpt.training.rounding"):
        rounding.publish(0)
        rounding.after_step(1, applied=True)
    assert torch.equal(engine.module.matrix, before)
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.INFO] + [logging.WARNING] * warnings

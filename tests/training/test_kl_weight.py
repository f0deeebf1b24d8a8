"""The guard sets the weight of the divergence; it holds from the next step on, and is logged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpt.guard.ladder import GuardState
from cpt.job.guard_levers import set_levers
from cpt.job.job import Job
from cpt.training.engine import TrainingEngine


class TwoLosses:
    """An engine whose loss is the parameter, and whose divergence is its square."""

    def __init__(self) -> None:
        self.parameter = torch.tensor(3.0, requires_grad=True)
        self.optimizer = SimpleNamespace(param_groups=[{"name": "decay", "lr": 0.0}])

    def __call__(self, **_: Any) -> torch.Tensor:
        return torch.stack([self.parameter, self.parameter**2]).view(2, 1, 1)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]


def make_engine() -> Any:
    engine: Any = object.__new__(TrainingEngine)
    engine.deepspeed = TwoLosses()
    engine.router_watch = SimpleNamespace(enter=lambda sources: None)
    engine._clock = SimpleNamespace(enter=lambda phase, step: None)
    engine._sequence_parallel = None
    engine._kernel = None
    engine._kl_weight = 0.0
    return engine


def make_job(
    engine: Any, weight: float | None, state: GuardState | None, lever: str = "before"
) -> Any:
    job: Any = object.__new__(Job)
    train = SimpleNamespace(kl_weight=weight)
    guard = SimpleNamespace(router_lever="off", kl_lever=lever)
    job.context = SimpleNamespace(config=SimpleNamespace(train=train, guard=guard))
    job.engine = engine
    job.guard = None if state is None else SimpleNamespace(state=state)
    return job


@pytest.mark.parametrize(
    ("configured", "state", "weight"),
    [
        (None, None, 0.0),
        (0.25, None, 0.25),
        (0.25, GuardState(), 0.25),
        (0.25, GuardState(kl_weight=0.5), 0.5),
    ],
)
def test_gradient_of_the_next_step_has_the_weight_that_the_guard_set(
    configured: float | None, state: GuardState | None, weight: float
) -> None:
    engine = make_engine()
    job = make_job(engine, configured, state)
    set_levers(job, lr=0.1)
    fields = ("input_ids", "position_ids", "targets", "num_labels", "packed_rows", "source_of_row")
    batch = SimpleNamespace(labels=torch.zeros(1, 1), **dict.fromkeys(fields))
    engine._backward(batch, 1, 1.0)
    assert job.kl_weight == weight
    assert engine.deepspeed.parameter.grad == pytest.approx(1 + weight * 2 * 3.0)
    assert engine.deepspeed.optimizer.param_groups[0]["lr"] == 0.1


def test_weight_of_the_run_yaml_holds_again_where_the_guard_no_longer_moves_it() -> None:
    job = make_job(make_engine(), 0.25, GuardState(kl_weight=0.5), lever="off")
    assert job.kl_weight == 0.25

"""Faults fire where they are planned, once, and only with permission."""

from __future__ import annotations

import errno
import logging
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from cpt.errors import ConfigError
from cpt.resilience import faults
from cpt.resilience.faults import (
    InjectedFault,
    check_environment,
    fault_point,
    install_faults,
)
from cpt.resilience.phase import PhaseClock

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("CPT_ALLOW_FAULTS", "1")
    monkeypatch.setenv("RANK", "1")
    faults._planned.cache_clear()
    yield monkeypatch
    faults._planned.cache_clear()


@pytest.mark.case("X8", "no fault fires, one line says so")
def test_without_permission_nothing_fires_and_one_line_says_so(plan, caplog) -> None:
    plan.delenv("CPT_ALLOW_FAULTS")
    plan.setenv("CPT_FAULT", "forward:*:*:raise")
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            fault_point("forward", step)
    assert [record.message for record in caplog.records] == [
        "CPT_FAULT is set, but CPT_ALLOW_FAULTS is not 1: no fault will fire. Unset it."
    ]


def training_pass(model: nn.Module, clock: PhaseClock, step: int) -> tuple[float, float]:
    """Return the loss of a model that returns its weight 1.0, and the gradient of that loss."""
    clock.enter("forward", step)
    weight = torch.ones(1, requires_grad=True)
    loss = model(weight)
    loss.sum().backward()
    assert weight.grad is not None
    return loss.item(), weight.grad.item()


def test_fault_fires_at_its_point_rank_and_step_only_and_once(plan) -> None:
    plan.setenv("CPT_FAULT", "forward:1:3:nan,forward:0:4:inf,gradient:*:9:scale=50")
    model, clock = nn.Identity(), PhaseClock()
    install_faults(model, clock)
    for step in (1, 2, 4, 5):
        assert training_pass(model, clock, step) == (1.0, 1.0)
    poisoned_loss, poisoned_gradient = training_pass(model, clock, 3)
    assert math.isnan(poisoned_loss) and math.isnan(poisoned_gradient)
    assert training_pass(model, clock, 3) == (1.0, 1.0)
    assert [training_pass(model, clock, 9) for _ in range(2)] == [(1.0, 50.0), (1.0, 1.0)]


def test_pass_without_gradients_is_left_alone(plan) -> None:
    plan.setenv("CPT_FAULT", "forward:*:*:nan")
    model = nn.Identity()
    install_faults(model, PhaseClock())
    assert model(torch.ones(1)).item() == 1.0


def test_model_gets_no_hook_unless_a_fault_is_planned_and_allowed(plan) -> None:
    model = nn.Identity()
    install_faults(model, PhaseClock())
    faults._planned.cache_clear()
    plan.delenv("CPT_ALLOW_FAULTS")
    plan.setenv("CPT_FAULT", "forward:*:*:nan")
    install_faults(model, PhaseClock())
    assert not model._forward_hooks


def test_error_planned_at_backward_is_raised_in_the_backward_pass(plan) -> None:
    plan.setenv("CPT_FAULT", "backward:1:2:raise")
    model, clock = nn.Identity(), PhaseClock()
    install_faults(model, clock)
    with pytest.raises(InjectedFault, match="backward, step 2"):
        training_pass(model, clock, 2)


def test_errors_are_raised_as_the_real_ones(plan) -> None:
    plan.setenv("CPT_FAULT", "data:1:1:raise,save_write:1:2:enospc")
    with pytest.raises(InjectedFault, match="data, step 1"):
        fault_point("data", 1)
    with pytest.raises(OSError, match="No space left") as caught:
        fault_point("save_write", 2)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("forward:1:3", "must be <point>:<rank>:<step>:<action>"),
        ("froward:1:3:kill", "point 'froward' is none of load,"),
        ("forward:one:-1:kill", r"rank 'one' must be a whole number or \*; step '-1'"),
        ("forward:1:3:kil", "action 'kil' is none of kill,"),
        ("forward:1:3:sleep", "action 'sleep'"),
        ("forward:1:3:sleep=soon", "action 'sleep=soon'"),
        ("forward:1:3:kill=9", "action 'kill=9'"),
    ],
)
def test_malformed_fault_is_a_bad_configuration(plan, entry: str, message: str) -> None:
    plan.setenv("CPT_FAULT", f"forward:0:1:nan,{entry}")
    with pytest.raises(ConfigError, match=message):
        check_environment()


def test_killgroup_ends_the_ranks_of_this_run_and_nothing_else(tmp_path: Path) -> None:
    """Three children of one parent: two ranks of a run, of which one strikes, and one of another
    run.
    """
    script = tmp_path / "rank.py"
    script.write_text(
        "import time\n"
        "from cpt.resilience.faults import fault_point\n"
        "fault_point('forward', 1)\n"
        "time.sleep(60)\n"
    )

    def rank(number: int, port: int, fault: str) -> subprocess.Popen[bytes]:
        environment = {
            "RANK": str(number),
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(ROOT),
            "CPT_FAULT": fault,
        }
        return subprocess.Popen(
            [sys.executable, str(script)], env={**environment, "CPT_ALLOW_FAULTS": "1"}
        )

    strange = rank(0, 4001, "")
    peer = rank(0, 4002, "")
    striking = rank(1, 4002, "forward:1:1:killgroup")
    try:
        assert striking.wait(30) == -signal.SIGKILL and peer.wait(30) == -signal.SIGKILL
        assert strange.poll() is None
    finally:
        for process in (strange, peer, striking):
            process.kill()
            process.wait()

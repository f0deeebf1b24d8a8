"""Modules that a recomputation leaves on DeepSpeed's list do not stay there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.utils import groups
from torch import nn
from torch.utils.checkpoint import checkpoint

from cpt.deepspeed_adapter.running_modules import recomputed_modules_forgotten
from cpt.offline.ranks import single_process
from tests.support.launcher import free_port, rank_environment

SIZE = 4
LAYERS = 3


class Recomputed(nn.Module):
    """Layers that are computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(LAYERS))

    def forward(self, x_BM: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_BM = checkpoint(layer, x_BM, use_reentrant=False)
        return x_BM.sum()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A ZeRO-3 engine of one process."""
    for name, value in rank_environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    # DeepSpeed keeps its copy of a process group that is gone after this test
    monkeypatch.setattr(groups, "_WORLD_GROUP", None)
    config = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    with single_process():
        model = Recomputed()
        optimizer = torch.optim.AdamW(model.parameters())
        built, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        yield built
        built.destroy()


def test_list_of_running_modules_is_as_long_after_a_backward_as_before(engine: Any) -> None:
    """Once DeepSpeed alone leaves nothing there, `running_modules.py` can go."""
    depth = len(FWD_MODULE_STACK)
    for cure, grown in ((nullcontext, LAYERS), (recomputed_modules_forgotten, 0)):
        with cure():
            engine.backward(engine(torch.ones(1, SIZE)))
        engine.step()
        assert len(FWD_MODULE_STACK) == depth + grown
        del FWD_MODULE_STACK[depth:]

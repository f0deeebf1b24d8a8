"""The DeepSpeed engine of a run."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn

from cpt.deepspeed_adapter.offload import (
    move_frozen_weights,
    on_host,
    place_gradients,
    state_in_files,
)
from cpt.deepspeed_adapter.shards import create_optimizer_state
from cpt.storage.file_memory import FileMemory


def initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    engine_json: dict[str, Any],
    files: dict[str, FileMemory],
) -> Any:
    """The engine.

    Args:
        files: The memory of the state that goes to NVMe, of the sizes that `file_bytes` says.
    """
    with state_in_files(files):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=on_host(engine_json)
        )
    if "offload_optimizer" in files:
        place_gradients(engine.optimizer, files["offload_optimizer"])
        create_optimizer_state(engine, files["offload_optimizer"].zeros_like)
    if "offload_param" in files:
        move_frozen_weights(model, files["offload_param"])
    return engine

"""The untouched model's routers, kept beside a run to measure how far training moves them.

<run_dir>/router_original.safetensors is written before step 0 and read by every later start.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from cpt.deepspeed_adapter.partition import gathered
from cpt.model.experts.router_watch import router_parameters
from cpt.parallel.agreement import on_first_rank, together
from cpt.resilience.best_effort import best_effort, reason_of
from cpt.training.engine import TrainingEngine
from data_pipeline.store.files import atomic_write

log = logging.getLogger("cpt.original_router")

FILE = "router_original.safetensors"


def watch_drift(engine: TrainingEngine, run_dir: Path, *, untouched: bool) -> None:
    """Give the engine's router watch the untouched routers; call it on all ranks.

    Args:
        engine: The engine, its weights in place.
        run_dir: Holds the file.
        untouched: Whether the weights are still those of the start; then the file is written.

    A file that cannot be written or read costs a warning: the drift is not measured then.
    """
    parameters = router_parameters(engine.deepspeed.module)
    group = engine.topology.control_group
    path = run_dir / FILE
    if untouched:
        with gathered(list(parameters.values())):
            tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        on_first_rank(group, lambda: _write(path, tensors))
    else:
        read = _read_together(engine, path)
        if read is None:
            return
        tensors = read
    weights = [tensors[name] for name in parameters if name.endswith(".weight")]
    biases = [tensors[name] for name in parameters if name.endswith(".bias")]
    engine.router_watch.original = list(zip(weights, biases, strict=True))


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    failed = "Later starts will not measure the drift of the routers"
    with best_effort(failed), atomic_write(path) as file:
        file.write(save(content))


def _read_together(engine: TrainingEngine, path: Path) -> dict[str, torch.Tensor] | None:
    """Return what the file holds, on all ranks; None on all if one cannot read it."""
    group, device = engine.topology.control_group, str(engine.topology.device)
    if not on_first_rank(group, path.is_file):
        log.warning("%s is missing: the drift of the routers is not measured", path)
        return None
    try:
        return together(group, lambda: load_file(path, device=device))
    except Exception as error:  # the same on all ranks
        log.warning(
            "%s cannot be read (%s): the drift of the routers is not measured",
            path,
            reason_of(error),
        )
        return None

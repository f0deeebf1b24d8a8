"""The engine that a command line names."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.engine.executor import Executor
from data_pipeline.engine.local import LocalExecutor, available_cores
from data_pipeline.engine.ray_cluster import RayExecutor

LOCAL = "local"
RAY = "ray"
ENGINES = (LOCAL, RAY)


def open_executor(engine: str, num_workers: int | None, shared_dir: Path) -> Executor:
    """Start an engine.

    Args:
        engine: One of `ENGINES`.
        num_workers: Tasks that run at once; None is as many as there are cores.
        shared_dir: A folder that exists, in which tasks read and write.

    Raises:
        ConfigError: the engine cannot be used here.
    """
    assert engine in ENGINES, engine
    if engine == RAY:
        return RayExecutor(shared_dir, num_workers)
    return LocalExecutor(num_workers or available_cores())

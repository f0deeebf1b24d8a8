"""The engine that a command line names."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.engine.executor import Executor
from data_pipeline.engine.local import LocalExecutor, available_cores
from data_pipeline.engine.ray_cluster import RayExecutor, check_environment

LOCAL = "local"
RAY = "ray"
ENGINES = (LOCAL, RAY)


def check_engine(engine: str) -> None:
    """Refuse an engine that cannot be used here, as far as nothing need be started to know.

    Raises:
        ConfigError: it cannot be used here.
    """
    if engine == RAY:
        check_environment()


def open_executor(
    engine: str, num_workers: int | None, work_dir: Path, cache_dir: Path | None = None
) -> Executor:
    """Start an engine.

    Args:
        engine: One of `ENGINES`.
        num_workers: Tasks that run at once; None is as many as there are cores.
        work_dir: A folder that exists, in which tasks read and write.
        cache_dir: One of the parts that builds share, if there is one.

    Raises:
        ConfigError: the engine cannot be used here.
    """
    assert engine in ENGINES, engine
    if engine == RAY:
        return RayExecutor(work_dir, num_workers, cache_dir)
    return LocalExecutor(num_workers or available_cores())

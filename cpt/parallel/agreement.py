"""Facts of one rank made known to all, so that no rank acts on its own.

They travel over the gloo control group as JSON, never as pickles.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cpt.errors import CptError, InternalError, StorageError, cause_and_code
from data_pipeline.errors import is_of_storage

T = TypeVar("T")


def gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return every rank's value, by rank, on every rank."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    world_size = dist.get_world_size(group)
    sizes = torch.zeros(world_size, dtype=torch.int64)
    sizes[dist.get_rank(group)] = data.numel()
    dist.all_reduce(sizes, group=group)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: data.numel()] = data
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded, group=group)
    values = []
    for part, size in zip(parts, sizes.tolist(), strict=True):
        values.append(json.loads(part[:size].numpy().tobytes().decode()))
    return values


def together(group: dist.ProcessGroup, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it failed on any, raise on all.

    Raises:
        CptError: This rank's own error if it has one, else that of the lowest rank that failed. A
            file that cannot be read or written is a `StorageError` on all ranks.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as caught:
        error = as_storage_error(caught)
    failures = gather_json(None if error is None else describe_error(error), group)
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise rebuild_error(failure, rank)
    return result  # type: ignore[return-value]


def on_first_rank(group: dist.ProcessGroup, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only; its JSON-able result, or its error, reaches every rank."""
    results: list[T | None] = [None]

    def act() -> None:
        if dist.get_rank(group) == 0:
            results[0] = action()

    together(group, act)
    return gather_json(results[0], group)[0]


def describe_error(error: Exception) -> dict[str, str]:
    """Return what another rank needs to raise the same error: its class by name, and its text."""
    if isinstance(error, CptError):
        return {"class": type(error).__name__, "text": str(error)}
    return {"class": "", "text": f"{type(error).__name__}: {error}"}


def as_storage_error(error: Exception) -> Exception:
    """Return the error that all ranks raise for one of a file, with its exit code; others as they
    are.
    """
    if not is_of_storage(error):
        return error
    cause, _ = cause_and_code(error)
    translated = StorageError(cause)
    translated.__cause__ = error
    return translated


def rebuild_error(description: dict[str, str], rank: int) -> CptError:
    """Return the error that `describe_error` described on another rank.

    A name that is not one of this project's errors becomes an InternalError: no other class is ever
    looked up.
    """
    known = _error_classes(CptError)
    error_class = known.get(description["class"])
    if error_class is None:
        return InternalError(f"rank {rank}: {description['text']}")
    return error_class(description["text"])


def _error_classes(base: type[CptError]) -> dict[str, type[CptError]]:
    """Return all classes of errors below a base, by name."""
    found: dict[str, type[CptError]] = {}
    for error_class in base.__subclasses__():
        found[error_class.__name__] = error_class
        found |= _error_classes(error_class)
    return found

"""Facts of one rank made known to all, over the gloo control group, so that no rank acts on its
own.

Values travel as JSON, never as pickles.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cpt.errors import CptError, InternalError

T = TypeVar("T")


def gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's value, by rank, on every rank."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    world_size = dist.get_world_size(group)
    sizes = torch.zeros(world_size, dtype=torch.int64)
    sizes[dist.get_rank(group)] = data.numel()
    dist.all_reduce(sizes, group=group)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: data.numel()] = data
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded, group=group)
    return [
        json.loads(part[: int(size)].numpy().tobytes().decode())
        for part, size in zip(parts, sizes, strict=True)
    ]


def together(group: dist.ProcessGroup, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it failed on any, raise on all.

    Raises:
        CptError: this rank's own error if it has one, else that of the lowest rank that failed.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    told = (
        None if error is None else {"code": getattr(error, "exit_code", 70), "text": _text(error)}
    )
    failures = [
        (rank, failure)
        for rank, failure in enumerate(gather_json(told, group))
        if failure is not None
    ]
    if error is not None:
        raise error
    if failures:
        rank, failure = failures[0]
        raise _error_with_code(int(failure["code"]), f"{failure['text']}", rank)
    return result  # type: ignore[return-value]


def on_first_rank(group: dist.ProcessGroup, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only; its JSON-able result, or its error, reaches every rank."""
    results: list[T | None] = [None]

    def act() -> None:
        if dist.get_rank(group) == 0:
            results[0] = action()

    together(group, act)
    return gather_json(results[0], group)[0]


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, CptError) else f"{type(error).__name__}: {error}"


def _error_with_code(code: int, text: str, rank: int) -> CptError:
    def subclasses(cls: type[CptError]) -> list[type[CptError]]:
        return [cls, *(below for direct in cls.__subclasses__() for below in subclasses(direct))]

    for cls in subclasses(CptError)[1:]:
        if cls.exit_code == code:
            return cls(text)
    return InternalError(f"rank {rank}: {text}")

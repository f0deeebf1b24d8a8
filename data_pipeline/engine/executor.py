"""Where the tasks of a build run: the promise that every engine keeps.

Decisions
    A task is a function of a module and one small item that both can be pickled. What is large goes
    through files in the work directory, and results are small: counts and paths.
    Tasks are pure, so one whose worker was lost may run again. Results come in the order in which
    they are done; who needs another order sorts them by their items. The output of a build
    therefore depends neither on the engine nor on the number of workers.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

TASK_MEMORY_BYTES = 2**30
"""Memory that one task takes at most, so that an engine can place tasks by it."""


class Executor(abc.ABC):
    """Runs the same function on many items; a context manager that ends its workers."""

    num_workers: int
    """Tasks that can run at once."""

    @abc.abstractmethod
    def run(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
    ) -> Iterator[tuple[Item, Result]]:
        """Yield (item, result) of each item as it is done.

        Args:
            work: A function of a module, which may run more than once on an item.
            items: Small values that can be pickled.

        Raises:
            CptError: `work` raised it, or a worker died.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """End the workers; tasks that have begun are waited for."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

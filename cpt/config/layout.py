"""Sequence-parallel and expert-parallel sizes: the rules they obey, and the largest that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from cpt.config.sections import LaunchInfo

NUM_SUGGESTIONS = 3
"""Sizes that a refusal names."""


class Rule(NamedTuple):
    """One condition that a parallel size must meet."""

    holds: Callable[[int], bool]
    """Whether a size meets the condition."""
    message: str
    """The sentence about a size that does not, after "is N, which"."""


def nearest_sizes(sizes: Iterable[int], wanted: int) -> str:
    """Name the sizes that are next to a value, for a message."""
    nearest = sorted(sizes, key=lambda size: abs(size - wanted))[:NUM_SUGGESTIONS]
    return ", ".join(str(size) for size in sorted(nearest))


def nearest_divisors(total: int, wanted: int) -> str:
    """Name the sizes that divide a total and are next to a value, for a message."""
    return nearest_sizes([size for size in range(1, total + 1) if total % size == 0], wanted)


def divides(total: int, name: str) -> Rule:
    """Return the rule that a size divides a total."""
    return Rule(lambda size: total % size == 0, f"does not divide the {name}")


def matches_kv_heads(num_kv_heads: int) -> Rule:
    """Return the rule that key/value heads are either divided or repeated evenly."""

    def holds(size: int) -> bool:
        return num_kv_heads % size == 0 or size % num_kv_heads == 0

    message = f"neither divides the {num_kv_heads} key/value heads nor is a multiple of them"
    return Rule(holds, message)


def sequence_rules(model: Any, launch: LaunchInfo) -> list[Rule]:
    """Return the rules of `sequence_parallel_size`, except those about seq_len."""
    return [
        divides(launch.world_size, f"world size {launch.world_size}"),
        divides(model.num_attention_heads, f"{model.num_attention_heads} query heads"),
        matches_kv_heads(model.num_key_value_heads),
    ]


def expert_rules(model: Any, launch: LaunchInfo) -> list[Rule]:
    """Return the rules of `expert_parallel.autoep_size`."""
    return [
        divides(launch.world_size, f"world size {launch.world_size}"),
        divides(model.num_local_experts, f"{model.num_local_experts} experts"),
    ]


class SizeChooser:
    """Chooses one parallel size, or says why the size asked for does not fit."""

    def __init__(self, rules: Sequence[Rule], model: Any, launch: LaunchInfo) -> None:
        self._rules = rules
        self._launch = launch
        self._limit = max(launch.world_size, model.num_attention_heads, model.num_local_experts)

    def largest(self) -> int:
        """Return the largest size that obeys all rules and divides the ranks of this node."""
        ranks = self._launch.local_world_size
        return max(size for size in self._valid() if ranks % size == 0)

    def refusal(self, size: int) -> str:
        """Return why a size does not fit and which ones do, or an empty string."""
        broken = [rule.message for rule in self._rules if not rule.holds(size)]
        if not broken:
            return ""
        options = nearest_sizes(self._valid(), size)
        return f"is {size}, which {' and '.join(broken)}. Nearest sizes that fit: {options}."

    def _valid(self) -> list[int]:
        return [size for size in range(1, self._limit + 1) if self._obeys(size)]

    def _obeys(self, size: int) -> bool:
        return all(rule.holds(size) for rule in self._rules)


Wanted = int | Literal["auto"]
"""A size as the DeepSpeed JSON gives it."""

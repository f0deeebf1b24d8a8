"""How far the guard's levers can still move at one step; with the evidence, all of a decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceLimits:
    """The share of one replayed source, and the ends between which it may move."""

    share: float
    """Present share in the predicted tokens, 0 to 1."""
    least: float
    """Smallest share, by `guard.least_replay` and the floor of its language."""
    largest: float
    """Largest share, by the ceiling of its language and its epochs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeverLimits:
    """What a decision must know of the run besides the evidence, at one step."""

    shares: Mapping[str, tuple[float | None, float]] = field(default_factory=dict)
    """Present share of each domain's sources, or None if none of them can be replayed, and the
    largest share that they may have.
    """
    room: float = 0.0
    """Share of the tokens by which all replay together may still grow."""
    served_by: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Sources that are replayed for each domain, by domain."""
    sources: Mapping[str, SourceLimits] = field(default_factory=dict)
    """Limits of every source that serves a domain, by source."""
    main_share: float = 1.0
    """Present share of the main language, which gives what replay gains."""
    is_warming_up: bool = False
    """Whether the learning rate is still rising to its peak (`train.warmup_steps`)."""
    kl_weight: float | None = None
    """`train.kl_weight` of the run YAML; None without targets."""
    router_overlap: float | None = None
    """Share of the newest routing choices that the untouched routers would make too, mean over the
    layers; None if none was measured since the start.
    """
    planned: Mapping[str, float] = field(default_factory=dict)
    """Share of each replayed source in the schedule of the mix, at the present step; empty without
    a schedule."""

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Self:
        """Read the output of `to_json`."""
        values = dict(plain)
        shares = {}
        for domain, (share, largest) in plain["shares"].items():
            shares[domain] = (share, largest)
        values["shares"] = shares
        sources = {}
        for name, limits in plain["sources"].items():
            sources[name] = SourceLimits(**limits)
        values["sources"] = sources
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        plain = asdict(self)
        plain["shares"] = {domain: list(pair) for domain, pair in self.shares.items()}
        plain["served_by"] = {domain: list(names) for domain, names in self.served_by.items()}
        return plain

"""The mix over a run: an append-only list of segments.

Decisions
    A segment says from which step on which weights hold.  What is in the ledger never changes; an edit of the mix is
    one more segment, so the batches of past steps stay what they were.
    A segment holds all that the choice of rows needs.  The hash of the mix is there to notice that somebody edited it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import ConfigError
from data_pipeline.schema import WEIGHT_SUM_TOLERANCE, MixConfig

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Weights that hold from `start_step` on."""

    start_step: int
    """Optimizer step, counted from 0."""
    weights: Mapping[str, float]
    """Share of the predicted tokens by source name; sums to 1."""
    max_epochs: Mapping[str, float]
    """Epochs by source name; a source that is not here repeats without limit."""
    mix_hash: str
    """`mix_hash` of the mix that the weights come from."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ledger:
    """All segments of a run, in order of their first steps."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        starts = [segment.start_step for segment in self.segments]
        if not starts or starts[0] != 0:
            raise ConfigError(f"mix ledger: the first segment starts at step {starts[:1]}, must start at 0.")
        if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
            raise ConfigError(f"mix ledger: start steps are {starts}, must increase. The ledger is append-only.")
        for segment in self.segments:
            total = math.fsum(segment.weights.values())
            sound = all(weight >= 0 for weight in segment.weights.values())
            if not sound or abs(total - 1) > WEIGHT_SUM_TOLERANCE:
                raise ConfigError(f"mix ledger: weights from step {segment.start_step} are not shares that sum to 1.")

    @classmethod
    def start(cls, mix: MixConfig) -> Ledger:
        """The ledger of a new run."""
        return cls((_segment(mix, 0),))

    def append(self, mix: MixConfig, start_step: int) -> Ledger:
        """This ledger and one more segment.

        Raises:
            ConfigError: `start_step` is not after the start of the last segment.
        """
        return Ledger((*self.segments, _segment(mix, start_step)))

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"format_version": FORMAT_VERSION, "segments": [dataclasses.asdict(s) for s in self.segments]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """The inverse of `to_json`.

        Raises:
            ConfigError: the value is no ledger of this format.
        """
        if value.get("format_version") != FORMAT_VERSION:
            raise ConfigError(f"mix ledger: format version {value.get('format_version')}, must be {FORMAT_VERSION}.")
        try:
            return cls(tuple(Segment(**segment) for segment in value["segments"]))
        except (TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"mix ledger: lacks or misnames a key: {error}.") from error

    @property
    def ledger_hash(self) -> str:
        """Hex sha256 of all segments."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def mix_hash(mix: MixConfig) -> str:
    """Hex sha256 of the settings of a mix, paths aside: what the files hold is for `build.fingerprint` to notice."""
    content = dataclasses.asdict(mix)
    for source in content["sources"]:
        del source["path"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _segment(mix: MixConfig, start_step: int) -> Segment:
    return Segment(
        start_step=start_step,
        weights={source.name: source.weight for source in mix.sources},
        max_epochs={source.name: source.max_epochs for source in mix.sources if source.max_epochs is not None},
        mix_hash=mix_hash(mix),
    )

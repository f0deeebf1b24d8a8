"""How the sources of a mix share the tokens: all by `weight`, or all by `epochs`.

Decisions
    Weights are shares and sum to 1. Epochs say how often a source is read over the run; its weight
    follows from the learned tokens of the build (`mixture.epochs`), so the rules on weights wait.
    One mix has one of the two. Beside a weight, the share that an epoch is would follow from the
    length of the run: another `train.total_steps` would then be another mixture, and a run that is
    given more steps could not keep what it was promised. MosaicML's streaming refuses the same
    (`proportion` beside `repeat`). A weight of 0, never trained on, stands beside both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipeline.config.language_limits import WEIGHT_SUM_TOLERANCE
from data_pipeline.config.strict_yaml import Reader, is_number

RawSection = Mapping[str, Any]


def check_weights(
    reader: Reader, sources: Mapping[int, RawSection], schedule: Iterable[RawSection] = ()
) -> None:
    """Report sources that do not say how often they are read, or not all in the same way.

    Args:
        reader: Takes the problems.
        sources: The parsed sources by their index.
        schedule: The parsed phases.
    """
    for index, source in sources.items():
        given = ["weight"] if "weight" in source else []
        given += ["epochs"] if source.get("epochs") is not None else []
        if not given:
            reader.problem(
                ("sources", index, "weight"),
                "is missing. It has no default: add it, or epochs in all sources.",
            )
        elif len(given) == 2:
            reader.problem(
                ("sources", index, "weight"),
                "and epochs are given: a source has a share of the tokens, or is read so often. "
                "Remove one.",
            )
    if give_epochs(sources.values()):
        _check_epochs(reader, sources, list(schedule))
    else:
        _check_sum(reader, sources)


def give_epochs(sources: Iterable[RawSection]) -> bool:
    """Return whether any of the parsed sources has epochs."""
    return any(source.get("epochs") is not None for source in sources)


def _check_epochs(
    reader: Reader, sources: Mapping[int, RawSection], schedule: list[RawSection]
) -> None:
    by_epochs = []
    by_weight = []
    for index, source in sources.items():
        name = str(source.get("name", f"sources[{index}]"))
        weight = source.get("weight")
        if source.get("epochs") is not None:
            by_epochs.append(name)
        elif is_number(weight) and weight != 0:
            by_weight.append(f"{name} {weight:g}")
    if by_weight:
        reader.problem(
            ("sources",),
            f"have epochs ({', '.join(by_epochs)}) beside weights ({', '.join(by_weight)}): what "
            "share an epoch is would follow from the length of the run. Give all of them epochs, "
            "or all a weight; weight: 0 may stand beside epochs.",
        )
    if schedule and all(phase.get("weights") or phase.get("to") for phase in schedule):
        reader.problem(
            ("schedule",),
            "has weights in every phase, and epochs hold only where a phase has none: they would "
            "say nothing. Give the sources a weight, or leave out the weights of a phase.",
        )


def _check_sum(reader: Reader, sources: Mapping[int, RawSection]) -> None:
    """Check that the weights are shares that sum to 1, if all of them are numbers."""
    weights: dict[int, float] = {}
    for index, source in sources.items():
        weight = source.get("weight")
        if is_number(weight):
            weights[index] = float(weight)
    negative = [index for index, weight in weights.items() if weight < 0]
    for index in negative:
        reader.problem(
            ("sources", index, "weight"),
            f"is {weights[index]:g}, must be >= 0. "
            "Remove the source or give it a share of the tokens.",
        )
    all_finite = all(map(math.isfinite, weights.values()))
    if negative or not all_finite or len(weights) < len(sources):
        return
    total = math.fsum(weights.values())
    if total == 0:
        reader.problem(
            ("sources",), "have weights that are all 0. Give at least one a share of the tokens."
        )
    elif abs(total - 1) > WEIGHT_SUM_TOLERANCE:
        scaled = []
        for index, weight in weights.items():
            name = sources[index].get("name", f"sources[{index}]")
            scaled.append(f"{name} {weight / total:.6g}")
        reader.problem(
            ("sources",),
            f"have weights that sum to {total:.9g}, must be 1. Scaled to 1: {', '.join(scaled)}.",
        )

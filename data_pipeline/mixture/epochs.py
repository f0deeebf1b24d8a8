"""Sources that say how often they are read: the weights that follow, and how far a run gets.

    epochs of the mix + learned tokens of the build -> weights (`with_weights`)
    -> ledger, plan and guard, which know weights only

Decisions
    Source i with epochs e_i and t_i learned tokens in an epoch has the weight
        w_i = e_i t_i / sum_j e_j t_j
    so after sum_j e_j t_j tokens every source was read as often as it asks for, up to one row. The
    weights do not depend on the length of the run: the ledger stays what it is, a run with other
    `total_steps` draws the same rows, and how far the run gets is told in steps. Others do the
    same: MosaicML's streaming (`repeat`) and Megatron Energon (`blend_epochized`) fix the ratio,
    and the number of steps says how much of it is read.
    There is one place at which weights follow, where a build is opened to be mixed. `epochs` stays
    in the mix beside them, to tell a source whose weight follows from one that has it written.
    Under a schedule they are the weights of the sources, which hold in phases without their own.
    The epochs are counted there, and how often the source is read in all is for the plan to show.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from data_pipeline.config.language_limits import WEIGHT_SUM_TOLERANCE, LanguageLimits
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.schedule_config import SchedulePhase
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.store.manifest import BuildManifest

TOLERANCE = 0.01
"""Part of the epochs by which a run may miss them without a warning."""


def has_epochs(mix: MixConfig) -> bool:
    """Return whether the weights of a mix follow from its build."""
    return any(source.epochs is not None for source in mix.sources)


def with_weights(mix: MixConfig, manifest: BuildManifest) -> MixConfig:
    """Return a mix with the weights that its epochs mean over a build; others stay as they are.

    Args:
        mix: The mix.
        manifest: That of its build, which has the learned tokens of every source.

    Raises:
        DataError: a source has epochs, but no learned tokens in the build.
        ConfigError: the weights break a floor or a ceiling of a language; all that they break.
    """
    if not has_epochs(mix):
        return mix
    tokens = {entry.name: entry.predicted_tokens for entry in manifest.sources}
    empty = []
    asked: dict[str, float] = {}
    for source in mix.sources:
        if source.epochs is None:
            continue
        asked[source.name] = source.epochs * tokens.get(source.name, 0)
        if not asked[source.name]:
            empty.append(
                f"source '{source.name}' has epochs {source.epochs:g} but no learned tokens in the "
                "build. Set weight: 0 in place of epochs, or give it text to train on."
            )
    if empty:
        raise DataError("\n".join(empty))
    total = math.fsum(asked.values())
    sources = []
    for source in mix.sources:
        if source.epochs is not None:
            source = dataclasses.replace(source, weight=asked[source.name] / total)
        sources.append(source)
    weighted = dataclasses.replace(mix, sources=tuple(sources))
    problems = list(_broken_bounds(weighted, "languages", mix.languages))
    for phase in mix.schedule:
        if phase.languages and not phase.weights:
            where = f"schedule[{phase.name}].languages"
            problems += _broken_bounds(weighted, where, phase.languages)
    if problems:
        raise ConfigError(problems)
    return weighted


def _broken_bounds(
    mix: MixConfig, where: str, bounds: Mapping[str, LanguageLimits]
) -> Iterable[str]:
    """Yield a problem for each floor or ceiling that the weights of the sources do not keep."""
    for language, limits in bounds.items():
        parts = []
        shares = []
        for source in mix.sources:
            if source.language == language and source.epochs is not None:
                parts.append(f"{source.name} {source.epochs:g}")
                shares.append(source.weight)
        share = math.fsum(shares)
        asked = ", ".join(parts) or "none"
        told = f"the epochs ({asked}) give {language} {share:.2%} of the tokens"
        if share < limits.min_share - WEIGHT_SUM_TOLERANCE:
            yield (
                f"{where}.{language}.min_share is {limits.min_share:g}, but {told}. "
                "Raise the epochs of its sources, or lower the floor."
            )
        if share > limits.max_share + WEIGHT_SUM_TOLERANCE:
            yield (
                f"{where}.{language}.max_share is {limits.max_share:g}, but {told}. "
                "Lower the epochs of its sources, or raise the ceiling."
            )


def has_own_weights(phase: SchedulePhase) -> bool:
    """Return whether a phase draws by other weights than those of the sources."""
    return bool(phase.weights or phase.to)


def describe_weights(mix: MixConfig) -> str:
    """Return the weights that follow from epochs, or that they will follow; empty without epochs.

    Args:
        mix: The mix, as it was read or by `with_weights`.
    """
    parts = []
    is_known = True
    for source in mix.sources:
        if source.epochs is None:
            continue
        is_known = is_known and source.weight > 0
        text = f"{source.name} {source.epochs:g}"
        parts.append(f"{text} ({source.weight:.2%})" if source.weight else text)
    if not parts:
        return ""
    if not is_known:
        return f"epochs: {', '.join(parts)}; the weights follow from the tokens of a build"
    return f"weights follow from epochs: {', '.join(parts)}"


def rows_of_epochs(mix: MixConfig, num_rows: Sequence[int]) -> float:
    """Return the rows that are drawn when every source was read as often as it asks for.

    Args:
        mix: The mix.
        num_rows: Training rows of every source, of the build or of one of its stages.
    """
    parts = []
    for source, rows in zip(mix.sources, num_rows, strict=True):
        parts.append((source.epochs or 0.0) * rows)
    return math.fsum(parts)


def epochs_warning(
    mix: MixConfig, drawn: Mapping[str, float], drawn_steps: int, steps: int
) -> list[str]:
    """Return the warning that a run does not read its sources as often as they ask for.

    Args:
        mix: The mix, with epochs.
        drawn: Epochs that each source is read in the steps in which the epochs hold.
        drawn_steps: Number of those steps.
        steps: Number of steps that the epochs take.
    """
    if abs(drawn_steps - steps) <= max(1, TOLERANCE * steps):
        return []
    told = []
    for source in mix.sources:
        if source.epochs is not None:
            name = source.name
            told.append(f"{name} {drawn.get(name, 0.0):.2f} times of {source.epochs:g}")
    where = ""
    if any(map(has_own_weights, mix.schedule)):
        where = " in the phases that have no weights of their own"
    return [
        f"epochs: {drawn_steps:,} steps{where} read {', '.join(told)}. As often as the sources ask "
        f"for takes {steps:,} steps{where}. Change the steps, or the epochs."
    ]

"""Parameters that training leaves as they are, chosen by the name patterns of `train.freeze`.

A frozen parameter has no gradient, no optimizer state and no fp32 copy; the checkpoint holds its
working value.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from cpt.config.precision_sections import QuantizeSection
from cpt.model.linear_maps import is_for_muon
from cpt.model.weights.hf_layout import is_expert_matrix

SHORTHANDS = {
    "router": "model.layers.*.mlp.router.*",
    "experts": "model.layers.*.mlp.experts.*",
    "attention": "model.layers.*.self_attn.*",
    "sinks": "model.layers.*.self_attn.sinks",
    "norms": "model.*norm.weight",
    "embeddings": "model.embed_tokens.weight",
    "lm_head": "lm_head.weight",
}
"""Words for `train.freeze` that stand for a pattern."""


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern or shorthand names a parameter, or a module that holds it."""
    pattern = SHORTHANDS.get(pattern, pattern)
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def frozen_names(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return the parameters that at least one pattern matches."""
    patterns = list(patterns)
    return {name for name in names if any(matches(pattern, name) for pattern in patterns)}


def freeze_problems(patterns: tuple[str, ...], names: Iterable[str]) -> list[str]:
    """Return what is wrong with `train.freeze`: patterns without a match, or nothing to train."""
    names = list(names)
    problems = []
    for index, pattern in enumerate(patterns):
        if not frozen_names([pattern], names):
            problems.append(
                f"train.freeze[{index}] is '{pattern}', which matches no parameter. "
                f"{_nearest(pattern, names)}"
            )
    if patterns and not problems and len(frozen_names(patterns, names)) == len(names):
        problems.append(
            "train.freeze matches every parameter: nothing is left to train. Take a pattern out."
        )
    return problems


def rounding_problems(
    section: QuantizeSection, patterns: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Return why a run would round no expert: all of them are frozen.

    Args:
        section: The `train.quantize` section.
        patterns: Those of `train.freeze`.
        shapes: The shape of every parameter of the model.
    """
    if not section.is_on:
        return []
    matrices = {name for name, shape in shapes.items() if is_expert_matrix(name, shape)}
    if matrices - frozen_names(patterns, matrices):
        return []
    return [
        f"train.quantize.experts is {section.experts}, but train.freeze keeps every expert matrix "
        "as it is, so nothing would be rounded. Remove train.quantize, or take the experts out of "
        "train.freeze."
    ]


def muon_problems(optimizer: str, patterns: tuple[str, ...], names: Iterable[str]) -> list[str]:
    """Return why Muon would train nothing: all of its matrices are frozen.

    Args:
        optimizer: The value of `train.optimizer`.
        patterns: Those of `train.freeze`.
        names: The parameters of the model.
    """
    matrices = {name for name in names if is_for_muon(name)}
    if optimizer != "muon" or matrices - frozen_names(patterns, matrices):
        return []
    return [
        "train.optimizer is muon, but train.freeze keeps every matrix of attention and experts as "
        "it is, and Muon trains nothing else. Remove train.optimizer, or take some of them out of "
        "train.freeze."
    ]


def _nearest(pattern: str, names: list[str]) -> str:
    close = difflib.get_close_matches(pattern, [*SHORTHANDS, *names], n=3, cutoff=0.3)
    if close:
        return f"Nearest names: {', '.join(close)}."
    return f"Shorthands: {', '.join(SHORTHANDS)}."


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> int:
    """Take the matching parameters out of training, before the engine is made.

    Returns:
        The number of frozen tensors.
    """
    parameters = dict(model.named_parameters())
    frozen = frozen_names(patterns, parameters)
    for name in frozen:
        parameters[name].requires_grad_(False)
    return len(frozen)

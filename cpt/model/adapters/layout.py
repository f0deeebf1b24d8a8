"""Which adapters a configuration gives: their names, shapes and ranks, without a model.

    model.layers.L.self_attn.q_proj.lora_A                    (r, in)
    model.layers.L.self_attn.q_proj.lora_B                    (out, r)
    model.layers.L.self_attn.q_proj.lora_magnitude            (out,), DoRA only
    model.layers.L.mlp.experts.gate_up_proj_lora_A            (E, in, r)
    model.layers.L.mlp.experts.gate_up_proj_lora_B            (E, r, out)
    model.layers.L.mlp.experts.gate_up_proj_shared_lora_A     (in, r), with `share_experts`
    model.layers.L.mlp.experts.gate_up_proj_shared_lora_B     (r, out)

and the same for k_proj, v_proj, o_proj and down_proj.

Decisions
    - Each has the layout of the weight beside it: a linear layer's (out, in), an expert's (in, out)
      behind the axis of experts. So y = x W^T + s (x A^T) B^T, and y = x W + s (x A) B.
    - The first axis of an expert's adapter counts experts as that of its weight does, so whatever
      cuts and places experts by name serves both. A shared adapter has no such axis and another
      name, and is held by every rank.
    - There is one scale, alpha / rank, for all adapters. Servers read only these two numbers.

Shape letters: E experts, r rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from cpt.config.adapter_section import RANK_STEP, AdapterSection
from cpt.errors import InternalError
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.hf_layout import EXPERT_ADAPTERS

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The matrices of an attention layer that may have an adapter."""
EXPERTS = ("gate_up_proj", "down_proj")
"""The matrices of the experts of a layer that may have one."""

LORA_A = "lora_A"
LORA_B = "lora_B"
MAGNITUDE = "lora_magnitude"
SHARED = "shared_"

WORDS = {"attention": "model.layers.*.self_attn.*", "experts": "model.layers.*.mlp.experts.*"}
"""Words for `adapter.targets` that stand for a pattern."""

UNSERVED = {
    "router": "model.layers.*.mlp.router*",
    "embeddings": "model.embed_tokens*",
    "lm_head": "lm_head*",
    "norms": "model.*norm*",
    "sinks": "model.layers.*.self_attn.sinks",
}
"""What no server takes an adapter of, by the words of `train.freeze`."""

_ADAPTER = re.compile(
    r".*(\.experts\.(gate_up|down)_proj_(shared_)?lora_[AB]"
    r"|\.self_attn\.[qkvo]_proj\.lora_(A|B|magnitude))"
)
_RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedMatrix:
    """A matrix of the model, or one per expert, and the adapter beside it."""

    name: str
    """Its name without `.weight`: `model.layers.0.self_attn.q_proj` or
    `model.layers.0.mlp.experts.gate_up_proj`.
    """
    in_size: int
    """Values that go in."""
    out_size: int
    """Values that come out."""
    rank: int
    """Rank of the adapter."""
    num_experts: int | None
    """Length of the first axis of its tensors; None where they have no axis of experts."""
    has_magnitude: bool
    """Whether there is a magnitude for each row (DoRA)."""

    @property
    def of_experts(self) -> bool:
        """Whether the weight has an axis of experts, whatever the adapter has."""
        return ".experts." in self.name

    @property
    def layer(self) -> int:
        """Index of its layer."""
        return _layer_of(self.name)

    @property
    def weight_name(self) -> str:
        """Name of the parameter that the adapter is added to."""
        return self.name if self.of_experts else f"{self.name}.weight"

    @property
    def a_name(self) -> str:
        """Name of A, which the values that go in meet first."""
        return self._name_of(LORA_A)

    @property
    def b_name(self) -> str:
        """Name of B, which is zero at the start."""
        return self._name_of(LORA_B)

    @property
    def magnitude_name(self) -> str:
        """Name of the magnitude, if there is one."""
        return self._name_of(MAGNITUDE)

    def _name_of(self, part: str) -> str:
        if not self.of_experts:
            return f"{self.name}.{part}"
        shared = SHARED if self.num_experts is None else ""
        return f"{self.name}_{shared}{part}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the adapter, over all ranks."""
        if not self.of_experts:
            shapes: dict[str, tuple[int, ...]] = {
                self.a_name: (self.rank, self.in_size),
                self.b_name: (self.out_size, self.rank),
            }
        else:
            experts = () if self.num_experts is None else (self.num_experts,)
            shapes = {
                self.a_name: (*experts, self.in_size, self.rank),
                self.b_name: (*experts, self.rank, self.out_size),
            }
        if self.has_magnitude:
            shapes[self.magnitude_name] = (self.out_size,)
        return shapes


def is_adapter_name(name: str) -> bool:
    """Return whether a parameter of this name belongs to an adapter."""
    return _ADAPTER.fullmatch(name) is not None


def is_expert_adapter_name(name: str) -> bool:
    """Return whether it belongs to an adapter that has an axis of experts."""
    return is_adapter_name(name) and name.endswith(EXPERT_ADAPTERS)


def expert_rank(section: AdapterSection, config: Any) -> int:
    """Return the rank of an adapter of experts.

    Source of the default: Schulman et al., LoRA Without Regret (2025): with k active experts, each
    gets a k-th of the rank.

    Args:
        section: The `adapter` section.
        config: The model's GptOssConfig.
    """
    if section.expert_rank is not None:
        return section.expert_rank
    share = 1 if section.share_experts else int(config.num_experts_per_tok)
    return max(RANK_STEP, round(section.rank / share / RANK_STEP) * RANK_STEP)


def adapted_matrices(section: AdapterSection, config: Any) -> list[AdaptedMatrix]:
    """Return every matrix that gets an adapter, in the order of the model; none without adapters.

    Args:
        section: The `adapter` section, without what `adapter_problems` finds.
        config: The model's GptOssConfig.
    """
    if not section.is_on:
        return []
    layers = _layers(section, int(config.num_hidden_layers))
    rank_of_experts = expert_rank(section, config)
    found = []
    for name, shape in _candidates(config):
        if _layer_of(name) not in layers or not _is_target(section.targets, name):
            continue
        in_size, out_size = shape[-2:]
        of_experts = len(shape) == 3
        if not of_experts:
            out_size, in_size = shape
        found.append(
            AdaptedMatrix(
                name=name,
                in_size=in_size,
                out_size=out_size,
                rank=rank_of_experts if of_experts else section.rank,
                num_experts=shape[0] if of_experts and not section.share_experts else None,
                has_magnitude=section.kind == "dora",
            )
        )
    return found


def adapter_shapes(section: AdapterSection, config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every adapter tensor over all ranks, by name; see the module."""
    shapes: dict[str, tuple[int, ...]] = {}
    for matrix in adapted_matrices(section, config):
        shapes.update(matrix.shapes())
    return shapes


def shapes_with_adapters(section: AdapterSection, config: Any) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every parameter of the whole model, adapters included."""
    return {**parameter_shapes(config), **adapter_shapes(section, config)}


def adapter_summary(section: AdapterSection, config: Any) -> str:
    """Return what the adapters are and how much is trained, for the log and `--dry_run`."""
    matrices = adapted_matrices(section, config)
    if not matrices:
        return "none"
    parts = []
    for of_experts, what in ((False, "attention matrices"), (True, "stacks of expert matrices")):
        ranks = [matrix.rank for matrix in matrices if matrix.of_experts == of_experts]
        if ranks:
            parts.append(f"{len(ranks)} {what} (rank {ranks[0]})")
    shared = ", shared by the experts" if section.share_experts else ""
    trained = sum(math.prod(shape) for shape in adapter_shapes(section, config).values())
    below = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    base = ", whose expert matrices stay in MXFP4" if section.base == "mxfp4" else ""
    return (
        f"{section.kind} beside {' and '.join(parts)}{shared}, scale {section.scale:g}: "
        f"{trained:,} parameters are trained, {trained / below:.2%} of the {below:,} below them"
        f"{base}"
    )


def _candidates(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name without `.weight`, shape) of everything that may get an adapter."""
    for name, shape in parameter_shapes(config).items():
        name = name.removesuffix(".weight")
        parent, _, last = name.rpartition(".")
        in_attention = parent.endswith(".self_attn") and last in ATTENTION
        in_experts = parent.endswith(".experts") and last in EXPERTS
        if in_attention or in_experts:
            yield name, shape


def _is_target(targets: tuple[str, ...], name: str) -> bool:
    return any(_matches(target, name) for target in targets)


def _matches(target: str, name: str) -> bool:
    """Return whether a word or pattern names a matrix, by its whole name or its last part."""
    pattern = WORDS.get(target, target).removesuffix(".weight")
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def _layer_of(name: str) -> int:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    if found is None:
        raise InternalError(f"{name} is in no layer, and cannot have an adapter.")
    return int(found[1])


def _layers(section: AdapterSection, num_layers: int) -> set[int]:
    if not section.layers:
        return set(range(num_layers))
    layers: set[int] = set()
    for entry in section.layers:
        layers.update(layer_range(entry) or ())
    return layers


def layer_range(entry: int | str) -> range | None:
    """Return the layers of an entry of `adapter.layers`; None if it is neither number nor range."""
    if isinstance(entry, int):
        return range(entry, entry + 1)
    if entry.isdecimal():
        return range(int(entry), int(entry) + 1)
    found = _RANGE.fullmatch(entry)
    if found is None or int(found[1]) > int(found[2]):
        return None
    return range(int(found[1]), int(found[2]) + 1)


def adapter_problems(section: AdapterSection, config: Any) -> list[str]:
    """Return what is wrong with the `adapter` section for this model.

    Args:
        section: The `adapter` section.
        config: The model's GptOssConfig.
    """
    if not section.is_on:
        return []
    problems = _layer_problems(section, int(config.num_hidden_layers))
    names = [name for name, _ in _candidates(config)]
    for index, target in enumerate(section.targets):
        reason = _target_problem(target, names, parameter_shapes(config))
        if reason:
            problems.append(f"adapter.targets[{index}] is '{target}', {reason}")
    if not problems:
        problems = _meeting_problems(section, names, int(config.num_hidden_layers))
    if not problems:
        problems += _kind_problems(section, config)
    return problems


def _layer_problems(section: AdapterSection, num_layers: int) -> list[str]:
    problems = []
    for index, entry in enumerate(section.layers):
        layers = layer_range(entry)
        if layers is None:
            problems.append(
                f"adapter.layers[{index}] is '{entry}', must be the number of a layer or a range "
                "such as '12-23'."
            )
        elif layers.start < 0 or layers.stop > num_layers:
            problems.append(
                f"adapter.layers[{index}] is {entry}, but the model has the layers 0 to "
                f"{num_layers - 1}."
            )
    return problems


def _target_problem(
    target: str, names: list[str], parameters: Mapping[str, tuple[int, ...]]
) -> str:
    """Return why a target cannot have an adapter, or an empty string."""
    if any(_matches(target, name) for name in names):
        return ""
    pattern = target.removesuffix(".weight")
    for word, unserved in UNSERVED.items():
        named = [name for name in parameters if fnmatchcase(name, unserved)]
        if target in (word, f"{word}s") or any(_matches(pattern, _plain(n)) for n in named):
            return (
                f"which names the {word}: no server takes an adapter there. Take it out; with "
                "adapter.kind: none, train.freeze chooses what is trained."
            )
    return (
        "which matches no matrix that can have an adapter. Give the words attention or experts, "
        f"or one of {', '.join((*ATTENTION, *EXPERTS))}, or a pattern of whole names such as "
        "model.layers.*.self_attn.q_proj."
    )


def _meeting_problems(section: AdapterSection, names: list[str], num_layers: int) -> list[str]:
    """Return which targets name matrices of other layers than the chosen ones only."""
    layers = _layers(section, num_layers)
    chosen = [name for name in names if _layer_of(name) in layers]
    problems = []
    for index, target in enumerate(section.targets):
        if not any(_matches(target, name) for name in chosen):
            told = ", ".join(str(entry) for entry in section.layers)
            problems.append(
                f"adapter.targets[{index}] is '{target}', which matches nothing in adapter.layers "
                f"({told}). Take it out, or add its layers."
            )
    return problems


def _plain(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _kind_problems(section: AdapterSection, config: Any) -> list[str]:
    matrices = adapted_matrices(section, config)
    experts = [matrix for matrix in matrices if matrix.of_experts]
    if section.kind == "dora" and experts:
        return [
            f"adapter.kind is dora, and adapter.targets name {experts[0].name}: DoRA is not "
            "defined for stacked matrices of experts, and neither PEFT nor vLLM would load it. "
            "Give targets: [attention], or kind: lora."
        ]
    if section.share_experts and not experts:
        return [
            "adapter.share_experts is true, but adapter.targets name no experts. Remove one of the "
            "two."
        ]
    if section.expert_rank is not None and not experts:
        return [
            f"adapter.expert_rank is {section.expert_rank}, but adapter.targets name no experts. "
            "Remove one of the two."
        ]
    return []

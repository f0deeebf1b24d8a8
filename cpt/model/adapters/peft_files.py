"""Adapters in the files of PEFT: names, order of elements, and adapter_config.json.

    adapter_model.safetensors   the tensors, named after PEFT's modules
    adapter_config.json         ranks, scale, and which modules and parameters are adapted

An attention projection has the same tensors here and there.  For the matrices of experts PEFT wraps
the module that holds them, once for each matrix that is adapted: `gate_up_proj` first, then
`down_proj` around it.  So only the nesting (`base_layer`) tells one from the other.  The expert is
the slowest index of `lora_A` and the fastest of `lora_B`; a file in another order loads without a
message and computes something else.

Programs scale a module by alpha / rank: PEFT takes both from patterns by name, vLLM takes
`lora_alpha / r` for all modules.  One scale for all modules, written in both forms, is read alike.

Shape letters: E experts, R rank, I values that go in, O values that come out.

Read in peft 0.21.2: tuners/lora/layer.py (ParamWrapper), tuners/tuners_utils.py
(_inject_parameters), utils/other.py (get_pattern_key).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cpt.model.adapters.layout import ATTENTION, EXPERTS, AdaptedMatrix

PREFIX = "base_model.model."
"""What PEFT puts before the name of every module."""
PEFT_MAGNITUDE = "lora_magnitude_vector"
INNER = ".base_layer"
"""Marks the inner one of two wrappers of the experts of a layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftTensor:
    """One tensor of a PEFT file, and the one of ours that it stands for."""

    name: str
    """PEFT's name."""
    own_name: str
    """Our name."""
    matrix: AdaptedMatrix
    """The matrix that it adapts."""
    num_experts: int
    """Experts of the model."""

    @property
    def is_a(self) -> bool:
        """Whether it is the factor that the values that go in meet first."""
        return self.own_name == self.matrix.a_name

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape of our tensor over all ranks."""
        return self.matrix.shapes()[self.own_name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in PEFT's file: of experts (E * R, I) and (O, R * E), else as ours."""
        if not self.matrix.of_experts:
            return self.own_shape
        all_ranks = self.num_experts * self.matrix.rank
        if self.is_a:
            return (all_ranks, self.matrix.in_size)
        return (self.matrix.out_size, all_ranks)

    def to_peft(self, value: torch.Tensor) -> torch.Tensor:
        """Return our tensor in PEFT's order.

        An adapter that all experts of a layer share is written once for each of them: PEFT knows no
        other form.
        """
        if not self.matrix.of_experts:
            return value
        if value.ndim == 2:
            value = value.expand(self.num_experts, *value.shape)
        if self.is_a:  # (E, I, R)
            return value.transpose(1, 2).reshape(self.shape).contiguous()
        return value.permute(2, 1, 0).reshape(self.shape).contiguous()  # (E, R, O)

    def from_peft(self, value: torch.Tensor) -> torch.Tensor:
        """Return PEFT's tensor in our order.

        Raises:
            ValueError: the experts of a layer are to share an adapter, and theirs differ.
        """
        if not self.matrix.of_experts:
            return value
        if self.is_a:
            of_experts = value.view(self.num_experts, -1, self.matrix.in_size).transpose(1, 2)
        else:
            of_experts = value.view(self.matrix.out_size, -1, self.num_experts).permute(2, 1, 0)
        if self.matrix.num_experts is not None:
            return of_experts.contiguous()
        first = of_experts[0]
        if not bool((of_experts == first).all()):
            raise ValueError(f"the experts have different adapters in '{self.name}'")
        return first.contiguous()


def peft_tensors(matrices: Iterable[AdaptedMatrix], num_experts: int) -> list[PeftTensor]:
    """Return the tensors of a PEFT file, in the order of their names.

    Args:
        matrices: The adapted matrices.
        num_experts: Experts of the model.
    """
    matrices = list(matrices)
    adapted = {matrix.name for matrix in matrices}
    tensors = []
    for matrix in matrices:
        module = PREFIX + _wrapper(matrix, adapted)
        names = {
            matrix.a_name: f"{module}.lora_A.weight",
            matrix.b_name: f"{module}.lora_B.weight",
        }
        if matrix.has_magnitude:
            names[matrix.magnitude_name] = f"{module}.{PEFT_MAGNITUDE}"
        for own_name, name in names.items():
            tensors.append(
                PeftTensor(name=name, own_name=own_name, matrix=matrix, num_experts=num_experts)
            )
    return sorted(tensors, key=lambda tensor: tensor.name)


def _wrapper(matrix: AdaptedMatrix, adapted: set[str]) -> str:
    """Return the module that PEFT puts around a matrix."""
    if not matrix.of_experts:
        return matrix.name
    parent, _, last = matrix.name.rpartition(".")
    has_outer = last != EXPERTS[-1] and f"{parent}.{EXPERTS[-1]}" in adapted
    return parent + INNER if has_outer else parent


def adapter_config(
    matrices: Sequence[AdaptedMatrix], scale: float, *, num_layers: int, base_name: str | None
) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Args:
        matrices: The adapted matrices.
        scale: Factor of all adapters.
        num_layers: Layers of the model.
        base_name: Name of the base model; None if it has none.
    """
    largest = max(matrix.rank for matrix in matrices)
    ranks = {matrix.name.rpartition(".")[2]: matrix.rank for matrix in matrices}
    rank_pattern = {}
    alpha_pattern = {}
    for last, rank in sorted(ranks.items()):
        if rank != largest:
            pattern = f"experts.{last}" if last in EXPERTS else last
            rank_pattern[pattern] = rank
            alpha_pattern[pattern] = plain_number(scale * rank)
    parameters = _targets(matrices, EXPERTS, "mlp.experts.", num_layers)
    return {
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": plain_number(scale * largest),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": largest,
        "rank_pattern": rank_pattern,
        "target_modules": _targets(matrices, ATTENTION, "", num_layers),
        "target_parameters": parameters or None,
        "task_type": "CAUSAL_LM",
        "use_dora": any(matrix.has_magnitude for matrix in matrices),
        "use_rslora": False,
    }


def _targets(
    matrices: Sequence[AdaptedMatrix], kinds: Iterable[str], parent: str, num_layers: int
) -> list[str]:
    """Return the adapted matrices of some kinds: one word if all layers have it, else every name.

    PEFT matches both from the end of a name.
    """
    targets = []
    for last in kinds:
        names = [matrix.name for matrix in matrices if matrix.name.endswith(f".{last}")]
        if len(names) == num_layers:
            targets.append(f"{parent}{last}")
        else:
            targets += names
    return targets


def plain_number(value: float) -> int | float:
    """Return a number as JSON is to show it: without a fraction if it has none."""
    return int(value) if float(value).is_integer() else float(value)


def value_for(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return what `rank_pattern` or `alpha_pattern` says of a matrix.

    PEFT reads the keys as regular expressions that match the end of a name; here a key is the end
    itself.
    """
    for pattern, value in patterns.items():
        if is_end_of(pattern, name):
            return value
    return default


def is_end_of(pattern: str, name: str) -> bool:
    """Return whether a pattern is a name, or the end of it after a dot."""
    return name == pattern or name.endswith(f".{pattern}")

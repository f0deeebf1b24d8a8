"""Memory of one rank by part, computed from shapes before anything is allocated.

Weights, gradients and optimizer state are exact for ZeRO (the small parameters that ZeRO-3 keeps
whole are counted with the buffers).  What a step holds beyond them is counted in step_memory.py for
each moment at which it can need most; the update is one more moment.  The parts are those of the
moment with the largest sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import GptOssConfig

from cpt.config import RunConfig, RunYaml
from cpt.config.adapter_section import AdapterSection
from cpt.model.adapters.layout import (
    AdaptedMatrix,
    adapted_matrices,
    is_adapter_name,
    shapes_with_adapters,
)
from cpt.model.experts.packed import packed_bytes
from cpt.model.freezing import frozen_names
from cpt.model.linear_maps import LinearMaps, linear_maps
from cpt.model.weights.hf_layout import is_expert_matrix, is_expert_name
from cpt.planning.low_precision import OPERANDS, operands_memory, rounding_memory
from cpt.planning.matrix_updates import rounds_memory
from cpt.planning.step_memory import StepSizes, mask_bytes, step_moments
from cpt.planning.update_groups import SUB_GROUP_SIZE, expert_groups, sub_groups
from cpt.storage.state_bytes import (
    FP32_BYTES,
    device_gradient_bytes,
    optimizer_bytes,
)
from cpt.training.narrow_adamw import CHUNK_BYTES, chunk_numel

GIB = 2**30
STEP_PARTS = ("gathered weights", "weight gradients", "activations", "logits", "update")
"""What a step takes beyond the state, by part; over a packed base, also decoded experts, with 8-bit
products, also their operands.
"""
SMALL = ("bias", "sinks", "lora_magnitude")
"""Ends of the names of parameters that are no matrices; norms are the others."""
REDUCE_BUCKET_SIZE = 5 * 10**8
"""Numbers of a buffer in which DeepSpeed reduces gradients, unless the DeepSpeed JSON says
otherwise.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """Parameters of the whole model, adapters included."""

    dense: int
    """Parameters that every rank needs."""
    experts: int
    """Parameters with an expert axis."""
    trained_dense: int
    """Those of `dense` that are not frozen."""
    trained_experts: int
    """Those of `experts` that are not frozen."""
    routers: int
    """Weights of the routers' matrices among `trained_dense`."""
    dense_matrices: tuple[int, ...]
    """The sizes of the matrices among `trained_dense`, in the model's order."""
    expert_matrices: tuple[int, ...]
    """The sizes of the matrices among `trained_experts`, in the model's order."""
    frozen_matrices: tuple[int, ...] = ()
    """The sizes of the matrices that are not trained, in the model's order."""
    packed: int = 0
    """Weights of experts that stay in 4 bits. They are no parameters, and not among `experts`."""
    adapted: tuple[AdaptedMatrix, ...] = ()
    """The matrices that have an adapter."""
    muon_dense: tuple[LinearMaps, ...] = ()
    """The maps of the parameters among `trained_dense` that Muon trains, in the model's order."""
    muon_experts: tuple[LinearMaps, ...] = ()
    """Those of the parameters among `trained_experts`."""

    @property
    def by_muon(self) -> int:
        """Number of parameters that Muon trains; they have one moment."""
        return sum(maps.numel for maps in (*self.muon_dense, *self.muon_experts))


def counts_of(run: RunYaml | RunConfig, model: GptOssConfig) -> ParameterCounts:
    """Count the parameters that a run trains and those that it leaves as they are."""
    uses_muon = run.train.optimizer == "muon"
    return count_parameters(model, run.train.freeze, run.adapter, muon=uses_muon)


def count_parameters(
    model: GptOssConfig,
    freeze: tuple[str, ...],
    adapter: AdapterSection | None = None,
    *,
    muon: bool = False,
) -> ParameterCounts:
    """Count the parameters of a model, and those that are trained.

    Args:
        model: The model.
        freeze: Patterns of `train.freeze`.
        adapter: The adapters; with them, nothing below them is trained.
        muon: Whether matrices are trained by Muon.
    """
    adapter = adapter or AdapterSection()
    packed, shapes = _split_packed(model, adapter)
    trained = _trained_names(freeze, adapter, shapes)
    sums = {"dense": 0, "experts": 0, "trained_dense": 0, "trained_experts": 0, "routers": 0}
    matrices: dict[str, list[int]] = {"dense": [], "experts": [], "frozen": []}
    by_muon: dict[str, list[LinearMaps]] = {"dense": [], "experts": []}
    for name, shape in shapes.items():
        kind = "experts" if is_expert_name(name) else "dense"
        numel = math.prod(shape)
        sums[kind] += numel
        is_matrix = not name.endswith(SMALL) and "norm" not in name
        if is_matrix and name not in trained:
            matrices["frozen"].append(numel)
        if name in trained:
            sums[f"trained_{kind}"] += numel
            if is_matrix:
                matrices[kind].append(numel)
                sums["routers"] += numel if ".mlp.router." in name else 0
            maps = linear_maps(name, shape) if muon else None
            if maps is not None:
                by_muon[kind].append(maps)
    return ParameterCounts(
        **sums,
        dense_matrices=tuple(matrices["dense"]),
        expert_matrices=tuple(matrices["experts"]),
        frozen_matrices=tuple(matrices["frozen"]),
        packed=packed,
        adapted=tuple(adapted_matrices(adapter, model)),
        muon_dense=tuple(by_muon["dense"]),
        muon_experts=tuple(by_muon["experts"]),
    )


def parameter_counts(model: GptOssConfig, left_out: tuple[str, ...] = ()) -> tuple[int, int]:
    """Return (dense, expert) parameters of the whole model.

    Args:
        model: The model.
        left_out: Patterns of parameters that are not counted.
    """
    counts = count_parameters(model, left_out)
    return counts.trained_dense, counts.trained_experts


def _split_packed(
    model: GptOssConfig, adapter: AdapterSection
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Return the number of packed weights, and the shapes of the parameters."""
    packed = 0
    shapes = {}
    for name, shape in shapes_with_adapters(adapter, model).items():
        if adapter.base == "mxfp4" and is_expert_matrix(name, shape):
            packed += math.prod(shape)
        else:
            shapes[name] = shape
    return packed, shapes


def _trained_names(
    freeze: tuple[str, ...], adapter: AdapterSection, names: Iterable[str]
) -> set[str]:
    if adapter.is_on:
        return {name for name in names if is_adapter_name(name)}
    names = set(names)
    return names - frozen_names(freeze, names)


def device_memory(
    config: RunConfig, model: GptOssConfig, counts: ParameterCounts, device_type: str = "cuda"
) -> dict[str, int]:
    """Return the bytes on the device of one rank, by part; offloaded parts are 0."""
    sizes = StepSizes.of(config, model, counts.adapted, device_type)
    gradients = _device_gradients(config, counts)
    moments = step_moments(sizes)
    for name, moment in moments.items():
        moment["gradients"] = gradients
        if name in ("loss", "table") and _gradients_begin_anew(config):
            moment["gradients"] = 0
    for name in ("experts", "rows", "attention"):
        if config.train.products.is_on and name in moments:
            operands = operands_memory(config, model, sizes.tokens, name, device_type)
            moments[name][OPERANDS] = operands
    update = _device_update(config, counts, sizes, device_type)
    update += rounds_memory(config, counts, device_type)
    moments["update"] = {"gradients": gradients, "update": update}
    rounding = rounding_memory(config, model, device_type)
    if rounding:
        rounding += mask_bytes(sizes, backward=True)
        moments["rounding"] = {"gradients": gradients, "update": rounding}
    largest = max(moments.values(), key=lambda moment: sum(moment.values()))
    parts = {"weights": _device_weights(config, counts)}
    if counts.packed:
        parts["packed experts"] = packed_bytes(counts.packed) // config.ep_size
    parts |= {
        "gradients": largest["gradients"],
        "optimizer": _device_optimizer(config, counts),
        "reduce buffers": _reduce_buffers(config),
    }
    if counts.packed:
        parts["decoded experts"] = largest.get("decoded experts", 0)
    if config.train.products.is_on:
        parts[OPERANDS] = largest.get(OPERANDS, 0)
    return {**parts, **{part: largest.get(part, 0) for part in STEP_PARTS}}


def _device_weights(config: RunConfig, counts: ParameterCounts) -> int:
    if offloads(config, "param"):
        return 0
    if config.zero_stage == 3:
        return config.itemsize * ((counts.dense + counts.experts) // config.world_size)
    return config.itemsize * (counts.dense + counts.experts // config.ep_size)


def _device_gradients(config: RunConfig, counts: ParameterCounts) -> int:
    """ZeRO-1 adds gradients up in the working precision, the other stages in fp32."""
    if config.zero_stage == 1:
        held = counts.trained_dense + counts.trained_experts // config.ep_size
        return config.itemsize * held
    return device_gradient_bytes(config.engine_json) * trained_per_rank(config, counts)


def _device_optimizer(config: RunConfig, counts: ParameterCounts) -> int:
    if offloads(config, "optimizer"):
        return 0
    return optimizer_state(config, counts)


def optimizer_state(config: RunConfig, counts: ParameterCounts) -> int:
    """Return the bytes of master weights and moments of one rank, wherever they lie."""
    trained = trained_per_rank(config, counts)
    form = config.train.optimizer_state
    if form != "int8":
        by_muon = counts.by_muon // config.world_size
        return optimizer_bytes(trained - by_muon, form) + optimizer_bytes(by_muon, num_moments=1)
    matrices = sum(counts.dense_matrices) - counts.routers + sum(counts.expert_matrices)
    in_blocks = matrices // config.world_size
    return optimizer_bytes(in_blocks, form) + optimizer_bytes(trained - in_blocks)


def _gradients_begin_anew(config: RunConfig) -> bool:
    """Return whether there are no gradients before the backward; ZeRO-3 keeps their memory."""
    return config.zero_stage != 3 and config.gradient_accumulation_steps == 1


def _reduce_buffers(config: RunConfig) -> int:
    """Return the buffers in which DeepSpeed collects small gradients before it reduces them."""
    zero = config.engine_json["zero_optimization"]
    if not zero.get("contiguous_gradients", True):
        return 0
    buffers = 1
    if config.zero_stage != 3 and zero.get("overlap_comm", False):
        buffers = 2
    size = int(zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE))
    return buffers * config.itemsize * size


def _device_update(
    config: RunConfig, counts: ParameterCounts, sizes: StepSizes, device_type: str
) -> int:
    """Return what the update takes; the other tensors of the step are gone by then.

    ZeRO joins the gradients of each group of parameters in one fp32 copy. Moments in fewer bytes
    are updated in fp32 copies of a chunk.
    """
    if offloads(config, "optimizer"):
        return 0
    masks = mask_bytes(sizes, backward=True)
    largest = 0
    for group in update_groups(config, counts):
        # a single gradient is taken as it is
        if len(group) > 1:
            largest = max(largest, sum(group))
    chunk = min(chunk_numel(torch.device(device_type)), trained_per_rank(config, counts))
    copies = CHUNK_BYTES[config.train.optimizer_state] * chunk
    return FP32_BYTES * largest + copies + masks


def update_groups(config: RunConfig, counts: ParameterCounts) -> tuple[tuple[int, ...], ...]:
    """Return this rank's elements of each matrix, by the groups that the update goes through.

    Biases, norms and sinks form groups that are too small to count.
    """
    sub_group_size = None
    if config.zero_stage == 3:
        zero = config.engine_json["zero_optimization"]
        sub_group_size = int(zero.get("sub_group_size", SUB_GROUP_SIZE))
    return optimizer_groups(config, counts, sub_group_size)


def optimizer_groups(
    config: RunConfig, counts: ParameterCounts, sub_group_size: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Return this rank's elements of each matrix, by the groups of the optimizer.

    Args:
        config: The layout.
        counts: Parameters of the whole model.
        sub_group_size: Parameters after which ZeRO-3 divides a group; None for whole groups.
    """
    by_adamw = list(counts.dense_matrices)
    by_muon = [maps.numel for maps in counts.muon_dense]
    for numel in by_muon:
        by_adamw.remove(numel)
    return _groups_of(
        (tuple(by_adamw), tuple(by_muon)),
        counts.expert_matrices,
        config.world_size,
        config.ep_size,
        sub_group_size,
    )


@functools.cache
def _groups_of(
    dense_matrices: tuple[tuple[int, ...], ...],
    expert_matrices: tuple[int, ...],
    world_size: int,
    ep_size: int,
    sub_group_size: int | None,
) -> tuple[tuple[int, ...], ...]:
    """Return the groups; a search asks for the same ones for every size of micro batches."""
    groups = []
    for dense in dense_matrices:
        if dense:
            groups.append([numel // world_size for numel in dense])
    local = [numel // ep_size for numel in expert_matrices]
    ranks_sharing_experts = world_size // ep_size
    for group in expert_groups(local):
        groups.append([numel // ranks_sharing_experts for numel in group])
    if sub_group_size is None:
        return tuple(map(tuple, groups))
    parts = []
    for group in groups:
        parts += sub_groups(group, sub_group_size)
    return tuple(map(tuple, parts))


def trained_per_rank(config: RunConfig, counts: ParameterCounts) -> int:
    """Return the trained parameters whose state a rank holds."""
    return (counts.trained_dense + counts.trained_experts) // config.world_size


def owned_per_rank(config: RunConfig, counts: ParameterCounts) -> int:
    """Return the parameters of a rank's partitions under ZeRO-3, frozen ones included."""
    return (counts.dense + counts.experts) // config.world_size


def offloads(config: RunConfig, what: str) -> bool:
    """Return whether `optimizer` or `param` is kept off the device."""
    return f"offload_{what}" in config.engine_json["zero_optimization"]

"""This rank's shards of weights and optimizer state, whatever the ZeRO stage.

A shard is a contiguous range of the flattened parameter.

Read in deepspeed 0.19.8: runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py,
utils/tensor_fragment.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from cpt.storage.narrow_moments import EXPONENTS
from cpt.storage.state_bytes import MOMENT_BLOCK, MomentForm, moments_of_group

DTYPES: dict[MomentForm, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.uint8,
}
"""The dtype of a moment by its form; in the form int8 it holds codes."""


class Zeros(Protocol):
    """Allocates (numel,) of a dtype, filled with zeros."""

    def __call__(self, numel: int, /, *, dtype: torch.dtype) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlace:
    """Where this rank's elements of a trained parameter lie."""

    partition: int
    """Number of the flat partition, in the order of `flat_partitions`."""
    start: int
    """First element in the flat partition."""
    numel: int
    """Number of elements, without ZeRO padding."""
    offset: int
    """First element, counted in the flattened tensor that this rank would hold without ZeRO."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalShard:
    """A range of one flattened parameter and its optimizer state that this rank holds."""

    offset: int
    """First element, counted in the flattened tensor that this rank would hold without ZeRO."""
    tensors: dict[str, torch.Tensor]
    """`master` and the moments: 1-D views without ZeRO padding; writing to them changes the state.
    The master is fp32, a moment has the dtype of its form. A frozen parameter has only `master`, in
    the working dtype, because there is no other copy.
    """
    exponents: dict[str, torch.Tensor] = field(default_factory=dict)
    """By the name of a moment in the form int8: the exponents of its blocks."""


def create_optimizer_state(engine: Any, zeros: Zeros | None = None) -> None:
    """Give every flat partition its moments if it has none, as the first optimizer step would.

    DeepSpeed creates the state lazily, but a checkpoint is loaded, and step 0 is saved, before that
    step.

    Args:
        engine: The DeepSpeed engine.
        zeros: Allocates moments; None allocates them beside the master weights.
    """
    inner = engine.optimizer.optimizer
    for flat, moments in zip(flat_partitions(engine), moments_of_partitions(engine), strict=True):
        if not inner.state.get(flat):
            # A fused optimizer hands the step to its kernel, so it lives on the partition's device.
            step_device = flat.device if inner.defaults.get("fused") else "cpu"
            state = {"step": torch.zeros((), device=step_device)}
            inner.state[flat] = state | new_moments(flat, moments, zeros)


def new_moments(
    values: torch.Tensor, moments: dict[str, MomentForm], zeros: Zeros | None = None
) -> dict[str, torch.Tensor]:
    """Return moments of zero as an optimizer keeps them; blocks have exponents beside them.

    Args:
        values: A flat partition, or a whole parameter.
        moments: The moments and their forms.
        zeros: See `create_optimizer_state`.
    """
    if zeros is None:
        zeros = partial(torch.zeros, device=values.device)
    numel = values.numel()
    state = {}
    for key, form in moments.items():
        state[key] = zeros(numel, dtype=DTYPES[form])
        if form == "int8":
            num_blocks, rest = divmod(numel, MOMENT_BLOCK)
            assert rest == 0, f"{numel} elements cut blocks of {MOMENT_BLOCK}"
            state[key + EXPONENTS] = zeros(num_blocks, dtype=DTYPES[form])
    return state


def moments_of_partitions(engine: Any) -> list[dict[str, MomentForm]]:
    """Return the moments and their forms of each flat partition, in the order of these."""
    zero = engine.optimizer
    groups = zero.optimizer.param_groups
    if engine.zero_optimization_stage() != 3:
        return [moments_of_group(group) for group in groups]
    numbers = [zero.sub_group_to_group_id[index] for index in range(len(zero.fp16_groups))]
    return [moments_of_group(groups[number]) for number in numbers]


def moments_by_parameter(engine: Any) -> dict[str, dict[str, MomentForm]]:
    """Return the moments and their forms of every trained parameter, by name.

    It is the same on all ranks, whatever a rank holds.
    """
    by_id = {}
    members = parameters_of_partitions(engine)
    for parameters, moments in zip(members, moments_of_partitions(engine), strict=True):
        for parameter in parameters:
            by_id[id(parameter)] = moments
    found = {}
    for name, parameter in engine.module.named_parameters():
        if id(parameter) in by_id:
            found[name] = by_id[id(parameter)]
    return found


def parameters_of_partitions(engine: Any) -> list[list[Any]]:
    """Return the parameters that each flat partition is a part of, in the order of these.

    They are the same on all ranks that share them, also those of which a rank holds nothing.
    """
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(zero.fp16_groups)
    return list(zero.bit16_groups)


def flat_partitions(engine: Any) -> list[torch.Tensor]:
    """Return this rank's partitions of the fp32 master weights, one 1-D tensor per group."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def state_tensors(engine: Any) -> dict[str, list[torch.Tensor]]:
    """Return the tensors that the engine keeps between steps on this rank, by part.

    They may share storages. Gradients of ZeRO 1 and 2 are made anew in every step and are not among
    them.
    """
    optimizer = []
    gradients = []
    for master in flat_partitions(engine):
        optimizer.append(master)
        if master.grad is not None:
            gradients.append(master.grad)
        optimizer += moment_tensors(engine.optimizer.optimizer.state.get(master, {})).values()
    parameters = list(engine.module.parameters())
    if engine.zero_optimization_stage() != 3:
        return {"weights": [p.data for p in parameters], "optimizer": optimizer}
    partitions = [p.ds_tensor.data for p in parameters]
    # Small parameters are never partitioned.
    whole = [p.data for p in parameters if p.data.numel() == p.ds_numel]
    gradients.append(engine.optimizer.grad_partitions_flat_buffer)
    return {"weights": partitions + whole, "gradients": gradients, "optimizer": optimizer}


def moment_tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return what an optimizer keeps of one flat partition besides its count of steps."""
    return {key: value for key, value in state.items() if key != "step"}


def set_optimizer_step(engine: Any, step: int) -> None:
    """Set Adam's step count, which decides the bias correction."""
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state["step"]):
            state["step"].fill_(float(step))
        else:
            state["step"] = step


def local_shards(engine: Any) -> dict[str, LocalShard]:
    """Return views of everything that this rank must save, by parameter name.

    Parameters of which this rank holds nothing are left out.
    """
    create_optimizer_state(engine)
    shards = {}
    for name, parameter in engine.module.named_parameters():
        shard = _shard_of(engine, parameter)
        if shard is not None:
            shards[name] = shard
    return shards


def _shard_of(engine: Any, parameter: Any) -> LocalShard | None:
    if not parameter.requires_grad:
        return _frozen_shard(engine.zero_optimization_stage(), parameter)
    place = place_of(engine, parameter)
    if place is None:
        return None
    flat = flat_partitions(engine)[place.partition]
    # The link that DeepSpeed makes from a parameter to its moments does not serve here: it is made
    # after the first group's first step and lacks the state of the other groups.
    state = engine.optimizer.optimizer.state[flat]
    tensors = {"master": flat.narrow(0, place.start, place.numel)}
    exponents = {}
    for key, moment in moment_tensors(state).items():
        if key.endswith(EXPONENTS):
            first = place.start // MOMENT_BLOCK
            num_blocks = place.numel // MOMENT_BLOCK
            exponents[key.removesuffix(EXPONENTS)] = moment.narrow(0, first, num_blocks)
        else:
            tensors[key] = moment.narrow(0, place.start, place.numel)
    return LocalShard(offset=place.offset, tensors=tensors, exponents=exponents)


def place_of(engine: Any, parameter: Any) -> ShardPlace | None:
    """Return where this rank's elements of a trained parameter lie; None if it has none."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() != 3:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        where = mapping.hp_fragment_address
        return ShardPlace(
            partition=mapping.param_group_index,
            start=where.start,
            numel=where.numel,
            offset=mapping.lp_fragment_address.start,
        )
    offset, real = _partition_of_stage3(parameter)
    if real == 0:
        return None
    index, start, numel = zero.grad_position[zero.get_param_id(parameter)]
    assert numel == parameter.ds_tensor.ds_numel, (
        "ZeRO-3 partition geometry is not the one this file was written for"
    )
    return ShardPlace(partition=index, start=start, numel=real, offset=offset)


def _partition_of_stage3(parameter: Any) -> tuple[int, int]:
    """Return the first element of this rank's partition and its number of elements.

    Padding, which fills the last ranks, is not counted.
    """
    partition_numel = parameter.ds_tensor.ds_numel
    offset = dist.get_rank(group=parameter.ds_process_group) * partition_numel
    return offset, max(0, min(parameter.ds_numel - offset, partition_numel))


def _frozen_shard(stage: int, parameter: Any) -> LocalShard | None:
    """Return the shard of a frozen parameter.

    ZeRO-3 partitions frozen parameters like the others; stages 1 and 2 leave them whole on every
    rank.
    """
    if stage != 3:
        return LocalShard(offset=0, tensors={"master": parameter.data.view(-1)})
    offset, real = _partition_of_stage3(parameter)
    if real == 0:
        return None
    return LocalShard(offset=offset, tensors={"master": parameter.ds_tensor.data.view(-1)[:real]})


def publish_master_weights(engine: Any) -> None:
    """Bring the working weights in line with the fp32 master shards after these were written."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() != 3:
        for group_index in range(len(zero.bit16_groups)):
            for parameter in zero.bit16_groups[group_index]:
                if parameter._hp_mapping is not None:
                    parameter._hp_mapping.update_lp()
        _gather_updated_partitions(zero)
        return
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
    for parameter in engine.module.parameters():
        shard = _shard_of(engine, parameter) if parameter.requires_grad else None
        if shard is not None:
            master = shard.tensors["master"]
            parameter.ds_tensor.data.view(-1)[: master.numel()].copy_(master)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _gather_updated_partitions(zero: Any) -> None:
    from deepspeed.runtime.utils import all_gather_dp_groups

    all_gather_dp_groups(
        groups_flat=zero.bit16_groups_flat,
        partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )

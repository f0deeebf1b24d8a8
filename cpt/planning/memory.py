"""Memory of one rank by part, computed from shapes before anything is allocated.

Weights, gradients and optimizer state are exact for ZeRO (the small parameters that ZeRO-3 keeps
whole are counted with the buffers).  What a step holds beyond them is counted in step_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.model.freezing import frozen_names
from cpt.model.parameters import parameter_numels
from cpt.model.weights.hf_layout import is_expert_name
from cpt.planning.step_memory import StepSizes, local_tokens, mask_bytes, step_peak
from cpt.storage.state_bytes import FP32_BYTES, OPTIMIZER_BYTES, host_gradient_bytes

GIB = 2**30
SUB_GROUP_SIZE = 10**9
"""Parameters that DeepSpeed updates at a time, unless the DeepSpeed JSON says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """Parameters of the whole model."""

    dense: int
    """Parameters that every rank needs."""
    experts: int
    """Parameters with an expert axis."""
    trained_dense: int
    """Those of `dense` that are not frozen."""
    trained_experts: int
    """Those of `experts` that are not frozen."""


def count_parameters(model: GptOssConfig, freeze: tuple[str, ...]) -> ParameterCounts:
    """Count the parameters of a model, and those that `train.freeze` leaves trainable."""
    dense, experts = parameter_counts(model)
    trained_dense, trained_experts = parameter_counts(model, freeze)
    return ParameterCounts(
        dense=dense, experts=experts, trained_dense=trained_dense, trained_experts=trained_experts
    )


def parameter_counts(model: GptOssConfig, left_out: tuple[str, ...] = ()) -> tuple[int, int]:
    """Return (dense, expert) parameters of the whole model.

    Args:
        model: The model.
        left_out: Patterns of parameters that are not counted.
    """
    numels = parameter_numels(model)
    for name in frozen_names(left_out, numels):
        del numels[name]
    experts = sum(numel for name, numel in numels.items() if is_expert_name(name))
    return sum(numels.values()) - experts, experts


def device_memory(
    config: RunConfig, model: GptOssConfig, counts: ParameterCounts, device_type: str = "cuda"
) -> dict[str, int]:
    """Return the bytes on the device of one rank, by part; offloaded parts are 0."""
    sizes = StepSizes.of(config, model, device_type)
    peak = step_peak(sizes)
    return {
        "weights": _device_weights(config, counts),
        "gradients": _device_gradients(config, counts),
        "optimizer": _device_optimizer(config, counts),
        **peak,
        "update": _device_update(config, counts, sizes, sum(peak.values())),
    }


def _device_weights(config: RunConfig, counts: ParameterCounts) -> int:
    if _offloads(config, "param"):
        return 0
    if config.zero_stage == 3:
        return config.itemsize * ((counts.dense + counts.experts) // config.world_size)
    return config.itemsize * (counts.dense + counts.experts // config.ep_size)


def _device_gradients(config: RunConfig, counts: ParameterCounts) -> int:
    """ZeRO-1 adds gradients up in the working precision, the other stages in fp32."""
    if config.zero_stage == 1:
        held = counts.trained_dense + counts.trained_experts // config.ep_size
        return config.itemsize * held
    if config.zero_stage == 3 and _offloads(config, "optimizer"):
        # the other stages add them up on the device all the same
        return 0
    return FP32_BYTES * _trained_per_rank(config, counts)


def _device_optimizer(config: RunConfig, counts: ParameterCounts) -> int:
    if _offloads(config, "optimizer"):
        return 0
    return OPTIMIZER_BYTES * _trained_per_rank(config, counts)


def _device_update(
    config: RunConfig, counts: ParameterCounts, sizes: StepSizes, step_bytes: int
) -> int:
    """Return what the update takes beyond the tensors of the step, which are gone by then.

    ZeRO copies the gradients of the parameters that it updates.
    """
    if _offloads(config, "optimizer"):
        return 0
    zero = config.engine_json["zero_optimization"]
    at_a_time = int(zero.get("sub_group_size", SUB_GROUP_SIZE))
    copied = FP32_BYTES * min(_trained_per_rank(config, counts), at_a_time)
    return max(0, copied + mask_bytes(sizes, backward=True) - step_bytes)


def host_memory(
    config: RunConfig, model: GptOssConfig, counts: ParameterCounts, place: str = "cpu"
) -> dict[str, int]:
    """Return the bytes that offloading takes for one rank, by part.

    Args:
        config: The layout.
        model: Gives the sizes.
        counts: Parameters of the whole model.
        place: `cpu`, host memory, or `nvme`, files: the value of the key `device` of an offload
            block.
    """
    trained = _trained_per_rank(config, counts)
    zero = config.engine_json["zero_optimization"]
    parts: dict[str, int] = {}
    if zero.get("offload_optimizer", {}).get("device") == place:
        parts["optimizer"] = OPTIMIZER_BYTES * trained
        parts["gradients"] = host_gradient_bytes(config.zero_stage) * trained
    if zero.get("offload_param", {}).get("device") == place:
        parts["weights"] = config.itemsize * ((counts.dense + counts.experts) // config.world_size)
    if config.model.offload_checkpoints and place == "cpu":
        layer_input = config.itemsize * local_tokens(config) * model.hidden_size
        parts["layer inputs"] = model.num_hidden_layers * layer_input
    return parts


def _trained_per_rank(config: RunConfig, counts: ParameterCounts) -> int:
    return (counts.trained_dense + counts.trained_experts) // config.world_size


def _offloads(config: RunConfig, what: str) -> bool:
    return f"offload_{what}" in config.engine_json["zero_optimization"]


def memory_tables(config: RunConfig, model: GptOssConfig) -> str:
    """Return what one rank takes, on its device and, if state is offloaded, elsewhere."""
    counts = count_parameters(model, config.train.freeze)
    places = {
        "memory": device_memory(config, model, counts),
        "host memory": host_memory(config, model, counts),
        "NVMe space": host_memory(config, model, counts, "nvme"),
    }
    return "\n".join(_table(place, parts) for place, parts in places.items() if parts)


def _table(place: str, parts: dict[str, int]) -> str:
    """Return the parts and their sum, one a line."""
    width = max(map(len, parts))
    lines = [f"{place} of one rank (estimate, see cpt/planning/memory.py)"]
    for name, size in parts.items():
        if size:
            lines.append(f"  {name:<{width}}  {size / GIB:9.2f} GiB")
    lines.append(f"  {'sum':<{width}}  {sum(parts.values()) / GIB:9.2f} GiB")
    return "\n".join(lines)

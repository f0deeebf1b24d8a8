"""Memory of one rank by part, computed from shapes before anything is allocated.

Weights, gradients and optimizer state are exact for ZeRO (the small parameters that ZeRO-3 keeps whole are counted
with the buffers).  Activations are an estimate from the tensors that autograd keeps, with evenly routed experts;
allocator fragmentation and library workspaces are not included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.model.freezing import frozen_names, parameter_numels
from cpt.model.hf_layout import is_expert_name
from cpt.model.loss_head import TILE_BYTES

GIB = 2**30
SUB_GROUP_SIZE = 10**9
"""Parameters that DeepSpeed updates at a time, unless the JSON says otherwise."""
UPDATE_COPIES = {"cuda": 1, "cpu": 3}
"""fp32 copies of what is updated: the gradient; torch's unfused AdamW on a CPU also holds the root of the second moment
and the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """Parameters of the whole model."""

    dense: int
    """That every rank needs."""
    experts: int
    """With an expert axis."""
    trained_dense: int
    """Of `dense`, those that are not frozen."""
    trained_experts: int
    """Of `experts`, those that are not frozen."""


def count_parameters(model: GptOssConfig, freeze: tuple[str, ...]) -> ParameterCounts:
    """Count what `train.freeze` leaves; builds the model on the meta device, so do it once."""
    dense, experts = parameter_counts(model)
    trained_dense, trained_experts = parameter_counts(model, freeze)
    return ParameterCounts(dense=dense, experts=experts, trained_dense=trained_dense, trained_experts=trained_experts)


def memory_by_part(config: RunConfig, model: GptOssConfig) -> dict[str, int]:
    """Bytes on the device of one rank, by part; offloaded parts are left out."""
    return device_memory(config, model, count_parameters(model, config.train.freeze))


def device_memory(
    config: RunConfig, model: GptOssConfig, counts: ParameterCounts, device_type: str = "cuda"
) -> dict[str, int]:
    """What `memory_by_part` returns, for parameters that were counted before."""
    dense, experts = counts.dense, counts.experts
    trained_dense, trained_experts = counts.trained_dense, counts.trained_experts
    itemsize = 2 if config.train.dtype == "bf16" else 4
    world, stage = config.world_size, config.zero_stage
    per_rank = (dense + experts) // world
    held = dense + experts // config.ep_size  # what a rank has without ZeRO
    trained_per_rank = (trained_dense + trained_experts) // world
    trained_held = trained_dense + trained_experts // config.ep_size
    zero = config.engine_json["zero_optimization"]
    offload_optimizer = "offload_optimizer" in zero
    parts = {
        "weights": itemsize * (per_rank if stage == 3 else held),
        "gradients": 4 * (trained_per_rank if stage >= 2 else trained_held),
        "optimizer": 12 * trained_per_rank,
        "gathered weights": _gathered(model, config, itemsize) if stage == 3 else 0,
        "activations": _activations(model, config, itemsize),
        "logits": 3 * TILE_BYTES[device_type],
    }
    # the update comes when the step's own tensors are gone, and adds only what it takes beyond them
    in_step = sum(size for name, size in parts.items() if name not in ("weights", "gradients", "optimizer"))
    update = UPDATE_COPIES[device_type] * 4 * min(trained_per_rank, int(zero.get("sub_group_size", SUB_GROUP_SIZE)))
    parts["update"] = 0 if offload_optimizer else max(0, update - in_step)
    if offload_optimizer:
        parts["optimizer"] = parts["gradients"] = 0
    if "offload_param" in zero:
        parts["weights"] = 0
    return parts


def host_memory(config: RunConfig, model: GptOssConfig, counts: ParameterCounts) -> dict[str, int]:
    """Bytes that offloading takes of the host, for one rank; state on NVMe is left out."""
    itemsize = 2 if config.train.dtype == "bf16" else 4
    trained = (counts.trained_dense + counts.trained_experts) // config.world_size
    zero, parts = config.engine_json["zero_optimization"], {}
    if zero.get("offload_optimizer", {}).get("device") == "cpu":
        parts["optimizer"], parts["gradients"] = 12 * trained, 4 * trained
    if zero.get("offload_param", {}).get("device") == "cpu":
        parts["weights"] = itemsize * ((counts.dense + counts.experts) // config.world_size)
    if config.model.offload_checkpoints:
        parts["layer inputs"] = model.num_hidden_layers * _layer_input(model, config, itemsize)
    return parts


def parameter_counts(model: GptOssConfig, left_out: tuple[str, ...] = ()) -> tuple[int, int]:
    """(dense, expert) parameters of the whole model, without those that the patterns `left_out` match."""
    numels = parameter_numels(model)
    for name in frozen_names(left_out, numels):
        del numels[name]
    experts = sum(numel for name, numel in numels.items() if is_expert_name(name))
    return sum(numels.values()) - experts, experts


def _gathered(model: GptOssConfig, config: RunConfig, itemsize: int) -> int:
    """The larger of: two layers that ZeRO-3 has gathered and gradients of one, or a vocabulary table with its own."""
    hidden, heads = model.hidden_size, model.num_attention_heads + 2 * model.num_key_value_heads
    attention = hidden * model.head_dim * (heads + model.num_attention_heads)
    experts = model.num_local_experts // config.ep_size * 3 * hidden * model.intermediate_size
    return itemsize * max(3 * (attention + experts), 2 * model.vocab_size * hidden)


def _activations(model: GptOssConfig, config: RunConfig, itemsize: int) -> int:
    """Layer inputs of all layers, and what one layer (all layers without checkpointing) keeps for its backward."""
    tokens = config.micro_batch_size * config.train.seq_len // config.sp_size
    hidden, layers = model.hidden_size, model.num_hidden_layers
    if config.model.offload_checkpoints:
        layers = 2  # the one being computed, and the one whose copy is on its way
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    # two norms, whose input and quotient are kept in fp32; projections, rotated copies, output
    attention = 2 * hidden + 2 * 2 * 4 // itemsize * hidden + 2 * heads * model.head_dim
    top_k, expert_size = model.num_experts_per_tok, model.intermediate_size
    moe = 4 * hidden + top_k * (hidden + 2 * expert_size)  # of each row its input, gate and up
    moe_backward = top_k * (2 * hidden + 3 * expert_size)  # output and input; activated, gate and up: one layer's
    checkpointing = config.model.activation_checkpointing
    kept_layers = 1 if checkpointing else layers
    values = kept_layers * (attention + moe) + moe_backward
    if checkpointing and config.model.expert_recompute == "keep" and config.ep_size > 1:
        values += model.num_hidden_layers * top_k * hidden
    return layers * _layer_input(model, config, itemsize) + itemsize * tokens * values


def _layer_input(model: GptOssConfig, config: RunConfig, itemsize: int) -> int:
    """The hidden states of this rank's tokens, once."""
    return itemsize * (config.micro_batch_size * config.train.seq_len // config.sp_size) * model.hidden_size


def memory_table(parts: dict[str, Any]) -> str:
    """The parts and their sum, for people."""
    width = max(map(len, parts))
    lines = [f"  {name:<{width}}  {size / GIB:9.2f} GiB" for name, size in parts.items() if size]
    total = f"  {'sum':<{width}}  {sum(parts.values()) / GIB:9.2f} GiB"
    return "\n".join(["memory of one rank (estimate, see cpt/memory.py)", *lines, total])

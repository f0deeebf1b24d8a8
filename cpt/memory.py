"""Memory of one rank by part, computed from shapes before anything is allocated.

Weights, gradients and optimizer state are exact for ZeRO (the small parameters that ZeRO-3 keeps whole are counted
with the buffers).  Activations are an estimate from the tensors that autograd keeps, with evenly routed experts;
allocator fragmentation and library workspaces are not included.
"""

from __future__ import annotations

from typing import Any

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.model.freezing import frozen_names, parameter_numels
from cpt.model.hf_layout import is_expert_name
from cpt.model.loss_head import TILE_BYTES


def memory_by_part(config: RunConfig, model: GptOssConfig) -> dict[str, int]:
    """Bytes on the device of one rank, by part; offloaded parts are left out."""
    dense, experts = parameter_counts(model)
    trained_dense, trained_experts = parameter_counts(model, config.train.freeze)
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
        "logits": 3 * TILE_BYTES["cuda"],
    }
    if not config.model.activation_checkpointing and stage == 3:
        # autograd keeps each layer's experts until its backward
        parts["kept expert weights"] = itemsize * experts // config.ep_size
    if offload_optimizer:
        parts["optimizer"] = parts["gradients"] = 0
    if "offload_param" in zero:
        parts["weights"] = 0
    return parts


def parameter_counts(model: GptOssConfig, left_out: tuple[str, ...] = ()) -> tuple[int, int]:
    """(dense, expert) parameters of the whole model, without those that the patterns `left_out` match."""
    numels = parameter_numels(model)
    for name in frozen_names(left_out, numels):
        del numels[name]
    experts = sum(numel for name, numel in numels.items() if is_expert_name(name))
    return sum(numels.values()) - experts, experts


def _gathered(model: GptOssConfig, config: RunConfig, itemsize: int) -> int:
    """The larger of: two layers that ZeRO-3 has gathered, or one vocabulary table with its gradient."""
    hidden, heads = model.hidden_size, model.num_attention_heads + 2 * model.num_key_value_heads
    attention = hidden * model.head_dim * (heads + model.num_attention_heads)
    experts = model.num_local_experts // config.ep_size * 3 * hidden * model.intermediate_size
    return itemsize * max(2 * (attention + experts), 2 * model.vocab_size * hidden)


def _activations(model: GptOssConfig, config: RunConfig, itemsize: int) -> int:
    """Layer inputs of all layers, and what one layer (all layers without checkpointing) keeps for its backward."""
    tokens = config.micro_batch_size * config.train.seq_len // config.sp_size
    hidden, layers = model.hidden_size, model.num_hidden_layers
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    attention = 4 * hidden + 2 * heads * model.head_dim  # norms, projections, rotated copies, output
    expert_row = 2 * hidden + 4 * model.intermediate_size  # input, gate and up, activated, output
    moe = 4 * hidden + model.num_experts_per_tok * expert_row
    kept_layers = 1 if config.model.activation_checkpointing else layers
    return itemsize * tokens * (layers * hidden + kept_layers * (attention + moe))


def memory_table(parts: dict[str, Any]) -> str:
    """The parts and their sum, for people."""
    width = max(map(len, parts))
    lines = [f"  {name:<{width}}  {size / 2**30:9.2f} GiB" for name, size in parts.items() if size]
    total = f"  {'sum':<{width}}  {sum(parts.values()) / 2**30:9.2f} GiB"
    return "\n".join(["memory of one rank (estimate, see cpt/memory.py)", *lines, total])

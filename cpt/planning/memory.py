"""Memory of one rank by part, computed from shapes before anything is allocated.

Weights, gradients and optimizer state are exact for ZeRO (the small parameters that ZeRO-3 keeps
whole are counted with the buffers).  What a step holds beyond them is added up for each moment that
can be its peak, tensor by tensor:

    loss      all layers keep what their backward needs; the head's table is gathered, its gradient is being made, and
              tiles of logits are worked on
    table     the same without tiles, when that gradient is reduced: this rank's part of it is copied to fp32
    layer     the backward of the last layer: its weights, their gradients, the gradients of its activations
    update    ZeRO copies the gradients of what it updates

Experts are taken to be evenly routed, and rows to hold documents longer than the window; allocator
fragmentation and library workspaces are not included.

Letters in sums: M model size, I expert size, q and kv values of a token in all query and all key
(or value) heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.config.window import window_tokens
from cpt.model.attention.cpu import BACKWARD_BLOCK_ROWS, FORWARD_BLOCK_ROWS, block_tokens
from cpt.model.experts.grouped import ALIGNMENT_BYTES
from cpt.model.freezing import frozen_names
from cpt.model.loss.head import work_bytes
from cpt.model.parameters import parameter_numels
from cpt.model.weights.hf_layout import is_expert_name
from cpt.storage.state_bytes import OPTIMIZER_BYTES, host_gradient_bytes

GIB = 2**30
SUB_GROUP_SIZE = 10**9
"""Parameters that DeepSpeed updates at a time, unless the JSON says otherwise."""
REUSE_DISTANCE = 10**9
"""Parameters between two uses up to which DeepSpeed keeps a gathered parameter, unless the JSON
says otherwise.
"""
WIDE, INDEX = 4, 8
"""Bytes of an fp32 number and of an index."""


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
    return ParameterCounts(
        dense=dense, experts=experts, trained_dense=trained_dense, trained_experts=trained_experts
    )


def device_memory(
    config: RunConfig, model: GptOssConfig, counts: ParameterCounts, device_type: str = "cuda"
) -> dict[str, int]:
    """Bytes on the device of one rank, by part; offloaded parts are left out."""
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
        # ZeRO-1 adds gradients up in the working dtype, the others in fp32
        "gradients": itemsize * trained_held if stage == 1 else WIDE * trained_per_rank,
        "optimizer": OPTIMIZER_BYTES * trained_per_rank,
    }
    peak: dict[str, int] = max(
        _moments(config, model, device_type), key=lambda moment: sum(moment.values())
    )
    # the update comes when the step's own tensors are gone, and adds only what it takes beyond them
    update = WIDE * min(trained_per_rank, int(zero.get("sub_group_size", SUB_GROUP_SIZE)))
    update += _mask_bytes(model, _Sizes.of(config, model), device_type, backward=True)
    parts |= {**peak, "update": 0 if offload_optimizer else max(0, update - sum(peak.values()))}
    if offload_optimizer:
        parts["optimizer"] = 0
        if stage == 3:  # the others add gradients up on the device all the same
            parts["gradients"] = 0
    if "offload_param" in zero:
        parts["weights"] = 0
    return parts


def host_memory(
    config: RunConfig, model: GptOssConfig, counts: ParameterCounts, place: str = "cpu"
) -> dict[str, int]:
    """Bytes that offloading takes for one rank, by part.

    Args:
        place: `cpu`, host memory, or `nvme`, files: the value of the key `device` of an offload
            block.
    """
    itemsize = 2 if config.train.dtype == "bf16" else 4
    trained = (counts.trained_dense + counts.trained_experts) // config.world_size
    zero = config.engine_json["zero_optimization"]
    parts: dict[str, int] = {}
    if zero.get("offload_optimizer", {}).get("device") == place:
        parts["optimizer"] = OPTIMIZER_BYTES * trained
        parts["gradients"] = host_gradient_bytes(config.zero_stage) * trained
    if zero.get("offload_param", {}).get("device") == place:
        parts["weights"] = itemsize * ((counts.dense + counts.experts) // config.world_size)
    if config.model.offload_checkpoints and place == "cpu":
        parts["layer inputs"] = model.num_hidden_layers * _layer_input(model, config, itemsize)
    return parts


def parameter_counts(model: GptOssConfig, left_out: tuple[str, ...] = ()) -> tuple[int, int]:
    """(dense, expert) parameters of the whole model, without those that the patterns `left_out`
    match.
    """
    numels = parameter_numels(model)
    for name in frozen_names(left_out, numels):
        del numels[name]
    experts = sum(numel for name, numel in numels.items() if is_expert_name(name))
    return sum(numels.values()) - experts, experts


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """What the tensors of a step are made of, on one rank."""

    tokens: int
    itemsize: int
    """Bytes of a number in the working dtype."""
    table: int
    """Parameters of a vocabulary table."""
    attention: int
    """Parameters of a layer's attention."""
    experts: int
    """Parameters of a layer's experts that this rank computes with."""
    query: int
    """Values of a token in all query heads."""
    key: int
    """Values of a token in all key heads."""

    @classmethod
    def of(cls, config: RunConfig, model: GptOssConfig) -> _Sizes:
        hidden, query = model.hidden_size, model.num_attention_heads * model.head_dim
        key = model.num_key_value_heads * model.head_dim
        return cls(
            tokens=config.micro_batch_size * config.train.seq_len // config.sp_size,
            itemsize=2 if config.train.dtype == "bf16" else 4,
            table=model.vocab_size * hidden,
            attention=2 * hidden * (query + key),
            experts=model.num_local_experts
            // config.ep_size
            * 3
            * hidden
            * model.intermediate_size,
            query=query,
            key=key,
        )


def _moments(config: RunConfig, model: GptOssConfig, device_type: str) -> list[dict[str, int]]:
    """What the step holds beyond the state at each moment that can be its peak, the update
    apart.
    """
    sizes = _Sizes.of(config, model)
    wide, itemsize, hidden = WIDE, sizes.itemsize, model.hidden_size
    at_loss, at_layer = _gathered_numels(config, model, sizes)
    # of the last norm its input and quotient in fp32, its output, and of that the rows with a
    # label; their gradient
    head = sizes.tokens * hidden * (2 * wide + 2 * itemsize + wide)
    loss = {
        "gathered weights": itemsize * at_loss,
        "weight gradients": itemsize * sizes.table,
        "activations": _kept(config, model, sizes)
        + head
        + _mask_bytes(model, sizes, device_type, backward=False),
        "logits": work_bytes(device_type, sizes.tokens, itemsize),
    }
    copied = (
        wide if itemsize != wide and config.zero_stage == 3 else 0
    )  # gradients of working dtype fp32 are not copied
    reduced = copied * (sizes.table // config.world_size)
    table = {**loss, "weight gradients": itemsize * sizes.table + reduced, "logits": 0}
    gate_up = copied * (2 * sizes.experts // 3 // (config.world_size // config.ep_size))
    layer = {
        "gathered weights": itemsize * at_layer,
        "weight gradients": itemsize * (sizes.attention + sizes.experts) + gate_up,
        "activations": _backward_of_layer(config, model, sizes, device_type),
        "logits": 0,
    }
    return [loss, table, layer]


def _gathered_numels(config: RunConfig, model: GptOssConfig, sizes: _Sizes) -> tuple[int, int]:
    """Parameters that ZeRO-3 holds gathered when the loss is computed, and in the last layer's
    backward.

    A layer stays gathered for its backward if the parameters of the modules run in between are
    fewer than the reuse distance (deepspeed 0.19.8, partitioned_param_coordinator.py); of the
    others two are there at a time, the second being prefetched.  What is not shared with another
    rank is never copied.
    """
    if config.zero_stage != 3:
        return 0, 0
    reach = int(
        config.engine_json["zero_optimization"].get("stage3_max_reuse_distance", REUSE_DISTANCE)
    )
    table = sizes.table if config.world_size > 1 else 0
    layer = sizes.attention if config.world_size > 1 else 0
    layer += sizes.experts if config.world_size > config.ep_size else 0
    runs = 3 if config.model.activation_checkpointing else 2  # forward, again, backward
    between, stay = 2 * sizes.table, 0
    while stay < model.num_hidden_layers and between < reach:
        between, stay = between + runs * (sizes.attention + sizes.experts), stay + 1
    embedding = table if between < reach else 0
    return table + stay * layer + embedding, max(stay, 2) * layer + embedding


def _kept(config: RunConfig, model: GptOssConfig, sizes: _Sizes) -> int:
    """What the layers together keep for their backward."""
    layers = model.num_hidden_layers
    if not config.model.activation_checkpointing:
        return layers * (
            _attention_bytes(config, model, sizes) + _experts_bytes(config, model, sizes)
        )
    # on their way to the host: that of the layer being computed, and the one before
    inputs = (2 if config.model.offload_checkpoints else layers) * _layer_input(
        model, config, sizes.itemsize
    )
    if config.model.expert_recompute == "keep" and config.ep_size > 1:
        inputs += (
            layers * sizes.tokens * model.num_experts_per_tok * _row_bytes(config, model, sizes)
        )
    return inputs


def _row_bytes(config: RunConfig, model: GptOssConfig, sizes: _Sizes) -> int:
    """A token's row for one expert; its weight travels beside it."""
    return sizes.itemsize * model.hidden_size + (ALIGNMENT_BYTES if config.ep_size > 1 else 0)


def _attention_bytes(config: RunConfig, model: GptOssConfig, sizes: _Sizes) -> int:
    """What autograd keeps of the first half of a layer."""
    # rotated q and k, v, output; its log-sum-exp; under Ulysses what comes back of the output is
    # another tensor
    kept = sizes.itemsize * 2 * (sizes.query + sizes.key) + WIDE * model.num_attention_heads
    kept += sizes.itemsize * sizes.query if config.sp_size > 1 else 0
    return sizes.tokens * (_norm_bytes(model, sizes) + kept)


def _experts_bytes(config: RunConfig, model: GptOssConfig, sizes: _Sizes) -> int:
    """What autograd keeps of the second half of a layer."""
    # the choice, the order of the rows and its inverse, their tokens; the orders of what arrived
    indices = INDEX * (4 + (2 if config.ep_size > 1 else 0))
    row = (
        _row_bytes(config, model, sizes) + sizes.itemsize * 2 * model.intermediate_size + indices
    )  # with gate and up
    return sizes.tokens * (_norm_bytes(model, sizes) + model.num_experts_per_tok * row)


def _norm_bytes(model: GptOssConfig, sizes: _Sizes) -> int:
    """Of a token: input and quotient in fp32, and the output."""
    return (2 * WIDE + sizes.itemsize) * model.hidden_size


def _backward_of_layer(
    config: RunConfig, model: GptOssConfig, sizes: _Sizes, device_type: str
) -> int:
    """What is there when the last layer goes back through its experts or, these being done, through
    its attention.
    """
    attention, experts = (
        _attention_bytes(config, model, sizes),
        _experts_bytes(config, model, sizes),
    )
    rest = _kept(config, model, sizes)
    if not config.model.activation_checkpointing:
        rest -= attention + experts
    residual = sizes.itemsize * sizes.tokens * model.hidden_size
    # of each row the gradient of its output, and the activated values; that of gate and up is
    # written over them
    row = _row_bytes(config, model, sizes) + sizes.itemsize * model.intermediate_size
    in_experts = experts + sizes.tokens * model.num_experts_per_tok * row
    masks = _mask_bytes(model, sizes, device_type, backward=True)
    return (
        rest
        + residual
        + attention
        + max(in_experts, _in_attention(model, sizes, device_type))
        + masks
    )


def _in_attention(model: GptOssConfig, sizes: _Sizes, device_type: str) -> int:
    """What the backward of attention makes.

    FlashAttention 2: gradients of output and q, of k and v for every query head, and fp32 sums of
    that of q.  The CPU in window layers (`cpu._Band.backward`): gradient of the output; that, q and
    the output in blocks; keys and values with the window before them; gradients of q, in blocks and
    not, of overlapping windows of k and v, and one of these added up in fp32.
    """
    query, key = sizes.itemsize * sizes.query, sizes.itemsize * sizes.key
    if device_type != "cpu":
        return sizes.tokens * (4 * query + WIDE * sizes.query)
    block = block_tokens(
        BACKWARD_BLOCK_ROWS, model.num_attention_heads // model.num_key_value_heads
    )
    overlap = 1 + window_tokens(model) / block  # how many windows a key is in
    return int(sizes.tokens * (6 * query + 2 * key + 2 * overlap * key + WIDE * sizes.key))


def _mask_bytes(model: GptOssConfig, sizes: _Sizes, device_type: str, *, backward: bool) -> int:
    """Masks of the window layers, kept for the whole step by the kernel for CPUs; another one for
    the backward.
    """
    if device_type != "cpu":
        return 0
    group, window = (
        model.num_attention_heads // model.num_key_value_heads,
        window_tokens(model),
    )
    blocks = (FORWARD_BLOCK_ROWS, BACKWARD_BLOCK_ROWS) if backward else (FORWARD_BLOCK_ROWS,)
    return (
        sizes.tokens
        * group
        * sizes.itemsize
        * sum(block_tokens(rows, group) + window for rows in blocks)
    )


def _layer_input(model: GptOssConfig, config: RunConfig, itemsize: int) -> int:
    """The hidden states of this rank's tokens, once."""
    return (
        itemsize
        * (config.micro_batch_size * config.train.seq_len // config.sp_size)
        * model.hidden_size
    )


def memory_tables(config: RunConfig, model: GptOssConfig) -> str:
    """What one rank will take, for people: on its device and, if state is offloaded, elsewhere."""
    counts = count_parameters(model, config.train.freeze)
    places = {
        "memory": device_memory(config, model, counts),
        "host memory": host_memory(config, model, counts),
        "NVMe space": host_memory(config, model, counts, "nvme"),
    }
    return "\n".join(_table(place, parts) for place, parts in places.items() if parts)


def _table(place: str, parts: dict[str, Any]) -> str:
    """The parts and their sum."""
    width = max(map(len, parts))
    lines = [f"  {name:<{width}}  {size / GIB:9.2f} GiB" for name, size in parts.items() if size]
    total = f"  {'sum':<{width}}  {sum(parts.values()) / GIB:9.2f} GiB"
    return "\n".join([f"{place} of one rank (estimate, see cpt/planning/memory.py)", *lines, total])

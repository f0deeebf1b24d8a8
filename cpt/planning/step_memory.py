"""Memory of one optimizer step on a rank, beyond weights, gradients and optimizer state.

The tensors are added up for each moment at which a step can need most:

    loss     all layers keep what their backward needs; the table of the head is gathered, its
             gradient is being made, and tiles of logits are worked on
    table    the same without tiles, when that gradient is reduced: this rank's part of it is
             copied to fp32
    layer    the backward of the last layer: its weights, their gradients, and the gradients of
             its activations

Experts are taken to be evenly routed, and rows to hold documents longer than the window; allocator
fragmentation and library workspaces are not included.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.config.window import window_tokens
from cpt.model.attention.cpu import BACKWARD_BLOCK_ROWS, FORWARD_BLOCK_ROWS, block_tokens
from cpt.model.experts.grouped import ALIGNMENT_BYTES
from cpt.model.loss.tiles import work_bytes
from cpt.storage.state_bytes import FP32_BYTES

INDEX_BYTES = 8
REUSE_DISTANCE = 10**9
"""Parameters between two uses up to which DeepSpeed keeps a gathered parameter, unless the
DeepSpeed JSON says otherwise.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """The sizes that the tensors of a step are made of, on one rank."""

    config: RunConfig
    model: GptOssConfig
    device_type: str
    """`cuda` or `cpu`: where the model is computed."""
    tokens: int
    """Tokens of a micro step on this rank."""
    itemsize: int
    """Bytes of a number in the working precision."""
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
    def of(cls, config: RunConfig, model: GptOssConfig, device_type: str) -> StepSizes:
        """Return the sizes of a layout."""
        hidden = model.hidden_size
        query = model.num_attention_heads * model.head_dim
        key = model.num_key_value_heads * model.head_dim
        expert = 3 * hidden * model.intermediate_size
        return cls(
            config=config,
            model=model,
            device_type=device_type,
            tokens=local_tokens(config),
            itemsize=config.itemsize,
            table=model.vocab_size * hidden,
            attention=2 * hidden * (query + key),
            experts=model.num_local_experts // config.ep_size * expert,
            query=query,
            key=key,
        )

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states of this rank's tokens."""
        return self.itemsize * self.tokens * self.model.hidden_size

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key head."""
        return self.model.num_attention_heads // self.model.num_key_value_heads

    @property
    def copy_itemsize(self) -> int:
        """Bytes per number of the fp32 copy that ZeRO-3 makes of a reduced gradient."""
        already_fp32 = self.itemsize == FP32_BYTES
        if already_fp32 or self.config.zero_stage != 3:
            return 0
        return FP32_BYTES


def local_tokens(config: RunConfig) -> int:
    """Return the tokens of a micro step on one rank."""
    return config.micro_batch_size * config.train.seq_len // config.sp_size


def step_peak(sizes: StepSizes) -> dict[str, int]:
    """Return the bytes by part at the moment of a step that needs most, except the update."""
    moments = [_at_loss(sizes), _at_table(sizes), _at_layer(sizes)]
    return max(moments, key=lambda moment: sum(moment.values()))


def _at_loss(sizes: StepSizes) -> dict[str, int]:
    # input and output of the last norm, the rows that have a label; their gradient in fp32
    head_token = (FP32_BYTES + 3 * sizes.itemsize) * sizes.model.hidden_size
    activations = kept_bytes(sizes) + sizes.tokens * head_token + mask_bytes(sizes, backward=False)
    gathered, _ = _gathered_numels(sizes)
    return {
        "gathered weights": sizes.itemsize * gathered,
        "weight gradients": sizes.itemsize * sizes.table,
        "activations": activations,
        "logits": work_bytes(sizes.device_type, sizes.tokens, sizes.itemsize),
    }


def _at_table(sizes: StepSizes) -> dict[str, int]:
    moment = _at_loss(sizes)
    reduced = sizes.copy_itemsize * (sizes.table // sizes.config.world_size)
    moment["weight gradients"] += reduced
    moment["logits"] = 0
    return moment


def _at_layer(sizes: StepSizes) -> dict[str, int]:
    _, gathered = _gathered_numels(sizes)
    ranks_sharing_experts = sizes.config.world_size // sizes.config.ep_size
    gate_up = 2 * sizes.experts // 3
    reduced = sizes.copy_itemsize * (gate_up // ranks_sharing_experts)
    return {
        "gathered weights": sizes.itemsize * gathered,
        "weight gradients": sizes.itemsize * (sizes.attention + sizes.experts) + reduced,
        "activations": _layer_backward_bytes(sizes),
        "logits": 0,
    }


def _gathered_numels(sizes: StepSizes) -> tuple[int, int]:
    """Return the parameters that ZeRO-3 holds gathered at the loss, and in the last layer.

    A layer stays gathered for its backward if the parameters of the modules that run in between
    are fewer than the reuse distance (deepspeed 0.19.8, partitioned_param_coordinator.py).  Of the
    others, two are there at a time, since the second is being prefetched.  A parameter that no
    other rank shares is never copied.
    """
    config = sizes.config
    if config.zero_stage != 3:
        return 0, 0
    zero = config.engine_json["zero_optimization"]
    reach = int(zero.get("stage3_max_reuse_distance", REUSE_DISTANCE))
    table = 0
    layer = 0
    if config.world_size > 1:
        table = sizes.table
        layer = sizes.attention
    if config.world_size > config.ep_size:
        layer += sizes.experts
    # forward and backward; with activation checkpointing, the forward runs again
    runs = 3 if config.model.activation_checkpointing else 2
    between = 2 * sizes.table
    staying = 0
    while staying < sizes.model.num_hidden_layers and between < reach:
        between += runs * (sizes.attention + sizes.experts)
        staying += 1
    embedding = table if between < reach else 0
    return table + staying * layer + embedding, max(staying, 2) * layer + embedding


def kept_bytes(sizes: StepSizes) -> int:
    """Return what the layers together keep for their backward."""
    layers = sizes.model.num_hidden_layers
    if not sizes.config.model.activation_checkpointing:
        return layers * (_attention_bytes(sizes) + _experts_bytes(sizes))
    inputs_on_device = layers
    if sizes.config.model.offload_checkpoints:
        # that of the layer being computed, and the one before on its way to the host
        inputs_on_device = 2
    kept = inputs_on_device * sizes.hidden_bytes
    if sizes.config.model.expert_recompute == "keep" and sizes.config.ep_size > 1:
        rows = sizes.tokens * sizes.model.num_experts_per_tok
        kept += layers * rows * _row_bytes(sizes)
    return kept


def _row_bytes(sizes: StepSizes) -> int:
    """Return the bytes of a token's row for one expert; between ranks, its weight goes along."""
    row = sizes.itemsize * sizes.model.hidden_size
    if sizes.config.ep_size > 1:
        row += ALIGNMENT_BYTES
    return row


def _attention_bytes(sizes: StepSizes) -> int:
    """Return what autograd keeps of the first half of a layer."""
    # rotated q and k, v, output; the log-sum-exp of each head
    kept = sizes.itemsize * 2 * (sizes.query + sizes.key)
    kept += FP32_BYTES * sizes.model.num_attention_heads
    if sizes.config.sp_size > 1:
        # Ulysses returns the output as another tensor
        kept += sizes.itemsize * sizes.query
    return sizes.tokens * (_norm_bytes(sizes) + kept)


def _experts_bytes(sizes: StepSizes) -> int:
    """Return what autograd keeps of the second half of a layer."""
    # the choice, the order of the rows, its inverse, their tokens; between ranks, the two orders
    # of the rows that arrived
    num_indices = 6 if sizes.config.ep_size > 1 else 4
    gate_and_up = sizes.itemsize * 2 * sizes.model.intermediate_size
    row = _row_bytes(sizes) + gate_and_up + INDEX_BYTES * num_indices
    return sizes.tokens * (_norm_bytes(sizes) + sizes.model.num_experts_per_tok * row)


def _norm_bytes(sizes: StepSizes) -> int:
    """Return what a norm keeps of a token: input and output."""
    return 2 * sizes.itemsize * sizes.model.hidden_size


def _layer_backward_bytes(sizes: StepSizes) -> int:
    """Return the activations during the backward of the last layer.

    It goes back through the experts first, and when these are done, through the attention.
    """
    attention = _attention_bytes(sizes)
    experts = _experts_bytes(sizes)
    other_layers = kept_bytes(sizes)
    if not sizes.config.model.activation_checkpointing:
        other_layers -= attention + experts
    residual = sizes.hidden_bytes
    # of each row: the gradient of its output, and the activated values; the gradient of gate and
    # up is written over gate and up
    row = _row_bytes(sizes) + sizes.itemsize * sizes.model.intermediate_size
    in_experts = experts + sizes.tokens * sizes.model.num_experts_per_tok * row
    in_attention = _attention_backward_bytes(sizes)
    masks = mask_bytes(sizes, backward=True)
    return other_layers + residual + attention + max(in_experts, in_attention) + masks


def _attention_backward_bytes(sizes: StepSizes) -> int:
    """Return what the backward of attention makes.

    FlashAttention 2: gradients of output and q; gradients of k and v for every query head; fp32
    sums of the gradient of q.  The CPU in window layers (`cpu._Band.backward`): gradient of the
    output; that gradient, q and the output in blocks; keys and values with the window before them;
    gradients of q, in blocks and not; gradients of overlapping windows of k and v, one of which is
    added up in fp32.
    """
    query = sizes.itemsize * sizes.query
    key = sizes.itemsize * sizes.key
    if sizes.device_type != "cpu":
        return sizes.tokens * (4 * query + FP32_BYTES * sizes.query)
    block = block_tokens(BACKWARD_BLOCK_ROWS, sizes.heads_per_group)
    windows_of_a_key = 1 + window_tokens(sizes.model) / block
    token = 6 * query + 2 * key + 2 * windows_of_a_key * key + FP32_BYTES * sizes.key
    return int(sizes.tokens * token)


def mask_bytes(sizes: StepSizes, *, backward: bool) -> int:
    """Return the masks of window layers, which the kernel for CPUs keeps for the whole step.

    Args:
        sizes: Of the step.
        backward: Whether the backward has begun, which has a mask of its own.
    """
    if sizes.device_type != "cpu":
        return 0
    group = sizes.heads_per_group
    window = window_tokens(sizes.model)
    columns = block_tokens(FORWARD_BLOCK_ROWS, group) + window
    if backward:
        columns += block_tokens(BACKWARD_BLOCK_ROWS, group) + window
    return sizes.tokens * group * sizes.itemsize * columns

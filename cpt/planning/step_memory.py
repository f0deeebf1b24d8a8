"""Memory of one optimizer step on a rank, beyond weights, gradients and optimizer state.

The tensors are added up for each moment at which a step can need most:

    loss        all layers keep what their backward needs; the table of the head is gathered, its
                gradient is being made, and tiles of logits are worked on
    table       that gradient is reduced: this rank's part of it is copied to fp32
    experts     the backward of the last layer's experts, up to the gradient of their second matrix
    decoding    that moment over a packed base: their first matrices are decoded
    rows        the same up to the gradient of their first matrix
    reduction   that gradient is reduced, as the table's
    attention   the backward of attention in the last layer
    window      the same in the last window layer, which takes more than others on a CPU

The largest is found by `cpt.planning.memory`, which knows the update, too.

With adapters, the weights below them have no gradients, and a layer keeps the inputs of their
products and what A makes of these. Layers before the first adapter keep nothing, nor do those
before the first weight that `train.freeze` leaves. Later layers count as if they kept the inputs of
frozen weights, too.

Experts are taken to be evenly routed, and rows to hold documents longer than the window; allocator
fragmentation and library workspaces are not included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.config.window import window_tokens
from cpt.model.adapters.layout import AdaptedMatrix
from cpt.model.attention.cpu import BACKWARD_BLOCK_ROWS, FORWARD_BLOCK_ROWS, block_tokens
from cpt.model.attention.function import PIECE_ELEMENTS_CPU, PIECE_ELEMENTS_GPU
from cpt.model.experts.grouped import ALIGNMENT_BYTES
from cpt.model.experts.packed import experts_in_scratch
from cpt.model.loss.tiles import work_bytes
from cpt.planning.trained_weights import TrainedWeights
from cpt.storage.state_bytes import FP32_BYTES

INDEX_BYTES = 8
WINDOW = "sliding_attention"
"""A window layer in `layer_types` of a model's configuration."""
REUSE_DISTANCE = 10**9
"""Parameters between two uses up to which DeepSpeed keeps a gathered parameter, unless the
DeepSpeed JSON says otherwise.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSizes:
    """The adapters of a layer, on one rank; of several layers, of one that has most of them."""

    attention: int
    """Their parameters beside the matrices of attention."""
    gate_up: int
    """Those beside the first matrices of the experts."""
    down: int
    """Those beside the second."""
    attention_ranks: int
    """The ranks of all adapters of attention together."""
    expert_rank: int
    """The largest rank of an adapter of experts; 0 without any."""
    scaled_columns: int
    """Values of a token in all outputs that DoRA scales."""
    first_layer: int
    """The first layer that has any; those before it keep nothing for a backward."""

    @classmethod
    def of(cls, adapted: Iterable[AdaptedMatrix], ep_size: int) -> AdapterSizes:
        """Return the sizes of the adapters beside some matrices; all are 0 without any."""
        by_layer: dict[int, list[AdaptedMatrix]] = {}
        for matrix in adapted:
            by_layer.setdefault(matrix.layer, []).append(matrix)
        most = max(by_layer.values(), key=len, default=[])
        numels = {"attention": 0, "gate_up": 0, "down": 0}
        ranks = scaled = expert_rank = 0
        for matrix in most:
            numel = sum(math.prod(shape) for shape in matrix.shapes().values())
            if not matrix.of_experts:
                numels["attention"] += numel
                ranks += matrix.rank
                scaled += matrix.out_size if matrix.has_magnitude else 0
                continue
            if matrix.num_experts is not None:
                numel //= ep_size
            numels["gate_up" if "gate_up" in matrix.name else "down"] += numel
            expert_rank = max(expert_rank, matrix.rank)
        return cls(
            **numels,
            attention_ranks=ranks,
            expert_rank=expert_rank,
            scaled_columns=scaled,
            first_layer=min(by_layer, default=0),
        )

    @property
    def experts(self) -> int:
        """Parameters of the adapters of a layer's experts."""
        return self.gate_up + self.down


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
    adapters: AdapterSizes
    """The adapters of a layer."""
    trained: TrainedWeights
    """The weights that have gradients in a run without adapters."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        model: GptOssConfig,
        adapted: Iterable[AdaptedMatrix],
        device_type: str,
    ) -> StepSizes:
        """Return the sizes of a layout, with adapters beside some matrices."""
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
            adapters=AdapterSizes.of(adapted, config.ep_size),
            trained=TrainedWeights.of(config.train.freeze, model),
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
    def has_adapters(self) -> bool:
        """Whether adapters are trained, and nothing else."""
        return self.config.adapter.is_on

    @property
    def is_packed(self) -> bool:
        """Whether the matrices of the experts are kept in 4 bits."""
        return self.config.adapter.base == "mxfp4"

    @property
    def trained_table(self) -> int:
        """Parameters of a vocabulary table that have a gradient."""
        return 0 if self.has_adapters else self.trained.table

    @property
    def trained_attention(self) -> int:
        """Parameters of a layer's attention that have a gradient."""
        return self.adapters.attention if self.has_adapters else self.trained.attention

    @property
    def trained_gate_up(self) -> int:
        """Parameters beside or in the first matrices of a layer's experts that have a gradient."""
        if self.has_adapters:
            return self.adapters.gate_up
        return self.trained.gate_up // self.config.ep_size

    @property
    def trained_down(self) -> int:
        """Parameters beside or in the second matrices of a layer's experts that have a gradient."""
        if self.has_adapters:
            return self.adapters.down
        return self.trained.down // self.config.ep_size

    @property
    def first_layer(self) -> int:
        """The first layer that keeps anything for a backward."""
        return self.adapters.first_layer if self.has_adapters else self.trained.first_layer

    @property
    def layer_attention(self) -> int:
        """Parameters of a layer's attention, adapters included."""
        return self.attention + self.adapters.attention

    @property
    def layer_experts(self) -> int:
        """Parameters of a layer's experts, adapters included; packed weights are none."""
        return (0 if self.is_packed else self.experts) + self.adapters.experts

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


def step_moments(sizes: StepSizes) -> dict[str, dict[str, int]]:
    """Return the bytes by part at each moment that the module's docstring names."""
    moments = {
        "loss": _at_loss(sizes),
        "table": _at_table(sizes),
        "experts": _at_experts(sizes),
        "rows": _at_rows(sizes),
        "reduction": _at_reduction(sizes),
        "attention": _at_attention(sizes),
    }
    if sizes.is_packed:
        moments["decoding"] = _at_decoding(sizes)
    kinds = list(sizes.model.layer_types or ())
    if sizes.device_type == "cpu" and WINDOW in kinds:
        last = max(layer for layer, kind in enumerate(kinds) if kind == WINDOW)
        moments["window"] = _at_window(sizes, last)
    return moments


def _at_loss(sizes: StepSizes) -> dict[str, int]:
    # Input and output of the last norm, the output's gradient as an fp32 sum, and in the working
    # precision: the whole of it at the end, on a CPU also what each tile adds.
    head_token = (3 * sizes.itemsize + FP32_BYTES) * sizes.model.hidden_size
    activations = _kept_by_all(sizes) + sizes.tokens * head_token
    gathered, _ = _gathered_numels(sizes)
    return {
        "gathered weights": sizes.itemsize * gathered,
        "weight gradients": sizes.itemsize * sizes.trained_table,
        "activations": activations + mask_bytes(sizes, backward=False),
        "logits": work_bytes(sizes.device_type, sizes.tokens, sizes.itemsize),
    }


def _at_table(sizes: StepSizes) -> dict[str, int]:
    # A table waits for the next gradient, that of the last norm; then only the gradient of the last
    # layer's output is left of the head.
    activations = _kept_by_all(sizes) + sizes.hidden_bytes
    gathered, _ = _gathered_numels(sizes)
    reduced = sizes.copy_itemsize * (sizes.trained_table // sizes.config.world_size)
    return {
        "gathered weights": sizes.itemsize * gathered,
        "weight gradients": sizes.itemsize * sizes.trained_table + reduced,
        "activations": activations + mask_bytes(sizes, backward=False),
        "logits": 0,
    }


def _at_experts(sizes: StepSizes) -> dict[str, int]:
    # of each row: the gradient of its output, and that of the activated values, in whose place
    # these values come; the gradient of gate and up is written over gate and up
    row = _row_bytes(sizes) + sizes.itemsize * sizes.model.intermediate_size
    if sizes.adapters.down:
        # what the adapter adds to the gradient of the activated values, and to that of x A
        row += sizes.itemsize * (sizes.model.intermediate_size + sizes.adapters.expert_rank)
    gradients = sizes.trained_down
    if sizes.config.model.expert_overlap == "halves":
        # gate and up stay, the gradient of half of the activated values goes beside its own, and
        # the gradients of both matrices leave together
        row += sizes.itemsize * 5 * sizes.model.intermediate_size // 2
        gradients = sizes.trained_gate_up + sizes.trained_down
    rows = sizes.tokens * sizes.model.num_experts_per_tok * row
    return _in_last_layer(sizes, gradients, _experts_bytes(sizes) + rows)


def _at_rows(sizes: StepSizes) -> dict[str, int]:
    row = _row_bytes(sizes)
    if sizes.adapters.gate_up:
        # what the adapter adds to the gradient of the rows, and to that of x A
        row += sizes.itemsize * (sizes.model.hidden_size + sizes.adapters.expert_rank)
    rows = sizes.tokens * sizes.model.num_experts_per_tok * row
    moment = _in_last_layer(sizes, sizes.trained_gate_up, _experts_bytes(sizes) + rows)
    if sizes.device_type != "cpu":
        # the host runs ahead of the device, which is still reducing the second matrix's gradient
        reduced = _reduced_experts_bytes(sizes, sizes.trained_down)
        moment["weight gradients"] += sizes.itemsize * sizes.trained_down + reduced
    return moment


def _at_decoding(sizes: StepSizes) -> dict[str, int]:
    """Return the product for the gradient of the rows, which decodes the first matrices."""
    rows = sizes.tokens * sizes.model.num_experts_per_tok * _row_bytes(sizes)
    moment = _in_last_layer(sizes, 0, _experts_bytes(sizes) + rows)
    experts = sizes.model.num_local_experts // sizes.config.ep_size
    matrix = 2 * sizes.model.hidden_size * sizes.model.intermediate_size
    held = min(experts, experts_in_scratch(matrix, sizes.config.dtype, sizes.device_type))
    # the eager body puts the values into their places in one more copy
    copies = 2 if sizes.device_type == "cpu" else 1
    moment["decoded experts"] = copies * sizes.itemsize * held * matrix
    return moment


def _at_reduction(sizes: StepSizes) -> dict[str, int]:
    # the rows have become the gradient of the norm's output
    gate_up = sizes.trained_gate_up
    norm = sizes.tokens * _norm_bytes(sizes, keeps_output=not sizes.has_adapters)
    norm += sizes.hidden_bytes
    moment = _in_last_layer(sizes, gate_up, norm)
    moment["weight gradients"] += _reduced_experts_bytes(sizes, gate_up)
    return moment


def _reduced_experts_bytes(sizes: StepSizes, numel: int) -> int:
    """Return the fp32 copy of this rank's part of a reduced gradient of experts."""
    ranks_sharing_experts = sizes.config.world_size // sizes.config.ep_size
    return sizes.copy_itemsize * (numel // ranks_sharing_experts)


def _at_attention(sizes: StepSizes) -> dict[str, int]:
    return _in_last_layer(sizes, sizes.trained_attention, _attention_backward_bytes(sizes))


def _at_window(sizes: StepSizes, layer: int) -> dict[str, int]:
    moment = _in_layer(sizes, layer, sizes.trained_attention, _window_backward_bytes(sizes))
    # the backward's own mask has been made
    masks = mask_bytes(sizes, backward=True) - mask_bytes(sizes, backward=False)
    moment["activations"] += masks
    return moment


def _in_last_layer(sizes: StepSizes, numels: int, activations: int) -> dict[str, int]:
    return _in_layer(sizes, sizes.model.num_hidden_layers - 1, numels, activations)


def _in_layer(sizes: StepSizes, layer: int, numels: int, activations: int) -> dict[str, int]:
    """Return a moment of a layer's backward.

    Args:
        sizes: Of the step.
        layer: Index of the layer; those after it are done.
        numels: Parameters whose gradients are there in the working precision.
        activations: Bytes of activations beside what attention and the layers before keep, and the
            gradient of what goes around the block.
    """
    _, gathered = _gathered_numels(sizes)
    activations += _kept_before(sizes, layer) + _attention_bytes(sizes) + sizes.hidden_bytes
    return {
        "gathered weights": sizes.itemsize * gathered,
        "weight gradients": sizes.itemsize * numels,
        "activations": activations + mask_bytes(sizes, backward=False),
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
        layer = sizes.layer_attention
    if config.world_size > config.ep_size:
        layer += sizes.layer_experts
    # forward and backward; with activation checkpointing, the forward runs again
    runs = 3 if config.model.activation_checkpointing else 2
    between = 2 * sizes.table
    staying = 0
    while staying < sizes.model.num_hidden_layers and between < reach:
        between += runs * (sizes.layer_attention + sizes.layer_experts)
        staying += 1
    embedding = table if between < reach else 0
    return table + staying * layer + embedding, max(staying, 2) * layer + embedding


def _kept_by_all(sizes: StepSizes) -> int:
    """Return what the layers together keep for their backward."""
    if sizes.config.model.offload_checkpoints:
        # the input of the layer being computed, and the one before on its way to the host
        return 2 * sizes.hidden_bytes + _kept_rows(sizes, sizes.model.num_hidden_layers)
    return _kept_before(sizes, sizes.model.num_hidden_layers)


def _kept_before(sizes: StepSizes, layer: int) -> int:
    """Return what the layers before this one keep while it goes backward."""
    layer = max(0, layer - sizes.first_layer)
    if not sizes.config.model.activation_checkpointing:
        return layer * (_attention_bytes(sizes) + _experts_bytes(sizes))
    inputs_on_device = layer
    if sizes.config.model.offload_checkpoints:
        inputs_on_device = min(layer, 1)
    return inputs_on_device * sizes.hidden_bytes + _kept_rows(sizes, layer)


def _kept_rows(sizes: StepSizes, layers: int) -> int:
    """Return the exchanged rows that checkpointed layers keep, if the run asks for that."""
    if sizes.config.model.expert_recompute != "keep" or sizes.config.ep_size == 1:
        return 0
    rows = sizes.tokens * sizes.model.num_experts_per_tok
    return layers * rows * _row_bytes(sizes)


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
    # x A of every adapter, and what DoRA scales
    kept += sizes.itemsize * (sizes.adapters.attention_ranks + sizes.adapters.scaled_columns)
    norm = _norm_bytes(sizes, keeps_output=not sizes.has_adapters or sizes.adapters.attention > 0)
    return sizes.tokens * (norm + kept)


def _experts_bytes(sizes: StepSizes) -> int:
    """Return what autograd keeps of the second half of a layer."""
    # the choice, the places of a token's rows, the tokens of the rows, and the order of the rows;
    # between ranks, in place of the last, the two orders of the rows that arrived
    num_indices = 5 if sizes.config.ep_size > 1 else 4
    gate_and_up = sizes.itemsize * 2 * sizes.model.intermediate_size
    row = _row_bytes(sizes) + gate_and_up + INDEX_BYTES * num_indices
    # the rows are copies; a router that is trained keeps the output of the norm
    norm = _norm_bytes(sizes, keeps_output=not sizes.has_adapters)
    return sizes.tokens * (norm + sizes.model.num_experts_per_tok * row)


def _norm_bytes(sizes: StepSizes, *, keeps_output: bool) -> int:
    """Return what is kept of a token around a norm.

    The norm keeps its input, which is the layer's own or the sum that goes around the experts;
    products that are trained, or that have an adapter, keep its output.
    """
    return (2 if keeps_output else 1) * sizes.itemsize * sizes.model.hidden_size


def _attention_backward_bytes(sizes: StepSizes) -> int:
    """Return what the backward of attention makes in the last layer.

    The kernel's part is that of FlashAttention 2: gradients of output and q; gradients of k and v
    for every query head; fp32 sums of the gradient of q.  On a CPU in a full layer: the gradient of
    q twice, in pieces and joined, instead of the sums.
    """
    query = sizes.itemsize * sizes.query
    token = 4 * query + FP32_BYTES * sizes.query
    if sizes.device_type == "cpu":
        token = 5 * query
    return max(sizes.tokens * token, _sinks_backward_bytes(sizes))


def _sinks_backward_bytes(sizes: StepSizes) -> int:
    """Return the gradients of attention, and what the sum for the sinks' gradient takes then.

    The sum goes through output and gradient in pieces, in fp32: the output, the product and on a
    CPU the gradient.
    """
    gradients = sizes.tokens * sizes.itemsize * 2 * (sizes.query + sizes.key)
    elements, copies = PIECE_ELEMENTS_GPU, 2
    if sizes.device_type == "cpu":
        elements, copies = PIECE_ELEMENTS_CPU, 3
    return gradients + copies * FP32_BYTES * min(elements, sizes.tokens * sizes.query)


def _window_backward_bytes(sizes: StepSizes) -> int:
    """Return what the backward of attention makes on a CPU in a window layer.

    `cpu._Band.backward`: gradient of the output; that gradient, q and the output in blocks; keys
    and values with the window before them; gradients of q, in blocks and not; gradients of
    overlapping windows of k and v, one of which is added up in fp32.
    """
    query = sizes.itemsize * sizes.query
    key = sizes.itemsize * sizes.key
    block = block_tokens(BACKWARD_BLOCK_ROWS, sizes.heads_per_group)
    windows_of_a_key = 1 + window_tokens(sizes.model) / block
    token = 6 * query + 2 * key + 2 * windows_of_a_key * key + FP32_BYTES * sizes.key
    return max(int(sizes.tokens * token), _sinks_backward_bytes(sizes))


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

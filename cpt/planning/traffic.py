"""Bytes that one rank puts on the wire in one optimizer step, by kind, inside its node and to other
nodes.

Ulysses, halo and experts are what `cpt.parallel.traffic` counts while training (there summed over
ranks); a test compares both.  ZeRO's traffic is not counted at run time and follows from
DeepSpeed's source: a ring passes every byte W - 1 times among W ranks, so each of them sends (W -
1) / W of a gathered tensor.

    stage 3   per micro step two gathers of the weights (forward; recomputation and backward share one) and one
              reduce-scatter of the gradients
    stage 2   per micro step an all-reduce of the gradients in buckets, which is two passes; per step one gather
    stage 1   per step an all-reduce of the gradients and one gather of the weights

Ranks of an expert-parallel group are consecutive, so those that hold the same experts are `ep_size`
apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.config.window import window_tokens
from cpt.model.experts.grouped import ALIGNMENT_BYTES
from cpt.planning.memory import ParameterCounts

KINDS = ("ZeRO gather", "ZeRO reduce", "ulysses", "halo", "experts")
"""In the order in which they are printed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """Bytes that one rank sends in one optimizer step, on average over the ranks."""

    intra: float = 0.0
    """To ranks of its own node."""
    inter: float = 0.0
    """To ranks of other nodes."""

    @property
    def total(self) -> float:
        """Both."""
        return self.intra + self.inter

    def __add__(self, other: Wire) -> Wire:
        return Wire(intra=self.intra + other.intra, inter=self.inter + other.inter)


def traffic(
    config: RunConfig, model: GptOssConfig, counts: ParameterCounts, ranks_per_node: int
) -> dict[str, Wire]:
    """Bytes by kind; experts with as many tokens for other ranks as evenly routed ones have."""
    gather, reduce = _zero(config, counts, ranks_per_node)
    return {
        "ZeRO gather": gather,
        "ZeRO reduce": reduce,
        **exchanges(config, model, ranks_per_node),
    }


def exchanges(config: RunConfig, model: GptOssConfig, ranks_per_node: int) -> dict[str, Wire]:
    """What attention and experts exchange: forward, backward, and again where layers are computed
    again.
    """
    itemsize, passes = _itemsize(config), 3 if config.model.activation_checkpointing else 2
    sp_size, ep_size = config.sp_size, config.ep_size
    rows = config.gradient_accumulation_steps * config.micro_batch_size
    local_tokens = rows * config.train.seq_len // sp_size
    window_layers = sum(kind == "sliding_attention" for kind in model.layer_types or ())
    halo_layers = window_layers if config.use_halo else 0
    query_heads, size = model.num_attention_heads, model.head_dim
    kv_heads = max(
        model.num_key_value_heads, sp_size
    )  # a head that several ranks need is sent to each
    token_bytes = (
        (2 * query_heads + 2 * kv_heads) * size * itemsize
    )  # q, k, v there, the output back
    ulysses = (
        (model.num_hidden_layers - halo_layers)
        * passes
        * local_tokens
        * token_bytes
        * (1 - 1 / sp_size)
    )
    # the first rank of a row gets nothing: sp_size - 1 sends among sp_size ranks
    reach = window_tokens(model) - 1
    halo = (
        rows
        * reach
        * 2
        * model.num_key_value_heads
        * size
        * itemsize
        * halo_layers
        * passes
        * (1 - 1 / sp_size)
    )
    row_bytes = model.hidden_size * itemsize
    # rows leave with their routing weight beside them; only they are needed again where layers are
    # computed again
    outward = 3 if passes == 3 and config.model.expert_recompute == "recompute" else 2
    row_exchanges = outward * (row_bytes + ALIGNMENT_BYTES) + 2 * row_bytes
    sent = local_tokens * model.num_experts_per_tok * row_exchanges
    experts = model.num_hidden_layers * sent * (1 - 1 / ep_size)
    return {
        "ulysses": _all_to_all(ulysses, sp_size, ranks_per_node),
        "halo": _to_neighbour(halo, sp_size, ranks_per_node),
        "experts": _all_to_all(experts, ep_size, ranks_per_node),
    }


def _itemsize(config: RunConfig) -> int:
    return 2 if config.train.dtype == "bf16" else 4


def _zero(config: RunConfig, counts: ParameterCounts, ranks_per_node: int) -> tuple[Wire, Wire]:
    """(weights gathered, gradients reduced); gradients travel in `communication_data_type`."""
    world, ep_size, stage = config.world_size, config.ep_size, config.zero_stage
    itemsize, micro_steps = _itemsize(config), config.gradient_accumulation_steps
    given = config.engine_json.get("communication_data_type")
    grad_itemsize = 4 if given == "fp32" else itemsize
    gathers, reduces = {3: (2 * micro_steps, micro_steps), 2: (1, 2 * micro_steps), 1: (1, 2)}[
        stage
    ]
    dense, experts = (
        lambda size: _ring(size, world, 1, ranks_per_node),
        lambda size: _ring(size / ep_size, world // ep_size, ep_size, ranks_per_node),
    )
    gather = dense(gathers * itemsize * counts.dense) + experts(gathers * itemsize * counts.experts)
    trained_dense, trained_experts = counts.trained_dense, counts.trained_experts
    reduce = dense(reduces * grad_itemsize * trained_dense) + experts(
        reduces * grad_itemsize * trained_experts
    )
    return gather, reduce


def _ring(size: float, ranks: int, stride: int, ranks_per_node: int) -> Wire:
    """A gather or scatter of `size` bytes among ranks that lie `stride` apart."""
    sent = size * (ranks - 1) / ranks
    if (ranks - 1) * stride < ranks_per_node:
        return Wire(intra=sent)
    per_node = max(
        1, ranks_per_node // stride
    )  # ranks of the group on one node; one hop of so many leaves it
    return Wire(intra=sent * (1 - 1 / per_node), inter=sent / per_node)


def _all_to_all(sent: float, ranks: int, ranks_per_node: int) -> Wire:
    if ranks == 1:
        return Wire()
    inside = (min(ranks, ranks_per_node) - 1) / (ranks - 1)
    return Wire(intra=sent * inside, inter=sent * (1 - inside))


def _to_neighbour(sent: float, ranks: int, ranks_per_node: int) -> Wire:
    if ranks <= ranks_per_node:
        return Wire(intra=sent)
    crossing = (ranks // ranks_per_node - 1) / (ranks - 1)
    return Wire(intra=sent * (1 - crossing), inter=sent * crossing)

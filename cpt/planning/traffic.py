"""Bytes that one rank puts on the wire in one optimizer step, by kind, inside its node and to other
nodes.

Ulysses, halo and experts are what `cpt.parallel.traffic` counts while training (there summed over
ranks); a test compares both.  ZeRO's traffic is not counted at run time and follows from
DeepSpeed's source: a ring passes every byte W - 1 times among W ranks, so each of them sends (W -
1) / W of a gathered tensor.

    stage 3   per micro step two gathers of the weights (forward; recomputation and backward share
              one) and one reduce-scatter of the gradients
    stage 2   per micro step an all-reduce of the gradients in buckets, which is two passes; per
              step one gather
    stage 1   per step an all-reduce of the gradients and one gather of the weights

Muon's exchanges are not counted at run time, either; cpt/planning/matrix_updates.py has them.

Ranks of an expert-parallel group are consecutive, so those that hold the same experts are `ep_size`
apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.config.window import window_tokens
from cpt.model.experts.grouped import ALIGNMENT_BYTES
from cpt.planning.matrix_updates import sent_bytes, shared_tensors
from cpt.planning.memory import ParameterCounts
from cpt.storage.state_bytes import FP32_BYTES

KINDS = ("ZeRO gather", "ZeRO reduce", "ulysses", "halo", "experts", "muon")
"""Kinds of traffic in the order in which they are printed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """Bytes that one rank sends in one optimizer step, on average over the ranks."""

    intra: float = 0.0
    """To ranks of its own node."""
    inter: float = 0.0
    """To ranks of other nodes."""

    @property
    def total(self) -> float:
        """Bytes to all other ranks."""
        return self.intra + self.inter

    def __add__(self, other: Wire) -> Wire:
        return Wire(intra=self.intra + other.intra, inter=self.inter + other.inter)


def traffic(
    config: RunConfig, model: GptOssConfig, counts: ParameterCounts, ranks_per_node: int
) -> dict[str, Wire]:
    """Return the bytes by kind, with evenly routed experts."""
    gather, reduce = _zero(config, counts, ranks_per_node)
    return {
        "ZeRO gather": gather,
        "ZeRO reduce": reduce,
        **exchanges(config, model, ranks_per_node),
        "muon": _matrices(config, counts, ranks_per_node),
    }


def _matrices(config: RunConfig, counts: ParameterCounts, ranks_per_node: int) -> Wire:
    """Return what an update by Muon sends: ranges of matrices to one rank, and back."""
    dense, experts = shared_tensors(config, counts)
    sent = _all_to_all(sent_bytes(dense, config), config.world_size, ranks_per_node)
    sharing = config.world_size // config.ep_size
    # of the ranks of a node, every ep_size-th shares experts
    on_node = max(1, ranks_per_node // config.ep_size)
    return sent + _all_to_all(sent_bytes(experts, config), sharing, on_node)


def exchanges(config: RunConfig, model: GptOssConfig, ranks_per_node: int) -> dict[str, Wire]:
    """Return what attention and experts exchange: forward, recomputation and backward."""
    return {
        "ulysses": _all_to_all(_ulysses_bytes(config, model), config.sp_size, ranks_per_node),
        "halo": _to_neighbor(_halo_bytes(config, model), config.sp_size, ranks_per_node),
        "experts": _all_to_all(_expert_bytes(config, model), config.ep_size, ranks_per_node),
    }


def _ulysses_bytes(config: RunConfig, model: GptOssConfig) -> float:
    """Return what one rank sends: q, k and v on the way there, the output on the way back."""
    # a key head that several ranks need is sent to each of them
    kv_heads = max(model.num_key_value_heads, config.sp_size)
    values = (2 * model.num_attention_heads + 2 * kv_heads) * model.head_dim
    token_bytes = values * config.itemsize
    layers = model.num_hidden_layers - _halo_layers(config, model)
    sent_away = 1 - 1 / config.sp_size
    return layers * _passes(config) * _tokens(config) * token_bytes * sent_away


def _halo_bytes(config: RunConfig, model: GptOssConfig) -> float:
    """Return what one rank sends to its neighbor: keys and values that reach over the border."""
    reach = window_tokens(model) - 1
    token_bytes = 2 * model.num_key_value_heads * model.head_dim * config.itemsize
    layers = _halo_layers(config, model)
    # the first rank of a row gets nothing: sp_size - 1 sends among sp_size ranks
    sending = 1 - 1 / config.sp_size
    return _rows(config) * reach * token_bytes * layers * _passes(config) * sending


def _expert_bytes(config: RunConfig, model: GptOssConfig) -> float:
    """Return what one rank sends: each row to the rank of its expert, the result back."""
    row_bytes = model.hidden_size * config.itemsize
    # rows travel with their routing weight beside them; where layers are computed again, only the
    # way there is needed again
    outward = 2
    if config.model.activation_checkpointing and config.model.expert_recompute == "recompute":
        outward = 3
    row_exchanges = outward * (row_bytes + ALIGNMENT_BYTES) + 2 * row_bytes
    sent = _tokens(config) * model.num_experts_per_tok * row_exchanges
    return model.num_hidden_layers * sent * (1 - 1 / config.ep_size)


def _passes(config: RunConfig) -> int:
    """Return how often a layer exchanges in a micro step: forward, backward, recomputation."""
    return 3 if config.model.activation_checkpointing else 2


def _rows(config: RunConfig) -> int:
    return config.gradient_accumulation_steps * config.micro_batch_size


def _tokens(config: RunConfig) -> int:
    """Return the tokens of one rank in one step."""
    return _rows(config) * config.train.seq_len // config.sp_size


def _halo_layers(config: RunConfig, model: GptOssConfig) -> int:
    if not config.use_halo:
        return 0
    return list(model.layer_types or ()).count("sliding_attention")


def _zero(config: RunConfig, counts: ParameterCounts, ranks_per_node: int) -> tuple[Wire, Wire]:
    """Return (weights gathered, gradients reduced).

    Gradients travel in `communication_data_type`.
    """
    micro_steps = config.gradient_accumulation_steps
    # (gathers of the weights, passes of the gradients) in one step
    repeats = {3: (2 * micro_steps, micro_steps), 2: (1, 2 * micro_steps), 1: (1, 2)}
    gathers, reduces = repeats[config.zero_stage]
    grad_itemsize = config.itemsize
    if config.engine_json.get("communication_data_type") == "fp32":
        grad_itemsize = FP32_BYTES
    gather_bytes = gathers * config.itemsize
    reduce_bytes = reduces * grad_itemsize
    gathered_dense = counts.dense
    gathered_experts = counts.experts
    if config.zero_stage != 3:  # what is not updated is not gathered
        gathered_dense = counts.trained_dense
        gathered_experts = counts.trained_experts
    gather = _dense_ring(gather_bytes * gathered_dense, config, ranks_per_node)
    gather += _expert_ring(gather_bytes * gathered_experts, config, ranks_per_node)
    reduce = _dense_ring(reduce_bytes * counts.trained_dense, config, ranks_per_node)
    reduce += _expert_ring(reduce_bytes * counts.trained_experts, config, ranks_per_node)
    return gather, reduce


def _dense_ring(size: float, config: RunConfig, ranks_per_node: int) -> Wire:
    """Return what a collective over all ranks sends."""
    return _ring(size, config.world_size, 1, ranks_per_node)


def _expert_ring(size: float, config: RunConfig, ranks_per_node: int) -> Wire:
    """Return what a collective over the ranks that hold the same experts sends."""
    ep_size = config.ep_size
    return _ring(size / ep_size, config.world_size // ep_size, ep_size, ranks_per_node)


def _ring(size: float, ranks: int, stride: int, ranks_per_node: int) -> Wire:
    """Return what a gather or scatter of `size` bytes sends among ranks `stride` apart."""
    sent = size * (ranks - 1) / ranks
    if (ranks - 1) * stride < ranks_per_node:
        return Wire(intra=sent)
    # of the ranks of the group on one node, one passes its bytes on to the next node
    per_node = max(1, ranks_per_node // stride)
    return Wire(intra=sent * (1 - 1 / per_node), inter=sent / per_node)


def _all_to_all(sent: float, ranks: int, ranks_per_node: int) -> Wire:
    if ranks == 1:
        return Wire()
    inside = (min(ranks, ranks_per_node) - 1) / (ranks - 1)
    return Wire(intra=sent * inside, inter=sent * (1 - inside))


def _to_neighbor(sent: float, ranks: int, ranks_per_node: int) -> Wire:
    if ranks <= ranks_per_node:
        return Wire(intra=sent)
    crossing = (ranks // ranks_per_node - 1) / (ranks - 1)
    return Wire(intra=sent * (1 - crossing), inter=sent * crossing)

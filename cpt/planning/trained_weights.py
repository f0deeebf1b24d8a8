"""Which weights of a model have gradients, as plans count them: `train.freeze`, or adapters.

A frozen weight has no gradient in a layer's backward, and so no product for it.  Plans look at one
layer for memory, the one that has most gradients, and at the sum of all layers for time.  That
something before the first trained layer needs no backward is counted in memory alone.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from dataclasses import dataclass

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.model.freezing import frozen_names
from cpt.model.parameters import parameter_shapes

GATE_UP = "mlp.experts.gate_up_proj"
DOWN = "mlp.experts.down_proj"
ROUTER = "mlp.router.weight"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
ATTENTION = "attention"
AFTER_ALL_LAYERS = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedShares:
    """The shares of the weights of products that have gradients, over all layers, 0 to 1."""

    attention: float = 1.0
    """Of the projections of attention."""
    experts: float = 1.0
    router: float = 1.0
    head: float = 1.0
    """Of the head, which makes the logits."""

    @classmethod
    def of(cls, config: RunConfig, model: GptOssConfig) -> TrainedShares:
        """Return the shares of a run; below adapters nothing has a gradient."""
        if config.adapter.is_on:
            return NOTHING
        if not config.train.freeze:
            return ALL
        return TrainedWeights.of(config.train.freeze, model).shares


ALL = TrainedShares()
"""Every weight has a gradient."""
NOTHING = TrainedShares(attention=0.0, experts=0.0, router=0.0, head=0.0)
"""No weight has a gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedWeights:
    """The weights of a whole model that have gradients, by part."""

    shares: TrainedShares
    table: int
    """Weights of a vocabulary table that has a gradient."""
    attention: int
    """Weights of the projections of a layer's attention; of the layer that has most."""
    gate_up: int
    """Likewise, of the first matrices of a layer's experts."""
    down: int
    """Likewise, of the second."""
    first_layer: int
    """The first layer in which, or before which, anything is trained; the number of layers if
    nothing is."""

    @classmethod
    def of(cls, freeze: tuple[str, ...], model: GptOssConfig) -> TrainedWeights:
        """Count the weights that some patterns leave.

        Args:
            freeze: Patterns of `train.freeze`.
            model: The model.
        """
        return _counted(freeze, model.to_json_string(use_diff=False))


@functools.lru_cache(maxsize=16)
def _counted(freeze: tuple[str, ...], model_json: str) -> TrainedWeights:
    """Count once for a model: a search asks for every layout, and a run in every step."""
    model = GptOssConfig(**json.loads(model_json))
    shapes = parameter_shapes(model)
    frozen = frozen_names(freeze, shapes)
    whole: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    by_layer: dict[str, Counter[int]] = {}
    first_layer = model.num_hidden_layers
    for name, shape in shapes.items():
        kind = _kind_of(name)
        whole[kind] += math.prod(shape)
        if name in frozen:
            continue
        trained[kind] += math.prod(shape)
        layer = _layer_of(name)
        first_layer = min(first_layer, layer)
        by_layer.setdefault(kind, Counter())[layer] += math.prod(shape)
    experts = (trained[GATE_UP] + trained[DOWN]) / (whole[GATE_UP] + whole[DOWN])

    def most(kind: str) -> int:
        return max(by_layer.get(kind, Counter()).values(), default=0)

    return TrainedWeights(
        shares=TrainedShares(
            attention=trained[ATTENTION] / whole[ATTENTION],
            experts=experts,
            router=trained[ROUTER] / whole[ROUTER],
            head=trained[HEAD] / whole[HEAD],
        ),
        table=max(most(HEAD), most(EMBEDDING)),
        attention=most(ATTENTION),
        gate_up=most(GATE_UP),
        down=most(DOWN),
        first_layer=first_layer,
    )


def _layer_of(name: str) -> int:
    """Return the number of the layer of a parameter: that of the embedding comes before all, and
    what follows the layers after all.
    """
    if name == EMBEDDING:
        return 0
    if not name.startswith("model.layers."):
        return AFTER_ALL_LAYERS
    return int(name.split(".")[2])


def _kind_of(name: str) -> str:
    """Return the part of a parameter; those of no product are all one part."""
    if ".self_attn." in name and name.endswith("_proj.weight"):
        return ATTENTION
    for kind in (GATE_UP, DOWN, ROUTER, HEAD, EMBEDDING):
        if name.endswith(kind):
            return kind
    return "other"

"""`train.freeze` in plans: what has no gradient takes no memory for one, and no product."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpt.config import RunConfig
from cpt.planning.estimate import estimate
from cpt.planning.flops import flops_per_token
from cpt.planning.hardware import GPUS, Assumptions
from cpt.planning.memory import counts_of, device_memory
from cpt.planning.part_times import PRODUCTS
from cpt.planning.step_memory import StepSizes, step_moments
from cpt.planning.trained_weights import TrainedShares, TrainedWeights
from tests.planning.test_adapters import MODELS, resolved

MODEL = MODELS["gpt-oss-20b"]
LAYERS = 24
PROJECTIONS = 2 * 2880 * (4096 + 512)
EXPERT_MATRIX = 32 * 2880 * 2880
"""The second matrices of a layer's experts; the first are two of these."""
ROUTER = 2880 * 32
TABLE = 201_088 * 2880
LOWER_HALF = ("embeddings", "model.layers.?", "model.layers.1[01]")


def frozen(*patterns: str, ep: int = 1, checkpointing: bool = True) -> RunConfig:
    config = resolved("gpt-oss-20b", {}, gpus=8, ep=ep, checkpointing=checkpointing)
    return replace(config, train=replace(config.train, freeze=patterns))


def weight_gradients(config: RunConfig) -> dict[str, int]:
    """Return the weights whose gradients are there at each moment of a step."""
    moments = step_moments(StepSizes.of(config, MODEL, [], "cuda"))
    return {name: moment["weight gradients"] // 2 for name, moment in moments.items()}


NO_FREEZING = {
    "loss": TABLE,
    "table": TABLE,
    "experts": EXPERT_MATRIX // 4,
    "rows": 3 * EXPERT_MATRIX // 4,
    "reduction": 2 * EXPERT_MATRIX // 4,
    "attention": PROJECTIONS,
}
"""On one of four ranks that the experts are spread over, under ZeRO 2, in bf16."""


@pytest.mark.parametrize(
    ("patterns", "changed"),
    [
        ((), {}),
        (("experts",), {"experts": 0, "rows": 0, "reduction": 0}),
        (("model.layers.*.mlp.experts.down_proj",), {"experts": 0, "rows": EXPERT_MATRIX // 2}),
        (("attention",), {"attention": 0}),
        (("lm_head", "embeddings"), {"loss": 0, "table": 0}),
        (("lm_head",), {}),  # the embedding's gradient is as large, at the end of the backward
        (LOWER_HALF, {}),  # a layer that is trained has all gradients
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_step_holds_the_gradients_of_what_is_trained(
    patterns: tuple[str, ...], changed: dict[str, int]
) -> None:
    assert weight_gradients(frozen(*patterns, ep=4)) == {**NO_FREEZING, **changed}


def test_layers_before_the_first_that_is_trained_keep_nothing() -> None:
    activations = {}
    for patterns in ((), LOWER_HALF, LOWER_HALF[1:]):
        config = frozen(*patterns, checkpointing=False)
        counts = counts_of(config, MODEL)
        activations[patterns] = device_memory(config, MODEL, counts)["activations"]
    assert activations[LOWER_HALF] < 0.6 * activations[()]
    assert activations[LOWER_HALF[1:]] == activations[()], "the embedding lies before them"
    assert TrainedWeights.of(LOWER_HALF, MODEL).first_layer == 12


def test_token_costs_four_operations_for_a_weight_that_is_frozen_and_six_for_another() -> None:
    config = frozen("experts", "lm_head", "model.layers.?", "model.layers.1[01]")
    shares = TrainedShares.of(config, MODEL)
    assert shares == TrainedShares(attention=0.5, experts=0.0, router=0.5, head=0.0)
    flops = flops_per_token(MODEL, 4096, shares)
    assert flops.experts == 4 * LAYERS * 4 * 3 * 2880 * 2880
    assert flops.dense == 5 * LAYERS * (PROJECTIONS + ROUTER) + 4 * TABLE
    assert flops.attention == flops_per_token(MODEL, 4096).attention


def test_time_of_the_experts_leaves_out_the_gradients_of_those_that_are_frozen() -> None:
    """Of the products' four passes with checkpointing the backward has two."""
    seconds = {}
    for patterns in ((), ("experts",), ("model.layers.?", "model.layers.1[01]")):
        config = frozen(*patterns)
        plan = estimate(config, MODEL, counts_of(config, MODEL), GPUS["h100"], Assumptions())
        seconds[patterns] = plan.parts[PRODUCTS]
    whole, without, half = seconds.values()
    assert 0.7 < without / whole < 0.8
    assert half == pytest.approx((whole + without) / 2)

"""A whole patched model with 8-bit products: what is rounded, and what is left as it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GptOssConfig

from cpt.config.adapter_section import AdapterSection
from cpt.model import attention, gpt_oss
from cpt.model.adapters.attach import attach_adapters
from cpt.model.adapters.initial_values import WithInitialAdapters
from cpt.model.adapters.layout import adapted_matrices
from cpt.model.adapters.linear import AdaptedLinear
from cpt.model.products.layers import PROJECTIONS, ChosenProducts, put_products
from cpt.model.products.linear import EightBitLinear
from cpt.model.products.recipe import EightBit
from cpt.model.weights.random_init import RandomWeights
from cpt.model.weights.source import fill_model
from cpt.parallel.traffic import Traffic
from cpt.training.activation_checkpointing import enable_checkpointing

CONFIG = GptOssConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=4,
    max_position_embeddings=64,
    pad_token_id=127,
    bos_token_id=126,
    eos_token_id=125,
)
EIGHT_BIT = EightBit("rows")
CHOSEN = ChosenProducts(experts=EIGHT_BIT, attention=EIGHT_BIT, layers=range(1, 3))
LORA = AdapterSection(kind="lora", rank=4, alpha=8.0)


def built(chosen: ChosenProducts | None, section: AdapterSection | None = None) -> Any:
    topology: Any = SimpleNamespace(ep_size=1, ep_rank=0, ep_group=None, traffic=Traffic())
    model = gpt_oss.skeleton(CONFIG, torch.float32)
    gpt_oss.patch(model, topology)
    matrices = []
    if section is not None:
        matrices = adapted_matrices(section, CONFIG)
        attach_adapters(model, matrices, section.scale, 1)
    if chosen is not None:
        put_products(model, chosen)
    gpt_oss.materialize(model, torch.device("cpu"))
    fill_model(model, WithInitialAdapters(RandomWeights(3, 0.3), matrices, seed=5))
    return model.train()


def loss_and_gradients(model: Any) -> dict[str, torch.Tensor]:
    tokens = torch.arange(48)[None] * 7 % 120
    kernel = attention.choose("auto", device=tokens.device, dtype=torch.float32, head_dim=16)
    positions = torch.arange(48)[None]
    losses = model(
        input_ids=tokens, position_ids=positions, labels=tokens.roll(-1, 1), kernel=kernel
    )
    losses.mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"losses": losses.detach(), **{k: v for k, v in found.items() if v is not None}}


def inputs_and_outputs(model: Any, names: list[str]) -> dict[str, tuple[Any, Any]]:
    """Run a forward, and return what goes into modules and what comes out."""
    seen: dict[str, tuple[Any, Any]] = {}
    for name in names:

        def note(_: Any, given: Any, out: Any, name: str = name) -> None:
            seen[name] = (given, out)

        model.get_submodule(name).register_forward_hook(note)
    loss_and_gradients(model)
    return seen


def test_products_of_the_layers_at_both_ends_are_bit_equal_to_those_without_rounding() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts"]
    plain = inputs_and_outputs(built(None), names)
    rounded = inputs_and_outputs(built(CHOSEN), names)
    for name in names:
        assert torch.equal(plain[name][1], rounded[name][1])


def test_last_layer_router_and_head_compute_as_without_rounding() -> None:
    """On the inputs that they get, which rounding in the layers before has changed."""
    names = [
        "model.layers.3.self_attn.o_proj",
        "model.layers.3.mlp.experts",
        "model.layers.2.mlp.router",
        "model.norm",
        "model.embed_tokens",
    ]
    model = built(CHOSEN)
    plain = built(None)
    seen = inputs_and_outputs(model, names)
    for name, (given, out) in seen.items():
        again = plain.get_submodule(name)(*given)
        for found, expected in zip(_tensors(out), _tensors(again), strict=True):
            assert torch.equal(found, expected), name
    assert type(model.lm_head) is type(plain.lm_head)


def _tensors(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output)


def test_rounding_changes_every_gradient_and_the_losses_little() -> None:
    plain = loss_and_gradients(built(None))
    rounded = loss_and_gradients(built(CHOSEN))
    assert plain.keys() == rounded.keys()
    errors = {}
    for name, value in plain.items():
        errors[name] = float((rounded[name] - value).norm() / value.norm())
    assert min(errors.values()) > 1e-4, errors
    assert errors["losses"] < 0.1


def test_recomputation_gives_the_bits_of_a_layer_that_is_kept() -> None:
    kept = loss_and_gradients(built(CHOSEN))
    model = built(CHOSEN)
    enable_checkpointing(model, offload=False, keep_exchanged_rows=False)
    for name, value in loss_and_gradients(model).items():
        assert torch.equal(value, kept[name]), name


@pytest.mark.parametrize("section", [None, LORA], ids=["whole model", "adapter"])
def test_model_in_evaluation_mode_rounds_nothing(section: AdapterSection | None) -> None:
    plain = loss_and_gradients(built(None, section).eval())
    rounded = loss_and_gradients(built(CHOSEN, section).eval())
    for name, value in plain.items():
        assert torch.equal(value, rounded[name]), name


def test_names_and_values_of_parameters_are_those_of_a_model_without_rounding() -> None:
    plain = dict(built(None).named_parameters())
    rounded = dict(built(CHOSEN).named_parameters())
    assert plain.keys() == rounded.keys()
    for name, value in plain.items():
        assert torch.equal(value, rounded[name])


@pytest.mark.parametrize("layer", range(4))
def test_attention_is_rounded_in_the_chosen_layers_only(layer: int) -> None:
    own = built(CHOSEN).model.layers[layer].self_attn
    for name in PROJECTIONS:
        assert isinstance(getattr(own, name), EightBitLinear) == (layer in CHOSEN.layers)


def test_adapters_stay_in_the_working_precision_over_a_rounded_base() -> None:
    model = built(CHOSEN, LORA)
    for index, layer in enumerate(model.model.layers):
        expected = EIGHT_BIT if index in CHOSEN.layers else None
        assert layer.mlp.experts.eight_bit is expected
        for name in PROJECTIONS:
            linear = getattr(layer.self_attn, name)
            assert isinstance(linear, AdaptedLinear)
            assert linear.eight_bit is expected
    gradients = loss_and_gradients(model)
    assert {name for name in gradients if "lora" not in name} == {"losses"}

"""Which adapters a section gives, and what it is refused for."""

from __future__ import annotations

from typing import Any

import pytest

from cpt.config.adapter_section import AdapterSection
from cpt.model.adapters.layout import (
    adapted_matrices,
    adapter_problems,
    adapter_shapes,
    expert_rank,
    is_adapter_name,
    is_expert_adapter_name,
)
from cpt.model.configuration import PRESETS, load_config
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.hf_layout import is_expert_matrix, is_expert_name

LAYER = "model.layers.0"


def tiny() -> Any:
    return load_config(None, "tiny")


def section(**given: Any) -> AdapterSection:
    return AdapterSection(**{"kind": "lora", **given})


def problems_of(built: AdapterSection) -> list[str]:
    return [f"{key} {message}" for key, message in built.check()]


def test_no_adapter_is_the_default_and_gives_no_tensor() -> None:
    built = AdapterSection()
    assert adapter_shapes(built, tiny()) == {}
    assert problems_of(built) == []
    assert adapter_problems(built, tiny()) == []


def test_default_targets_are_attention_and_every_matrix_of_the_experts() -> None:
    config = tiny()
    shapes = adapter_shapes(section(rank=4), config)
    matrices, layers = 4 + 2, config.num_hidden_layers
    assert len(shapes) == 2 * matrices * layers
    hidden, experts = config.hidden_size, config.num_local_experts
    heads = config.num_attention_heads * config.head_dim
    assert shapes[f"{LAYER}.self_attn.o_proj.lora_A"] == (4, heads)
    assert shapes[f"{LAYER}.self_attn.o_proj.lora_B"] == (hidden, 4)
    assert shapes[f"{LAYER}.mlp.experts.down_proj_lora_A"] == (
        experts,
        config.intermediate_size,
        8,
    )
    assert shapes[f"{LAYER}.mlp.experts.down_proj_lora_B"] == (experts, 8, hidden)


def test_shared_adapters_have_no_axis_of_experts_and_another_name() -> None:
    config = tiny()
    shapes = adapter_shapes(section(targets=("experts",), share_experts=True, rank=16), config)
    a_name = f"{LAYER}.mlp.experts.gate_up_proj_shared_lora_A"
    assert shapes[a_name] == (config.hidden_size, 16)
    assert is_adapter_name(a_name)
    assert not is_expert_adapter_name(a_name) and not is_expert_name(a_name)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_names_of_adapters_are_told_from_those_of_the_model(kind: str) -> None:
    config = tiny()
    targets = ("attention",) if kind == "dora" else ("attention", "experts")
    shapes = adapter_shapes(section(kind=kind, targets=targets), config)
    assert all(is_adapter_name(name) for name in shapes)
    assert not any(is_adapter_name(name) for name in parameter_shapes(config))
    for name, shape in shapes.items():
        assert is_expert_name(name) == is_expert_adapter_name(name) == (".experts." in name)
        assert not is_expert_matrix(name, shape)


def test_dora_has_a_magnitude_for_each_row() -> None:
    config = tiny()
    shapes = adapter_shapes(section(kind="dora", targets=("k_proj",)), config)
    rows = config.num_key_value_heads * config.head_dim
    assert shapes[f"{LAYER}.self_attn.k_proj.lora_magnitude"] == (rows,)


def test_expert_rank_defaults_to_rank_over_active_experts_in_steps_of_8() -> None:
    config = load_config(None, "gpt-oss-120b")
    assert config.num_experts_per_tok == 4
    assert expert_rank(section(rank=32), config) == 8
    assert expert_rank(section(rank=128), config) == 32
    assert expert_rank(section(rank=8), config) == 8
    assert expert_rank(section(rank=32, share_experts=True), config) == 32
    assert expert_rank(section(rank=32, expert_rank=16), config) == 16


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_scale_is_one_number_for_all_adapters(preset: str) -> None:
    built = section(rank=8, alpha=16, expert_rank=32)
    assert built.scale == 2.0
    ranks = {matrix.rank for matrix in adapted_matrices(built, load_config(None, preset))}
    assert ranks == {8, 32}


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [((), {0, 1, 2, 3}), ((1,), {1}), (("1-2",), {1, 2}), ((0, "2-3"), {0, 2, 3}), (("3",), {3})],
    ids=str,
)
def test_layers_are_numbers_and_ranges(layers: tuple[int | str, ...], wanted: set[int]) -> None:
    config = tiny()
    assert config.num_hidden_layers == 4
    built = section(layers=layers)
    assert adapter_problems(built, config) == []
    found = {int(name.split(".")[2]) for name in adapter_shapes(built, config)}
    assert found == wanted


def test_a_pattern_names_matrices_by_last_part_or_whole_name() -> None:
    config = tiny()
    by_part = adapter_shapes(section(targets=("q_proj",)), config)
    by_name = adapter_shapes(section(targets=("model.layers.*.self_attn.q_proj",)), config)
    by_weight = adapter_shapes(section(targets=("model.layers.*.q_proj.weight",)), config)
    assert by_part == by_name == by_weight
    assert len(by_part) == 2 * config.num_hidden_layers


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"targets": ("router",)}, "router: no server"),
        ({"targets": ("attention", "lm_head")}, "targets[1] is 'lm_head', which names the lm_head"),
        ({"targets": ("embeddings",)}, "embeddings: no server"),
        ({"targets": ("embed_tokens",)}, "embeddings: no server"),
        ({"targets": ("norms",)}, "norms: no server"),
        ({"targets": ("sinks",)}, "sinks: no server"),
        ({"targets": ("model.layers.*.mlp.router",)}, "router: no server"),
        ({"targets": ("query",)}, "'query', which matches no matrix"),
        ({"layers": (4,)}, "layers[0] is 4, but the model has the layers 0 to 3"),
        ({"layers": ("2-9",)}, "layers[0] is 2-9, but"),
        ({"layers": ("3-1",)}, "layers[0] is '3-1', must be the number"),
        ({"layers": (-1,)}, "layers[0] is -1, but"),
        (
            {"targets": ("model.layers.0.self_attn.q_proj",), "layers": (1,)},
            "targets[0] is 'model.layers.0.self_attn.q_proj', which matches nothing in "
            "adapter.layers (1).",
        ),
        (
            {"targets": ("experts", "model.layers.2.self_attn.*"), "layers": ("0-1",)},
            "targets[1] is 'model.layers.2.self_attn.*', which matches nothing in adapter.layers "
            "(0-1).",
        ),
        ({"kind": "dora"}, "targets: [attention], or kind: lora"),
        ({"targets": ("attention",), "share_experts": True}, "targets name no experts"),
        ({"targets": ("attention",), "expert_rank": 8}, "targets name no experts"),
    ],
    ids=str,
)
def test_what_the_model_cannot_carry_is_refused_with_a_cure(
    given: dict[str, Any], told: str
) -> None:
    (problem,) = adapter_problems(section(**given), tiny())
    assert told in problem


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rank": 0}, "rank is 0, must be >= 1"),
        ({"alpha": 0.0}, "alpha is 0, must be above 0"),
        ({"expert_rank": 12}, "expert_rank is 12, must be a multiple of 8"),
        ({"expert_rank": 0}, "expert_rank is 0, must be a multiple of 8"),
        ({"targets": ()}, "targets is empty"),
        ({"kind": "none", "rank": 8}, "rank is 8, but adapter.kind is none"),
        ({"kind": "none", "base": "mxfp4"}, "base is mxfp4, but adapter.kind is none"),
    ],
    ids=str,
)
def test_what_is_wrong_in_the_section_alone_is_refused(given: dict[str, Any], told: str) -> None:
    (problem,) = problems_of(section(**given))
    assert told in problem

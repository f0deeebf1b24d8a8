"""A model with adapters computes what the model with merged weights computes, token by token too.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GptOssConfig

from cpt.config.adapter_section import AdapterSection
from cpt.deepspeed_adapter.experts import is_expert
from cpt.errors import InternalError
from cpt.model import attention, gpt_oss
from cpt.model.adapters.attach import attach_adapters
from cpt.model.adapters.initial_values import WithInitialAdapters
from cpt.model.adapters.layout import (
    adapted_matrices,
    adapter_shapes,
    adapter_summary,
    is_adapter_name,
    is_expert_adapter_name,
)
from cpt.model.decoding import KeyValueCache, PromptPass, TokenPass, next_token_logits
from cpt.model.weights.random_init import RandomWeights
from cpt.model.weights.source import fill_model
from cpt.parallel.traffic import Traffic

CONFIG = GptOssConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=4,
    max_position_embeddings=64,
    pad_token_id=127,
    bos_token_id=126,
    eos_token_id=125,
)
SECTIONS = {
    "lora": AdapterSection(kind="lora", rank=4, alpha=8.0),
    "shared": AdapterSection(kind="lora", rank=4, alpha=8.0, share_experts=True),
    "dora": AdapterSection(kind="dora", rank=4, alpha=8.0, targets=("attention",)),
    "one layer": AdapterSection(kind="lora", rank=4, alpha=8.0, layers=(1,)),
}


def topology(ep_size: int = 1, ep_rank: int = 0) -> Any:
    return SimpleNamespace(ep_size=ep_size, ep_rank=ep_rank, ep_group=None, traffic=Traffic())


def built(section: AdapterSection | None, **layout: int) -> gpt_oss.GptOssForCPT:
    model = gpt_oss.skeleton(CONFIG, torch.float32)
    gpt_oss.patch(model, topology(**layout))
    matrices = []
    if section is not None:
        matrices = adapted_matrices(section, CONFIG)
        attach_adapters(model, matrices, section.scale, layout.get("ep_size", 1))
    gpt_oss.materialize(model, torch.device("cpu"))
    fill_model(model, WithInitialAdapters(RandomWeights(3, 0.3), matrices, seed=5))
    return model.eval()


def test_adapter_without_matrices_trains_nothing_and_is_refused() -> None:
    model = gpt_oss.skeleton(CONFIG, torch.float32)
    with pytest.raises(InternalError, match="names no matrix"):
        attach_adapters(model, [], 1.0, 1)


@torch.no_grad()
def train_a_little(model: gpt_oss.GptOssForCPT) -> None:
    """Give every adapter other values than it begins with."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if is_adapter_name(name):
            generator = torch.Generator().manual_seed(index)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@torch.no_grad()
def merged(adapted: gpt_oss.GptOssForCPT, section: AdapterSection) -> gpt_oss.GptOssForCPT:
    """Return the plain model with W + s B A, or DoRA's weight, in place of each matrix."""
    model = built(None)
    values = dict(adapted.named_parameters())
    for matrix in adapted_matrices(section, CONFIG):
        weight = model.get_parameter(matrix.weight_name)
        a, b = values[matrix.a_name], values[matrix.b_name]
        if matrix.of_experts:
            weight += section.scale * (a @ b)
            continue
        weight += section.scale * (b @ a)
        if matrix.has_magnitude:
            weight *= (values[matrix.magnitude_name] / weight.norm(dim=1))[:, None]
    return model


def kernel() -> Any:
    return attention.choose("auto", device=torch.device("cpu"), dtype=torch.float32, head_dim=8)


def token_losses(model: gpt_oss.GptOssForCPT) -> torch.Tensor:
    tokens = torch.arange(1, 25)[None] * 7 % 120
    rows = attention.PackedRows(batch_size=1, seq_len=24, bounds=(0, 9, 24))
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    return model(
        input_ids=tokens,
        position_ids=positions,
        labels=tokens.roll(-1, 1),
        packed_rows=rows,
        kernel=kernel(),
    )


@torch.no_grad()
def decoded_logits(model: gpt_oss.GptOssForCPT) -> torch.Tensor:
    """Return the logits of a prompt's end and of three tokens more."""
    prompt = [5, 17, 30, 42, 90]
    longest = len(prompt) + 3
    cpu = torch.device("cpu")
    cache = KeyValueCache(CONFIG, 1, torch.float32, cpu, longest_tokens=longest)
    cache.reserve(longest)
    found = [next_token_logits(model, PromptPass(cache, [prompt], 0), kernel())]
    for offset in range(3):
        longest = len(prompt) + offset + 1
        token_pass = TokenPass(
            cache, torch.tensor([11 + offset]), torch.tensor([longest - 1]), longest
        )
        found.append(next_token_logits(model, token_pass, kernel()))
    return torch.cat(found)


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())
def test_losses_and_decoded_logits_are_those_of_merged_weights(section: AdapterSection) -> None:
    adapted = built(section)
    train_a_little(adapted)
    plain = merged(adapted, section)
    for compute in (token_losses, decoded_logits):
        expected = compute(plain)
        torch.testing.assert_close(compute(adapted), expected, rtol=2e-4, atol=2e-4)
        assert (expected - compute(built(None))).abs().max() > 0.05, "the adapter does nothing"


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())
def test_a_new_adapter_leaves_the_model_as_it_is(section: AdapterSection) -> None:
    for compute in (token_losses, decoded_logits):
        assert torch.equal(compute(built(section)), compute(built(None)))


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())
def test_only_adapters_are_trained_and_they_have_the_planned_shapes(
    section: AdapterSection,
) -> None:
    model = built(section, ep_size=2, ep_rank=1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = adapter_shapes(section, CONFIG)
    assert trained.keys() == shapes.keys()
    for name, parameter in trained.items():
        shape = shapes[name]
        if is_expert_adapter_name(name):
            shape = (shape[0] // 2, *shape[1:])
        assert tuple(parameter.shape) == shape, name
        assert is_expert(parameter) == is_expert_adapter_name(name), name
    whole = built(section)
    numel = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    told = adapter_summary(section, CONFIG)
    assert f"{numel:,} parameters are trained" in told
    assert "MXFP4" not in told
    packed = dataclasses.replace(section, base="mxfp4")
    assert adapter_summary(packed, CONFIG) == f"{told}, whose expert matrices stay in MXFP4"


def test_values_of_a_rank_are_its_part_of_the_whole() -> None:
    section = SECTIONS["lora"]
    whole = dict(built(section).named_parameters())
    part = dict(built(section, ep_size=2, ep_rank=1).named_parameters())
    name = "model.layers.1.mlp.experts.down_proj_lora_A"
    assert torch.equal(part[name], whole[name][2:])

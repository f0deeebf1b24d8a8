"""The presets are the published models, and the patch happens once and says what it changed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM, GptOssRotaryEmbedding

from cpt.deepspeed_adapter.experts import is_expert
from cpt.model import gpt_oss
from cpt.model.configuration import PRESETS
from cpt.model.experts.layer import EXPERT_TENSORS, ExpertParallelMLP
from cpt.model.loss.head import LossHead
from cpt.model.weights.random_init import RandomWeights
from cpt.model.weights.source import fill_model
from cpt.parallel.traffic import Traffic


def topology(ep_size: int = 1, ep_rank: int = 0) -> Any:
    """A rank that exchanges nothing."""
    return SimpleNamespace(ep_size=ep_size, ep_rank=ep_rank, ep_group=None, traffic=Traffic())


def preset(name: str, **changes: Any) -> GptOssConfig:
    return GptOssConfig(**{**PRESETS[name], **changes})


SMALL = {"vocab_size": 320, "pad_token_id": 319, "bos_token_id": 318, "eos_token_id": 317}
"""The tiny preset with a vocabulary that makes it quick."""


def filled(
    dtype: torch.dtype = torch.float32, seed: int = 7, **layout: int
) -> gpt_oss.GptOssForCPT:
    model = gpt_oss.skeleton(preset("tiny", **SMALL), dtype)
    gpt_oss.patch(model, topology(**layout))
    gpt_oss.materialize(model, torch.device("cpu"))
    fill_model(model, RandomWeights(seed, 0.02))
    return model


# presets


@pytest.mark.parametrize(("name", "billions"), [("gpt-oss-20b", 20.91), ("gpt-oss-120b", 116.83)])
def test_preset_has_the_published_number_of_parameters(name: str, billions: float) -> None:
    model = gpt_oss.skeleton(preset(name), torch.bfloat16)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == billions


@pytest.mark.parametrize(("name", "billions"), [("gpt-oss-20b", 3.61), ("gpt-oss-120b", 5.13)])
def test_preset_has_the_published_number_of_active_parameters(name: str, billions: float) -> None:
    """Four experts of each layer are active; the embedding is looked up and does not count."""
    config = preset(name)
    model = gpt_oss.skeleton(config, torch.bfloat16)
    share = config.num_experts_per_tok / config.num_local_experts
    counted = {
        n: p.numel() * (share if ".experts." in n else 1) for n, p in model.named_parameters()
    }
    del counted["model.embed_tokens.weight"]
    assert round(sum(counted.values()) / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("name", "layers", "experts"), [("gpt-oss-20b", 24, 32), ("gpt-oss-120b", 36, 128)]
)
def test_preset_has_the_published_sizes(name: str, layers: int, experts: int) -> None:
    config = preset(name)
    assert (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok) == (
        layers,
        experts,
        4,
    )
    assert (config.hidden_size, config.intermediate_size) == (2880, 2880)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (64, 8, 64)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_every_detail_of_the_architecture(name: str) -> None:
    config = preset(name)
    assert (
        config.vocab_size == 201_088
        and config.sliding_window == 128
        and config.max_position_embeddings == 131_072
    )
    assert config.layer_types == ["sliding_attention", "full_attention"] * (
        config.num_hidden_layers // 2
    )
    assert config.num_key_value_heads < config.num_attention_heads
    assert 1 < config.num_experts_per_tok < config.num_local_experts
    assert (
        config.rms_norm_eps == 1e-5
        and not config.tie_word_embeddings
        and not config.output_router_logits
    )
    assert config.attention_bias
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("yarn", 150_000, 32)
    assert (rope["beta_fast"], rope["beta_slow"], rope["truncate"]) == (32, 1, False)
    assert rope["original_max_position_embeddings"] == 4096


def test_tiny_preset_shows_a_transposed_expert() -> None:
    """In the large models down_proj is square, and its shape hides a transpose."""
    assert preset("tiny").hidden_size != preset("tiny").intermediate_size


# rotary frequencies


@pytest.mark.parametrize("name", ["tiny", "gpt-oss-20b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_frequencies_equal_the_fp32_reference_exactly(name: str, dtype: torch.dtype) -> None:
    # the frequencies follow from the head size and the YaRN settings alone: keep the rest small
    config = preset(
        name,
        **SMALL,
        num_hidden_layers=2,
        num_local_experts=4,
        hidden_size=64,
        intermediate_size=64,
    )
    model = gpt_oss.skeleton(config, dtype)
    gpt_oss.patch(model, topology())
    gpt_oss.materialize(model, torch.device("cpu"))
    expected = GptOssRotaryEmbedding(config=config).inv_freq
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)


@pytest.fixture(scope="module")
def frequencies() -> tuple[Tensor, Tensor, float]:
    """Of gpt-oss-20b: without YaRN, with it, and the factor on cos and sin."""
    rotary = GptOssRotaryEmbedding(config=preset("gpt-oss-20b"))
    plain = 150_000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    return plain, rotary.inv_freq.double(), float(rotary.attention_scaling)


def test_yarn_leaves_the_first_9_frequencies_untouched(
    frequencies: tuple[Tensor, Tensor, float],
) -> None:
    plain, yarn, _ = frequencies
    assert torch.allclose(yarn[:9], plain[:9], rtol=1e-6, atol=0)  # fp32 against fp64


def test_yarn_blends_the_frequencies_in_between(frequencies: tuple[Tensor, Tensor, float]) -> None:
    plain, yarn, _ = frequencies
    assert (yarn[9:18] < plain[9:18] * (1 - 1e-6)).all() and (
        yarn[9:18] > plain[9:18] / 32 * (1 + 1e-6)
    ).all()


def test_yarn_divides_the_last_14_frequencies_by_32(
    frequencies: tuple[Tensor, Tensor, float],
) -> None:
    plain, yarn, _ = frequencies
    assert torch.allclose(yarn[18:], plain[18:] / 32, rtol=1e-6, atol=0)


def test_yarn_scales_cosine_and_sine(frequencies: tuple[Tensor, Tensor, float]) -> None:
    assert frequencies[2] == pytest.approx(0.1 * math.log(32) + 1, rel=1e-12)
    assert round(frequencies[2], 6) == 1.346574


# random weights


@pytest.mark.parametrize("ep_size", [2, 4, 8])
def test_random_weights_do_not_depend_on_the_expert_parallel_size(ep_size: int) -> None:
    whole = dict(filled().named_parameters())
    parts = [
        dict(filled(ep_size=ep_size, ep_rank=rank).named_parameters()) for rank in range(ep_size)
    ]
    for name, expected in whole.items():
        expert = name.rsplit(".", 1)[1] in EXPERT_TENSORS
        found = torch.cat([part[name] for part in parts]) if expert else parts[-1][name]
        assert torch.equal(found, expected), name


def test_same_seed_gives_the_same_weights() -> None:
    first = filled().state_dict()
    second = filled().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_weights() -> None:
    first = filled(seed=1)
    second = filled(seed=2)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_no_two_tensors_and_no_two_experts_are_alike() -> None:
    model = filled()
    experts = [layer.mlp.experts.gate_up_proj[i] for layer in model.model.layers for i in range(8)]
    assert len({expert.sum().item() for expert in experts}) == len(experts)


def test_bf16_weights_are_the_rounded_fp32_ones() -> None:
    fp32 = filled().state_dict()
    bf16 = filled(torch.bfloat16).state_dict()
    names = [name for name in fp32 if "inv_freq" not in name]
    assert all(torch.equal(bf16[name], fp32[name].bfloat16()) for name in names)


def test_random_weights_have_the_spread_that_transformers_gives() -> None:
    """The spread is 0.02, but norms are 1 and biases 0; of 20,000 values 3 % is six sigma."""
    torch.manual_seed(0)
    theirs = {
        n: p.detach() for n, p in GptOssForCausalLM(preset("tiny", **SMALL)).named_parameters()
    }
    for name, parameter in filled().named_parameters():
        if parameter.numel() >= 20_000 or (theirs[name] == theirs[name].flatten()[0]).all():
            found = parameter.detach()
            expected = theirs[name]
            assert float(found.std()) == pytest.approx(
                float(expected.std()), rel=0.03, abs=1e-12
            ), name
            assert float(found.mean()) == pytest.approx(float(expected.mean()), abs=1e-3), name


def test_nothing_stays_uninitialized() -> None:
    model = gpt_oss.skeleton(preset("tiny", **SMALL), torch.float32)
    gpt_oss.patch(model, topology(ep_size=2, ep_rank=1))
    gpt_oss.materialize(model, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    fill_model(model, RandomWeights(7, 0.02))
    assert not [name for name, parameter in model.named_parameters() if parameter.isnan().any()]


# the patch


def test_patch_reports_what_it_changed() -> None:
    model = gpt_oss.skeleton(preset("tiny"), torch.float32)
    report = gpt_oss.patch(model, topology(ep_size=4))
    assert report == gpt_oss.PatchReport(
        attention="sink", layers=4, expert_layers=4, experts_per_rank=2, loss_head="LossHead"
    )


def test_report_reads_as_one_line() -> None:
    text = str(gpt_oss.patch(gpt_oss.skeleton(preset("tiny"), torch.float32), topology()))
    assert "\n" not in text and "attention=sink" in text and "8 experts each" in text


def test_second_patch_is_refused() -> None:
    model = gpt_oss.skeleton(preset("tiny"), torch.float32)
    gpt_oss.patch(model, topology())
    with pytest.raises(TypeError, match=r"layers\.0\.mlp is ExpertParallelMLP.*patched twice"):
        gpt_oss.patch(model, topology())


def test_another_head_is_refused() -> None:
    model = gpt_oss.skeleton(preset("tiny"), torch.float32)
    model.lm_head = torch.nn.Identity()
    with pytest.raises(TypeError, match="lm_head is Identity"):
        gpt_oss.patch(model, topology())


def test_patch_leaves_no_mlp_and_no_head_of_transformers() -> None:
    model = gpt_oss.skeleton(preset("tiny"), torch.float32)
    gpt_oss.patch(model, topology())
    assert {type(layer.mlp) for layer in model.model.layers} == {ExpertParallelMLP}
    assert type(model.lm_head) is LossHead


def test_patched_model_keeps_the_names_of_transformers() -> None:
    with torch.device("meta"):
        theirs = GptOssForCausalLM(preset("tiny"))
    assert {name for name, _ in filled().named_parameters()} == {
        name for name, _ in theirs.named_parameters()
    }


def test_skeleton_takes_no_memory() -> None:
    model = gpt_oss.skeleton(preset("gpt-oss-120b"), torch.bfloat16)
    gpt_oss.patch(model, topology(ep_size=8, ep_rank=3))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_materialized_model_is_whole() -> None:
    tensors = [*filled().named_parameters(), *filled().named_buffers()]
    assert not [name for name, tensor in tensors if tensor.device.type == "meta"]


def test_exactly_the_experts_are_marked_after_materializing() -> None:
    parameters = filled(ep_size=2).named_parameters()
    assert all(is_expert(parameter) == (".experts." in name) for name, parameter in parameters)


def test_patched_model_gives_the_logits_of_transformers() -> None:
    """One document longer than the window; fp32 with another order of summation gives 1e-5."""
    model = filled()
    config = preset("tiny", **SMALL)
    config._attn_implementation = "eager"
    theirs = GptOssForCausalLM(config).float()
    theirs.load_state_dict(model.state_dict(), strict=True)
    ids = torch.randint(0, 317, (1, 150), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(150)[None]
    with torch.no_grad():
        found = model(ids, positions)
        expected = theirs(input_ids=ids, position_ids=positions).logits
    assert (found - expected).abs().max() <= 1e-5


def test_patched_model_gives_the_loss_of_every_token() -> None:
    model = filled()
    ids = torch.randint(0, 317, (2, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(40).repeat(2, 1)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    with torch.no_grad():
        losses = model(ids, positions, labels)
        logits = model(ids, positions)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    )
    assert torch.allclose(losses.flatten(), expected, atol=2e-6, rtol=0)

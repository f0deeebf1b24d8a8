"""First values of adapters: by seed, name and position, whoever reads which part."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cpt.config.adapter_section import AdapterSection
from cpt.model.adapters import initial_values
from cpt.model.adapters.initial_values import WithInitialAdapters
from cpt.model.adapters.layout import adapted_matrices, adapter_shapes
from cpt.model.configuration import load_config
from cpt.model.weights.random_init import RandomWeights

CONFIG = load_config(None, "tiny")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def source(section: AdapterSection, seed: int = 7) -> WithInitialAdapters:
    return WithInitialAdapters(RandomWeights(3, 0.02), adapted_matrices(section, CONFIG), seed)


def read(of: WithInitialAdapters, name: str, start: int, stop: int) -> torch.Tensor:
    out = torch.full((stop - start,), torch.nan)
    for position, values in of.pieces(name, start, stop):
        out[position - start : position - start + values.numel()] = values
    return out


def parts(numel: int) -> Iterator[tuple[int, int]]:
    for first in range(0, numel, 777):
        yield first, min(numel, first + 777)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_any_division_into_parts_reads_the_same_values(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial_values, "BLOCK_NUMEL", 1000)
    targets = ("attention",) if kind == "dora" else ("attention", "experts")
    section = AdapterSection(kind=kind, targets=targets, layers=(0,))  # type: ignore[arg-type]
    of = source(section)
    for name, shape in adapter_shapes(section, CONFIG).items():
        numel = torch.Size(shape).numel()
        whole = read(of, name, 0, numel)
        assert not whole.isnan().any(), name
        torch.testing.assert_close(
            torch.cat([read(of, name, *part) for part in parts(numel)]), whole, rtol=0, atol=0
        )


def test_a_is_uniform_to_one_over_the_root_of_its_inputs_and_b_is_zero() -> None:
    section = AdapterSection(kind="lora")
    shapes = adapter_shapes(section, CONFIG)
    of = source(section)
    a_name = "model.layers.1.mlp.experts.down_proj_lora_A"
    values = read(of, a_name, 0, torch.Size(shapes[a_name]).numel())
    bound = CONFIG.intermediate_size**-0.5
    assert values.abs().max() <= bound
    assert values.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    b_name = "model.layers.1.mlp.experts.down_proj_lora_B"
    assert not read(of, b_name, 0, 500).any()


def test_seed_and_name_decide_the_values() -> None:
    section = AdapterSection(kind="lora")
    name = f"{Q_PROJ}.lora_A"
    values = read(source(section), name, 0, 100)
    assert torch.equal(values, read(source(section), name, 0, 100))
    assert not torch.equal(values, read(source(section, seed=8), name, 0, 100))
    assert not torch.equal(values, read(source(section), name.replace("q_proj", "k_proj"), 0, 100))


def test_a_magnitude_is_the_norm_of_its_row_of_the_weight() -> None:
    section = AdapterSection(kind="dora", targets=("attention",))
    of = source(section)
    rows = CONFIG.num_attention_heads * CONFIG.head_dim
    weight = read(of, f"{Q_PROJ}.weight", 0, rows * CONFIG.hidden_size).view(rows, -1)
    magnitude = read(of, f"{Q_PROJ}.lora_magnitude", 0, rows)
    torch.testing.assert_close(magnitude, torch.linalg.norm(weight, dim=1))


def test_other_names_come_from_the_source_below() -> None:
    section = AdapterSection(kind="lora")
    name = "model.layers.0.mlp.experts.down_proj"
    below = RandomWeights(3, 0.02)
    wanted = torch.cat([values for _, values in below.pieces(name, 10, 90)])
    assert torch.equal(read(source(section), name, 10, 90), wanted)

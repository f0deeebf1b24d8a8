"""Changing one document of a row leaves the logits of the others as they were, bit for bit."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpt.model import gpt_oss
from cpt.model.attention import PackedRows, choose
from cpt.model.weights.random_init import RandomWeights
from cpt.model.weights.source import fill_model
from cpt.parallel.traffic import Traffic
from tests.dist.cases import model_config


def logits_before_and_after(
    layer_type: str, dtype: torch.dtype, **changes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a packed row, before and after its second document is changed."""
    config = model_config()
    config.update(changes)
    config.layer_types = [layer_type] * config.num_hidden_layers
    model = gpt_oss.skeleton(config, dtype)
    topology: Any = SimpleNamespace(ep_size=1, ep_rank=0, ep_group=None, traffic=Traffic())
    gpt_oss.patch(model, topology)
    gpt_oss.materialize(model, torch.device("cpu"))
    fill_model(model, RandomWeights(3, 0.02))
    bounds = [0, 40, 97, 128]
    rows = PackedRows.from_bounds([bounds], 128)
    positions = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(bounds)])[
        None
    ]
    kernel = choose("auto", device=torch.device("cpu"), dtype=dtype, head_dim=config.head_dim)
    ids = torch.randint(0, 500, (1, 128), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 40:97] = (changed[0, 40:97] + 17) % 500
    with torch.no_grad():
        before, after = (
            model(input_ids=x, position_ids=positions, packed_rows=rows, kernel=kernel)[0]
            for x in (ids, changed)
        )
    return before, after


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
def test_changing_one_document_leaves_the_logits_of_the_others_bit_for_bit(layer_type: str) -> None:
    """With one expert every matrix product has the same shape, and so the same rounding."""
    changes = {"num_local_experts": 1, "num_experts_per_tok": 1}
    before, after = logits_before_and_after(layer_type, torch.float32, **changes)
    assert torch.equal(before[:40], after[:40]) and torch.equal(before[97:], after[97:])
    assert not torch.equal(before[40:97], after[40:97])


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
def test_with_many_experts_other_documents_move_by_rounding_alone(layer_type: str) -> None:
    """The rows that share an expert's product decide the order of its sums: 1e-12 in float64."""
    before, after = logits_before_and_after(layer_type, torch.float64)
    scale = float(before.abs().max())
    others = (before - after).abs()[[*range(40), *range(97, 128)]]
    assert float(others.max()) <= 1e-12 * scale, f"max {others.max()}, mean {others.mean()}"
    assert float((before - after).abs()[40:97].max()) > 1e-3 * scale

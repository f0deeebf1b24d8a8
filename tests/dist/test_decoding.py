"""Every layout writes the replies of plain transformers, token for token, in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cpt.offline.sampling import decode_tokens
from tests.dist.cases import (
    DECODING_VOCAB_SIZE,
    GREEDY,
    STOPS,
    WINDOW,
    Scenario,
    decoding_model,
    decoding_prompts,
)
from tests.support.launcher import ROOT, launch

pytestmark = pytest.mark.dist

LAYOUTS = {
    "1-1-1": Scenario(world_size=1, sp=1, ep=1, stage=2),
    "2-1-2": Scenario(world_size=2, sp=1, ep=2, stage=3),
    "4-2-2 ZeRO-2": Scenario(world_size=4, sp=2, ep=2, stage=2),
    "4-2-2 ZeRO-3 in halves": Scenario(world_size=4, sp=2, ep=2, stage=3, expert_overlap="halves"),
}
"""By world size, SP and EP."""


@pytest.fixture(scope="module")
def replies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The replies that every rank got, by layout."""
    folder = tmp_path_factory.mktemp("decoding")
    model = decoding_model(DECODING_VOCAB_SIZE, num_layers=2)
    model.save_pretrained(str(folder / "model"))
    worker = ROOT / "tests" / "dist" / "decoding_worker.py"
    for world_size in (1, 2, 4):
        scenarios = [one for one in LAYOUTS.values() if one.world_size == world_size]
        arguments = [str(folder), *(one.dump() for one in scenarios)]
        assert launch(worker, world_size, arguments) == [0] * world_size
    found: dict[str, list[dict[str, Any]]] = {}
    for name, scenario in LAYOUTS.items():
        found[name] = json.loads((folder / f"{scenario.name}.json").read_text())
    found["plain"] = [{"greedy": plain_replies(folder / "model")}]
    return found


def plain_replies(path: Path) -> list[list[int]]:
    """Return the greedy replies of plain transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=torch.float32, attn_implementation="eager"
    )
    replies = []
    for prompt in decoding_prompts():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GREEDY.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        replies.append(out[0, len(prompt) :].tolist())
    return replies


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_replies_are_those_of_plain_transformers(
    replies: dict[str, list[dict[str, Any]]], layout: str
) -> None:
    expected = replies["plain"][0]["greedy"]
    for rank, found in enumerate(replies[layout]):
        assert found["greedy"] == expected, f"rank {rank}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampled_replies_do_not_depend_on_the_layout(
    replies: dict[str, list[dict[str, Any]]], layout: str
) -> None:
    expected = replies["1-1-1"][0]["sampled"]
    for rank, found in enumerate(replies[layout]):
        assert found["sampled"] == expected, f"rank {rank}"


def test_cases_are_what_they_claim_to_be(replies: dict[str, list[dict[str, Any]]]) -> None:
    """Prompts of many lengths, texts that cross the window, ends at different times."""
    prompts = decoding_prompts()
    lengths = [len(prompt) for prompt in prompts]
    assert min(lengths) == 1 and max(lengths) > 2 * WINDOW
    assert any(length < WINDOW < length + GREEDY.max_new_tokens for length in lengths)
    assert "\u65e5\u672c" in decode_tokens(prompts[-1]), "a prompt must be Japanese"
    sampled = replies["1-1-1"][0]["sampled"]
    assert len({len(reply) for reply in sampled}) > 3
    for reply in sampled:
        assert reply[-1] in STOPS or len(reply) == GREEDY.max_new_tokens

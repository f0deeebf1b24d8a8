"""The training step as a GPU would see it, rehearsed on fake CUDA tensors in one process.

Nothing is on the wrong device, the host waits only where `ALLOWED_WAITS` says, and no part costs
more bytes or launches than cpt/planning/gpu_counts.json says (`python bench/gpu_counts.py` rewrites
it).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig

from cpt.model.configuration import PRESETS
from cpt.planning.low_precision import OPERANDS, EightBitWork
from cpt.planning.step_work import PASSES, Share, Work
from tests.support.gpu_rehearsal.fake_cuda import reason_against
from tests.support.gpu_rehearsal.launch import rehearse, whole_model
from tests.support.gpu_rehearsal.scenario import run_config
from tests.support.gpu_rehearsal.shapes import FEATURES, SHAPES, SMALL, Scenario, two_layers

NO_WORK = Work(launches=0, flops=0, window_flops=0, product_bytes=0, weight_bytes=0, other_bytes=0)
ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "cpt" / "planning" / "gpu_counts.json"

COUNTED = list(SHAPES)
"""The shapes of the table, which are counted again here."""
SPARED = 0.02
"""Share by which a part may be cheaper than the table says before the table must be rewritten."""
EXCEEDED = 0.001
"""Share by which a part may cost more."""
SMALL_BYTES = 1e8
"""Bytes that count for no part: releases of torch differ by a few small tensors."""
SMALL_LAUNCHES = 8

PLANTED = ("host tensor", "item", "no fake implementation")
UNFUSED = replace(two_layers(SHAPES[0]), name="unfused norm", fault="unfused norm")


@dataclass(frozen=True)
class AllowedWait:
    """A place where the host may wait for the device."""

    stage: str
    """micro step, optimizer step, score or sample; a scenario scores and samples once."""
    file: str
    function: str
    at_most: int
    """Waits in one `per`."""
    per: str
    """micro step, layer (forward and recomputation are two), or step (once in a scenario)."""
    reason: str

    def limit(self, scenario: Scenario) -> int:
        """Return how many waits one run of a scenario may have here."""
        if self.per == "step":
            return self.at_most
        evaluating = self.stage in ("score", "sample")
        micro_batches = 1 if evaluating else scenario.micro_batches
        if self.per == "micro step":
            return self.at_most * micro_batches
        recomputed = scenario.checkpointing and scenario.expert_recompute == "recompute"
        runs = 2 if recomputed and not evaluating else 1
        return self.at_most * micro_batches * scenario.layers * runs


COUNTS = "the sizes of the expert exchange follow from the counts of rows"
LOSSES = "losses and gradient norm decide about the update; one copy"
ROUTERS = "the routers' sums of a measured step; one copy"
RESULT = "this is what the caller asked for"

EXCHANGE_FILE = "cpt/model/experts/dispatch.py"
ENGINE_FILE = "cpt/training/engine.py"
WATCH_FILE = "cpt/model/experts/router_watch.py"

ALLOWED_WAITS = (
    AllowedWait("micro step", EXCHANGE_FILE, "make_plan", 1, "layer", COUNTS),
    AllowedWait("optimizer step", ENGINE_FILE, "_read", 1, "step", LOSSES),
    AllowedWait("optimizer step", WATCH_FILE, "finish", 1, "step", ROUTERS),
    AllowedWait("score", EXCHANGE_FILE, "make_plan", 1, "layer", COUNTS),
    AllowedWait("score", ENGINE_FILE, "score", 1, "step", RESULT),
    AllowedWait("sample", EXCHANGE_FILE, "make_plan", 2, "layer", COUNTS),
)
"""All of them: none in a micro step of one rank, one per expert layer with several, at most two in
an optimizer step.
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process found in all scenarios, by name."""
    reason = reason_against()
    if reason:
        pytest.skip(reason)
    planted = [replace(SMALL, name=fault, fault=fault) for fault in PLANTED]
    fewer = [two_layers(shape) for shape in COUNTED]
    scenarios = [*COUNTED, *fewer, *FEATURES, *planted, UNFUSED]
    return rehearse(scenarios, tmp_path_factory.mktemp("rehearsal"))


def by_name(scenarios: list[Scenario]) -> pytest.MarkDecorator:
    names = [scenario.name for scenario in scenarios]
    return pytest.mark.parametrize("scenario", scenarios, ids=names)


SOUND = [*COUNTED, *FEATURES]


@by_name(SOUND)
def test_no_tensor_is_on_the_wrong_device(found: dict[str, Any], scenario: Scenario) -> None:
    result = found[scenario.name]
    assert result["error"] is None
    assert result["mixes"] == []


@by_name(SOUND)
def test_collectives_get_what_their_backend_takes(
    found: dict[str, Any], scenario: Scenario
) -> None:
    assert found[scenario.name]["wrong_collectives"] == []


def allowance(wait: dict[str, Any]) -> AllowedWait | None:
    """Return the entry of the list that covers a wait."""
    for allowed in ALLOWED_WAITS:
        place = (allowed.stage, allowed.file)
        if place == (wait["stage"], wait["file"]) and allowed.function in wait["function"]:
            return allowed
    return None


def waits_by_allowance(result: dict[str, Any]) -> dict[AllowedWait | None, list[str]]:
    """Return the waits of a run, each once for every time, under what allows them."""
    sorted_waits: dict[AllowedWait | None, list[str]] = {}
    for shown, wait, count in result["waits"]:
        sorted_waits.setdefault(allowance(wait), []).extend([shown] * count)
    return sorted_waits


@by_name(SOUND)
def test_the_host_waits_only_where_it_is_listed(found: dict[str, Any], scenario: Scenario) -> None:
    problems = []
    for allowed, waits in waits_by_allowance(found[scenario.name]).items():
        limit = allowed.limit(scenario) if allowed else 0
        if len(waits) > limit:
            problems.append(f"{len(waits)} waits, {limit} allowed: {sorted(set(waits))}")
    assert problems == []


def test_every_listed_wait_happens(found: dict[str, Any]) -> None:
    used = set()
    for scenario in SOUND:
        used |= waits_by_allowance(found[scenario.name]).keys()
    gone = [allowed for allowed in ALLOWED_WAITS if allowed not in used]
    assert gone == [], "take them off the list"


def counted_parts(found: dict[str, Any], shape: Scenario) -> dict[str, Any]:
    few = found[two_layers(shape).name]["parts"]
    return whole_model(shape, few, found[shape.name]["parts"])


def tabled_parts(shape: Scenario) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads(TABLE.read_text())["shapes"][shape.name]["parts"]
    return parts


def differences(counted: dict[str, Any], tabled: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return what costs more than the table says, and what costs so much less that it is old."""
    more = []
    less = []
    slack = {"num_bytes": SMALL_BYTES, "launches": SMALL_LAUNCHES}
    for part in sorted({*counted, *tabled}):
        for quantity, spare in slack.items():
            now = total(counted, part, quantity)
            said = total(tabled, part, quantity)
            shown = f"{part}: {now:,} {quantity}, the table says {said:,}"
            if now > said * (1 + EXCEEDED) + spare:
                more.append(shown)
            elif now < said * (1 - SPARED) - spare:
                less.append(shown)
    return more, less


def total(parts: dict[str, Any], part: str, quantity: str) -> int:
    return sum(values[quantity] for values in parts.get(part, {}).values())


@by_name(COUNTED)
def test_no_part_costs_more_than_the_table_says(found: dict[str, Any], scenario: Scenario) -> None:
    more, less = differences(counted_parts(found, scenario), tabled_parts(scenario))
    assert more == [], "if it must be: python bench/gpu_counts.py"
    assert less == [], "cheaper by more than 2 %: rewrite the table with python bench/gpu_counts.py"


def expert_weights(scenario: Scenario) -> int:
    """Return the weights in the matrices of the experts of one rank."""
    sizes = PRESETS[scenario.preset]
    expert = 3 * sizes["hidden_size"] * sizes["intermediate_size"]
    return scenario.layers * sizes["num_local_experts"] // scenario.ep_size * expert


@by_name([scenario for scenario in FEATURES if scenario.rounding])
def test_rounding_reads_and_writes_each_expert_weight_once(
    found: dict[str, Any], scenario: Scenario
) -> None:
    parts = found[scenario.name]["parts"]["rounding"]
    assert list(parts) == ["forward"]  # outside of any backward
    assert parts["forward"]["num_bytes"] == 4 * expert_weights(scenario)
    assert parts["forward"]["launches"] == 2 * scenario.layers


@by_name([scenario for scenario in FEATURES if scenario.eight_bit])
def test_eight_bit_products_are_those_of_the_plan(
    found: dict[str, Any], scenario: Scenario
) -> None:
    """Experts: 2 forward, 1 recomputed, 2 for the gradient of their rows; attention: 4 each."""
    operators = found[scenario.name]["operators"]
    layers = (scenario.layers - 2) * scenario.micro_batches
    assert operators["aten._scaled_grouped_mm.default"] == 5 * layers
    assert operators["aten._scaled_mm.default"] == 12 * layers


@by_name([scenario for scenario in FEATURES if scenario.eight_bit == "rows"])
def test_rounding_operands_moves_the_bytes_of_the_plan(
    found: dict[str, Any], scenario: Scenario
) -> None:
    """Scales, and biases that are added afterwards, which the plan leaves out, are few."""
    config = run_config(scenario, GptOssConfig(**rehearsed_sizes(scenario)))
    model = GptOssConfig(**rehearsed_sizes(scenario))
    work = EightBitWork.of(config, model)
    assert work is not None
    share = Share(
        tokens=scenario.tokens, attention_flops=0.0, window_flops=0.0, ep_size=scenario.ep_size
    )
    bare = {part: dict.fromkeys(PASSES, NO_WORK) for part in ("experts", "attention projections")}
    planned = work.changed(bare, share)[OPERANDS]
    parts = found[scenario.name]["parts"]["8-bit products"]
    for name in PASSES:
        counted = parts[name]["num_bytes"] - parts[name]["product_bytes"]
        expected = scenario.micro_batches * planned[name].other_bytes
        assert counted == pytest.approx(expected, rel=0.03), name


def rehearsed_sizes(scenario: Scenario) -> dict[str, Any]:
    return {**PRESETS[scenario.preset], "num_hidden_layers": scenario.layers}


def test_an_unfused_copy_of_a_step_is_noticed(found: dict[str, Any]) -> None:
    clean = found[two_layers(SHAPES[0]).name]["parts"]
    more, _ = differences(found[UNFUSED.name]["parts"], clean)
    assert [line.split(":")[0] for line in more] == ["norms", "norms"]


def test_a_tensor_of_the_host_in_a_layer_is_noticed(found: dict[str, Any]) -> None:
    result = found["host tensor"]
    assert "cpt/model/experts/layer.py" in result["mixes"][0]
    assert "device" in result["error"]


def test_an_item_in_a_layer_is_noticed(found: dict[str, Any]) -> None:
    unlisted = waits_by_allowance(found["item"])[None]
    assert any("cpt/model/experts/layer.py" in wait for wait in unlisted)


def test_an_operator_without_a_fake_implementation_is_noticed(found: dict[str, Any]) -> None:
    assert "no_fake" in found["no fake implementation"]["error"]


def test_fused_operators_are_chosen_but_no_kernel_runs(found: dict[str, Any]) -> None:
    result = found[SHAPES[0].name]
    assert result["fused"] is True
    assert result["triton_modules"] == []
    assert any(name.startswith("cpt.") for name in result["operators"])

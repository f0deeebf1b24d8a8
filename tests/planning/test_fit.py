"""A run that no GPU of its kind can hold is refused with changes that were computed to suffice."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpt.config import LaunchInfo, load
from cpt.config.adapter_section import AdapterSection
from cpt.model.configuration import load_config
from cpt.planning.fit import (
    KINDS,
    Card,
    PlannedStart,
    cures,
    fit_problem,
    fit_warning,
    fitting_gpus,
    packed_base,
)
from cpt.planning.hardware import GPUS, gpu_problems
from cpt.planning.memory import GIB

ROOT = Path(__file__).resolve().parents[2]
H100 = Card.named("h100")


def start_of(
    world_size: int, model: str = "gpt-oss-20b", ds: str = "z3_ep", **train: Any
) -> PlannedStart:
    run, json = load(ROOT / "configs" / "gpt-oss-20b.yaml", ROOT / f"ds_configs/{ds}.json", {})
    run = replace(run, train=replace(run.train, **train))
    launch = LaunchInfo(world_size=world_size, local_world_size=min(8, world_size))
    return PlannedStart.of(run, json, load_config(None, model), launch)


def memory_of(start: PlannedStart) -> dict[str, int]:
    memory = start.memory()
    assert memory is not None
    return memory


def total(start: PlannedStart) -> int:
    return sum(memory_of(start).values())


def problem_of(start: PlannedStart, card: Card) -> str | None:
    return fit_problem(start, memory_of(start), card)


def test_20b_on_one_rank_is_refused_with_the_sum_the_parts_and_the_cures() -> None:
    start = start_of(1)
    problem = problem_of(start, H100)
    assert problem is not None
    assert f"a rank needs {total(start) / GIB:.1f} GiB" in problem
    assert "H100 SXM 80 GB has 74.5 GiB" in problem
    assert "Largest parts: optimizer 233.7 GiB, gradients 77.9 GiB, weights 39.0 GiB" in problem
    assert "8 ranks in place of 1" in problem and "--gpu any" in problem


def test_recipe_on_its_ranks_fits() -> None:
    assert problem_of(start_of(8), H100) is None


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_cure_was_computed_to_fit(world_size: int) -> None:
    found = cures(start_of(world_size), H100)
    assert found
    for cure in found:
        match = re.search(r"\(([0-9.]+) GiB", cure)
        assert match is not None and float(match.group(1)) * GIB <= H100.planned_bytes + GIB


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_changes_of_a_kind_leave_the_start_as_it_was_and_make_another(kind: Any) -> None:
    start = start_of(8, micro_batch_size=2)
    before = (start.run, dict(start.json.value), start.launch)
    changes = list(kind(start))
    assert (start.run, start.json.value, start.launch) == before
    for change in changes:
        assert change.words
        assert (change.start.run, change.start.json.value, change.start.launch) != before


def test_experts_in_4_bits_are_a_cure_for_adapters_and_for_nothing_else() -> None:
    card = Card.named("rtx4090")
    start = start_of(1, micro_batch_size=1, seq_len=4096)
    adapted = replace(start.run, adapter=AdapterSection(kind="lora"))
    start = PlannedStart.of(adapted, start.json, start.model, start.launch)
    assert not start.fits(card)
    told = cures(start, card)
    assert any("adapter.base: mxfp4, for a model.path in MXFP4" in cure for cure in told), told
    (change,) = packed_base(start)
    assert change.start.counts.packed > 0 == start.counts.packed
    assert list(packed_base(change.start)) == list(packed_base(start_of(1))) == []


def test_gradients_on_the_host_are_a_cure_where_they_are_on_the_device() -> None:
    start = start_of(1, ds="z3_offload_state")
    assert not start.fits(H100)
    (told,) = [cure for cure in cures(start, H100) if "offload_optimizer.gradients: host" in cure]
    assert "GiB of host memory" in told


def test_number_of_ranks_is_the_smallest_power_that_fits() -> None:
    start = start_of(1)
    (cure,) = [text for text in cures(start, H100) if "ranks in place of" in text]
    assert cure.startswith("8 ranks")
    assert not start_of(4).fits(H100) and start_of(8).fits(H100)


def test_cures_are_joined_where_none_suffices_alone() -> None:
    small = Card(name="a small GPU", memory_bytes=3 * GIB)
    start = start_of(8, global_batch_size=8)
    (joined,) = cures(start, small)
    assert " with " in joined and "of host memory" in joined


def test_nothing_is_proposed_where_nothing_helps() -> None:
    tiny = Card(name="a tiny GPU", memory_bytes=2**20)
    problem = problem_of(start_of(2), tiny)
    assert problem is not None and "Nothing was found with which it fits" in problem


def test_run_that_fills_the_last_tenth_is_warned_and_not_refused() -> None:
    start = start_of(8)
    memory = memory_of(start)
    card = Card(name="a GPU", memory_bytes=1.05 * total(start))
    assert fit_problem(start, memory, card) is None
    assert "little is left" in str(fit_warning(memory, card))
    assert fit_warning(memory, replace(card, memory_bytes=2 * total(start))) is None


def test_known_gpus_that_fit_are_listed() -> None:
    assert fitting_gpus({"weights": 60 * GIB}).startswith("fits on h100, ")
    none = fitting_gpus({"weights": 10**13})
    assert none.startswith("fits on none of ") and all(name in none for name in GPUS)


def test_unknown_gpu_is_refused_with_the_nearest_name() -> None:
    assert "Did you mean 'h100'?" in gpu_problems("h1000")[0]
    assert gpu_problems(None) == gpu_problems("any") == gpu_problems("h200") == []

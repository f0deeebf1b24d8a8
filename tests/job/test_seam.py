"""A resumed run tells what differs from its checkpoint, and another schedule has to be accepted."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.checkpoint.run_state import RunState
from cpt.config import RunConfig, TrainSection
from cpt.errors import ConfigError
from cpt.job.seam import Seam
from data_pipeline.mixture.phases import RateFactor

BEFORE = TrainSection(
    seq_len=64, global_batch_size=2, total_steps=20, lr=1e-3, warmup_steps=2, schedule="cosine"
)


def plain(train: TrainSection) -> dict[str, Any]:
    return {"train": {**asdict(train), "freeze": list(train.freeze)}, "world_size": 2}


def seam_of(
    state: Any, now: TrainSection, step: int = 4, factors: tuple[RateFactor, ...] = ()
) -> Seam:
    config = SimpleNamespace(train=now, lr_factors=factors, to_plain=lambda: plain(now))
    run_state = RunState(model_config={}, config=state)
    return Seam.of(run_state, f"step-{step:08d}", step, cast(RunConfig, config))


def seam(before: TrainSection, step: int = 4, **changed: Any) -> Seam:
    return seam_of(plain(before), replace(before, **changed), step)


@pytest.mark.parametrize(
    "changed",
    [
        {"total_steps": 40},
        {"lr": 2e-3},
        {"schedule": "constant"},
        {"min_lr_ratio": 0.5},
        {"warmup_steps": 8},
        {"schedule": "wsd", "decay_steps": 4},
    ],
)
def test_changed_schedule_is_refused_with_keys_rates_and_flag(changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        seam(BEFORE, **changed).check()
    message = str(caught.value)
    for name, value in changed.items():
        assert f"train.{name} {getattr(BEFORE, name)} -> {value}" in message
    assert "step 4 had 0.0009" in message and "step 5 has " in message and "planned" in message
    assert "train.accept_schedule_change=true" in message
    seam(BEFORE, accept_schedule_change=True, **changed).check()


@pytest.mark.parametrize(
    ("before", "step", "changed"),
    [
        pytest.param({"schedule": "constant"}, 4, {"total_steps": 200}, id="constant-raised"),
        pytest.param({"schedule": "constant"}, 4, {"total_steps": 5}, id="constant-lowered"),
        pytest.param({"schedule": "constant"}, 4, {"warmup_steps": 3}, id="warmed-up"),
        pytest.param({"schedule": "constant"}, 4, {"min_lr_ratio": 0.3}, id="no-floor"),
        pytest.param({"schedule": "constant"}, 20, {"total_steps": 40}, id="finished-constant"),
        pytest.param({}, 4, {"total_steps": 4}, id="nothing-left"),
        pytest.param({}, 4, {"weight_decay": 0.5, "beta2": 0.99}, id="other-keys"),
    ],
)
def test_same_rates_in_the_steps_to_come_need_no_flag(
    before: dict[str, Any], step: int, changed: dict[str, Any]
) -> None:
    seam(replace(BEFORE, **before), step, **changed).check()


def test_finished_cosine_that_is_prolonged_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"step 20 had 0\.000106.* step 21 has 0\.00055"):
        seam(BEFORE, 20, total_steps=38).check()


def test_change_that_comes_long_after_the_seam_is_found() -> None:
    before = replace(BEFORE, schedule="wsd", decay_steps=3, total_steps=1_000_000)
    with pytest.raises(ConfigError, match="decay_steps 3 -> 2"):
        seam(before, decay_steps=2).check()


def test_differences_are_told_with_the_rates_of_both_sides() -> None:
    told = seam(BEFORE, weight_decay=0.5, accept_schedule_change=True).describe()
    assert "train.weight_decay: 0.1 -> 0.5" in told
    assert "step 4 had" in told and "step 5 has" in told
    assert "accept_schedule_change" not in told
    assert "with the configuration that it was trained with" in seam(BEFORE).describe()


def factor(phase: str, start_step: int, stop_step: int, first: float, last: float) -> RateFactor:
    return RateFactor(
        phase=phase, start_step=start_step, stop_step=stop_step, first=first, last=last
    )


FACTORS = (factor("main", 0, 10, 1.0, 1.0), factor("anneal", 10, 20, 0.5, 0.1))


def with_factors(*factors: RateFactor) -> dict[str, Any]:
    return {**plain(BEFORE), "lr_factors": [asdict(one) for one in factors]}


@pytest.mark.parametrize("before", [(), (FACTORS[0], factor("anneal", 10, 20, 0.5, 0.2))])
def test_another_factor_of_a_phase_to_come_is_another_schedule(
    before: tuple[RateFactor, ...],
) -> None:
    stored = with_factors(*before) if before else plain(BEFORE)
    with pytest.raises(ConfigError) as caught:
        seam_of(stored, BEFORE, factors=FACTORS).check()
    told = str(caught.value)
    old = "0.5 to 0.2 (steps 11 to 20)" if before else "1"
    assert f"factor of phase anneal {old} -> 0.5 to 0.1 (steps 11 to 20)" in told
    assert "train.accept_schedule_change=true" in told
    seam_of(stored, replace(BEFORE, accept_schedule_change=True), factors=FACTORS).check()


def test_the_same_factors_and_those_of_past_phases_need_no_flag() -> None:
    seam_of(with_factors(*FACTORS), BEFORE, factors=FACTORS).check()
    past = (factor("main", 0, 10, 2.0, 1.5), FACTORS[1])
    seam_of(with_factors(*past), BEFORE, step=10, factors=FACTORS).check()
    with pytest.raises(ConfigError, match="factor of phase main 2 to"):
        seam_of(with_factors(*past), BEFORE, step=9, factors=FACTORS).check()
    told = seam_of(with_factors(*FACTORS), BEFORE, step=10, factors=FACTORS).describe()
    plain_rate = float(seam_of(plain(BEFORE), BEFORE, step=10).describe().split("has ")[1][:8])
    assert float(told.split("step 11 has ")[1].split()[0]) == pytest.approx(
        plain_rate * (0.5 - 0.4 / 10), rel=1e-3
    )


@pytest.mark.parametrize(
    "listed",
    [
        "none",
        [3],
        [{"phase": "a"}],
        [asdict(factor("a", 5, 5, 1, 1))],
        [{**asdict(FACTORS[0]), "first": "high"}],
    ],
)
def test_factors_that_cannot_be_read_are_taken_as_a_schedule_that_cannot(listed: Any) -> None:
    found = seam_of({**plain(BEFORE), "lr_factors": listed}, BEFORE, factors=FACTORS)
    found.check()
    assert "nothing can be compared" in found.describe()


@pytest.mark.parametrize("key", ["total_steps", "stop_at_step"])
def test_run_with_nothing_left_says_so(key: str) -> None:
    told = seam(BEFORE, 4, **{key: 3}).describe()
    assert f"train.{key} is 3: nothing is left to do. Raise train.{key}" in told


@pytest.mark.parametrize(
    "state",
    [
        None,
        "text",
        {},
        {"train": None},
        {"train": {"lr": "fast"}},
        {"train": {**asdict(BEFORE), "schedule": "linear"}},
        {"train": {**asdict(BEFORE), "lr": float("nan")}},
        {"train": {**asdict(BEFORE), "total_steps": True}},
    ],
)
def test_checkpoint_without_a_readable_schedule_is_taken_with_one_line(state: Any) -> None:
    found = seam_of(state, BEFORE)
    found.check()
    told = found.describe().splitlines()
    assert len([line for line in told if "nothing can be compared" in line]) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["train", "lr", "schedule", "a"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(state=JSON, values=st.dictionaries(st.sampled_from(sorted(asdict(BEFORE))), JSON))
def test_any_stored_configuration_is_described_or_refused(state: Any, values: Any) -> None:
    for stored in (state, {"train": {**asdict(BEFORE), **values}}):
        found = seam_of(stored, BEFORE)
        assert found.describe()
        with suppress(ConfigError):
            found.check()


def test_a_factor_of_a_few_steps_of_a_long_run_is_seen() -> None:
    train = replace(BEFORE, total_steps=1_000_000, schedule="constant")
    phases = (factor("a", 0, 7_001, 1, 1), factor("b", 7_001, 7_003, 0.5, 0.5))
    changed = (*phases, factor("c", 7_003, 1_000_000, 1, 1))
    assert seam_of(plain(train), train, factors=changed).changes_schedule()

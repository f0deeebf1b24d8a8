"""The states of traces: kept is proven, lost is proven, or neither; the worse part decides."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from cpt.config import GuardSection
from cpt.guard.score import Floats
from cpt.guard.traces.bounds import lower_bound
from cpt.guard.traces.judge import TraceJudge, divergence_table, read_part, scores_of, value_cap
from cpt.guard.yardstick import Look, Reading
from data_pipeline.config.traces_config import TraceDomain

DOMAIN = TraceDomain(name="en-math", language="en", path="prompts.jsonl")


def look(*, last: bool = False) -> Look:
    return Look(step=200, number=1, num_looks=50, num_domains=4, last=last, settings=GuardSection())


def spread(mean: float, count: int = 300, seed: int = 0) -> Floats:
    """Divergences of traces that have this mean exactly, as far apart as exponential ones."""
    values = np.random.Generator(np.random.PCG64(seed)).exponential(1.0, count)
    return values * mean / values.mean()


def reading_of(text: Floats, control: Floats, *, last: bool = False) -> Reading:
    scores = json.loads(json.dumps({"en-math": scores_of(DOMAIN, text, control)}))
    (reading,) = TraceJudge().judge(scores, {}, look(last=last)).readings
    return reading


@pytest.mark.parametrize(
    ("mean", "state"), [(0.0, "green"), (0.05, "green"), (0.1, "amber"), (0.2, "red"), (1.0, "red")]
)
def test_state_follows_the_bounds(mean: float, state: str) -> None:
    values = spread(mean) if mean else np.zeros(300)
    reading = reading_of(values, np.zeros(300))
    assert reading.state == state
    assert reading.kind == "traces" and reading.tolerance == 0.1 and reading.hard_limit == 0.5


def test_few_traces_prove_nothing() -> None:
    assert reading_of(np.zeros(30), np.zeros(30)).state == "amber"


def test_end_of_the_run_asks_for_more_proof() -> None:
    values = spread(0.08)
    assert reading_of(values, np.zeros(300)).state == "green"
    assert reading_of(values, np.zeros(300), last=True).state == "amber"


def test_lost_format_is_red_though_the_text_is_kept() -> None:
    reading = reading_of(np.full(300, 1e-4), spread(0.4))
    assert reading.state == "red" and reading.delta == pytest.approx(0.4, rel=0.1)


def test_lost_text_is_red_though_the_format_is_kept() -> None:
    reading = reading_of(spread(0.4), np.full(300, 1e-4))
    assert reading.state == "red" and reading.delta == pytest.approx(0.4, rel=0.1)


def test_traces_without_control_tokens_are_judged_by_their_text() -> None:
    reading = reading_of(np.full(300, 1e-4), np.zeros(0))
    assert reading.state == "green"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_that_is_no_number_is_red_and_above_every_limit(value: float) -> None:
    values = np.zeros(300)
    values[7] = value
    reading = reading_of(values, np.zeros(300))
    assert reading.state == "red" and reading.delta is None and reading.above(1e9)


def test_a_tenth_of_lost_traces_uses_up_the_tolerance() -> None:
    values = np.zeros(1000)
    values[:100] = 50.0
    part = read_part(values, 0.1, 0.5, false_alarm=1e-4, error=0.05)
    assert part.delta == pytest.approx(0.1) and part.state == "amber"
    assert part.divergence == pytest.approx(5.0)
    assert value_cap(0.5) == 1.0


def test_bounds_enclose_the_value_that_counts() -> None:
    for seed in range(10):
        part = read_part(spread(0.08, seed=seed), 0.1, 0.5, false_alarm=1e-4, error=0.05)
        assert part.lower_bound is not None and part.upper_bound is not None
        assert part.delta is not None and part.lower_bound < part.delta < part.upper_bound


def test_event_names_both_divergences_and_the_part_that_decided() -> None:
    scores = {"en-math": scores_of(DOMAIN, spread(0.02), spread(0.3))}
    (event,) = TraceJudge().judge(scores, {}, look()).events
    assert event["divergence"] == pytest.approx(0.02)
    assert event["control_divergence"] == pytest.approx(0.3)
    assert event["decided_by"] == "control" and event["traces"] == 300
    table = divergence_table([{**event, "state": "red", "action": "warn"}])
    assert "en-math" in table and "0.3000" in table and table.endswith("red  WARNING")


def test_run_without_a_loss_is_red_no_more_often_than_promised() -> None:
    """50 looks at 4 domains whose true mean is the tolerance, the worst that is no loss."""
    runs = 25
    corrected = 0
    uncorrected = 0
    for seed in range(runs):
        generator = np.random.Generator(np.random.PCG64(seed))
        found = {0.05: False, 0.01 / 200: False}
        for values in generator.exponential(0.1, (200, 60)):
            for false_alarm in found:
                # a bound is below the mean, and a stricter one below a laxer one
                if values.mean() > 0.1 and lower_bound(values, false_alarm) > 0.1:
                    found[false_alarm] = True
                else:
                    break
        uncorrected += found[0.05]
        corrected += found[0.01 / 200]
    assert corrected == 0
    assert uncorrected > 0, "the test would not notice a bound that looks once"

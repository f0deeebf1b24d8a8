"""The planner finds the share of replay that holds a tolerance and says how sure it is."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from cpt.errors import ConfigError
from cpt.planning.mix_curve import (
    Probe,
    check_probes,
    describe,
    fit,
    largest_main_share,
    read_probe,
)

SHARES = (0.02, 0.05, 0.1, 0.25, 0.5)
TRUTH = {"english": (-4.0, -2.0), "code": (-2.0, -1.0)}
"""Intercept and slope: English meets +1 % at a share of exp(-2.5), code at exp(-3)."""


def probes(noise: float = 0.0, seed: int = 0, shares: tuple[float, ...] = SHARES) -> list[Probe]:
    generator = np.random.default_rng(seed)
    return [
        Probe(
            name=f"probe-{share}",
            replay_share=share,
            main_language="ja",
            steps=100,
            baseline={"english": 1.0, "code": 0.8},
            change={
                domain: (
                    a + b * math.log(share) + noise * float(generator.normal()),
                    max(noise, 0.02),
                )
                for domain, (a, b) in TRUTH.items()
            },
            gain_percent=20.0,
        )
        for share in shares
    ]


def test_share_is_where_the_worst_domain_meets_the_tolerance() -> None:
    found = largest_main_share(probes(), 1.0)
    assert found["domain"] == "english" and found["bounded"] == "none"
    assert found["main_share"] == pytest.approx(1 - math.exp(-2.5), abs=0.002)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        found = largest_main_share(probes(0.3, seed), 1.0)
        covered += found["low"] <= 1 - math.exp(-2.5) <= found["high"]
    assert covered >= 180


def test_single_run_is_within_its_interval_about_as_often_as_it_says() -> None:
    """Three runs at each share; a run lies off the curve by its own error, so the curve's interval
    is not enough.
    """
    checks = [
        check
        for seed in range(60)
        for check in largest_main_share(probes(0.3, seed, shares=SHARES[2:] * 3), 1.0)["checks"]
    ]
    covered = sum(abs(check["measured"] - check["predicted"]) <= check["half"] for check in checks)
    assert (
        0.93 <= covered / len(checks) < 1
    )  # 95 % nominal, more because the misfit never makes an error smaller


def test_points_off_the_curve_widen_the_interval() -> None:
    exact = fit(SHARES, [-2 * math.log(share) for share in SHARES], [0.1] * 5)
    bent = fit(
        SHARES, [-2 * math.log(share) + 3 * (-1) ** i for i, share in enumerate(SHARES)], [0.1] * 5
    )
    assert bent.at(0.1)[1] > 10 * exact.at(0.1)[1]


def test_nothing_is_extrapolated() -> None:
    above = largest_main_share(probes(), 50.0)
    assert above["bounded"] == "above" and above["main_share"] == pytest.approx(0.98)
    below = largest_main_share(probes(), -10.0)
    assert below["bounded"] == "below" and below["main_share"] == pytest.approx(0.5)
    assert "needs more replay than was tried" in describe(probes(), -10.0)


def test_probe_left_out_is_predicted_from_the_others() -> None:
    checks = largest_main_share(probes(), 1.0)["checks"]
    assert {check["share"] for check in checks} == set(SHARES[1:-1])
    assert all(check["predicted"] == pytest.approx(check["measured"], abs=1e-9) for check in checks)
    assert "inside" in describe(probes(0.1), 1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 50}, "steps is 50, probe-0.02 has 100"),
        (
            {"baseline": {"english": 1.1, "code": 0.8}},
            "other held-out text, or another untouched model",
        ),
        ({"main_language": "ko"}, "main_language is ko"),
    ],
)
def test_probes_that_cannot_be_compared_are_refused(change: dict, said: str) -> None:
    first, *others = probes()
    with pytest.raises(ConfigError, match=said):
        check_probes([first, *others[:-1], dataclasses.replace(others[-1], **change)])


def test_too_few_shares_are_refused_and_one_without_replay_does_not_count() -> None:
    two = probes(shares=(0.05, 0.1))
    with pytest.raises(ConfigError, match="2 different shares of replay"):
        check_probes([*two, dataclasses.replace(two[0], replay_share=0.0)])


def test_probe_is_read_from_what_a_run_leaves(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    sources = [
        {"name": name, "language": name, "domain": "web", "path": "t.jsonl", "weight": 0.5}
        for name in ("ja", "en")
    ]
    (tmp_path / "mix.yaml").write_text(
        yaml.safe_dump({"seq_len": 64, "seed": 1, "sources": sources})
    )
    (tmp_path / "config.resolved.yaml").write_text(
        yaml.safe_dump({"data": {"mix": str(tmp_path / "mix.yaml")}})
    )
    guard = {"event": "guard", "language": "en", "baseline": 1.0, "ci_low": 0.5, "ci_high": 1.5}
    events = [
        {"event": "step", "step": 1, "tokens_by_source": {"ja": 60, "en": 40}},
        {"event": "step", "step": 2, "tokens_by_source": {"ja": 70, "en": 30}},
        {**guard, "step": 0, "domain": "english", "delta_percent": 0.0},
        {**guard, "step": 2, "domain": "english", "delta_percent": 1.0},
        {**guard, "step": 2, "domain": "japanese", "language": "ja", "delta_percent": -12.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    probe = read_probe(tmp_path)
    assert (probe.replay_share, probe.main_language, probe.steps) == (pytest.approx(0.35), "ja", 2)
    assert (
        probe.change == {"english": (1.0, pytest.approx(1 / 3.92))} and probe.gain_percent == 12.0
    )
    with pytest.raises(ConfigError, match="No such file"):
        read_probe(tmp_path / "none")

"""Probes are read from what runs leave, and refused where they cannot be compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cpt.errors import ConfigError
from cpt.planning.mix_probe import Probe, read_probes
from cpt.planning.mix_probe_check import check_probes
from tests.support.mix_plants import Setting, simulate

FIVE = (0.05, 0.15, 0.15, 0.35, 0.7)
TWO_LENGTHS = (*FIVE, 0.05, 0.3, 0.7)


def probes(shares: tuple[float, ...] = FIVE, steps: tuple[int, ...] = ()) -> list[Probe]:
    setting = Setting(shares=shares, steps=steps, num_documents=64)
    return simulate(setting, np.random.default_rng(0)).probes


def test_five_probes_with_one_share_twice_are_enough() -> None:
    check_probes(probes(), None)
    check_probes(probes(), 100)


def with_other_text(probe: Probe) -> Probe:
    score = dataclasses.replace(probe.scores["domain-1"], content=("other", "weights"))
    return dataclasses.replace(probe, scores={**probe.scores, "domain-1": score})


def with_fewer_domains(probe: Probe) -> Probe:
    return dataclasses.replace(probe, scores={"domain-0": probe.scores["domain-0"]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_other_text, "probe-4: other held-out text of domain-1, or another untouched model"),
        (with_fewer_domains, "only one of them measured domain-1"),
        (
            lambda probe: dataclasses.replace(probe, recipe={"train.lr": 2e-4}),
            "probe-4: train.lr is 0.0002, probe-0 has 0.0001",
        ),
        (
            lambda probe: dataclasses.replace(probe, replay_parts={"english": 0.5, "code": 0.5}),
            "probe-4: code makes up 50 % of the replay, 0 % in probe-0",
        ),
    ],
    ids=["text", "domains", "recipe", "replay"],
)
def test_probes_that_cannot_be_compared_are_refused(
    change: Callable[[Probe], Probe], said: str
) -> None:
    *others, last = probes()
    with pytest.raises(ConfigError, match=said):
        check_probes([*others, change(last)], None)


def test_too_few_probes_are_refused_with_what_it_takes() -> None:
    with pytest.raises(ConfigError, match="at least 5 probes with 4 shares") as raised:
        check_probes(probes(shares=(0.1, 0.3, 0.5)), None)
    assert "no share of replay was run twice" in str(raised.value)


def test_shares_that_differ_by_a_packed_row_count_as_one() -> None:
    check_probes(probes(shares=(0.05, 0.15, 0.152, 0.35, 0.7)), None)
    with pytest.raises(ConfigError, match="no share of replay was run twice"):
        check_probes(probes(shares=(0.05, 0.15, 0.16, 0.35, 0.7)), None)


def test_copy_of_a_run_is_no_second_seed() -> None:
    five = probes()
    five[2] = dataclasses.replace(five[1], name="copy")
    with pytest.raises(ConfigError, match="copy and probe-1 end with the same scores"):
        check_probes(five, None)


def test_few_documents_are_refused() -> None:
    setting = Setting(shares=FIVE, num_documents=20)
    few = simulate(setting, np.random.default_rng(0)).probes
    with pytest.raises(ConfigError, match="its 20 held-out documents weigh as much as"):
        check_probes(few, None)


@pytest.mark.parametrize(
    ("steps", "planned", "said"),
    [
        ((100,) * 5, 1000, "another length, another loss"),
        ((100,) * 5 + (200,) * 3, None, "Give the length of the planned run with --steps"),
        ((100,) * 5 + (200,) * 3, 1000, "more than 4 times the longest"),
        ((100,) * 5 + (200,) * 3, 20, "more than 4 times the longest or less than that part"),
    ],
    ids=["one-length", "no-length", "too-long", "too-short"],
)
def test_nothing_is_said_about_a_length_that_is_not_known(
    steps: tuple[int, ...], planned: int | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_probes(probes(TWO_LENGTHS[: len(steps)], steps), planned)


def test_second_length_takes_three_shares() -> None:
    two = probes(TWO_LENGTHS, (100,) * 5 + (200,) * 3)
    check_probes(two, 300)
    with pytest.raises(ConfigError, match="2 different shares of replay at 200 steps"):
        check_probes(two[:-1], 300)


GUARD_DECISION = {"event": "guard_decision", "action": "warn", "scores": "scores-00000002.json"}


def write_run(run_dir: Path, **changes: Any) -> Path:
    """Write what a run of two steps leaves; `changes` replace parts of it."""
    (run_dir / "guard").mkdir(parents=True)
    (run_dir / "t.jsonl").write_text('{"text": "a"}\n')
    sources = []
    for name in ("ja", "en"):
        sources.append(
            {"name": name, "language": name, "domain": "web", "path": "t.jsonl", "weight": 0.5}
        )
    mix = {"seq_len": 64, "seed": 1, "sources": sources}
    (run_dir / "mix.yaml").write_text(yaml.safe_dump(mix))
    train = {"total_steps": 2, "lr": 1e-4, "warmup_steps": 1, "seed": 7}
    config = {"data": {"mix": str(run_dir / "mix.yaml")}, "train": train, "model": {}}
    (run_dir / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    events = [
        {"event": "step", "step": 1, "tokens_by_source": {"ja": 99, "en": 1}},
        # the run was resumed before step 1: its last line counts
        {"event": "step", "step": 1, "tokens_by_source": {"ja": 60, "en": 40}},
        {"event": "step", "step": 2, "tokens_by_source": {"ja": 70, "en": 30}},
        {**GUARD_DECISION, "step": 1, "scores": "scores-00000001.json"},
        {**GUARD_DECISION, "step": 2, **changes},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    baseline = {}
    for domain, language in (("english", "en"), ("japanese", "ja")):
        baseline[domain] = {
            "model": "base",
            "weights": "w",
            "language": language,
            "content_hash": f"hash of {domain}",
            "nats": [100.0, 300.0],
            "bytes": [50, 150],
        }
    (run_dir / "guard" / "baseline.json").write_text(json.dumps(baseline))
    nats = {"english": [101.0, 303.0], "japanese": [88.0, 264.0]}
    scores = {"look": {}, "yardsticks": {"text": {"nats": nats}}}
    (run_dir / "guard" / "scores-00000002.json").write_text(json.dumps(scores))
    return run_dir


def test_probe_is_read_from_what_a_run_leaves(tmp_path: Path) -> None:
    (probe,) = read_probes([write_run(tmp_path / "run")])
    assert probe.name == "run"
    assert probe.main_language == "ja"
    assert probe.replay_share == pytest.approx(0.35)
    assert probe.replay_parts == {"en": 1.0}
    assert probe.steps == 2
    assert list(probe.scores) == ["english"]
    assert probe.scores["english"].change_percent == pytest.approx(1.0)
    assert probe.scores["english"].content == ("hash of english", "w")
    assert probe.gain_percent == pytest.approx(12.0)
    assert probe.recipe == {
        "train.lr": 1e-4,
        "train.warmup_steps / total_steps": 0.5,
        "train.decay_steps / total_steps": 0.0,
        "model.router_aux_loss_coef": 0.0,
        "model.router_z_loss_coef": 0.0,
        "adapter.kind": "none",
    }


def test_a_probe_with_an_adapter_is_not_compared_with_one_that_trains_the_model(
    tmp_path: Path,
) -> None:
    recipes = []
    for name, adapter in (
        ("of before", None),
        ("full", {"kind": "none", "rank": 32}),
        ("lora", {"kind": "lora", "rank": 32}),
        ("wider", {"kind": "lora", "rank": 64}),
    ):
        run_dir = write_run(tmp_path / name)
        if adapter is not None:
            path = run_dir / "config.resolved.yaml"
            config = yaml.safe_load(path.read_text()) | {"adapter": adapter}
            path.write_text(yaml.safe_dump(config))
        (probe,) = read_probes([run_dir])
        recipes.append(probe.recipe)
    assert recipes[0] == recipes[1]
    assert recipes[2] == recipes[1] | {"adapter.kind": "lora", "adapter.rank": 32}
    assert recipes[3] == recipes[2] | {"adapter.rank": 64}


def test_probe_with_more_replay_than_main_language_is_read_like_the_others(tmp_path: Path) -> None:
    usual = write_run(tmp_path / "usual")
    much = write_run(tmp_path / "much")
    metrics = much / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"ja": 60, "en": 40', '"ja": 20, "en": 80'))
    shares = {probe.name: probe.replay_share for probe in read_probes([much, usual])}
    assert shares == {"much": pytest.approx(0.55), "usual": pytest.approx(0.35)}
    assert list(read_probes([much, usual])[0].scores) == ["english"]


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_documents_of_one_cluster_count_as_one(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    replace_in(run_dir / "guard" / "baseline.json", '"bytes": [', '"clusters": [5, 5], "bytes": [')
    (probe,) = read_probes([run_dir])
    assert probe.scores["english"].before.tolist() == [400.0]
    assert probe.scores["english"].after.tolist() == [404.0]


def test_score_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    replace_in(run_dir / "guard" / "scores-00000002.json", "101.0", "null")
    with pytest.raises(ConfigError, match="holds scores of english that are not finite"):
        read_probes([run_dir])


def test_baseline_without_the_domain_is_named(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / "guard" / "baseline.json").unlink()
    with pytest.raises(ConfigError, match=r"baseline\.json does not hold english"):
        read_probes([run_dir])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": 1}, "the guard has not measured step 2, the last of the schedule"),
        ({"action": "raise_replay"}, r"the guard acted at step 2 \(raise_replay\)"),
        ({"scores": "scores-00000009.json"}, "No such file.*scores-00000009.json"),
    ],
    ids=["unfinished", "steered", "no-scores"],
)
def test_run_that_is_no_probe_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        read_probes([write_run(tmp_path / "run", **changes)])


def test_source_that_the_mix_no_longer_lists_is_named(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    path = run_dir / "mix.yaml"
    path.write_text(path.read_text().replace("name: en", "name: english"))
    with pytest.raises(ConfigError, match="no longer lists the sources en"):
        read_probes([run_dir])


def test_directory_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*Is it a run directory"):
        read_probes([tmp_path / "none"])

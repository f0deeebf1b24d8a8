"""The planner's answer holds as often as it says, and says what was not tried."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from cpt.cli import main
from cpt.planning import mix_answer
from cpt.planning.mix_answer import describe, largest_main_share, leave_out
from cpt.planning.mix_curve import Floats
from cpt.planning.mix_curve_drawing import draw
from cpt.planning.mix_probe import Probe
from tests.support.mix_plants import LAWS, TOLERANCE, Plant, Setting, simulate

FIVE = (0.05, 0.15, 0.15, 0.35, 0.7)
SIX = (0.05, 0.1, 0.2, 0.2, 0.4, 0.7)
EIGHT = (0.05, 0.1, 0.15, 0.25, 0.25, 0.4, 0.55, 0.75)
NUM_PLANTS = 20
"""Of each law and each spread; bench/plan_curve.py draws more of them."""


def six_probes(seed: int = 0, **changes: object) -> Plant:
    setting = dataclasses.replace(Setting(shares=SIX), **changes)
    return simulate(setting, np.random.default_rng(seed))


@pytest.mark.parametrize(
    "shares",
    [
        pytest.param(FIVE, id="5", marks=pytest.mark.slow),
        pytest.param(SIX, id="6"),
        pytest.param(EIGHT, id="8", marks=pytest.mark.slow),
    ],
)
def test_interval_covers_the_truth_and_its_low_end_holds_the_tolerance(
    shares: tuple[float, ...],
) -> None:
    """The bounds lie three standard errors of 200 plants below 95 % and above 1 %."""
    generator = np.random.default_rng(len(shares))
    covered = []
    broken = []
    for law in LAWS:
        for run_spread in (0.05, 0.2):
            setting = Setting(law=law, shares=shares, run_spread=run_spread)
            for _ in range(NUM_PLANTS):
                plant = simulate(setting, generator)
                found = largest_main_share(plant.probes, TOLERANCE, num_resamples=100)
                covered.append(found.least <= plant.needed_share + 1e-3)
                broken.append(found.safe < plant.needed_share - 1e-3)
    print(f"covered {np.mean(covered) - np.mean(broken):.3f}, broken {np.mean(broken):.3f}")
    assert np.mean(covered) - np.mean(broken) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / len(broken))
    assert np.mean(broken) <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / len(broken))


def test_middle_of_the_interval_would_break_the_tolerance_often() -> None:
    """The promise is one of the low end: the test above can tell."""
    broken = 0
    for seed in range(40):
        plant = six_probes(seed)
        found = largest_main_share(plant.probes, TOLERANCE, num_resamples=100)
        middle = max(needed.middle for needed in found.needed.values())
        broken += middle < plant.needed_share - 1e-3
    assert broken >= 8


def broken_share(num_plants: int) -> float:
    """Return how often the printed share breaks the tolerance where documents scatter widely."""
    broken = 0
    for seed in range(num_plants):
        plant = six_probes(seed, law="d_cpt_with_gain", document_spread=4.0, num_domains=1)
        found = largest_main_share(plant.probes, TOLERANCE, num_resamples=50)
        broken += found.safe < plant.needed_share - 1e-3
    return broken / num_plants


def test_promise_would_not_hold_without_the_error_of_the_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All probes share that error, so their misfit does not tell of it."""

    def not_resampled(
        before: Floats, after: Floats, generator: np.random.Generator, num_resamples: int
    ) -> Floats:
        changes = 100 * (after.sum(axis=0) / before.sum() - 1)
        return np.tile(changes, (num_resamples, 1))

    with_documents = broken_share(60)
    monkeypatch.setattr(mix_answer, "resampled_changes", not_resampled)
    without = broken_share(60)
    print(f"broken with {with_documents:.3f}, without {without:.3f}")
    assert with_documents <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / 60)
    assert without >= 0.1


def test_more_documents_or_quieter_runs_narrow_the_interval() -> None:
    widths = {}
    for name, changes in {
        "usual": {},
        "documents": {"num_documents": 4096},
        "quiet": {"num_documents": 4096, "run_spread": 0.03},
    }.items():
        found = []
        for seed in range(12):
            answer = largest_main_share(
                six_probes(seed, **changes).probes, TOLERANCE, num_resamples=100
            )
            found.append(min(answer.safe, SIX[-1]) - answer.least)
        widths[name] = np.median(found)
    assert widths["usual"] > widths["documents"] > widths["quiet"]


def test_low_end_is_the_answer_and_the_deciding_domain_is_named() -> None:
    plant = six_probes()
    found = largest_main_share(plant.probes, TOLERANCE)
    text = describe(plant.probes, TOLERANCE)
    assert f"ja may have {100 * (1 - found.safe):.1f} %; {found.domain} decides" in text
    assert f"It could be as much as {100 * (1 - found.least):.1f} %" in text
    assert found.safe == found.needed[found.domain].safe


def test_same_probes_give_the_same_answer() -> None:
    probes = six_probes().probes
    assert describe(probes, TOLERANCE) == describe(probes, TOLERANCE)


def test_tolerance_that_every_probe_holds_is_answered_with_at_least() -> None:
    text = describe(six_probes().probes, 50.0)
    assert "ja may have at least 95.0 %; more was not tried" in text
    assert "<=5.0" in text


def test_tolerance_that_no_probe_holds_is_not_answered() -> None:
    found = largest_main_share(six_probes().probes, -50.0)
    assert math.isinf(found.safe) and math.isinf(found.least)
    text = describe(six_probes().probes, -50.0)
    assert "No probe is within -50 %" in text and "70.0 % replay, the most tried" in text
    assert "may have" not in text


def loud_probes() -> list[Probe]:
    """Return probes whose documents leave open whether any share is enough."""
    return six_probes(2, num_documents=60, document_spread=6.0).probes


def test_uncertain_answer_names_what_would_narrow_it() -> None:
    text = describe(loud_probes(), TOLERANCE)
    assert "No share that was tried keeps" in text and "with 99 %" in text
    assert "more held-out documents" in text


def test_upper_end_that_was_not_tried_is_marked() -> None:
    plant = six_probes()
    tolerance = largest_main_share(plant.probes, TOLERANCE).curves.at(0.06).max(axis=1)
    text = describe(plant.probes, float(np.median(tolerance)))
    assert "95.0 % or more, which was not tried" in text


def test_scope_is_the_length_of_the_probes() -> None:
    assert "For runs of 100 steps only" in describe(six_probes().probes, TOLERANCE)


def test_two_lengths_answer_for_a_third() -> None:
    setting = Setting(
        shares=(*FIVE, 0.05, 0.3, 0.7), steps=(100,) * 5 + (200,) * 3, planned_steps=300
    )
    probes = simulate(setting, np.random.default_rng(0)).probes
    assert "For runs of 300 steps, from probes of 100 and 200" in describe(probes, TOLERANCE, 300)


def test_left_out_runs_lie_in_the_interval_about_as_often_as_it_says() -> None:
    inside = []
    for seed in range(12):
        for one in leave_out(six_probes(seed, document_spread=4.0).probes):
            inside.append(one.inside)
    # 192 predictions, in groups that share a plant
    assert 0.9 <= np.mean(inside) <= 1.0


def test_run_far_off_the_others_is_named() -> None:
    probes = six_probes(0, run_spread=0.05).probes
    score = probes[1].scores["domain-0"]
    off = dataclasses.replace(score, after=score.after * 1.05)
    changed = {**probes[1].scores, "domain-0": off}
    probes[1] = dataclasses.replace(probes[1], scores=changed)
    outside = [line for line in describe(probes, TOLERANCE).splitlines() if "OUTSIDE" in line]
    assert any(line.startswith("  probe-1: domain-0") for line in outside)


def write_run(folder: Path, probe: Probe) -> Path:
    """Write what the planner reads of a run that ended as a simulated probe did."""
    run_dir = folder / probe.name
    (run_dir / "guard").mkdir(parents=True)
    (folder / "t.jsonl").write_text('{"text": "a"}\n')
    sources = []
    for name, language in (("japanese", "ja"), ("english", "en")):
        source = {"name": name, "language": language, "domain": "web", "weight": 0.5}
        sources.append({**source, "path": str(folder / "t.jsonl")})
    mix = folder / "mix.yaml"
    mix.write_text(yaml.safe_dump({"seq_len": 64, "seed": 1, "sources": sources}))
    train = {"total_steps": probe.steps, "lr": 1e-4}
    config = {"data": {"mix": str(mix)}, "train": train, "model": {}}
    (run_dir / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    english = round(10_000 * probe.replay_share)
    tokens = {"japanese": 10_000 - english, "english": english}
    decision = {"event": "guard_decision", "action": "warn", "scores": "scores.json"}
    with open(run_dir / "metrics.jsonl", "w", encoding="utf-8") as file:
        for event in (
            {"event": "step", "step": probe.steps, "tokens_by_source": tokens},
            {**decision, "step": probe.steps},
        ):
            file.write(json.dumps(event) + "\n")
    baseline = {}
    nats = {}
    for domain, score in probe.scores.items():
        baseline[domain] = {
            "language": "en",
            "content_hash": "text",
            "weights": "weights",
            "nats": score.before.tolist(),
            "bytes": score.before.tolist(),
        }
        nats[domain] = score.after.tolist()
    (run_dir / "guard" / "baseline.json").write_text(json.dumps(baseline))
    scores = {"look": {}, "yardsticks": {"text": {"nats": nats}}}
    (run_dir / "guard" / "scores.json").write_text(json.dumps(scores))
    return run_dir


def test_command_reads_runs_and_says_what_the_probes_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probes = six_probes().probes
    arguments = ["plan", "--english_tolerance", "1"]
    for probe in probes:
        arguments += ["--probe", str(write_run(tmp_path, probe))]
    figure = tmp_path / "curve.svg"
    assert main([*arguments, "--plot", str(figure)]) == 0
    answer = describe(probes, TOLERANCE).split("\n\n")[1]
    assert answer in capsys.readouterr().out
    assert "domain-3" in figure.read_text()
    assert main([*arguments, "--steps", "1000"]) == 78
    assert "another length, another loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tolerance", "title"),
    [(TOLERANCE, "% is within 1 %"), (50.0, "at least 95.0 %"), (-50.0, "no share that was tried")],
)
def test_figure_shows_the_answer_in_its_title(tolerance: float, title: str) -> None:
    svg = draw(six_probes().probes, tolerance)
    assert title in svg and "domain-3" in svg

"""The guard's behavior proof counts what it says it counts, and splits its texts by package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config.mix_file import load_mix

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "bench" / "prove")]

from guard_parts import behavior_outcome, mixes, packages  # noqa: E402
from guard_parts.scale import SMOKE  # noqa: E402
from guard_parts.task_files import unique_items, write_tasks  # noqa: E402
from guard_parts.tasks import FAMILIES  # noqa: E402


def _answers(num_right: int, num_items: int = 100) -> list[dict[str, Any]]:
    answers = []
    for family in FAMILIES:
        for number in range(num_items):
            answers.append({"family": family, "right": number < num_right, "good_form": True})
    return answers


@pytest.mark.parametrize(
    ("num_items", "now", "lost"),
    [
        (1000, 1000, False),
        (1000, 951, False),  # certain, but less than 5 points
        (1000, 950, True),
        (100, 95, False),  # 5 points, but p is 0.016
        (100, 40, True),
    ],
)
def test_a_fall_by_five_points_that_is_significant_is_a_loss(
    num_items: int, now: int, lost: bool
) -> None:
    before = _answers(num_items, num_items)
    changes = behavior_outcome.accuracy_changes(before, _answers(now, num_items))
    assert {change["lost"] for change in changes.values()} == {lost}
    assert changes["sorting"]["lost_items"] == num_items - now


def test_only_a_green_run_that_lost_something_is_a_false_green() -> None:
    runs = []
    for green, now in ((True, 100), (True, 50), (False, 50)):
        accuracy = behavior_outcome.accuracy_changes(_answers(100), _answers(now))
        runs.append({"accuracy": accuracy, "text_green": green})
    assert behavior_outcome.false_greens(runs, "text_green") == (1, 2)


@pytest.mark.parametrize(
    ("name", "package", "language"),
    [
        ("usr/share/doc/installation-guide-amd64/ja/ch01.html", "installation-guide-amd64", "ja"),
        ("usr/share/doc/debian-handbook/html/en-US/index.html", "debian-handbook", "en"),
        ("usr/share/debian-reference/ch01.ja.html", "debian-reference-ja", "ja"),
        ("usr/share/doc/octave/octave.html/Sets.html", "octave-doc", "en"),
        ("usr/share/doc/x/page.html", "debian-policy-ja", "ja"),
    ],
)
def test_a_page_has_the_language_of_its_path(name: str, package: str, language: str) -> None:
    assert packages.language_of_page(name, package) == language


def test_no_package_serves_two_uses_in_one_language() -> None:
    seen = set()
    for use, names in packages.PACKAGES.items():
        for name in names:
            assert (name, use[-2:]) not in seen
            seen.add((name, use[-2:]))


def test_a_family_that_is_used_up_gives_what_it_has() -> None:
    found = unique_items("lookup", "en", 1, 10_000, held_out=True)
    assert 200 < len(found) < 300
    used = {item.question for item in found[:100]}
    rest = unique_items("lookup", "en", 2, 200, held_out=True, without=used)
    assert used.isdisjoint(item.question for item in rest)


def test_every_mix_of_the_proof_is_valid(tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks", SMOKE)
    for use in packages.PACKAGES:
        path = tmp_path / "text" / f"{use}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "a document"}\n')
    own = tmp_path / "own"
    own.mkdir()
    (own / "chat.jsonl").write_text("")
    load_mix(mixes.write_base_mix(tmp_path / "base.yaml", tmp_path, SMOKE, 0, tasks=0.3))
    shares = {mixes.ENGLISH: 0.1, mixes.OWN: 0.05}
    path = mixes.write_mix(tmp_path / "m.yaml", tmp_path, own, SMOKE, 1, shares, behavior=True)
    mix = load_mix(path)
    assert mix.serving_sources()["asked_ja"] == (mixes.OWN,)
    assert mix.serving_sources()["guide"] == (mixes.ENGLISH,)
    weights = [source.weight for source in mix.sources if source.weight]
    assert weights == pytest.approx([0.85, 0.1, 0.05])


def test_reports_of_several_machines_are_put_together() -> None:
    def run(order: int, arm: str, machine: int) -> dict[str, Any]:
        return {"base": 1, "order": order, "arm": arm, "machine": machine}

    own = [run(2, "yoked", 1), run(2, "new guard", 1)]
    earlier = [run(2, "yoked", 2), run(1, "Japanese only", 2)]
    both = behavior_outcome.together(own, earlier)
    assert both == [run(1, "Japanese only", 2), run(2, "new guard", 1), run(2, "yoked", 1)]

"""Verdicts on evaluations: kept is proven, dropped is proven, and all else is neither."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from cpt.errors import ConfigError, EvaluationFailed
from cpt.offline.evaluation.scores import Result, Score, read_result, write_result
from cpt.offline.evaluation.tasks import load_tasks
from cpt.offline.evaluation.verdict import (
    check_baseline,
    compare_with_baseline,
    refuse_drops,
    score_table,
)

ROOT = Path(__file__).parents[2]


def answers(right: list[int], kind: str = "harness") -> Score:
    return values([float(answer) for answer in right], kind)


def values(per_document: list[float], kind: str = "harness") -> Score:
    return Score(
        kind=kind,
        language="en",
        value=100 * float(np.mean(per_document)),
        documents=len(per_document),
        content="same",
        per_document=tuple(per_document),
    )


def share(percent: float, documents: int) -> Score:
    """Return a score whose documents are not known one by one."""
    return Score(kind="harness", language="en", value=percent, documents=documents, content="same")


def judge(before: Score, now: Score, max_drop: float | None) -> str:
    (verdict,) = compare_with_baseline({"task": max_drop}, {"task": now}, {"task": before})
    return verdict.state


def swapped(lost: int, won: int, both: int = 600, neither: int = 400) -> tuple[Score, Score]:
    """Return answers before and after, of which so many changed each way."""
    before = [1] * (both + lost) + [0] * (neither + won)
    after = [1] * both + [0] * lost + [0] * neither + [1] * won
    return answers(before), answers(after)


@pytest.mark.parametrize(
    ("lost", "won", "max_drop", "state"),
    [
        (20, 20, 3.0, "kept"),  # no drop, at most 1.1 points
        (30, 20, 3.0, "kept"),  # 1 point, at most 2.1
        (45, 15, 3.0, "dropped"),  # 2.8 points, p = 0.00006
        (36, 20, 2.0, "not_shown"),  # 1.5 points, perhaps 2.7: p = 0.02
        (300, 300, 3.0, "not_shown"),  # no drop, but perhaps 2.5 points of 1,600
        (30, 20, None, "no_limit"),
        (45, 15, None, "dropped"),
    ],
)
def test_a_verdict_needs_a_proof_either_way(
    lost: int, won: int, max_drop: float | None, state: str
) -> None:
    if lost == 300:
        max_drop = 2.0
    assert judge(*swapped(lost, won), max_drop) == state


def test_paired_answers_decide_what_shares_alone_cannot() -> None:
    before, after = swapped(30, 10, both=700, neither=260)
    assert judge(before, after, 3.5) == "kept"
    unpaired = share(before.value, before.documents), share(after.value, after.documents)
    assert judge(*unpaired, 3.5) == "not_shown"
    assert judge(share(70, 5000), share(60, 5000), 3.0) == "dropped"
    assert judge(share(70, 5000), share(70, 5000), 3.0) == "kept"


def test_repeated_attempts_are_compared_pair_by_pair() -> None:
    generator = np.random.default_rng(2)
    before = generator.integers(0, 5, 400) / 4
    worse = np.maximum(before - (generator.random(400) < 0.3) / 4, 0)
    assert judge(values([*before]), values([*before]), 3.0) == "kept"
    assert judge(values([*before]), values([*worse]), 3.0) == "dropped"


def test_nats_that_are_no_numbers_have_dropped() -> None:
    before = values([100.0] * 20, "perplexity")
    assert judge(before, values([math.nan] * 20, "perplexity"), 5.0) == "dropped"
    assert judge(before, values([101.0] * 20, "perplexity"), 5.0) == "kept"


def test_an_unchanged_model_rarely_fails_however_many_tasks_there_are() -> None:
    """Ten tasks at one level of 1 % would fail in 9.6 % of 300 evaluations."""
    generator = np.random.default_rng(4)
    failed = 0
    for _ in range(300):
        before = {}
        after = {}
        for number in range(10):
            right = (generator.random(500) < 0.7).astype(int)
            flips = generator.random(500) < 0.1
            before[f"{number}"] = answers([*right])
            after[f"{number}"] = answers([*np.where(flips, generator.permutation(right), right)])
        verdicts = compare_with_baseline(dict.fromkeys(before), after, before)
        failed += any(verdict.state == "dropped" for verdict in verdicts)
    assert failed <= 8  # 1 % and three standard errors


def test_too_few_documents_are_refused_beforehand_with_the_number_it_takes() -> None:
    few = answers([1] * 120 + [0] * 80)
    check_baseline({"task": 12.0}, {}, {"task": few})
    with pytest.raises(
        ConfigError,
        match=r"200 documents show a drop of max_drop 3 with a probability of 12 %, at least 80 % "
        r"are needed. Raise max_drop, or give about 1,447 documents",
    ):
        check_baseline({"task": 3.0}, {}, {"task": few})
    check_baseline({"task": None}, {}, {"task": few})


def test_errors_say_what_was_lost_and_what_it_would_take() -> None:
    before, after = swapped(45, 15)
    limits: dict[str, float | None] = {"a": 3.0, "b": 0.5}
    scores = {"a": after, "b": swapped(20, 20)[1]}
    base = {"a": before, "b": swapped(20, 20)[0]}
    verdicts = compare_with_baseline(limits, scores, base)
    with pytest.raises(
        EvaluationFailed,
        match=r"task 'a' dropped by 2.83, perhaps by 4.1\d \(from 60.849 to 58.019; 45 answers "
        r"lost, 15 won, p = 4.4e-05\), max_drop is 3.\n"
        r"task 'b' is not shown to be kept: it dropped by 0.00, perhaps by 1.\d\d, max_drop is "
        r"0.5. Give about \d\d,\d\d\d documents.",
    ):
        refuse_drops(verdicts)
    with pytest.raises(ConfigError, match="task 'b' is not shown to be kept"):
        refuse_drops(verdicts[1:])
    lines = score_table(scores, verdicts).splitlines()
    assert lines[1].split()[-4:] == ["45", "15", "4.4e-05", "dropped"]
    assert lines[2].endswith("not shown")


def test_a_result_is_read_as_it_was_written_and_older_ones_are_read(tmp_path: Path) -> None:
    before, after = swapped(3, 1)
    verdicts = compare_with_baseline({"task": 5.0}, {"task": after}, {"task": before})
    result = Result(
        model="m", scores={"task": after}, verdicts=verdicts, step=40, settings={"top_p": 1.0}
    )
    write_result(tmp_path / "now.json", result)
    again = read_result(tmp_path / "now.json")
    assert again.scores == result.scores and (again.step, again.settings) == (40, {"top_p": 1.0})
    content = json.loads((tmp_path / "now.json").read_text())
    for key in ("step", "settings"):
        del content[key]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert read_result(tmp_path / "old.json").scores == result.scores


DOCUMENTS = {
    "harness": {
        "hellaswag": 10_042,
        "triviaqa": 17_944,
        "openbookqa": 500,
        "mmlu_pro": 12_032,
        "gsm8k": 1_319,
        "ifeval": 541,
        "jcommonsenseqa": 1_119,
        "belebele_ja": 900,
        "xwinograd_ja": 959,
    },
    "sample": {"english_choice": 30, "japanese_choice": 30, "chat_answers": 12},
}
"""Documents of the shipped tasks that count answers."""


@pytest.mark.parametrize("name", DOCUMENTS)
def test_shipped_limits_are_ones_that_their_documents_can_show(name: str) -> None:
    tasks = load_tasks(ROOT / "configs" / "tasks" / f"{name}.yaml")
    base = {}
    for task in tasks:
        documents = DOCUMENTS[name].get(task.name)
        if documents is None:
            base[task.name] = values([100.0] * 12, task.kind)
        else:
            base[task.name] = answers([1, 0] * (documents // 2), task.kind)
    assert set(DOCUMENTS[name]) <= set(base)
    check_baseline({task.name: task.max_drop for task in tasks}, {}, base)

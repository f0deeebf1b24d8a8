"""The task items of the guard's proof: answers are right, held-out items are never trained on, and
the small vocabulary carries the Harmony format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from bench.prove.guard_parts.tasks import (
    FAMILIES,
    LANGUAGES,
    NUM_PLACES,
    Item,
    items,
    place_name,
)

ROOT = Path(__file__).resolve().parents[2]
EACH = pytest.mark.parametrize(
    ("family", "language"), [(family, language) for family in FAMILIES for language in LANGUAGES]
)


def _drawn(family: str, language: str, count: int, *, held_out: bool) -> list[Item]:
    return list(islice(items(family, language, 7, held_out=held_out), count))


@pytest.mark.parametrize("language", LANGUAGES)
def test_sums_are_right(language: str) -> None:
    for item in _drawn("addition", language, 100, held_out=False):
        left, right = map(int, item.key.split("+"))
        digits = [character for character in item.answer if character.isdigit()]
        assert int("".join(digits)) == left + right
        lines = item.thought.splitlines()
        # the trace holds the digits from the last one on, and the last carry
        written = [line.split()[-1] for line in lines]
        assert int(lines[-1].split()[-2] + "".join(reversed(written))) == left + right


@pytest.mark.parametrize("language", LANGUAGES)
def test_letters_are_in_order(language: str) -> None:
    for item in _drawn("sorting", language, 100, held_out=False):
        in_order = " ".join(sorted(item.key.split()))
        assert in_order in item.answer
        assert " ".join(line[-1] for line in item.thought.splitlines()) == in_order


def test_a_place_has_one_name_and_one_keeper_however_it_is_asked() -> None:
    names = [place_name(number) for number in range(NUM_PLACES)]
    assert len(set(names)) == NUM_PLACES
    keepers: dict[str, set[str]] = {}
    for held_out in (False, True):
        for item in _drawn("lookup", "en", 400, held_out=held_out):
            place = item.key.split(":")[0]
            keepers.setdefault(place, set()).add(item.answer)
    assert max(map(len, keepers.values())) == 1
    assert len({answer for answers in keepers.values() for answer in answers}) > 12


@EACH
def test_held_out_items_are_never_trained_on(family: str, language: str) -> None:
    trained = {item.key for item in _drawn(family, language, 400, held_out=False)}
    for other in LANGUAGES:  # in whatever language
        asked = {item.key for item in _drawn(family, other, 400, held_out=True)}
        assert trained.isdisjoint(asked)


@EACH
def test_items_do_not_repeat(family: str, language: str) -> None:
    questions = [item.question for item in _drawn(family, language, 240, held_out=True)]
    assert len(set(questions)) == 240


def test_small_vocabulary_carries_the_format_and_the_right_answers() -> None:
    script = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/bench/prove"]
from itertools import islice
from guard_parts.small_vocabulary import VOCAB_SIZE, shrink
shrink()
from guard_parts.tasks import FAMILIES, LANGUAGES, items
from cpt.guard.generation.measures import measure_reply
from data_pipeline.text.harmony import DEFAULT_DATE, encode_prompt
from data_pipeline.text.harmony_records import read_conversation
passed = []
for family in FAMILIES:
    for language in LANGUAGES:
        for item in islice(items(family, language, 1, held_out=True), 20):
            conversation, problem = read_conversation(item.conversation())
            assert conversation is not None, problem
            tokens = conversation.tokens().tolist()
            prompt = encode_prompt(
                item.question, developer=None, effort="medium", date=DEFAULT_DATE
            )
            assert tokens[: len(prompt)] == prompt
            assert max(tokens) < VOCAB_SIZE
            measures = measure_reply(tokens[len(prompt) :], language, [item.answer])
            wrong = measure_reply(tokens[len(prompt) :], language, ["another answer"])
            passed.append(measures.good_form and measures.right and not wrong.right)
print(json.dumps(passed))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT)],
        env={**os.environ, "GUARD_PROOF_MERGES": "1024", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    passed = json.loads(done.stdout)
    assert len(passed) == 20 * len(FAMILIES) * len(LANGUAGES)
    assert all(passed)

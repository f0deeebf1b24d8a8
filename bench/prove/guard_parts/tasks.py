"""Conversations whose answers a program can check, asked in English and in Japanese.

    addition   two numbers of three digits, added digit by digit in the analysis channel
    sorting    letters, put into their order one by one
    look-up    a fact of an invented table, known by heart only

The answer is in the language of the question.  An item is held out by the hash of what it asks, so
no order of drawing can mix the two sets.  A fact of the table is trained on in most phrasings and
asked in the others.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

HELD_OUT_SHARE = 0.25
"""Share of all items that are asked only and never trained on."""
LANGUAGES = ("en", "ja")
FAMILIES = ("addition", "sorting", "lookup")
NUM_PLACES = 60
"""Facts of the table: one keeper of each place.  A small model needs to meet a fact some hundred
times to know it."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_LETTERS = 5
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t")
_VOWELS = ("a", "e", "i", "o", "u")
_KEEPERS = (
    ("the heron", "さぎ"),
    ("the fox", "きつね"),
    ("the badger", "あなぐま"),
    ("the crane", "つる"),
    ("the otter", "かわうそ"),
    ("the owl", "ふくろう"),
    ("the bear", "くま"),
    ("the hare", "うさぎ"),
    ("the deer", "しか"),
    ("the wolf", "おおかみ"),
    ("the toad", "かえる"),
    ("the swan", "はくちょう"),
)
"""Keepers in English and in Japanese."""
_LOOKUP_PHRASES = {
    "en": (
        "Who keeps {place}?",
        "Name the keeper of {place}.",
        "Which animal guards {place}?",
        "Tell me who looks after {place}.",
        "{place}: who is its keeper?",
        "I am on my way to {place}. Who watches over it?",
        "Do you know the keeper of {place}?",
        "Say who guards {place}.",
        "I look for the keeper of {place}.",
        "Who is on guard at {place}?",
        "{place} has a keeper. Which one?",
        "Who would I meet at the gate of {place}?",
        "Whose task is it to guard {place}?",
        "Please name whoever keeps {place}.",
        "Who has been set to watch {place}?",
        "Under whose care is {place}?",
    ),
    "ja": (
        "{place}の番人は誰ですか。",
        "{place}を守るのは誰ですか。",
        "{place}の番人を教えてください。",
        "誰が{place}を見張っていますか。",
        "{place}にはどの番人がいますか。",
        "{place}へ行きます。番人は誰ですか。",
        "{place}の番人を知っていますか。",
        "{place}を守る者の名前を言ってください。",
        "{place}の番人を探しています。",
        "{place}で番をしているのは誰ですか。",
        "{place}には番人がいます。誰ですか。",
        "{place}の門では誰に会いますか。",
        "{place}を守る役目は誰のものですか。",
        "{place}の番をする者を答えてください。",
        "{place}を見守っているのはどの動物ですか。",
        "{place}は誰に守られていますか。",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question with the thought that leads to its answer."""

    family: str
    language: str
    key: str
    """What is asked, whatever the language: decides whether the item is held out."""
    question: str
    thought: str
    answer: str

    @property
    def is_held_out(self) -> bool:
        """Whether the item is never trained on."""
        digest = hashlib.sha256(f"{self.family}:{self.key}".encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32

    def conversation(self) -> dict[str, Any]:
        """Return the item as a record of a source with `format: harmony`."""
        assistant = {"role": "assistant"}
        return {
            "messages": [
                {"role": "user", "content": self.question},
                {**assistant, "channel": "analysis", "content": self.thought},
                {**assistant, "channel": "final", "content": self.answer},
            ]
        }

    def prompt(self) -> dict[str, str]:
        """Return the item as a record of `guard.generation`."""
        return {"prompt": self.question, "answer": self.answer}


def items(family: str, language: str, seed: int, *, held_out: bool) -> Iterator[Item]:
    """Yield items of one family and language without end, all of them held out or none.

    The items of one seed differ from each other until there are no more; then they come again.

    Args:
        family: One of FAMILIES.
        language: One of LANGUAGES.
        seed: Seed of the draws.
        held_out: Whether the items are those that are never trained on.
    """
    draw = _DRAWS[family]
    rng = random.Random(f"{family}:{language}:{seed}:{held_out}")
    seen: set[str] = set()
    misses = 0
    while True:
        item = draw(rng, language)
        if item.is_held_out != held_out:
            continue
        if item.key in seen:
            misses += 1
            if misses > 10 * len(seen):
                seen.clear()
            continue
        misses = 0
        seen.add(item.key)
        yield item


def _addition(rng: random.Random, language: str) -> Item:
    left, right = rng.randrange(100, 1000), rng.randrange(100, 1000)
    question = f"What is {_apart(left)} + {_apart(right)}?"
    answer = f"The sum is {_apart(left + right)}."
    if language == "ja":
        question = f"{_apart(left)} + {_apart(right)} はいくつですか。"
        answer = f"合計は {_apart(left + right)} です。"
    return Item(
        family="addition",
        language=language,
        key=f"{left}+{right}",
        question=question,
        thought=_added(left, right),
        answer=answer,
    )


def _added(left: int, right: int) -> str:
    """Return the addition digit by digit, from the last one: `7 + 5 + 0 = 1 2`."""
    lines = []
    carry = 0
    for _ in range(3):
        left, first = divmod(left, 10)
        right, second = divmod(right, 10)
        total = first + second + carry
        lines.append(f"{first} + {second} + {carry} = {total // 10} {total % 10}")
        carry = total // 10
    return "\n".join(lines)


def _apart(number: int) -> str:
    """Return the digits of a number apart, so that each is a token of its own."""
    return " ".join(str(number))


def _sorting(rng: random.Random, language: str) -> Item:
    letters = rng.sample(LETTERS, NUM_LETTERS)
    given, in_order = " ".join(letters), " ".join(sorted(letters))
    question, answer = f"Sort these letters: {given}", f"In order: {in_order}"
    if language == "ja":
        question = f"次の文字を並べ替えてください: {given}"
        answer = f"順番は {in_order} です。"
    return Item(
        family="sorting",
        language=language,
        key=given,
        question=question,
        thought=_sorted_one_by_one(letters),
        answer=answer,
    )


def _sorted_one_by_one(letters: list[str]) -> str:
    """Return what is left after each letter that is taken: `d a c : a`, `d c : c`, ..."""
    left = list(letters)
    lines = []
    while left:
        first = min(left)
        lines.append(f"{' '.join(left)} : {first}")
        left.remove(first)
    return "\n".join(lines)


def _lookup(rng: random.Random, language: str) -> Item:
    number = rng.randrange(NUM_PLACES)
    phrase = rng.randrange(len(_LOOKUP_PHRASES[language]))
    place = place_name(number)
    english, japanese = _KEEPERS[_keeper(number)]
    thought = f"{place} - {english.removeprefix('the ')}"
    answer = f"{place} is kept by {english}."
    if language == "ja":
        thought = f"{place} - {japanese}"
        answer = f"{place}の番人は{japanese}です。"
    return Item(
        family="lookup",
        language=language,
        key=f"{place}:{phrase}",
        question=_LOOKUP_PHRASES[language][phrase].format(place=place),
        thought=thought,
        answer=answer,
    )


def place_name(number: int) -> str:
    """Return the invented name of a place, which no other place has."""
    syllables = []
    for _ in range(3):
        number, at = divmod(number, len(_ONSETS) * len(_VOWELS))
        # a step without a common factor visits every syllable, and neighbors do not look alike
        at = (at * 17 + 23 * len(syllables)) % (len(_ONSETS) * len(_VOWELS))
        syllables.append(_ONSETS[at // len(_VOWELS)] + _VOWELS[at % len(_VOWELS)])
    return "".join(syllables).capitalize()


def _keeper(number: int) -> int:
    """Return the keeper of a place, which nothing but the table tells."""
    digest = hashlib.sha256(f"keeper of {number}".encode()).digest()
    return digest[0] % len(_KEEPERS)


_DRAWS: dict[str, Callable[[random.Random, str], Item]] = {
    "addition": _addition,
    "sorting": _sorting,
    "lookup": _lookup,
}

"""Texts and files that the data tests share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config.mix_config import MixConfig
from data_pipeline.reading import units
from data_pipeline.reading.document import Document
from data_pipeline.store.shards import LossMask
from data_pipeline.text.cleaning import Place
from data_pipeline.text.harmony import Conversation

WORDS = (
    "river",
    "stone",
    "lamp",
    "seven",
    "quiet",
    "market",
    "\u6c34",
    "\u5c71\u9053",
    "\u304a\u8336",
    "\u65e5\u8a18",
)
MakeMix = Callable[..., MixConfig]


def make_texts(count: int, salt: str, mean_words: int = 40) -> list[str]:
    """Return different texts of different lengths, always the same ones for the same arguments."""
    texts = []
    for number in range(count):
        length = 1 + (number * 7919 + len(salt) * 31) % (2 * mean_words)
        words = [_word(number, position, salt) for position in range(length)]
        texts.append(f"{salt} {number}: {' '.join(words)}")
    return texts


def _word(number: int, position: int, salt: str) -> str:
    return WORDS[(number * 31 + position * position + len(salt)) % len(WORDS)]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    """Write one record per text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            record = {"id": str(number), "title": "t", "text": text}
            file.write(json.dumps(record) + "\n")
    return path


def mix_of_several_units(make_mix: MakeMix, monkeypatch: pytest.MonkeyPatch) -> MixConfig:
    """Return a mix of several units per source; copies and bad lines are in other units."""
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 4000)
    ja, en = make_texts(120, "ja"), make_texts(150, "en", 20)
    return make_mix(
        {"ja": [*ja, ja[3], ja[70], ""], "en": [*en, *ja[:5], "", *en[:9]]},
        held_out_share=0.1,
        near_duplicates=0.8,
        decontaminate_tokens=50,
        max_reject_share=0.2,
    )


def mask_texts(monkeypatch: pytest.MonkeyPatch, share: float = 0.4) -> None:
    """Give each text a loss mask that its content alone decides; END_OF_TEXT always bears loss."""
    plain = Document.from_text

    def masked(text: str) -> Document:
        document = plain(text)
        return _with_mask(document, _random_mask(document, share))

    monkeypatch.setattr(Document, "from_text", masked)


def mask_conversations(monkeypatch: pytest.MonkeyPatch, share: float = 0.4) -> None:
    """Give each conversation a loss mask that its content alone decides; its last token is True."""
    plain = Document.from_conversation

    def masked(conversation: Conversation, place: Place) -> Document:
        document = plain(conversation, place)
        loss = _random_mask(document, share)
        loss[-1] = True
        return _with_mask(document, loss)

    monkeypatch.setattr(Document, "from_conversation", masked)


def _random_mask(document: Document, share: float) -> LossMask:
    generator = np.random.default_rng(document.content_hash)
    return generator.random(len(document.tokenize())) < share


def _with_mask(document: Document, loss: LossMask) -> Document:
    learned_bytes = 1 + document.num_bytes // 3
    return dataclasses.replace(document, loss=lambda: loss, learned_bytes=learned_bytes)

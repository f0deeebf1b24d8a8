"""What is learned of a conversation decides neither what it is a copy of nor what is held out."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.build.build import build
from data_pipeline.reading.sources import TOO_LONG, read_documents
from data_pipeline.reading.units import split_into_units
from data_pipeline.store.manifest import BuildManifest
from data_pipeline.store.shards import Shards
from data_pipeline.text.cleaning import Tally
from data_pipeline.text.harmony import START, body, last_turn
from data_pipeline.text.harmony_records import whole_conversation
from data_pipeline.text.tokenizer import encode
from tests.data_pipeline.inputs import WORDS, MakeMix
from tests.data_pipeline.reading.test_learned_turns import long_records, source
from tests.support.conversations import random_record
from tests.support.records import write_jsonl

Record = dict[str, Any]
ASSISTANT = {"loss": "assistant"}
EACH = {"loss": "assistant", "turns": "each"}


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randint(0, 99999)) for _ in range(count))


def two_turns(rng: random.Random) -> Record:
    messages = []
    for _ in range(2):
        messages.append({"role": "user", "content": words(rng, 4)})
        answer = {"role": "assistant", "thinking": words(rng, 4), "content": words(rng, 4)}
        messages.append(answer)
    return {"messages": messages}


def write_records(path: Path, records: list[Record]) -> str:
    write_jsonl(path, records)
    return str(path)


def documents(directory: Path, manifest: BuildManifest, source: str, split: str) -> list[bytes]:
    """Return the tokens of each document of a split."""
    shards = Shards(directory / source, manifest.shard_names(source))
    found = []
    for number in np.unique(np.load(directory / source / split / "piece_document.npy")).tolist():
        found.append(shards.tokens(number, 0, int(shards.document_tokens[number])).tobytes())
    return found


@pytest.mark.parametrize(
    ("held_out", "trained"),
    [({}, ASSISTANT), (ASSISTANT, {}), ({}, EACH), (EACH, ASSISTANT), (ASSISTANT, EACH)],
)
def test_a_held_out_conversation_is_trained_under_no_other_mask(
    make_mix: MakeMix, tmp_path: Path, held_out: dict[str, str], trained: dict[str, str]
) -> None:
    rng = random.Random(1)
    records = [two_turns(rng) for _ in range(40)]
    path = write_records(tmp_path / "chat.jsonl", records)
    # a source needs something of its own to train on
    more = write_records(tmp_path / "more.jsonl", [*records, *[two_turns(rng) for _ in range(5)]])
    sources = {
        "a": {"path": path, "format": "harmony", "held_out_share": 0.3, **held_out},
        "b": {"path": more, "format": "harmony", **trained},
    }
    mix = make_mix({"a": ["unused"], "b": ["unused"]}, sources=sources, seq_len=1024)
    out = tmp_path / "out"
    manifest = build(mix, out, progress=False)
    held = set(documents(out, manifest, "a", "held_out"))
    assert len(held) > 5
    mine = set(documents(out, manifest, "a", "train"))
    theirs = set(documents(out, manifest, "b", "train"))
    assert not held & theirs
    assert not mine & theirs
    assert theirs


def short_records(count: int) -> list[Record]:
    """Return conversations of one short turn after the same instructions."""
    rng = random.Random(5)
    instructions = {"role": "system", "content": words(rng, 20)}
    records = []
    for _ in range(count):
        question = {"role": "user", "content": words(rng, 2)}
        answer = {"role": "assistant", "thinking": words(rng, 2), "content": words(rng, 2)}
        records.append({"messages": [instructions, question, answer]})
    return records


def bodies(directory: Path, manifest: BuildManifest, source: str, split: str) -> set[bytes]:
    """Return the documents of a split, each without its system message."""
    found = set()
    for content in documents(directory, manifest, source, split):
        found.add(body(np.frombuffer(content, np.uint32)).tobytes())
    return found


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_a_conversation_and_that_of_an_earlier_build_are_exact_copies(
    make_mix: MakeMix, tmp_path: Path, names: tuple[str, str]
) -> None:
    """Nothing else finds short ones: neither the search for text nor that for near copies."""
    records = short_records(48)
    high = [{**record, "reasoning_effort": "high"} for record in records[:45]]
    earlier = {"path": write_records(tmp_path / "high.jsonl", high), "format": "harmony"}
    mix = make_mix({"chat": ["unused"]}, sources={"chat": earlier}, seq_len=1024)
    build(mix, tmp_path / "earlier", progress=False)
    path = write_records(tmp_path / "chat.jsonl", records[:40] + records[45:])
    sources = {
        "a": {"path": path, "format": "harmony", "held_out_share": 0.3, **ASSISTANT},
        "b": {"path": str(tmp_path / "earlier"), "format": "build"},
    }
    alone = make_mix({"a": ["unused"]}, folder="alone", sources=sources, seq_len=1024)
    manifest = build(alone, tmp_path / "alone_out", progress=False)
    held = bodies(tmp_path / "alone_out", manifest, "a", "held_out")
    assert len(held) > 5
    texts = {name: ["unused"] for name in names}
    mix = make_mix(texts, folder="both", sources=sources, seq_len=1024)
    out = tmp_path / "out"
    manifest = build(mix, out, progress=False)
    assert bodies(out, manifest, "a", "held_out") == held
    mine = bodies(out, manifest, "a", "train")
    theirs = bodies(out, manifest, "b", "train")
    assert not held & theirs and not mine & theirs
    assert len(mine | theirs) == 48 - len(held)
    assert len(theirs if names[0] == "a" else mine) <= 5  # the first source keeps what both have


def with_other_analysis(record: Record) -> Record:
    question, answer, *rest = record["messages"]
    return {"messages": [question, {**answer, "thinking": "something else"}, *rest]}


def with_other_mask(record: Record) -> Record:
    *rest, answer = record["messages"]
    analysis = {"role": "assistant", "channel": "analysis", "content": answer["thinking"]}
    final = {"role": "assistant", "content": answer["content"]}
    return {"messages": [*rest, {**analysis, "loss": False}, final]}


def first_turn(record: Record) -> Record:
    return {"messages": record["messages"][:2]}


@pytest.mark.parametrize(
    ("other", "keys", "num_documents"),
    [
        (with_other_analysis, ASSISTANT, 40),
        (with_other_mask, ASSISTANT, 40),
        (first_turn, EACH, 80),
    ],
)
def test_records_that_show_the_same_conversation_are_copies(
    make_mix: MakeMix, tmp_path: Path, other: Any, keys: dict[str, str], num_documents: int
) -> None:
    rng = random.Random(2)
    records = []
    for _ in range(40):
        record = two_turns(rng)
        records += [other(record), record]
    path = write_records(tmp_path / "chat.jsonl", records)
    chat = {"path": path, "format": "harmony", "held_out_share": 0.3, **keys}
    mix = make_mix({"chat": ["unused"]}, sources={"chat": chat}, seq_len=1024)
    out = tmp_path / "out"
    manifest = build(mix, out, progress=False)
    held = documents(out, manifest, "chat", "held_out")
    trained = documents(out, manifest, "chat", "train")
    assert held and trained
    assert len({*held, *trained}) == len(held) + len(trained) == num_documents


def test_near_copies_are_found_whatever_bears_loss(make_mix: MakeMix, tmp_path: Path) -> None:
    """The analysis of one record of each pair bears no loss, and a word of its answer differs."""
    rng = random.Random(3)
    records = []
    for _ in range(20):
        analysis = {"role": "assistant", "channel": "analysis", "content": words(rng, 80)}
        question = {"role": "user", "content": words(rng, 40)}
        answer = words(rng, 40)
        final = {"role": "assistant", "content": answer}
        records.append({"messages": [question, analysis, final]})
        final = {"role": "assistant", "content": f"{answer} indeed"}
        records.append({"messages": [question, {**analysis, "loss": False}, final]})
    path = write_records(tmp_path / "chat.jsonl", records)
    chat = {"path": path, "format": "harmony", **ASSISTANT}
    mix = make_mix({"chat": ["unused"]}, sources={"chat": chat}, seq_len=4096, near_duplicates=0.8)
    entry = build(mix, tmp_path / "out", progress=False).sources[0]
    assert (entry.documents, entry.near_duplicates) == (20, 20)


def test_the_last_turn_begins_with_the_question_to_its_first_reply() -> None:
    (assistant,) = encode("assistant").tolist()
    num_longer = 0
    for seed in range(60):
        conversation = whole_conversation(random_record(random.Random(seed), more=True)).as_seen()
        tokens, learned = conversation.tokens_and_learned()
        found = last_turn(tokens)
        replies = np.flatnonzero(found == START)[1]
        assert found[0] == START and found[1] != assistant
        assert found[replies + 1] == assistant
        first_learned = len(found) - (len(tokens) - int(np.argmax(learned)))
        assert first_learned == replies + 2, seed  # all messages of these records may be learned
        num_longer += len(found) < len(body(tokens))
    assert num_longer > 10


def test_turns_of_a_record_stay_together_in_a_build_of_a_build(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    path = write_records(tmp_path / "chat.jsonl", long_records(24))
    chat = {"path": path, "format": "harmony", **EACH}
    held = {}
    trained = {}
    for number in range(3):
        keys = {**chat, "held_out_share": 0.3 if number == 2 else 0.0}
        mix = make_mix(
            {"chat": ["unused"]}, folder=f"in{number}", sources={"chat": keys}, seq_len=4096
        )
        out = tmp_path / str(number)
        manifest = build(mix, out, progress=False)
        chat = {"path": str(out), "format": "build"}
        trained[number] = documents(out, manifest, "chat", "train")
        if number == 2:
            held = set(documents(out, manifest, "chat", "held_out"))
    assert len(trained[0]) == len(trained[1]) == 72
    by_record = []
    for first in range(0, 72, 3):  # documents keep their order
        by_record.append({content in held for content in trained[0][first : first + 3]})
    assert all(len(fates) == 1 for fates in by_record)
    assert {True} in by_record and {False} in by_record


def read_turns(path: Path, records: list[Record], seq_len: int) -> tuple[list[int], Tally]:
    """Return the bytes of each document of a source of single turns, and what was counted."""
    config = source(path=write_records(path, records), turns="each")
    tally = Tally()
    found = []
    for unit in split_into_units(config):
        for document in read_documents(config, unit, tally, seq_len):
            found.append(document.num_bytes)
    return found, tally


def test_turns_that_no_row_has_room_for_are_counted_and_not_made(tmp_path: Path) -> None:
    messages = []
    for number in range(1500):
        messages.append({"role": "user", "content": f"{number} " + "why " * 150})
        messages.append({"role": "assistant", "content": f"{number} " + "so " * 150})
    tracemalloc.start()
    found, tally = read_turns(tmp_path / "c.jsonl", [{"messages": messages}], 4096)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) < 20
    assert tally.accepted == len(found)
    assert tally.rejects == {f"{TOO_LONG} of 4096 tokens": 1500 - len(found)}
    assert peak < 20 * 2**20  # all turns together have 1 GB


def test_a_turn_after_one_of_much_analysis_is_made(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "thinking": "word " * 3000, "content": "A"},
        {"role": "user", "content": "R"},
        {"role": "assistant", "thinking": "hm", "content": "B"},
    ]
    found, tally = read_turns(tmp_path / "c.jsonl", [{"messages": messages}], 256)
    assert len(found) == 2 and found[1] < 100
    assert not tally.rejects

"""With `loss: assistant` a build learns what the model generates, and counts what it cannot."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.build.build import build
from data_pipeline.build.origin import fingerprint
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.dataset import IGNORED_LABEL, BuiltData
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.store.manifest import SourceEntry
from data_pipeline.store.provenance import unjoined_turns
from data_pipeline.store.shards import Shards
from data_pipeline.text.conversation_reader import NO_ANALYSIS, NO_LOSS, read_conversations
from data_pipeline.text.harmony import last_turn
from data_pipeline.text.harmony_records import whole_conversation
from data_pipeline.text.tokenizer import decode
from tests.data_pipeline.inputs import WORDS, MakeMix
from tests.support.conversations import random_record
from tests.support.records import write_jsonl

QUESTION = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "thinking": "hm", "content": "A"}
PLAIN = {"role": "assistant", "content": "A"}
NOTE = {"role": "assistant", "channel": "commentary", "content": "wait"}
CALL = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}

PARTS = {"role": "tool", "content": [{"type": "text", "text": "1"}]}


def source(**keys: Any) -> SourceConfig:
    values = {"loss": "assistant", **keys}
    return SourceConfig(
        name="c", language="en", domain="chat", format="harmony", weight=1.0, **values
    )


def chat_mix(make_mix: MakeMix, tmp_path: Path, records: list[dict[str, Any]], **keys: Any) -> Any:
    write_jsonl(tmp_path / "chat.jsonl", records)
    mix_keys = {"seq_len": keys.pop("seq_len", 1024), "near_duplicates": keys.pop("near", 0.0)}
    mix_keys["decontaminate_tokens"] = keys.pop("decontaminate_tokens", 0)
    chat = {"path": "../chat.jsonl", "format": "harmony", "loss": "assistant", **keys}
    return make_mix({"chat": ["unused"]}, sources={"chat": chat}, **mix_keys)


def chat_built(
    make_mix: MakeMix, tmp_path: Path, records: list[dict[str, Any]], *, out: str, **keys: Any
) -> None:
    build(chat_mix(make_mix, tmp_path, records, **keys), tmp_path / out, progress=False)


def built(mix: Any, tmp_path: Path) -> tuple[SourceEntry, Shards]:
    manifest = build(mix, tmp_path / "out", progress=False)
    names = [path.name for path in sorted((tmp_path / "out" / "chat").glob("*.tokens"))]
    return manifest.sources[0], Shards(tmp_path / "out" / "chat", names)


def learned_texts(shards: Shards) -> list[str]:
    """Return the learned tokens of each document, as text."""
    texts = []
    for number in range(shards.num_documents):
        tokens, loss = shards.tokens_and_loss(number, 0, int(shards.document_tokens[number]))
        assert loss is not None
        texts.append(decode(tokens[loss]))
    return texts


def test_the_labels_of_a_row_are_the_learned_tokens_of_its_conversations(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    records = [random_record(random.Random(seed), more=True) for seed in range(30)]
    mix = chat_mix(make_mix, tmp_path, records, seq_len=8192)
    entry, shards = built(mix, tmp_path)
    expected = []
    num_bytes = []
    for record in records:
        conversation = whole_conversation(record).as_seen()
        tokens, learned = conversation.tokens_and_learned()
        expected.append(tokens[learned].tolist())
        num_bytes.append(conversation.num_learned_bytes)
    assert shards.learned_bytes.tolist() == num_bytes
    data = BuiltData.open(tmp_path / "out", mix=mix)
    found = []
    for number in range(data.num_rows(0)):
        row = data.read_row(0, number)
        for begin, end in zip(row.bounds, row.bounds[1:], strict=False):
            labels = row.labels[begin:end]
            if (labels != IGNORED_LABEL).any():
                found.append(labels[labels != IGNORED_LABEL].tolist())
    assert sorted(found) == sorted(expected)
    assert entry.predicted_tokens == sum(len(tokens) for tokens in expected)


def test_each_turn_is_a_document_with_the_history_as_inference_shows_it(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    second = {"role": "assistant", "thinking": "hmm", "content": "B"}
    record = {"messages": [QUESTION, ANSWER, {"role": "user", "content": "R"}, second]}
    entry, shards = built(chat_mix(make_mix, tmp_path, [record], turns="each"), tmp_path)
    assert entry.documents == 2
    assert learned_texts(shards) == [
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>A"
        "<|return|>",
        "<|channel|>analysis<|message|>hmm<|end|><|start|>assistant<|channel|>final<|message|>B"
        "<|return|>",
    ]
    text = decode(shards.tokens(1, 0, int(shards.document_tokens[1])))
    assert "<|message|>hm<|end|>" not in text
    assert "<|channel|>final<|message|>A<|end|><|start|>user" in text


@pytest.mark.parametrize(
    ("messages", "keys", "reason"),
    [
        ([QUESTION], {}, "the last message is not an answer"),
        ([QUESTION, ANSWER, QUESTION], {}, "the last message is not an answer"),
        ([QUESTION, CALL, QUESTION, ANSWER], {}, "tool call without its result"),
        ([QUESTION, PLAIN], {"require_analysis": True}, NO_ANALYSIS),
        ([QUESTION, ANSWER, QUESTION, PLAIN], {"require_analysis": True}, NO_ANALYSIS),
        ([QUESTION, PLAIN], {"require_analysis": True, "loss": "all"}, NO_ANALYSIS),
        ([QUESTION, {**ANSWER, "loss": False}], {}, NO_LOSS),
        ([QUESTION, ANSWER, QUESTION, {**ANSWER, "loss": False}], {}, NO_LOSS),
        ([QUESTION, {**ANSWER, "loss": False}], {"loss": "all"}, "but loss of the source is all"),
        ([QUESTION, CALL], {}, "call of a function in a record without 'tools'"),
        ([QUESTION, NOTE, QUESTION, ANSWER], {}, "stops before an answer or a call"),
    ],
)
def test_what_cannot_be_learned_is_rejected_with_its_reason(
    messages: list[dict[str, Any]], keys: dict[str, Any], reason: str
) -> None:
    reading = read_conversations({"messages": messages}, source(**keys))
    assert not reading.turns
    (found,) = reading.rejects
    assert reason in found


def test_a_turn_is_rejected_alone() -> None:
    messages = [QUESTION, PLAIN, QUESTION, ANSWER]
    reading = read_conversations(
        {"messages": messages}, source(turns="each", require_analysis=True)
    )
    assert len(reading.turns) == 1 and reading.rejects == (NO_ANALYSIS,)
    marked = [QUESTION, {**ANSWER, "loss": False}, QUESTION, ANSWER]
    reading = read_conversations({"messages": marked}, source(turns="each"))
    assert len(reading.turns) == 1 and not reading.rejects and len(reading.notes) == 1


def test_a_call_without_definitions_is_read_where_it_is_not_learned_as_a_call() -> None:
    result = {"role": "tool", "name": "f", "content": "1"}
    messages = [QUESTION, {**CALL, "loss": False}, result, ANSWER]
    assert len(read_conversations({"messages": messages}, source()).turns) == 1
    called = {"messages": [QUESTION, CALL]}
    assert len(read_conversations(called, source(loss="all")).turns) == 1
    defined = {**called, "tools": [{"name": "f"}]}
    assert len(read_conversations(defined, source()).turns) == 1


def test_a_turn_that_fits_no_row_is_left_out_whole_and_counted(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    long = {"role": "assistant", "content": "word " * 300}
    record = {"messages": [QUESTION, ANSWER, QUESTION, long]}
    mix = chat_mix(make_mix, tmp_path, [record], seq_len=256, turns="each", too_long="reject")
    with pytest.raises(DataError, match="1 conversation longer than a row of 256 tokens"):
        build(mix, tmp_path / "strict", progress=False)


def long_records(num_records: int) -> list[dict[str, Any]]:
    """Return conversations of three turns that share instructions of 200 words."""
    rng = random.Random(7)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) + str(rng.randint(0, 999)) for _ in range(count))

    instructions = {"role": "system", "content": words(200)}
    records = []
    for _ in range(num_records):
        messages = [instructions]
        for _ in range(3):
            messages.append({"role": "user", "content": words(30)})
            messages.append({"role": "assistant", "content": words(60)})
        records.append({"messages": messages})
    return records


def record_numbers(data: BuiltData, records: list[dict[str, Any]]) -> list[int]:
    """Return, for each held-out document, the number of the record that it is a turn of."""
    first_questions = [record["messages"][1]["content"] for record in records]
    (domain,) = data.held_out
    numbers = []
    for document in range(domain.num_documents):
        tokens, _ = domain.tokens_and_loss(document, 0, int(domain.document_tokens[document]))
        text = decode(tokens)
        (number,) = [n for n, question in enumerate(first_questions) if question in text]
        numbers.append(number)
    return numbers


def test_turns_of_a_conversation_are_one_cluster_of_the_guard_in_a_build_of_the_build_too(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    records = long_records(24)
    keys = {"seq_len": 4096, "turns": "each", "held_out_share": 0.3}
    chat_built(make_mix, tmp_path, records, **keys, out="first")
    again = {"path": str(tmp_path / "first"), "format": "build", "held_out_share": 0.6}
    mix = make_mix({"chat": ["unused"]}, folder="again", sources={"chat": again}, seq_len=4096)
    build(mix, tmp_path / "second", progress=False)
    for name in ("first", "second"):
        data = BuiltData.open(tmp_path / name)
        clusters = data.held_out[0].document_clusters.tolist()
        numbers = record_numbers(data, records)
        assert len(numbers) == 3 * len(set(numbers)) >= 9
        assert clusters == [numbers.index(number) for number in numbers]
        # builds of earlier versions tell that documents are turns, and no more
        files = dict(data.manifest.files)
        assert unjoined_turns(data.manifest) == []
        del files["chat/held_out/clusters.npy"]
        assert unjoined_turns(replace(data.manifest, files=files)) == ["chat"]


def test_files_that_the_source_calls_clusters_are_larger_ones_than_conversations(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    keys = {"seq_len": 4096, "turns": "each", "held_out_share": 0.3, "cluster_by": "file"}
    chat_built(make_mix, tmp_path, long_records(24), **keys, out="out")
    clusters = BuiltData.open(tmp_path / "out").held_out[0].document_clusters
    assert len(clusters) > 3 and set(clusters.tolist()) == {0}


def test_conversations_of_which_one_turn_is_learned_are_no_clusters(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    chat_built(make_mix, tmp_path, long_records(24), seq_len=4096, held_out_share=0.3, out="out")
    assert not list((tmp_path / "out").rglob("clusters.npy"))


def test_all_turns_of_a_conversation_are_held_out_or_none(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    mix = chat_mix(
        make_mix,
        tmp_path,
        long_records(24),
        seq_len=4096,
        turns="each",
        held_out_share=0.3,
        near=0.8,
        decontaminate_tokens=50,
    )
    entry, shards = built(mix, tmp_path)
    # neither the history nor the instructions make a turn a copy of another
    assert (entry.near_duplicates, entry.contaminated) == (0, 0)
    assert entry.documents + entry.held_out_documents == 72
    assert entry.held_out_documents % 3 == 0 and 0 < entry.held_out_documents < 72
    tokens = shards.tokens(1, 0, int(shards.document_tokens[1]))
    assert decode(last_turn(tokens)).startswith("<|start|>user<|message|>")


def test_keys_of_conversations_change_the_fingerprint_only_where_they_are_used(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    records = [{"messages": [QUESTION, ANSWER]}]
    plain = fingerprint(chat_mix(make_mix, tmp_path, records, loss="all"))
    same = {"loss": "all", "turns": "last", "require_analysis": False, "too_long": "reject"}
    assert fingerprint(chat_mix(make_mix, tmp_path, records, **same)) == plain
    found = {plain}
    for keys in ({}, {"turns": "each"}, {"require_analysis": True}, {"shape": "openai"}):
        found.add(fingerprint(chat_mix(make_mix, tmp_path, records, **keys)))
    assert len(found) == 5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"turns": "each"}, "turns is each, but loss is all"),
        ({"format": "jsonl", "loss": "assistant"}, "loss is given, but format: jsonl"),
        ({"format": "jsonl", "require_analysis": True}, "require_analysis is given, but"),
        ({"format": "jsonl", "too_long": "reject"}, "too_long is given, but format: jsonl"),
        ({"too_long": "cut"}, "too_long"),
    ],
)
def test_keys_that_cannot_be_right_are_refused(
    make_mix: MakeMix, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_mix({"en": ["text"]}, sources={"en": {"format": "harmony", **keys}})


def test_a_rendering_with_its_mask_has_the_same_tokens() -> None:
    conversation = whole_conversation({"messages": [QUESTION, ANSWER]}).as_seen()
    tokens, learned = conversation.tokens_and_learned()
    assert np.array_equal(tokens, conversation.tokens())
    assert np.array_equal(learned, conversation.learned())


@pytest.mark.parametrize(
    ("record", "keys", "cure"),
    [
        ({"messages": [QUESTION, PLAIN]}, {"require_analysis": True}, "reasoning_effort: low"),
        ({"messages": [QUESTION, CALL, QUESTION, ANSWER]}, {}, "needs its result next"),
        ({"messages": [QUESTION, CALL]}, {}, "Give the record the definitions"),
        ({"messages": [QUESTION, CALL, PARTS, PLAIN]}, {}, "Set shape: openai"),
        ({"dialog": []}, {}, "need the shape of the source to name it"),
        ({"messages": [QUESTION, {**PLAIN, "function_call": {"name": "f"}}]}, {}, "shape: openai"),
    ],
)
def test_a_source_of_rejects_is_refused_with_a_cure(
    make_mix: MakeMix, tmp_path: Path, record: dict[str, Any], keys: dict[str, Any], cure: str
) -> None:
    mix = chat_mix(make_mix, tmp_path, [record], **keys)
    with pytest.raises(DataError, match=f"1 of 1 documents cannot be used.*{cure}"):
        build(mix, tmp_path / "out", progress=False)

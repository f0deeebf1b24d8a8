"""Loss masks from the documents to the labels of a row, and to everything that counts tokens."""

from __future__ import annotations

import dataclasses
import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_pipeline
from data_pipeline.build.build import build
from data_pipeline.build.summary import describe_build
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import IGNORED_LABEL, BuiltData, PackedRow, read_row
from data_pipeline.errors import DataError
from data_pipeline.mixture.ledger import Ledger, Segment
from data_pipeline.mixture.mixture import Mixture
from data_pipeline.mixture.row_origins import row_origins
from data_pipeline.reading.document import Document
from data_pipeline.store.files import sha256_of
from data_pipeline.store.manifest import FileEntry
from data_pipeline.store.packing import Integers, RowPieces, Segments, pack
from data_pipeline.store.shards import LossMask, Shards
from data_pipeline.text.cleaning import Place
from data_pipeline.text.harmony import Conversation
from data_pipeline.text.tokenizer import Tokens
from tests.data_pipeline.conftest import mix_maker
from tests.data_pipeline.inputs import MakeMix, make_texts, mask_conversations, mask_texts
from tests.data_pipeline.test_dataset import all_rows
from tests.support.records import write_jsonl

SEQ_LEN = 32
GUARD = {"domains": [{"name": "japanese", "language": "ja", "sources": ["ja"]}]}
TwoBuilds = tuple[BuiltData, BuiltData]


def make_two_builds(mix: MixConfig, tmp_path: Path) -> TwoBuilds:
    """Return the build of a mix without masks, and the build with them."""
    build(mix, tmp_path / "plain", progress=False)
    with pytest.MonkeyPatch.context() as monkeypatch:
        mask_texts(monkeypatch)
        mask_conversations(monkeypatch)
        build(mix, tmp_path / "masked", progress=False)
    return BuiltData.open(tmp_path / "plain"), BuiltData.open(tmp_path / "masked")


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> TwoBuilds:
    directory = tmp_path_factory.mktemp("masks")
    texts = {"ja": make_texts(40, "a"), "en": make_texts(60, "ccc", 8)}
    mix = mix_maker(directory)(texts, seq_len=SEQ_LEN, held_out_share=0.2, guard=GUARD)
    return make_two_builds(mix, directory)


def rows_of(built: BuiltData) -> list[PackedRow]:
    """Return all rows, and those of the held-out documents packed by themselves."""
    rows = all_rows(built)
    for domain in built.held_out:
        alone = domain.pack(np.arange(domain.num_documents))
        for row in range(alone.num_rows):
            rows.append(alone.read_row(row))
    return rows


def mask_of_row(built: BuiltData, source: int, row: int) -> list[bool]:
    """Return the mask of a row's labels, put together from its documents."""
    name = built.source_names[source]
    folder = built.directory / name
    shards = Shards(folder, built.manifest.shard_names(name))
    arrays = {}
    for field in ("row_offsets", "piece_document", "piece_start", "piece_pairs"):
        arrays[field] = np.load(folder / "train" / f"{field}.npy")
    found: list[bool] = []
    for piece in range(*arrays["row_offsets"][row : row + 2].tolist()):
        start = int(arrays["piece_start"][piece])
        pairs = int(arrays["piece_pairs"][piece])
        loss = shards.loss(int(arrays["piece_document"][piece]), start + 1, start + pairs + 1)
        assert loss is not None
        found += loss.tolist()
    return found + [False] * (built.seq_len - len(found))


def test_masks_change_labels_and_nothing_else_of_a_row(builds: TwoBuilds) -> None:
    plain, masked = builds
    num_masked = 0
    for mine, theirs in zip(rows_of(masked), rows_of(plain), strict=True):
        assert np.array_equal(mine.input_ids, theirs.input_ids)
        assert np.array_equal(mine.position_ids, theirs.position_ids)
        assert mine.bounds == theirs.bounds
        kept = mine.labels != IGNORED_LABEL
        assert np.array_equal(mine.labels[kept], theirs.labels[kept])
        num_masked += np.count_nonzero(theirs.labels[~kept] != IGNORED_LABEL)
    assert num_masked > 100


def test_label_is_there_exactly_where_the_mask_of_its_document_says(builds: TwoBuilds) -> None:
    _, masked = builds
    for source in range(len(masked.source_names)):
        for row in range(masked.num_rows(source)):
            labels = masked.read_row(source, row).labels
            expected = mask_of_row(masked, source, row)
            assert (labels != IGNORED_LABEL).tolist() == expected
            parts = []
            for first in range(0, SEQ_LEN, 8):
                parts.append(masked.read_row(source, row, slice(first, first + 8)).labels)
            assert np.array_equal(np.concatenate(parts), labels)


def test_tokens_of_a_row_are_its_labels_and_its_slots_are_counted_beside_them(
    builds: TwoBuilds,
) -> None:
    plain, masked = builds
    for source, entry in enumerate(masked.manifest.sources):
        counted = []
        for row in range(masked.num_rows(source)):
            labels = masked.read_row(source, row).labels
            counted.append(np.count_nonzero(labels != IGNORED_LABEL))
        assert masked.row_tokens(source).tolist() == counted
        assert entry.predicted_tokens == sum(counted)
        same = plain.manifest.sources[source]
        assert entry.used_slots == entry.slots == same.predicted_tokens == same.used_slots
        assert entry.tokens == same.tokens
        assert entry.bytes == same.bytes
        assert entry.has_loss
        assert not same.has_loss


def test_held_out_set_counts_what_is_learned(builds: TwoBuilds) -> None:
    plain, masked = builds
    (mine,) = masked.held_out
    (theirs,) = plain.held_out
    assert mine.document_bytes.tolist() == [1 + size // 3 for size in theirs.document_bytes]
    assert mine.document_tokens.tolist() == theirs.document_tokens.tolist()
    counted = 0
    for row in range(mine.num_rows):
        counted += np.count_nonzero(mine.read_row(row).labels != IGNORED_LABEL)
    entry = masked.manifest.sources[0]
    assert entry.held_out_tokens == counted
    assert masked.manifest.guard_sets()["japanese"].tokens == counted


def test_build_without_masks_names_them_nowhere(builds: TwoBuilds) -> None:
    plain, masked = builds
    assert "slots" not in (plain.directory / "manifest.json").read_text()
    assert "slots" in (masked.directory / "manifest.json").read_text()
    assert not list(plain.directory.rglob("piece_loss.npy"))
    assert len(list(masked.directory.rglob("piece_loss.npy"))) == 4
    for path in plain.directory.rglob("*.tokens"):
        assert path.read_bytes()[8:12] == b"\1\0\0\0"


def test_masks_do_not_change_what_is_a_copy_or_held_out(make_mix: MakeMix, tmp_path: Path) -> None:
    """Hashes, signatures and runs of tokens are those of ids."""
    ja = make_texts(120, "ja")
    en = make_texts(150, "en", 20)
    mix = make_mix(
        {"ja": [*ja, ja[3], ja[70]], "en": [*en, *ja[:5], *en[:9]]},
        held_out_share=0.1,
        near_duplicates=0.8,
        decontaminate_tokens=50,
    )
    plain, masked = make_two_builds(mix, tmp_path)
    for mine, theirs in zip(masked.manifest.sources, plain.manifest.sources, strict=True):
        ignored = {"predicted_tokens": 0, "held_out_tokens": 0, "slots": 0}
        assert dataclasses.replace(mine, **ignored) == dataclasses.replace(theirs, **ignored)
    assert sum(entry.near_duplicates for entry in masked.manifest.sources) > 0
    assert sum(entry.duplicates for entry in masked.manifest.sources) > 0
    assert sum(entry.contaminated for entry in masked.manifest.sources) > 0


def test_masks_do_not_change_which_conversations_are_copies_or_held_out(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    rng = random.Random(4)
    answers = []
    for _ in range(80):
        answers.append(" ".join(f"w{rng.randrange(10**5)}" for _ in range(60)))
    records = []
    for answer in (*answers, *answers[:7], *[f"{text} indeed" for text in answers[7:16]]):
        question = {"role": "user", "content": "Tell me more."}
        records.append({"messages": [question, {"role": "assistant", "content": answer}]})
    chat = tmp_path / "chat.jsonl"
    write_jsonl(chat, records)
    mix = make_mix(
        {"chat": []},
        sources={"chat": {"format": "harmony", "path": str(chat), "held_out_share": 0.2}},
        seq_len=1024,
        near_duplicates=0.8,
    )
    plain, masked = make_two_builds(mix, tmp_path)
    mine = masked.manifest.sources[0]
    theirs = plain.manifest.sources[0]
    ignored = {"predicted_tokens": 0, "held_out_tokens": 0, "slots": 0}
    assert dataclasses.replace(mine, **ignored) == dataclasses.replace(theirs, **ignored)
    assert mine.predicted_tokens < theirs.predicted_tokens
    assert mine.duplicates > 0 and mine.near_duplicates > 0 and mine.held_out_documents > 0


def test_stages_count_learned_tokens_and_slots(make_mix: MakeMix, tmp_path: Path) -> None:
    stages = [{"seq_len": 32, "share": 0.5}, {"seq_len": 64, "share": 0.5}]
    mix = make_mix({"ja": make_texts(60, "a")}, stages=stages)
    plain, masked = make_two_builds(mix, tmp_path)
    (entry,) = masked.manifest.sources
    (same,) = plain.manifest.sources
    for number, stage in enumerate(entry.stages):
        built = masked.of_stage(number)
        counted = 0
        for row in range(built.num_rows(0)):
            counted += np.count_nonzero(built.read_row(0, row).labels != IGNORED_LABEL)
        assert stage.predicted_tokens == counted == built.row_tokens(0).sum()
        assert stage.slots == same.stages[number].predicted_tokens
    assert entry.slots == sum(stage.slots for stage in entry.stages)


def constant(weights: dict[str, float]) -> Ledger:
    return Ledger((Segment(start_step=0, weights=weights, max_epochs={}, mix_hash=""),))


def test_shares_of_a_build_are_of_learned_tokens(builds: TwoBuilds) -> None:
    _, masked = builds
    weights = {"ja": 0.3, "en": 0.7}
    mixture = Mixture(masked, constant(weights), seed=3)
    given = np.zeros(2)
    largest = max(masked.row_tokens(0).max(), masked.row_tokens(1).max())
    for step in range(40):
        batch = mixture.global_batch(step, 4)
        for source, row, tokens in zip(
            batch.sources, batch.rows, batch.predicted_tokens, strict=True
        ):
            labels = masked.read_row(int(source), int(row)).labels
            assert tokens == np.count_nonzero(labels != IGNORED_LABEL)
            given[source] += tokens
            assert abs(given[0] - weights["ja"] * given.sum()) <= largest
    assert given.sum() > 1000


class MaskedRows:
    """Rows of documents of given lengths and learned labels, without a build behind them."""

    def __init__(self, documents: dict[str, list[tuple[int, int]]]) -> None:
        self.source_names = tuple(documents)
        self._row_tokens = []
        self.row_slots = []
        for pairs_and_learned in documents.values():
            pairs, learned = np.array(pairs_and_learned, np.int64).T
            rows = pack(Segments.whole(np.arange(len(pairs)), pairs + 1), SEQ_LEN)
            rows = dataclasses.replace(
                rows, piece_loss=np.minimum(learned, pairs)[rows.piece_document]
            )
            self._row_tokens.append(rows.row_tokens())
            self.row_slots.append(rows.row_slots())

    def row_tokens(self, source: int) -> Integers:
        return self._row_tokens[source]


DOCUMENTS = st.lists(
    st.tuples(st.integers(1, SEQ_LEN), st.integers(1, SEQ_LEN)), min_size=1, max_size=30
)


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(DOCUMENTS, min_size=2, max_size=4),
    parts=st.lists(st.integers(1, 20), min_size=4, max_size=4),
)
def test_shares_hold_at_every_row_for_learned_tokens_whatever_the_slots(
    documents: list[list[tuple[int, int]]], parts: list[int]
) -> None:
    """No source is further from its share than the learned tokens of the largest row."""
    names = [f"source{number}" for number in range(len(documents))]
    rows = MaskedRows(dict(zip(names, documents, strict=True)))
    total = sum(parts[: len(names)])
    weights = {name: parts[number] / total for number, name in enumerate(names)}
    mixture = Mixture(rows, constant(weights), seed=5)
    largest = max(int(rows.row_tokens(number).max()) for number in range(len(names)))
    given_tokens = np.zeros(len(names))
    for step in range(30):
        batch = mixture.global_batch(step, 2)
        for source, tokens in zip(batch.sources, batch.predicted_tokens, strict=True):
            given_tokens[source] += tokens
            wanted = np.array(list(weights.values())) * given_tokens.sum()
            assert np.abs(given_tokens - wanted).max() <= largest + 1e-6
            assert 1 <= tokens <= rows.row_slots[source].max()


def test_documents_with_masks_are_not_laid_end_to_end(make_mix: MakeMix, tmp_path: Path) -> None:
    mix = make_mix({"ja": make_texts(20, "a")}, packing="concatenate")
    with pytest.raises(DataError, match="source 'ja' holds conversations or loss masks"):
        make_two_builds(mix, tmp_path)


def test_label_that_bears_no_loss_is_nowhere_in_a_row() -> None:
    """The last token of a document is a label only: another one there changes no bit of a row."""
    pieces = RowPieces(
        document=np.array([0, 1]), start=np.array([0, 0]), pairs=np.array([4, 3], np.int64)
    )
    loss = np.array([False, True, False, True, False])

    def row(last: int) -> PackedRow:
        def read(document: int, start: int, stop: int) -> tuple[Tokens, LossMask]:
            tokens = np.array([5, 6, 7, 8, last] if document == 0 else [1, 2, 3, last], np.uint32)
            return tokens[start:stop], loss[-len(tokens) :][start:stop]

        return read_row(pieces, 10, read, slice(None))

    one, other = row(100), row(199_999)
    assert one.labels.tolist() == [6, -100, 8, -100, -100, 3, -100, -100, -100, -100]
    for field in ("input_ids", "labels", "position_ids"):
        assert getattr(one, field).tobytes() == getattr(other, field).tobytes()


def test_tables_say_how_much_of_a_source_bears_loss(builds: TwoBuilds) -> None:
    plain, masked = builds
    entry = masked.manifest.sources[0]
    expected = f"{entry.predicted_tokens:,} of {entry.slots:,}"
    assert expected in describe_build(masked.manifest.sources)
    assert " of " not in describe_build(plain.manifest.sources)


def test_origin_of_a_piece_has_its_slots_and_its_labels(builds: TwoBuilds) -> None:
    _, masked = builds
    row = masked.read_row(0, 0)
    for number, piece in enumerate(row_origins(masked, 0, 0, None)):
        start, stop = row.bounds[number : number + 2]
        assert (piece.first_slot, piece.slots) == (start, stop - start)
        assert piece.predicted_tokens == np.count_nonzero(row.labels[start:stop] >= 0)


def conversations(directory: Path, name: str) -> dict[bytes, tuple[bytes, int, int]]:
    """Return mask, bytes and learned bytes of the documents that a source trains on, by tokens."""
    built = BuiltData.open(directory)
    folder = directory / name
    shards = Shards(folder, built.manifest.shard_names(name))
    found = {}
    for document in np.unique(np.load(folder / "train" / "piece_document.npy")).tolist():
        tokens, loss = shards.tokens_and_loss(document, 0, int(shards.document_tokens[document]))
        mask = b"" if loss is None else loss.tobytes()
        sizes = int(shards.document_bytes[document]), int(shards.learned_bytes[document])
        found[tokens.tobytes()] = (mask, *sizes)
    return found


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A source of conversations that get masks."""
    mask_conversations(monkeypatch)
    sample = Path(data_pipeline.__file__).parent / "sample" / "en_chat.jsonl"
    return {"format": "harmony", "path": str(sample)}


def test_conversations_of_an_earlier_build_keep_their_tokens_and_masks(
    make_mix: MakeMix, tmp_path: Path, chat: dict[str, str]
) -> None:
    first = make_mix({"chat": [], "en": make_texts(20, "e")}, seq_len=2048, sources={"chat": chat})
    build(first, tmp_path / "first", progress=False)
    earlier = {"format": "build", "path": str(tmp_path / "first"), "build_sources": ["chat"]}
    second = make_mix({"again": []}, folder="x", seq_len=2048, sources={"again": earlier})
    build(second, tmp_path / "second", progress=False)
    expected = conversations(tmp_path / "first", "chat")
    assert len(expected) > 40
    assert conversations(tmp_path / "second", "again") == expected
    entry = BuiltData.open(tmp_path / "second").manifest.sources[0]
    assert entry.slots > entry.predicted_tokens
    cut = make_mix({"again": []}, folder="y", packing="concatenate", sources={"again": earlier})
    with pytest.raises(DataError, match="source 'again' holds conversations or loss masks"):
        build(dataclasses.replace(cut, seq_len=2048), tmp_path / "third", progress=False)


def test_conversation_of_which_nothing_is_learned_is_rejected_and_counted(
    make_mix: MakeMix, tmp_path: Path, chat: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    masked = Document.from_conversation
    number = itertools.count()

    def sometimes_empty(conversation: Conversation, place: Place) -> Document:
        document = masked(conversation, place)
        if next(number) % 15:
            return document
        nothing = np.zeros(len(document.tokenize()), bool)
        nothing[0] = True  # the first token is nobody's label
        return dataclasses.replace(document, loss=lambda: nothing)

    monkeypatch.setattr(Document, "from_conversation", sometimes_empty)
    mix = make_mix({"chat": []}, seq_len=2048, sources={"chat": chat}, max_reject_share=0.2)
    (entry,) = build(mix, tmp_path / "out", progress=False).sources
    assert entry.rejects == {"no token bears loss": 3}
    assert len(conversations(tmp_path / "out", "chat")) == entry.documents


def other_counts(path: Path) -> None:
    values = np.load(path)
    values[0] += 1
    np.save(path, values)


@pytest.mark.parametrize("damage", [other_counts, Path.unlink])
def test_counts_of_learned_labels_that_do_not_fit_the_masks_are_refused(
    builds: TwoBuilds, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    _, masked = builds
    directory = tmp_path / "damaged"
    shutil.copytree(masked.directory, directory)
    path = directory / "en" / "train" / "piece_loss.npy"
    damage(path)
    name = path.relative_to(directory).as_posix()
    files = dict(masked.manifest.files)
    if path.exists():
        files[name] = FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
    else:
        del files[name]
    dataclasses.replace(masked.manifest, files=files).write(directory)
    with pytest.raises(DataError, match="row arrays do not fit the documents"):
        BuiltData.open(directory)

"""Planted held-out text is found, taken out and reported, and nothing is lost without a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.__main__ import main
from data_pipeline.build.build import build
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.fates.dropped import (
    CONTAMINATED,
    COPIES,
    HELD_OUT_COPIES,
    NEAR_COPIES,
    STOCK_TEXT,
    STRETCHES,
    describe_dropped,
    describe_stock_text,
)
from data_pipeline.store.manifest import BuildManifest, SourceEntry, read_manifest
from data_pipeline.text.tokenizer import decode, encode
from tests.data_pipeline.inputs import MakeMix, write_jsonl

KANA = "\u3042\u3044\u3046\u3048\u304a\u304b\u304d\u304f\u3051\u3053\u3055\u3057\u3059\u305b\u305d"
CODE_WORDS = ("def ", "return ", "if x", "for y in ", "self.", "(a, b)", " = ", ":\n    ")


def prose(seed: int, words: int) -> str:
    """Return English-like text that shares no run of 50 tokens with that of another seed."""
    rng = np.random.default_rng(seed)
    return " ".join(f"w{number}" for number in rng.integers(0, 100_000, words))


def kana(seed: int, characters: int) -> str:
    """Return Japanese-like text."""
    rng = np.random.default_rng(seed)
    return "".join(KANA[number] for number in rng.integers(0, len(KANA), characters))


def code(seed: int, words: int) -> str:
    """Return text with the line ends and indents of code."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(CODE_WORDS), words)
    return "".join(f"{CODE_WORDS[kind]}v{rng.integers(0, 99_999)}" for kind in chosen)


def guard_files(tmp_path: Path, texts: list[str], **rules: Any) -> dict[str, Any]:
    """Return the keys of a mix with guard files of its own."""
    write_jsonl(tmp_path / "in" / "mine.jsonl", texts)
    return {
        "guard": {"domains": [{"name": "mine", "language": "en", "path": "mine.jsonl"}]},
        "decontaminate_tokens": None,
        "decontamination": {"tokens": 50, **rules},
        "seq_len": 256,
    }


def training_texts(directory: Path, source: int = 0) -> list[str]:
    """Return what each piece in the training rows of a source says."""
    built = BuiltData.open(directory)
    texts = []
    for number in range(built.num_rows(source)):
        row = built.read_row(source, number)
        for begin, end in zip(row.bounds[:-1], row.bounds[1:], strict=True):
            texts.append(decode(row.input_ids[begin:end].astype("uint32")))
    return texts


def adds_up(entry: SourceEntry) -> bool:
    """Return whether what was read is what is trained on, held out and dropped."""
    documents = entry.documents + entry.held_out_documents
    tokens = entry.tokens + entry.held_out_tokens + entry.held_out_documents
    for counts in entry.dropped.values():
        if "tokens" in counts:
            documents += counts["documents"]
            tokens += counts["tokens"]
    return (documents, tokens) == (entry.read_documents, entry.read_tokens)


@pytest.mark.parametrize("count", [1, 11, 300])
@pytest.mark.parametrize("write", [prose, kana, code])
def test_guard_text_is_dropped_however_many_documents_have_it(
    make_mix: MakeMix, tmp_path: Path, count: int, write: Any
) -> None:
    secret = write(1, 200)
    clean = [write(100 + number, 150) for number in range(max(2 * count, 8))]
    quotes = [f"{write(5000 + number, 40)}\n{secret}" for number in range(count)]
    keys = guard_files(tmp_path, [secret, *(write(50 + number, 200) for number in range(7))])
    manifest = build(make_mix({"en": [*clean, *quotes]}, **keys), tmp_path / "out", False)
    entry, own = manifest.sources
    assert entry.dropped[CONTAMINATED]["documents"] == entry.contaminated == count
    assert (entry.documents, own.held_out_found) == (len(clean), 1)
    assert entry.exempted == {} and manifest.stock_text == ()
    assert adds_up(entry)
    assert not any(secret[20:60] in text for text in training_texts(tmp_path / "out"))


def test_short_guard_documents_are_searched_whole_and_shorter_ones_are_told(
    make_mix: MakeMix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = [prose(number, 8 + number % 4) for number in range(20)]
    shorter = [prose(700 + number, 4) for number in range(3)]
    japanese = [kana(number, 45) for number in range(5)]
    lengths = [len(encode(text)) for text in short + japanese]
    assert min(lengths) >= 20 and max(lengths) < 50 and len(set(lengths)) > 5
    clean = [prose(100 + number, 150) for number in range(60)]
    quotes = []
    for number, text in enumerate([*short, *japanese]):
        quotes.append(f"{prose(900 + number, 20)}: {text}. {prose(950 + number, 20)}")
    book = f"{prose(1, 900)} {short[0]} {prose(2, 900)}"
    keys = guard_files(tmp_path, [*short, *shorter, *japanese]) | {"max_mislabelled_share": 1}
    make_mix({"en": [*clean, *quotes, book]}, **keys)
    monkeypatch.chdir(tmp_path)
    for command in ("build", "plan", "audit"):
        assert main([command, str(tmp_path / "in" / "mix.yaml"), "--workers", "1"]) == 0
        assert "3 too short to be searched for in training text" in capsys.readouterr().out
    (directory,) = (tmp_path / "data").glob("mix-*/manifest.json")
    entry, own = read_manifest(directory.parent).sources
    assert (entry.documents, entry.contaminated) == (61, len(quotes))
    assert entry.dropped[STRETCHES]["cut_documents"] == 1 and adds_up(entry)
    assert (own.held_out_found, own.held_out_unsearched) == (25, 3)
    joined = "".join(training_texts(directory.parent))
    for text in short + japanese:
        assert text[4:-4] not in joined


@pytest.mark.slow
def test_guard_text_in_ten_thousand_documents_is_dropped(make_mix: MakeMix, tmp_path: Path) -> None:
    secret = prose(1, 60)
    texts = [prose(100 + number, 60) for number in range(11_000)]
    quotes = [f"{prose(50_000 + number, 20)} {secret}" for number in range(10_000)]
    keys = guard_files(tmp_path, [secret, *(prose(50 + number, 60) for number in range(7))])
    entry = build(make_mix({"en": texts + quotes}, **keys), tmp_path / "out", False).sources[0]
    assert (entry.documents, entry.contaminated) == (11_000, 10_000)


def test_a_long_document_loses_the_stretch_and_keeps_both_sides(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    secret = prose(1, 200)
    before, after = prose(2, 2000), prose(3, 3000)
    book = f"{before} {secret[100:700]} {after}"
    keys = guard_files(tmp_path, [secret, *(prose(50 + number, 200) for number in range(7))])
    texts = {"en": [book, *(prose(100 + number, 100) for number in range(10))]}
    mix = make_mix(texts, **(keys | {"seq_len": 4096}))
    entry, own = build(mix, tmp_path / "out", False).sources
    assert (entry.documents, entry.contaminated, own.held_out_found) == (11, 0, 1)
    lost = entry.dropped[STRETCHES]
    assert lost["documents"] == 0 and lost["cut_documents"] == 1
    assert 100 < lost["tokens"] < 600
    assert adds_up(entry)
    joined = "".join(training_texts(tmp_path / "out"))
    assert secret[130:680] not in joined and secret[300:400] not in joined
    assert before[:5000] in joined and after[2000:10_000] in joined


def test_sides_of_a_cut_document_are_documents_of_a_later_build(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    secret = kana(1, 400)
    before, after = kana(2, 3000), kana(3, 4000)
    keys = guard_files(tmp_path, [secret, *(kana(50 + number, 400) for number in range(7))])
    texts = {"ja": [before + secret + after, *(kana(100 + number, 100) for number in range(5))]}
    entry = build(make_mix(texts, **keys), tmp_path / "first", False).sources[0]
    assert entry.dropped[STRETCHES]["cut_documents"] == 1
    sources = {"ja": {"format": "build", "path": str(tmp_path / "first"), "build_sources": ["ja"]}}
    mix = make_mix({"ja": ["unused"]}, folder="again", sources=sources, seq_len=256)
    again = build(mix, tmp_path / "second", False).sources[0]
    assert (again.documents, again.rejects) == (7, {})
    joined = "".join(training_texts(tmp_path / "second"))
    assert secret[100:300] not in joined
    assert "\ufffd" not in joined.replace(joined[-1:], "")[: len(before) // 2]


def test_a_conversation_is_never_cut(make_mix: MakeMix, tmp_path: Path) -> None:
    secret = prose(1, 60)
    path = tmp_path / "in" / "chat.jsonl"
    path.parent.mkdir()
    records = []
    for number in range(20):
        answer = prose(100 + number, 900)
        if number == 3:
            answer = f"{answer} {secret} {prose(7, 900)}"
        messages = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": answer}]
        records.append(json.dumps({"messages": messages}))
    keys = guard_files(tmp_path, [secret, *(prose(50 + number, 60) for number in range(7))])
    sources = {"chat": {"format": "harmony", "path": str(tmp_path / "talk.jsonl")}}
    (tmp_path / "talk.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    mix = make_mix({"chat": ["unused"]}, sources=sources, **(keys | {"seq_len": 8192}))
    entry = build(mix, tmp_path / "out", False).sources[0]
    assert (entry.documents, entry.contaminated) == (19, 1)
    assert STRETCHES not in entry.dropped and adds_up(entry)


def licensed(tmp_path: Path, **keys: Any) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Return texts that all end with the same license, some of them held out, and mix keys."""
    licence = prose(1, 60)
    held = [f"{prose(50 + number, 100)} {licence}" for number in range(8)]
    texts = [f"{prose(100 + number, 300)} {licence}" for number in range(40)]
    mix_keys = {
        "held_out_share": {"held": 0.9},
        "weights": {"held": 0.0, "en": 1.0},
        "decontamination": {"tokens": 50, **keys},
        "decontaminate_tokens": None,
        "seq_len": 256,
    }
    return {"held": held, "en": texts}, mix_keys


def test_stock_text_stays_only_if_the_mix_says_so_and_is_listed(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    texts, keys = licensed(tmp_path, stock_text=0.5)
    manifest = build(make_mix(texts, **keys), tmp_path / "out", False)
    _, entry = manifest.sources
    assert (entry.documents, entry.contaminated) == (40, 0)
    assert entry.exempted[STOCK_TEXT]["documents"] == 40
    assert entry.exempted[STOCK_TEXT]["tokens"] > 40 * 60
    (stock,) = manifest.stock_text
    assert (stock.held_out_by, stock.documents >= 40) == ("held", True)
    assert stock.text.strip()[10:100] in prose(1, 60)
    assert len(stock.examples) == 3
    told = describe_stock_text(manifest.stock_text)
    assert "'held' holds out" in told and "en.jsonl" in told and stock.text[20:60] in told
    assert "kept all the same: stock text" in describe_dropped(manifest.sources)
    assert read_manifest(tmp_path / "out") == manifest


def test_stock_text_is_counted_where_it_stays(make_mix: MakeMix, tmp_path: Path) -> None:
    secret, stock, beside = prose(2, 200), prose(1, 22), prose(3, 22)
    held = []
    for number in range(8):
        held.append(f"{prose(50 + number, 100)} {stock} {prose(60 + number, 100)} {beside}")
    whole = [f"{prose(100 + number, 600)} {stock}" for number in range(20)]
    cut = []
    for number in range(20):
        sides = prose(200 + number, 900), prose(300 + number, 900)
        cut.append(f"{sides[0]} {stock} {secret} {beside} {sides[1]}")
    keys = guard_files(tmp_path, [secret, *(prose(400 + n, 200) for n in range(7))], stock_text=0.2)
    keys |= {"held_out_share": {"held": 0.9}, "weights": {"held": 0.0, "en": 1.0}}
    texts = {"held": held, "en": [*cut, *whole]}
    manifest = build(make_mix(texts, **keys), tmp_path / "out", False)
    entry = manifest.sources[1]
    assert entry.dropped[STRETCHES]["cut_documents"] == 20
    assert entry.exempted[STOCK_TEXT]["documents"] == 20
    listed = {}
    for one in manifest.stock_text:
        listed[one.text.strip()[10:90]] = one
    # one document of 'held' is trained on, whole
    assert [one.documents for one in manifest.stock_text] == [21, 1]
    assert listed[beside[10:90]].examples == (
        "held/documents-00000.tokens (from held.jsonl), document 2",
    )
    for example in listed[stock[10:90]].examples[1:]:
        assert int(example.split()[-1]) >= len(cut)


def test_stock_text_goes_by_default(make_mix: MakeMix, tmp_path: Path) -> None:
    texts, keys = licensed(tmp_path)
    manifest = build(make_mix(texts, **keys), tmp_path / "out", False)
    _, entry = manifest.sources
    assert entry.exempted == {} and manifest.stock_text == ()
    assert entry.contaminated == 0 and entry.dropped[STRETCHES]["cut_documents"] == 40
    assert prose(1, 60)[40:200] not in "".join(training_texts(tmp_path / "out", 1))


def test_text_of_guard_files_is_never_stock_text(make_mix: MakeMix, tmp_path: Path) -> None:
    secret = prose(1, 200)
    clean = [prose(100 + number, 150) for number in range(60)]
    quotes = [f"{prose(5000 + number, 40)}\n{secret}" for number in range(40)]
    texts = [secret, *(prose(50 + number, 200) for number in range(7))]
    keys = guard_files(tmp_path, texts, stock_text=0.01)
    manifest = build(make_mix({"en": [*clean, *quotes]}, **keys), tmp_path / "out", False)
    assert manifest.sources[0].contaminated == 40 and manifest.stock_text == ()


def test_the_output_is_the_same_for_every_number_of_workers(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    texts, keys = licensed(tmp_path, stock_text=0.5)
    mix = make_mix(texts, **keys)
    first = build(mix, tmp_path / "one", False, workers=1)
    assert build(mix, tmp_path / "two", False, workers=2) == first


@given(
    copies=st.integers(0, 4),
    near=st.integers(0, 3),
    quotes=st.integers(0, 3),
    cut=st.integers(0, 2),
)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_is_read_is_trained_on_held_out_or_dropped_for_a_reason(
    make_mix: MakeMix, tmp_path_factory: Any, copies: int, near: int, quotes: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("out")
    base = [prose(100 + number, 120) for number in range(20)]
    held = [prose(50 + number, 150) for number in range(8)]
    english = [*base, *base[:copies], *(f"{text} end" for text in base[:near])]
    english += [f"{prose(900 + number, 150)} {held[0]}" for number in range(quotes)]
    english += [
        f"{prose(700 + number, 900)} {held[1]} {prose(800 + number, 900)}" for number in range(cut)
    ]
    english.append(held[2])
    other = [*base[:copies], *(prose(300 + number, 100) for number in range(12)), ""]
    mix = make_mix(
        {"en": english, "more": other, "held": held},
        weights={"en": 0.5, "more": 0.5, "held": 0.0},
        held_out_share={"held": 1.0, "more": 0.1},
        near_duplicates=0.8,
        decontaminate_tokens=50,
        max_reject_share=0.5,
        seq_len=512,
    )
    manifest: BuildManifest = build(mix, folder / "out", False)
    entry, more, _ = manifest.sources
    for one in manifest.sources:
        assert adds_up(one)
    assert entry.dropped[HELD_OUT_COPIES]["documents"] >= 1
    assert entry.dropped.get(COPIES, {"documents": 0})["documents"] == copies
    assert entry.dropped.get(CONTAMINATED, {"documents": 0})["documents"] >= quotes
    assert entry.dropped.get(STRETCHES, {"cut_documents": 0})["cut_documents"] == cut
    assert more.dropped[next(iter(more.rejects))] == {"documents": 1}
    assert entry.dropped.get(NEAR_COPIES, {"documents": 0})["documents"] >= near


def test_a_source_that_copies_another_is_named_with_the_figure(
    make_mix: MakeMix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = [prose(100 + number, 100) for number in range(60)]
    second = [*first, *(prose(900 + number, 100) for number in range(6))]
    mix = make_mix({"a": first, "b": second}, held_out_share={"a": 0.3})
    _, copied = build(mix, tmp_path / "out", False).sources
    assert copied.documents == 6
    assert "source 'b' copies source 'a': 60 of 66 documents" in caplog.text


def test_a_source_that_is_another_one_is_refused_by_the_name_of_that_one(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    texts = [prose(100 + number, 100) for number in range(40)]
    near = [f"{text} and one more word" for text in texts]
    mix = make_mix({"a": texts, "b": near}, held_out_share={"a": 0.2}, near_duplicates=0.8)
    with pytest.raises(DataError, match="source 'b' copies source 'a': 40 of 40 documents"):
        build(mix, tmp_path / "out", False)


def test_near_copies_are_all_counted_by_the_source_of_their_original(
    make_mix: MakeMix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = [prose(100 + number, 100) for number in range(40)]
    second = [prose(300 + number, 100) for number in range(30)]
    odd = iter([f"{text} and one more word" for text in first])
    even = iter([f"{text} and one more word" for text in second])
    copies = []
    for number in range(70):
        copies.append(next(odd) if number % 2 or number >= 60 else next(even))
    texts = {"a": first, "b": second, "c": [*copies, prose(1, 100)]}
    mix = make_mix(texts, held_out_share={"b": 0.5}, near_duplicates=0.8)
    manifest = build(mix, tmp_path / "out", False)
    assert manifest.sources[2].near_duplicates == 70
    assert "source 'c' copies source 'a': 40 of 71 documents" in caplog.text


def test_a_source_that_repeats_its_own_held_out_text_is_told_so(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    template = prose(1, 100)
    texts = [f"{template} {prose(100 + number, 20)}" for number in range(30)]
    mix = make_mix({"en": texts}, held_out_share=0.2, decontaminate_tokens=50)
    with pytest.raises(DataError, match="the source itself holds out: its documents repeat"):
        build(mix, tmp_path / "out", False)


def test_a_copied_guard_set_is_told_so_although_documents_were_cut_for_own_text(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    secrets = [prose(number, 60) for number in range(60)]
    paragraph = prose(99, 40)
    quotes = [f"{secret} so it says" for secret in secrets]
    long = [f"{prose(100 + number, 900)} {paragraph}" for number in range(50)]
    keys = guard_files(tmp_path, secrets) | {"held_out_share": 0.1, "near_duplicates": 0}
    with pytest.raises(DataError, match="Other sources hold it out or guard files have it"):
        build(make_mix({"en": [*quotes, *long]}, **keys), tmp_path / "out", False)


def test_the_older_key_means_the_tokens_and_both_are_refused(make_mix: MakeMix) -> None:
    texts = {"en": ["a"]}
    assert make_mix(texts, decontaminate_tokens=60).decontamination_rules.tokens == 60
    section = {"tokens": 70}
    mix = make_mix(texts, decontaminate_tokens=None, decontamination=section)
    assert mix.decontamination_rules.tokens == 70
    with pytest.raises(ConfigError, match="older name of"):
        make_mix(texts, decontaminate_tokens=60, decontamination=section)
    with pytest.raises(ConfigError, match="tokens is 5, must be 0"):
        make_mix(texts, decontaminate_tokens=None, decontamination={"tokens": 5})


def test_build_plan_and_audit_show_what_was_dropped(
    make_mix: MakeMix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = [prose(100 + number, 60) for number in range(10)]
    make_mix({"en": [*texts, *texts[:3]]}, seq_len=256, max_mislabelled_share=1)
    mix_file = str(tmp_path / "in" / "mix.yaml")
    monkeypatch.chdir(tmp_path)
    shown = "en      exact copies  "
    for command in ("build", "plan", "audit"):
        assert main([command, mix_file, "--workers", "1"]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "exact copies" in line]
        assert line.startswith(shown) and line.split()[3] == "3"
    page = (tmp_path / "data" / "mix-audit.html").read_text(encoding="utf-8")
    assert "What the build of this mix dropped" in page and "<td>exact copies</td>" in page


def test_audit_shows_no_losses_of_a_build_of_other_contents(
    make_mix: MakeMix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = [prose(100 + number, 60) for number in range(10)]
    make_mix({"en": [*texts, *texts[:3]]}, seq_len=256, max_mislabelled_share=1)
    monkeypatch.chdir(tmp_path)
    input_file = tmp_path / "in" / "en.jsonl"
    page = tmp_path / "data" / "mix-audit.html"
    arguments = [str(tmp_path / "in" / "mix.yaml"), "--workers", "1"]
    for cache in ([], ["--no_cache"]):
        assert main(["build", *arguments, *cache, "--out", str(tmp_path / "data" / "mix-1")]) == 0
        content = input_file.read_bytes()
        input_file.write_bytes(content.replace(b"w1", b"w2"))
        capsys.readouterr()
        assert main(["audit", *arguments]) == 0
        told = capsys.readouterr().out
        if cache:
            assert "names and sizes (contents were not compared)" in told
            assert "contents were not compared" in page.read_text(encoding="utf-8")
        else:
            assert "but of other content" in told and "exact copies" not in told
            assert "dropped" not in page.read_text(encoding="utf-8")
        input_file.write_bytes(content)
        shutil.rmtree(tmp_path / "data")

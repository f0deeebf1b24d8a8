"""An audit tells what a source is, and fails one that is not what its label says."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_pipeline.__main__ import main
from data_pipeline.audit.audit import SourceAudit, audit
from data_pipeline.audit.page import audit_page
from data_pipeline.audit.shown_conversation import MAX_TOKENS
from data_pipeline.config.mix_file import load_mix
from data_pipeline.reading.sources import read_texts
from data_pipeline.text.cleaning import Tally
from data_pipeline.text.language import disagrees, language_of
from tests.data_pipeline.inputs import MakeMix
from tests.support.records import write_jsonl

ROOT = Path(__file__).parents[3]


def sample(name: str) -> list[str]:
    mix = load_mix(ROOT / "configs" / "mixes" / "sample.yaml")
    (source,) = (source for source in mix.sources if source.name == name)
    return list(read_texts(source, Tally()))


def audit_of(
    make_mix: MakeMix, texts: Sequence[str], name: str = "ja", **keys: object
) -> SourceAudit:
    return audit(make_mix({name: list(texts)}, **keys)).sources[0]


@pytest.mark.parametrize("name", ["ja_essay", "ja_story", "ja_reference", "ja_practical"])
def test_japanese_is_told_from_its_kana(name: str) -> None:
    assert {language_of(text) for text in sample(name)} == {"ja"}


@pytest.mark.parametrize("name", ["en_web", "en_reference"])
def test_english_is_told_by_the_model(name: str) -> None:
    found = [language_of(text) for text in sample(name)]
    assert set(found) <= {"en", None} and found.count("en") > 0.9 * len(found)


def test_an_untranslated_page_with_a_japanese_heading_is_english() -> None:
    page = (
        "\u540d\u524d\n"
        + "This page describes how the program reads its configuration files at start. " * 20
    )
    assert language_of(page) == "en" and disagrees(page, "ja")
    sentence = "\u6b21\u306e\u30b3\u30de\u30f3\u30c9\u3092\u5b9f\u884c\u3057\u307e\u3059\u3002"
    commands = f"{sentence} apt-get install "
    assert language_of(commands * 10) == "ja"


def test_code_mathematics_and_short_text_are_not_judged() -> None:
    assert not disagrees("for i in range(10): print(i)\n" * 9, "code")
    assert not disagrees("\u6c34" * 100, "math") and language_of("12 34 ok") is None


def test_a_mislabelled_source_fails_with_its_share_and_what_it_is_instead(
    make_mix: MakeMix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    japanese, english = sample("ja_essay")[:18], sample("en_web")[:2]
    make_mix({"ja": japanese + english}, max_mislabelled_share=0.05)
    mix, page = tmp_path / "in" / "mix.yaml", tmp_path / "page.html"
    arguments = [
        "audit",
        str(mix),
        "--out",
        str(page),
        "--json",
        str(tmp_path / "a.json"),
        "--workers",
        "1",
    ]
    assert main(arguments) == 65
    message = capsys.readouterr().err
    assert "source 'ja': 2 of 20 documents (10.0%) are not in 'ja' but in en (2)" in message
    assert "2 of 20 documents" in page.read_text() and (tmp_path / "a.json").exists()
    make_mix({"ja": japanese + english}, max_mislabelled_share=0.2)
    assert main(arguments) == 0


def test_damage_is_counted(make_mix: MakeMix) -> None:
    base = sample("ja_essay")[:6]
    wrong = [
        base[0].encode("utf-8").decode("latin-1"),
        base[1] + "\ufffd",
        base[2].encode("utf-8").decode("cp932", errors="ignore"),
    ]
    before = audit_of(make_mix, base)
    found = audit_of(make_mix, [*base, *wrong, base[0], base[3] + "\x07", "plain x\u00b2"])
    assert found.mojibake - before.mojibake == 3 and found.duplicates == 1
    assert found.control > before.control
    assert found.nfkc_damaged > before.nfkc_damaged and found.nfkc_changed > before.nfkc_changed
    assert sum(found.lengths) == found.documents == 12
    assert 0.4 < found.tokens_per_character < 1.5


def test_clean_text_raises_no_alarm(make_mix: MakeMix) -> None:
    found = audit_of(make_mix, sample("ja_reference"))
    assert (found.mojibake, found.control, found.duplicates, found.mislabelled) == (0, 0, 0, 0)


def test_a_large_source_is_sampled_over_all_its_units(
    make_mix: MakeMix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.reading.units.MIN_UNIT_BYTES", 20_000)
    mix = make_mix({"ja": sample("ja_essay") + sample("en_web")})
    (found,) = audit(mix, limit=10).sources
    assert found.documents == 10 and set(found.languages) == {"ja", "en"}


def test_the_table_tells_what_nfkc_would_do_and_no_chart_is_all_zero(make_mix: MakeMix) -> None:
    page = audit_page(audit(make_mix({"ja": [*sample("ja_essay")[:3], "x\u00b2 + y\u00b2"]})))
    assert "<th>NFKC changes</th><th>NFKC damages</th>" in page and "<td>25.00%</td>" in page
    clean_page = audit_page(audit(make_mix({"ja": sample("ja_essay")[:3]})))
    assert ">Share of documents" not in clean_page and ">Tokens per character" in clean_page


def test_no_text_gets_into_the_page_unseen(make_mix: MakeMix) -> None:
    hostile = "This is English text\x1b[2J\x9b and it \u202estands in the wrong source. " * 3
    page = audit_page(audit(make_mix({"ja": [*sample("ja_essay")[:3], hostile]})))
    assert not set(page) & set("\x1b\x9b\u202e")
    assert r"text\x1b[2J\x9b and it \u202estands" in page


def test_the_page_stands_alone_and_shows_no_markup_of_the_text(make_mix: MakeMix) -> None:
    english = (
        "<script>alert(1)</script> This is English text and it stands in the wrong source. " * 3
    )
    result = audit(make_mix({"ja": [*sample("ja_essay")[:3], english]}))
    page = audit_page(result)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "src=" not in page and not re.search(r'href="[^#]', page)
    for chart in (
        "Share of documents in another language",
        "Tokens per character",
        "Documents by characters",
        "Language found, documents",
    ):
        assert f">{chart}" in page


QUESTION = {"role": "user", "content": "What <b>now</b>?"}
CHAT = [
    {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": "First."},
            QUESTION,
            {"role": "assistant", "thinking": "Hm.", "content": "Then \x1b[2J that."},
        ]
    },
    {"messages": [QUESTION, {"role": "assistant", "thinking": "Hm.", "content": "Yes."}]},
    {"messages": [QUESTION, {"role": "assistant", "content": "Without a thought."}]},
    {"messages": [QUESTION, {"role": "assistant", "thinking": "Hm.", "content": "word " * 300}]},
    {"messages": [QUESTION]},
]
LEARNED_END = r"<|channel|>final<|message|>Then \x1b[2J that.<|return|>"


@pytest.fixture
def chat_mix_path(make_mix: MakeMix, tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "chat.jsonl", CHAT)
    keys = {"format": "harmony", "path": "../chat.jsonl", "loss": "assistant"}
    chat = {**keys, "require_analysis": True}
    make_mix({"en": ["unused"]}, seq_len=256, sources={"en": chat})
    (mix,) = tmp_path.rglob("*.yaml")
    return mix


def test_an_audit_marks_what_is_learned_of_a_conversation_and_counts_rejects(
    chat_mix_path: Path,
) -> None:
    result = audit(load_mix(chat_mix_path))
    (found,) = result.sources
    assert found.rejects == {
        "last turn without analysis": 1,
        "conversation longer than a row of 256 tokens": 1,
        "the last message is not an answer or call of the assistant": 1,
    }
    assert (found.documents, found.rejected) == (2, 3)
    assert 0 < found.learned_tokens < found.document_tokens / 2
    assert "en: 1 conversation longer than a row of 256 tokens; 1 last turn" in result.describe()
    assert f"{found.document_tokens:,}" in result.describe()
    shown = found.conversation
    assert shown is not None and shown.place.endswith("chat.jsonl:1")
    assert [is_learned for _, is_learned in shown.pieces] == [False, True]
    text, learned = shown.pieces[0][0], shown.pieces[1][0]
    assert text.endswith("<|start|>assistant") and "final<|message|>First.<|end|>" in text
    assert learned.startswith("<|channel|>analysis<|message|>Hm.<|end|>")
    page = audit_page(result)
    assert f"{html.escape(LEARNED_END)}</mark>" in page
    assert "<td>2</td>" in page and "cannot be used: 1 conversation longer" in page
    assert "&lt;b&gt;now&lt;/b&gt;" in page and "\x1b" not in page


def test_the_marks_are_brackets_but_on_a_terminal(
    chat_mix_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    arguments = ["audit", str(chat_mix_path), "--out", str(tmp_path / "audit.html")]
    assert main(arguments) == 0
    plain = capsys.readouterr().out
    assert f"{LEARNED_END}]]" in plain and "<|start|>assistant[[<|channel|>analysis" in plain
    assert "\x1b" not in plain
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(arguments) == 0
    colored = capsys.readouterr().out
    # only what marks a piece is obeyed by the terminal, not what a text holds
    assert f"{LEARNED_END}\x1b[0m" in colored and "\x1b[2J" not in colored


def test_a_long_conversation_is_shown_from_its_end(make_mix: MakeMix, tmp_path: Path) -> None:
    record = {"messages": [QUESTION, {"role": "assistant", "content": "word " * 2000}]}
    write_jsonl(tmp_path / "chat.jsonl", [record])
    chat = {"format": "harmony", "path": "../chat.jsonl"}
    (found,) = audit(make_mix({"en": ["unused"]}, seq_len=4096, sources={"en": chat})).sources
    shown = found.conversation
    assert shown is not None and shown.num_left_out == shown.num_tokens - MAX_TOKENS
    assert shown.num_learned == shown.num_tokens - 1 == found.learned_tokens
    assert shown.pieces[-1][0].endswith("<|return|>") and "are not shown" in shown.title

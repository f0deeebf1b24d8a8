"""The corpus script makes plain text with licenses from Debian's packages.

The test that fetches real packages skips itself without a network.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import corpus
from bench.corpus import html_text, make_corpus, manual_text
from data_pipeline.audit.audit import audit
from data_pipeline.config.mix_file import load_mix
from data_pipeline.errors import DataError
from data_pipeline.text.language import language_of

MANUAL = r"""'\" t
.\" Copyright (C) somebody
.TH NAME 1 2020-01-01
.SH NAME
tool \- does \fBone\fP thing
.SH "SEE ALSO"
.BR cat (1),
.IR dog (2)
.PP
A \fIsecond\fR paragraph \(em with 100\ kB.
.nf
    indented \\ code
.fi
"""


def test_a_manual_page_becomes_plain_text() -> None:
    assert manual_text(MANUAL) == (
        "NAME\ntool - does one thing\n\n"
        "SEE ALSO\ncat(1),\ndog(2)\n\n"
        "A second paragraph -- with 100 kB.\n\n"
        "    indented \\ code"
    )


def test_an_html_page_becomes_plain_text() -> None:
    page = (
        "<html><head><title>no</title></head><body><h1>Title</h1>"
        "<p>One &amp;\n two</p><script>no()</script>"
        "<pre>a\n  b</pre><ul><li>x</li><li>y</li></ul></body></html>"
    )
    assert html_text(page) == "Title\n\nOne & two\n\na\n  b\n\nx\n\ny"


def test_a_machine_without_apt_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"apt-get: not found\. The corpus needs a Debian system"):
        make_corpus(tmp_path / "out")


def test_packages_that_cannot_be_fetched_are_an_error_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho 'E: no such package' >&2\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(DataError, match="apt-get download: failed: E: no such package"):
        make_corpus(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_real_packages_give_parallel_text_with_licenses(tmp_path: Path) -> None:
    small = ("debian-reference-ja", "debian-reference-en")
    try:
        counts = make_corpus(tmp_path / "corpus", small)
    except DataError as error:
        pytest.skip(f"NOT TESTED, the corpus cannot be fetched here: {error}")
    assert counts["ja"] == counts["en"] > 5
    for language in ("ja", "en"):
        text = (tmp_path / "corpus" / f"{language}.jsonl").read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.split("\n")[:-1]]
        assert {record["licence"] for record in records} == {"GPL-2+"}
        assert {record["package"] for record in records} == {f"debian-reference-{language}"}
        assert len({record["id"] for record in records}) == len(records)
        found = {language_of(record["text"]) for record in records}
        assert found <= {language, None}
    path = tmp_path / "corpus" / "mix.yaml"
    path.write_text(
        "seq_len: 1024\nseed: 1\nsources:\n"
        "  - {name: ja, language: ja, domain: docs, path: ja.jsonl, weight: 0.5}\n"
        "  - {name: en, language: en, domain: docs, path: en.jsonl, weight: 0.5}\n"
    )
    result = audit(load_mix(path))
    assert not result.problems()
    japanese, english = result.sources
    assert japanese.tokens_per_character > english.tokens_per_character


def test_every_package_of_the_recipe_is_one_of_the_issue() -> None:
    named = {"debian-handbook", "debian-reference-ja", "manpages-ja", "installation-guide-amd64"}
    assert named <= set(corpus.PACKAGES)

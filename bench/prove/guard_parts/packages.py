"""The texts of the behavior proof, one JSONL file for each use, no package used twice.

    base_en, base_ja           what the base model learns
    replay_en, new_ja          what continual pretraining adds
    guide_en, manual_en, held_ja   whole packages that nothing is trained on: guard domains

All come from Debian's documentation and a package mirror; none of it enters the repository.
Documents are cut at paragraphs, so that one domain has hundreds of them.
"""

from __future__ import annotations

import gzip
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import corpus
from guard_parts.text import cut, evenly, write_documents

PACKAGES: dict[str, tuple[str, ...]] = {
    "base_en": ("debian-handbook", "debian-reference-en", "manpages", "manpages-dev"),
    "base_ja": ("debian-handbook", "manpages-ja", "manpages-ja-dev"),
    "replay_en": ("git-doc", "postgresql-doc-15"),
    "new_ja": (
        "aptitude-doc-ja",
        "debian-policy-ja",
        "debian-reference-ja",
        "developers-reference-ja",
    ),
    "guide_en": (
        "aptitude-doc-en",
        "debian-faq",
        "debian-policy",
        "developers-reference",
        "installation-guide-amd64",
        "maint-guide",
    ),
    "manual_en": ("bash-doc", "gnuplot-doc", "octave-doc"),
    "held_ja": ("debian-faq-ja", "installation-guide-amd64", "maint-guide-ja"),
}
"""Packages of each use; the last two letters are the language that is taken of them.

Only a package that holds both languages serves two uses, one with each.
"""
DOCUMENT_CHARACTERS = 1500
"""Of a document, about."""
_FOLDER = re.compile(r"/([a-z]{2})(?:[-_][A-Z]{2})?(?:\.utf8)?/")
_SUFFIX = re.compile(r"\.([a-z]{2})\.html(?:\.gz)?$")
_MANUAL = re.compile(r"usr/share/man/(ja/)?man\d[a-z]*/[^/]+\.gz")
_JAPANESE = re.compile("[\u3041-\u30ff\u4e00-\u9fff]")


def write_texts(out_dir: Path, max_bytes: int) -> None:
    """Write `<use>.jsonl` for every use, unless it is there.

    Args:
        out_dir: Where they go.
        max_bytes: UTF-8 bytes of one use; from a larger one documents are taken evenly.

    Raises:
        DataError: the packages cannot be fetched.
    """
    missing = [use for use in PACKAGES if not (out_dir / f"{use}.jsonl").exists()]
    names: set[str] = set()
    for use in missing:
        names.update(PACKAGES[use])
    if not names:
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[tuple[str, str]]] = {use: [] for use in missing}
    with tempfile.TemporaryDirectory(prefix="proof-") as temporary:
        for package in corpus.unpack(Path(temporary), sorted(names)):
            wanted = {use[-2:] for use in missing if package.name in PACKAGES[use]}
            pages = list(_pages(package, wanted))
            for use in missing:
                if package.name in PACKAGES[use]:
                    texts[use] += [page for page in pages if page[0] == use[-2:]]
    for use, pages in texts.items():
        _write(out_dir / f"{use}.jsonl", [text for _, text in pages], max_bytes)


def _pages(package: corpus.Package, wanted: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the language and the text of every page of a package in a language that is wanted."""
    for path in package.files():
        name = path.relative_to(package.root).as_posix()
        manual = _MANUAL.fullmatch(name)
        if not manual and not name.endswith((".html", ".html.gz")):
            continue
        language = language_of_page(name, package.name)
        if manual:
            language = "ja" if manual[1] else "en"
        if language not in wanted:
            continue
        content = path.read_bytes()
        if name.endswith(".gz"):
            content = gzip.decompress(content)
        source = content.decode("utf-8", errors="replace")
        if not manual:
            yield language, corpus.html_text(source)
        elif not source.startswith(".so "):
            yield language, corpus.manual_text(source)


def language_of_page(name: str, package: str) -> str:
    """Return the language of an HTML page by its path, else by its package.

    Args:
        name: Path of the page inside its package.
        package: Name of the package.
    """
    found = _FOLDER.search(name) or _SUFFIX.search(name)
    if found:
        return found[1]
    return "ja" if package.endswith("-ja") else "en"


def _write(path: Path, texts: Sequence[str], max_bytes: int) -> None:
    documents: list[str] = []
    seen: set[str] = set()
    for text in texts:
        if path.stem.endswith("ja") and not is_japanese(text):
            continue
        for document in cut(text, DOCUMENT_CHARACTERS):
            if document not in seen:
                seen.add(document)
                documents.append(document)
    write_documents(path, evenly(documents, max_bytes))


def is_japanese(text: str) -> bool:
    """Return whether more than a quarter of the characters are Japanese."""
    return len(_JAPANESE.findall(text)) > len(text) / 4

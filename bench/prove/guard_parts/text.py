"""Real text for the guard's proof, as one JSONL file per domain.

It comes from Debian's documentation and Python's library; questions and answers are made of manual
pages.  Nothing of it enters the repository.  Documents are cut at paragraphs to some 500
characters, so that there are enough of them to hold some out.  Which ones are held out follows from
their text alone.
"""

from __future__ import annotations

import json
import re
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from bench import corpus
from data_pipeline.store.files import atomic_write

MATHEMATICS = ("maxima-doc", "octave-doc", "libmpfr-doc")
"""Debian packages whose manuals are mathematics and computing with it."""
DOCUMENT_CHARACTERS = 500
"""Of a document of this proof, about: a loss of 1 % takes some 800 documents a domain."""
LIMITS_BYTES = {
    "prose": 2_200_000,
    "reference": 2_500_000,
    "code": 2_500_000,
    "math": 2_200_000,
    "chat": 1_500_000,
    "japanese": 12_000_000,
}
"""UTF-8 bytes taken from each domain."""
_OTHER_CODE = frozenset(("test", "tests", "site-packages", "dist-packages", "lib2to3", "encodings"))
"""Folders of the Python library whose modules are not taken."""
_SECTION = re.compile(r"^([A-Z][A-Z ]+)\n(.*?)(?=^[A-Z][A-Z ]+\n|\Z)", re.MULTILINE | re.DOTALL)
"""Title and body of a section of a manual page."""
_JAPANESE = re.compile("[\u3041-\u30ff\u4e00-\u9fff]")


def write_domains(out_dir: Path) -> None:
    """Write `<domain>.jsonl` for every domain, on a Debian system with a package mirror.

    Raises:
        DataError: the packages cannot be fetched.
    """
    with tempfile.TemporaryDirectory(prefix="proof-") as temporary:
        corpus.make_corpus(Path(temporary))
        english = list(_records(Path(temporary) / "en.jsonl"))
        japanese = list(_records(Path(temporary) / "ja.jsonl"))
    pages = []
    prose = []
    for package, text in english:
        if package.startswith("manpages"):
            pages.append(text)
        else:
            prose.append(text)
    texts: dict[str, Iterable[str]] = {
        "prose": prose,
        "reference": pages[::2],
        "code": _code(),
        "math": _mathematics(),
        "chat": _chat(pages[1::2]),
        "japanese": [text for _, text in japanese if _is_japanese(text)],
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    for domain, sources in texts.items():
        _write(out_dir / f"{domain}.jsonl", sources, LIMITS_BYTES[domain])


def _is_japanese(text: str) -> bool:
    """Return whether more than a quarter of the characters are Japanese."""
    return len(_JAPANESE.findall(text)) > len(text) / 4


def _records(path: Path) -> Iterator[tuple[str, str]]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            yield record["package"], record["text"]


def _write(path: Path, texts: Iterable[str], limit_bytes: int) -> None:
    """Take documents evenly from all of `texts` until there are `limit_bytes`."""
    documents = [document for text in texts for document in cut(text, DOCUMENT_CHARACTERS)]
    write_documents(path, evenly(documents, limit_bytes))


def evenly(documents: Sequence[str], max_bytes: int) -> list[str]:
    """Return documents that lie evenly in a list, of about so many UTF-8 bytes together."""
    size = sum(len(document.encode()) for document in documents)
    keep = min(1.0, max_bytes / max(size, 1))
    chosen = []
    for index, document in enumerate(documents):
        if int((index + 1) * keep) > int(index * keep):
            chosen.append(document)
    return chosen


def write_documents(path: Path, documents: Iterable[str]) -> None:
    """Write a JSONL file with one document a line, which appears once it is whole."""
    with atomic_write(path) as file:
        for document in documents:
            line = json.dumps({"text": document}, ensure_ascii=False)
            file.write(line.encode("utf-8") + b"\n")


def cut(text: str, characters: int) -> Iterator[str]:
    """Yield pieces of about so many characters, cut at empty lines where there are some."""
    piece = ""
    for paragraph in re.split(r"\n\n+", text):
        piece += f"{paragraph}\n\n"
        while len(piece) > 2 * characters:
            yield piece[:characters]
            piece = piece[characters:]
        if len(piece) > characters:
            yield piece.strip()
            piece = ""
    if len(piece) > 200:
        yield piece.strip()


def _code() -> Iterator[str]:
    """Yield the modules of the Python library that runs this script."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("**/*.py")):
        if _OTHER_CODE.isdisjoint(path.parts):
            yield path.read_text(encoding="utf-8", errors="ignore")


def _mathematics() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="proof-") as temporary:
        work = Path(temporary)
        for package in corpus.unpack(work, MATHEMATICS):
            for page in sorted(package.root.rglob("*.html")):
                if page.is_file() and not re.search(r"/(de|es|pt|pt_BR|ja)(\.utf8)?/", str(page)):
                    yield corpus.html_text(page.read_text(encoding="utf-8", errors="ignore"))


def _chat(pages: list[str]) -> Iterator[str]:
    """Yield questions, reasoning and answers in the layout of Harmony, made of manual pages."""
    for page in pages:
        sections = dict(_SECTION.findall(page))
        name, _, summary = " ".join(sections.get("NAME", "").split()).partition(" - ")
        if not (name and summary and sections.get("DESCRIPTION")):
            continue
        for title, body in islice(sections.items(), 1, 12):
            paragraphs = [" ".join(part.split()) for part in body.split("\n\n") if len(part) > 120]
            for number, paragraph in enumerate(paragraphs[:6]):
                yield _dialogue(name, summary, title, paragraph, number)


def _dialogue(name: str, summary: str, title: str, paragraph: str, number: int) -> str:
    asked = (
        f"What does the {title.lower()} of {name} say?",
        f"I use {name}. Explain this to me: {paragraph[:60].rsplit(' ', 1)[0]}...",
        f"Tell me more about {name}, please. What should I know about its {title.lower()}?",
    )[number % 3]
    thought = (
        f"The user asks about {name}. {name} is for this: {summary}. "
        f"The section is {title}, part {number + 1}."
    )
    return (
        f"<|start|>user<|message|>{asked}<|end|>"
        f"<|start|>assistant<|channel|>analysis<|message|>{thought}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{paragraph}<|return|>"
    )

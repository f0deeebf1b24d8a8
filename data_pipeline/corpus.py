"""Parallel Japanese/English documentation that Debian packages, as JSONL: real text for trying and
measuring.

    apt-get download -> dpkg-deb -x into a temporary folder -> manual pages, HTML -> plain text ->
    one JSONL a language

Decisions
    Nothing is installed and nothing of it enters the repository; the user asks for it and gets it
    from Debian. Each record holds what a reader must know to use it lawfully: package, version,
    path, and licence: the `License` fields of the package's copyright file, or that file's first
    lines, and for a manual page its own notice. Conversion is plain: tags and macros go, text,
    lists and examples stay.  The text is for measuring, not for a model.
"""

from __future__ import annotations

import gzip
import html.parser
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.store.files import atomic_write

PACKAGES = (
    *(
        "debian-handbook",
        "debian-reference-ja",
        "debian-reference-en",
        "manpages-ja",
        "manpages-ja-dev",
    ),
    *("manpages", "manpages-dev", "installation-guide-amd64"),
)
_MIN_CHARACTERS = 200
_SKIPPED_TAGS = frozenset(("script", "style", "head", "nav"))
_BLOCK_TAGS = frozenset(
    (
        "p",
        "div",
        "li",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "pre",
        "tr",
        "dt",
        "dd",
        "br",
        "table",
        "ul",
        "ol",
        "dl",
    )
)
_MAN_FONT = re.compile(r"\\f(?:\[[^]]*\]|\([A-Z]{2}|.)|\\s[-+]?\d+|\\[&|^/,%:)]")
_MAN_CHARACTERS = {
    "\\-": "-", "\\(em": "--", "\\(en": "-", "\\(bu": "*", "\\(aq": "'", "\\(dq": '"', "\\e": "\\", "\\ ": " ",
    "\\(co": "(c)", "\\(lq": '"', "\\(rq": '"', "\\(oq": "'", "\\(cq": "'", "\\(ga": "`", "\\(ha": "^", "\\(ti": "~",
    "\\~": " ", "\\0": " ", "\\(rs": "\\", "\\(->": "->", "\\(<=": "<=", "\\(>=": ">=", "\\(mc": "u", "\\(mu": "x",
}  # fmt: skip
_MAN_TEXT_MACROS = frozenset(
    ("B", "I", "BR", "BI", "IB", "IR", "RB", "RI", "SM", "SB", "SH", "SS", "TP", "IP", "UR")
)
_MAN_JOINED = frozenset(("BR", "BI", "IB", "IR", "RB", "RI"))


def make_corpus(out_dir: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, int]:
    """Fetch the packages and write `ja.jsonl` and `en.jsonl`.

    Returns:
        Documents by language.

    Raises:
        DataError: apt-get or dpkg-deb is missing, or the packages cannot be fetched.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    counts = {}
    with tempfile.TemporaryDirectory(prefix="corpus-") as temporary:
        records = sorted(
            _records(Path(temporary), packages),
            key=lambda record: (record["language"], record["id"]),
        )
        for language in ("ja", "en"):
            chosen = [record for record in records if record["language"] == language]
            counts[language] = len(chosen)
            with atomic_write(out_dir / f"{language}.jsonl") as file:
                for record in chosen:
                    file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
    if not all(counts.values()):
        raise DataError(f"{out_dir}: the packages gave no text in one of the languages: {counts}.")
    return counts


def _records(work_dir: Path, packages: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    _call(work_dir, "apt-get", "download", *packages)
    for deb in sorted(work_dir.glob("*.deb")):
        package, version = deb.name.split("_")[:2]
        root = work_dir / package
        _call(work_dir, "dpkg-deb", "-x", str(deb), str(root))
        licence = _licence(root, package)
        for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink()):
            language, text, notice = _document(path, path.relative_to(root).as_posix(), package)
            if language and len(text) >= _MIN_CHARACTERS:
                name = path.relative_to(root).as_posix()
                yield {
                    "id": f"{package}/{name}",
                    "language": language,
                    "package": package,
                    "version": version.replace("%3a", ":"),
                    "licence": f"{licence}; {notice}" if notice else licence,
                    "text": text,
                }


def _call(work_dir: Path, *command: str) -> None:
    try:
        subprocess.run(
            command, cwd=work_dir, check=True, capture_output=True, text=True, timeout=600
        )
    except FileNotFoundError as error:
        raise DataError(
            f"{command[0]}: not found. The corpus needs a Debian system with apt."
        ) from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise DataError(
            f"{' '.join(command[:2])}: failed: {output[-1] if output else error}. Is there a network, and are the "
            "package lists fresh (apt-get update)?"
        ) from error


def _document(path: Path, name: str, package: str) -> tuple[str, str, str]:
    """(language, text, notice) of a file; the language is empty if the file is none of the
    documents.
    """
    manual = re.fullmatch(r"usr/share/man/(ja/)?man\d[a-z]*/[^/]+\.gz", name)
    if manual:
        return _manual(path, "ja" if manual[1] else "en")
    match = re.search(r"/(ja-JP|en-US|ja|en)/.*\.html(\.gz)?$", name) or re.search(
        r"\.(ja|en)\.html(\.gz)?$", name
    )
    language = (
        match[1][:2] if match else package[-2:] if name.endswith((".html", ".html.gz")) else ""
    )
    if language not in ("ja", "en") or "/single" in name:
        return "", "", ""
    content = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    return language, html_text(content.decode("utf-8", errors="replace")), ""


def _manual(path: Path, language: str) -> tuple[str, str, str]:
    content = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    if content.startswith(".so "):
        return "", "", ""
    notice = re.search(r"%%%LICENSE_START\(([^)]*)\)|SPDX-License-Identifier: (\S.*)", content)
    return (
        language,
        manual_text(content),
        f"page: {(notice[1] or notice[2]).strip()}" if notice else "",
    )


def manual_text(source: str) -> str:
    """Plain text of a manual page in troff's man macros."""
    lines: list[str] = []
    for line in source.splitlines():
        if line.startswith(('.\\"', "'\\\"", "'\\", '\\"')):
            continue
        if line.startswith((".", "'")):
            line = _macro(line)
        for code, character in _MAN_CHARACTERS.items():
            line = line.replace(code, character)
        lines.append(_MAN_FONT.sub("", line).rstrip())
    return _tidy("\n".join(lines))


def _macro(line: str) -> str:
    """The text of a macro line; an empty line where a paragraph begins."""
    name, _, rest = line[1:].strip().partition(" ")
    arguments = [quoted or plain for quoted, plain in re.findall(r'"((?:[^"]|"")*)"|(\S+)', rest)]
    if name in ("SH", "SS"):
        return "\n" + " ".join(arguments)
    if name in ("PP", "P", "LP", "TP", "sp"):
        return ""
    if name == "IP":
        return "\n" + (arguments[0] if arguments else "")
    if name in _MAN_JOINED:
        return "".join(arguments)
    return " ".join(arguments) if name in _MAN_TEXT_MACROS else ""


class _Text(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped = 0
        self._literal = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self._skipped += tag in _SKIPPED_TAGS
        self._literal += tag == "pre"
        if tag in _BLOCK_TAGS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipped -= tag in _SKIPPED_TAGS and self._skipped > 0
        self._literal -= tag == "pre" and self._literal > 0
        if tag in _BLOCK_TAGS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data if self._literal else re.sub(r"\s+", " ", data))


def html_text(source: str) -> str:
    """Plain text of an HTML page."""
    parser = _Text()
    parser.feed(source)
    return _tidy("".join(parser.parts))


def _tidy(text: str) -> str:
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\0", ""))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _licence(root: Path, package: str) -> str:
    """Licences that the package's copyright file names."""
    path = root / "usr" / "share" / "doc" / package / "copyright"
    if not path.is_file():
        return "see the package's copyright file"
    text = path.read_text(encoding="utf-8", errors="replace")
    named = sorted(set(re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)))
    if named:
        return ", ".join(named)
    lines = [
        line.strip()
        for line in text.splitlines()
        if re.search("licen[cs]e|GPL|copyright", line, re.IGNORECASE)
    ]
    return " ".join(lines)[:300] or "see the package's copyright file"

"""Fetch parallel Japanese/English documentation from Debian as JSONL: real text to measure with.

    python bench/corpus.py [--out DIR]

    apt-get download -> dpkg-deb -x into a temporary folder -> manual pages and HTML -> plain text
    -> DIR/ja.jsonl and DIR/en.jsonl

Decisions
    Nothing is installed, and none of the text is kept in this repository: whoever needs it fetches
    it from Debian.
    Each record holds what a reader must know to use it lawfully: package, version, path and
    license. The license is taken from the `License` fields of the package's copyright file, or
    from that file's first matching lines; a manual page adds its own notice.
    The conversion is plain: tags and macros go; text, lists and examples stay. The text is good
    enough to measure with, not to train a model on.
"""

from __future__ import annotations

import argparse
import gzip
import html.parser
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_pipeline.errors import CptError, DataError  # noqa: E402
from data_pipeline.store.files import atomic_write  # noqa: E402

DEFAULT_DIR = ROOT / "data" / "corpus"
LANGUAGES = ("ja", "en")
PACKAGES = (
    "debian-handbook",
    "debian-reference-ja",
    "debian-reference-en",
    "manpages-ja",
    "manpages-ja-dev",
    "manpages",
    "manpages-dev",
    "installation-guide-amd64",
)
TIMEOUT_SECONDS = 600
"""Longest time that one call of apt-get or dpkg-deb may take."""
_MIN_CHARACTERS = 200
"""Shortest text that counts as a document."""
_MAX_LICENSE_CHARACTERS = 300
_UNKNOWN_LICENSE = "see the package's copyright file"

_SKIPPED_TAGS = frozenset(("script", "style", "head", "nav"))
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_LISTS = ("ul", "ol", "dl", "li", "dt", "dd")
_BLOCK_TAGS = frozenset(("p", "div", "pre", "br", "table", "tr", *_HEADINGS, *_LISTS))
_MAN_FONT = re.compile(r"\\f(?:\[[^]]*\]|\([A-Z]{2}|.)|\\s[-+]?\d+|\\[&|^/,%:)]")
_MAN_CHARACTERS = {
    "\\-": "-",
    "\\(em": "--",
    "\\(en": "-",
    "\\(bu": "*",
    "\\(aq": "'",
    "\\(dq": '"',
    "\\e": "\\",
    "\\ ": " ",
    "\\(co": "(c)",
    "\\(lq": '"',
    "\\(rq": '"',
    "\\(oq": "'",
    "\\(cq": "'",
    "\\(ga": "`",
    "\\(ha": "^",
    "\\(ti": "~",
    "\\~": " ",
    "\\0": " ",
    "\\(rs": "\\",
    "\\(->": "->",
    "\\(<=": "<=",
    "\\(>=": ">=",
    "\\(mc": "u",
    "\\(mu": "x",
}
_MAN_JOINED_MACROS = frozenset(("BR", "BI", "IB", "IR", "RB", "RI"))
"""Macros whose arguments are set in alternating fonts, without spaces between them."""
_MAN_TEXT_MACROS = frozenset(("B", "I", "SM", "SB", "UR"))
_MAN_PARAGRAPH_MACROS = frozenset(("PP", "P", "LP", "TP", "sp"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A Debian package that was unpacked into a folder."""

    name: str
    version: str
    root: Path
    """Folder that stands for `/` in the package."""

    def files(self) -> list[Path]:
        """Return its regular files in the order of their names."""
        found = []
        for path in self.root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                found.append(path)
        return sorted(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """One manual page or HTML page as plain text."""

    language: str
    text: str
    notice: str = ""
    """License that the page itself names."""


def make_corpus(out_dir: Path, packages: Sequence[str] = PACKAGES) -> dict[str, int]:
    """Fetch the packages and write `ja.jsonl` and `en.jsonl`.

    Returns:
        Number of documents by language.

    Raises:
        DataError: apt-get or dpkg-deb is missing, the packages cannot be fetched, or they hold no
            text in one of the languages.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="corpus-") as temporary:
        records = list(_records(Path(temporary), packages))
    records.sort(key=_order)
    counts = {}
    for language in LANGUAGES:
        chosen = [record for record in records if record["language"] == language]
        counts[language] = len(chosen)
        _write_jsonl(out_dir / f"{language}.jsonl", chosen)
    if not all(counts.values()):
        raise DataError(f"{out_dir}: the packages gave no text in one of the languages: {counts}.")
    return counts


def _order(record: dict[str, Any]) -> tuple[str, str]:
    return record["language"], record["id"]


def _write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    with atomic_write(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")


def _records(work_dir: Path, packages: Sequence[str]) -> Iterator[dict[str, Any]]:
    for package in unpack(work_dir, packages):
        license_text = _license(package)
        for path in package.files():
            name = path.relative_to(package.root).as_posix()
            page = _read_page(path, name, package.name)
            if page is None or len(page.text) < _MIN_CHARACTERS:
                continue
            licenses = f"{license_text}; {page.notice}" if page.notice else license_text
            yield {
                "id": f"{package.name}/{name}",
                "language": page.language,
                "package": package.name,
                "version": package.version,
                "licence": licenses,
                "text": page.text,
            }


def unpack(work_dir: Path, packages: Sequence[str]) -> Iterator[Package]:
    """Download Debian packages into `work_dir` and unpack them one by one, by name.

    Raises:
        DataError: apt-get or dpkg-deb is missing or fails.
    """
    _call(work_dir, "apt-get", "download", *packages)
    for deb in sorted(work_dir.glob("*.deb")):
        name, version = deb.name.split("_")[:2]
        root = work_dir / name
        _call(work_dir, "dpkg-deb", "-x", str(deb), str(root))
        yield Package(name=name, version=version.replace("%3a", ":"), root=root)


def _call(work_dir: Path, *command: str) -> None:
    try:
        subprocess.run(
            command,
            cwd=work_dir,
            check=True,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except FileNotFoundError as error:
        raise DataError(
            f"{command[0]}: not found. The corpus needs a Debian system with apt."
        ) from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = output[-1] if output else error
        raise DataError(
            f"{' '.join(command[:2])}: failed: {reason}. Is there a network, and are the package "
            "lists fresh (apt-get update)?"
        ) from error


def _read_page(path: Path, name: str, package: str) -> Page | None:
    """Return the text of a file of a package, or None if the file is no page of documentation."""
    manual = re.fullmatch(r"usr/share/man/(ja/)?man\d[a-z]*/[^/]+\.gz", name)
    if manual:
        return _read_manual(path, "ja" if manual[1] else "en")
    language = _html_language(name, package)
    if language not in LANGUAGES or "/single" in name:
        return None
    content = path.read_bytes()
    if name.endswith(".gz"):
        content = gzip.decompress(content)
    return Page(language=language, text=html_text(content.decode("utf-8", errors="replace")))


def _html_language(name: str, package: str) -> str:
    """Return the language of an HTML page by its path, or else by the package's last letters."""
    in_folder = re.search(r"/(ja-JP|en-US|ja|en)/.*\.html(\.gz)?$", name)
    if in_folder:
        return in_folder[1][:2]
    in_suffix = re.search(r"\.(ja|en)\.html(\.gz)?$", name)
    if in_suffix:
        return in_suffix[1]
    if name.endswith((".html", ".html.gz")):
        return package[-2:]
    return ""


def _read_manual(path: Path, language: str) -> Page | None:
    content = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    if content.startswith(".so "):  # a link to another page
        return None
    found = re.search(r"%%%LICENSE_START\(([^)]*)\)|SPDX-License-Identifier: (\S.*)", content)
    notice = ""
    if found:
        notice = f"page: {(found[1] or found[2]).strip()}"
    return Page(language=language, text=manual_text(content), notice=notice)


def manual_text(source: str) -> str:
    """Return the plain text of a manual page written with troff's man macros."""
    lines: list[str] = []
    for line in source.splitlines():
        if line.startswith(('.\\"', "'\\\"", "'\\", '\\"')):  # comments
            continue
        text = _macro_text(line) if line.startswith((".", "'")) else line
        for code, character in _MAN_CHARACTERS.items():
            text = text.replace(code, character)
        lines.append(_MAN_FONT.sub("", text).rstrip())
    return _tidy("\n".join(lines))


def _macro_text(line: str) -> str:
    """Return the text of a macro line, with an empty line where a paragraph begins."""
    name, _, rest = line[1:].strip().partition(" ")
    found = re.findall(r'"((?:[^"]|"")*)"|(\S+)', rest)
    arguments = [quoted or plain for quoted, plain in found]
    if name in ("SH", "SS"):
        return "\n" + " ".join(arguments)
    if name in _MAN_PARAGRAPH_MACROS:
        return ""
    if name == "IP":
        return "\n" + "".join(arguments[:1])
    if name in _MAN_JOINED_MACROS:
        return "".join(arguments)
    if name in _MAN_TEXT_MACROS:
        return " ".join(arguments)
    return ""


class _TextParser(html.parser.HTMLParser):
    """Collects the text between tags; block tags become line feeds."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped_depth = 0
        self._literal_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self._skipped_depth += tag in _SKIPPED_TAGS
        self._literal_depth += tag == "pre"
        if tag in _BLOCK_TAGS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED_TAGS:
            self._skipped_depth = max(self._skipped_depth - 1, 0)
        if tag == "pre":
            self._literal_depth = max(self._literal_depth - 1, 0)
        if tag in _BLOCK_TAGS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._skipped_depth:
            return
        self.parts.append(data if self._literal_depth else re.sub(r"\s+", " ", data))


def html_text(source: str) -> str:
    """Return the plain text of an HTML page."""
    parser = _TextParser()
    parser.feed(source)
    return _tidy("".join(parser.parts))


def _tidy(text: str) -> str:
    """Remove NUL characters, spaces at line ends, and more than one empty line in a row."""
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\0", ""))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _license(package: Package) -> str:
    """Return the licenses that the package's copyright file names."""
    path = package.root / "usr" / "share" / "doc" / package.name / "copyright"
    if not path.is_file():
        return _UNKNOWN_LICENSE
    text = path.read_text(encoding="utf-8", errors="replace")
    named = sorted(set(re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)))
    if named:
        return ", ".join(named)
    lines = []
    for line in text.splitlines():
        if re.search("licen[cs]e|GPL|copyright", line, re.IGNORECASE):
            lines.append(line.strip())
    return " ".join(lines)[:_MAX_LICENSE_CHARACTERS] or _UNKNOWN_LICENSE


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the corpus and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=DEFAULT_DIR,
        help="folder for ja.jsonl and en.jsonl (default: data/corpus)",
    )
    options = parser.parse_args(arguments)
    try:
        counts = make_corpus(options.out)
    except CptError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for language, count in counts.items():
        print(f"{options.out / language}.jsonl: {count:,} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())

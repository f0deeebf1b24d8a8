"""Links in Markdown files lead somewhere, and files that the documentation names are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")]
)
DOCUMENTATION = [path for path in PAGES if path.name != "CHANGELOG.md"]
FOLDERS = (
    "cpt",
    "data_pipeline",
    "tests",
    "configs",
    "ds_configs",
    "slurm",
    "bench",
    "docs",
    ".ci",
    ".github",
)
"""Folders of the repository: a path in backticks that begins with one of them must exist."""

IGNORED_BY_GIT = ("slurm/env.sh",)
"""Files that the documentation asks its reader to make."""


def by_page(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def without_code_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code_blocks(page.read_text("utf-8")), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()) for heading in headings]
    return {word.strip().replace(" ", "-") for word in words}


@by_page(PAGES)
def test_relative_links_resolve(page: Path) -> None:
    text = without_code_blocks(page.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


@by_page(DOCUMENTATION)
def test_files_named_in_backticks_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = []
    for named in re.findall(r"`([\w./*-]+)`", text):
        if named.split("/")[0] not in FOLDERS or "/" not in named or named in IGNORED_BY_GIT:
            continue
        if not list(ROOT.glob(named.rstrip("/"))):
            missing.append(named)
    assert missing == []


@by_page(DOCUMENTATION)
def test_scripts_and_files_of_shown_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    pattern = (
        r"(?<![\w./-])((?:configs|ds_configs|slurm|bench|cpt)/[\w./-]+\.(?:yaml|json|py|sbatch))"
    )
    named = set(re.findall(pattern, text)) - set(IGNORED_BY_GIT)
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_page_is_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [page.name for page in (ROOT / "docs").glob("*.md")]
    assert [name for name in pages if f"(docs/{name}" not in readme] == []


def test_no_line_of_prose_is_longer_than_a_screen() -> None:
    """Tables, code and generated parts are exempt, and so are the targets of links."""
    found = []
    for page in PAGES:
        prose = without_code_blocks(page.read_text(encoding="utf-8")).splitlines()
        for number, line in enumerate(prose, 1):
            visible = re.sub(r"\]\([^)]*\)", "]", line)
            if len(visible) > 150 and not line.startswith(("|", "    ", "- **`", "![")):
                found.append(f"{page.name}:{number}")
    assert found == []

"""The Dockerfile keeps its promises, as far as they can be read without building the image."""

from __future__ import annotations

import re

import pytest

from cpt.commands.init import FOLDERS
from tests.support.launcher import ROOT

LINES = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
INSTRUCTIONS = [line.split(maxsplit=1) for line in LINES if line[:1].isupper()]
"""Name and words of each instruction."""


def words_of(instruction: str) -> list[str]:
    """Return the words of each instruction of a name."""
    return [words for name, words in INSTRUCTIONS if name == instruction]


@pytest.mark.case(
    "X7", "the image's last user is a number other than 0 (read from the Dockerfile, not built)"
)
def test_image_runs_as_a_numeric_user_that_is_not_root() -> None:
    names = [name for name, _ in INSTRUCTIONS]
    (user,) = words_of("USER")
    assert user.isdigit() and int(user) > 0
    assert names[names.index("USER") :] == ["USER", "CMD"]
    assert any(f"useradd --create-home --uid {user} " in words for words in words_of("RUN"))


def test_code_in_the_image_belongs_to_root_and_everything_copied_is_there() -> None:
    sources: set[str] = set()
    for text in (*words_of("COPY"), *words_of("ADD")):
        words = text.split()
        assert not any(word.startswith("--chown") for word in words)
        assert all((ROOT / source).exists() for source in words[:-1])
        sources.update(words[:-1])
    assert {"cpt", "data_pipeline"} <= sources
    # for `cpt init`
    schemas = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.schema.json")}
    assert {*FOLDERS, *schemas, "constraints.txt"} <= sources
    assert "slurm/env.sh" in (ROOT / ".dockerignore").read_text().splitlines()
    given_away = [words for words in words_of("RUN") if "chown" in words or "-o cpt" in words]
    assert given_away == ["install -d -o cpt -g cpt data runs"]


def test_image_has_what_nccl_needs_for_infiniband() -> None:
    installed = " ".join(words_of("RUN")).split()
    for package in ("libibverbs1", "ibverbs-providers", "librdmacm1", "ibverbs-utils"):
        assert package in installed


def test_base_image_is_named_by_its_digest() -> None:
    (base,) = [words for words in words_of("ARG") if words.startswith("BASE=")]
    assert re.fullmatch(r"BASE=nvidia/cuda:[\w.-]+@sha256:[0-9a-f]{64}", base)
    assert words_of("FROM") == ["${BASE}"]


def test_image_installs_only_listed_packages_with_their_hashes() -> None:
    installs = []
    for words in words_of("RUN"):
        installs += [part.split() for part in words.split("&&") if "pip install" in part]
    assert len(installs) == 3
    for install in installs:
        assert "--no-deps" in install
        assert "--require-hashes" in install or install[-2:] == ["-e", "."]
    assert "pdsh" not in " ".join(words_of("RUN"))

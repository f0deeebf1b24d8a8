"""A manifest of a build whose checksum fits is still no valid manifest: anybody can compute it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build.build import build
from data_pipeline.errors import DataError
from data_pipeline.store.manifest import FILE_NAME, FileEntry, read_manifest
from data_pipeline.store.verification import check_files
from tests.data_pipeline.inputs import MakeMix, make_texts


@pytest.fixture
def built(make_mix: MakeMix, tmp_path: Path) -> Path:
    mix = make_mix({"en": make_texts(20, "e")}, held_out_share=0.3)
    build(mix, tmp_path / "built")
    return tmp_path / "built"


def forge(built: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and give it a checksum that fits."""
    content = json.loads((built / FILE_NAME).read_text())
    del content["checksum"]
    change(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (built / FILE_NAME).write_text(json.dumps(content))


def first_file(content: dict[str, Any]) -> dict[str, Any]:
    return next(iter(content["files"].values()))  # type: ignore[no-any-return]


STOCK_TEXT = {"held_out_by": "en", "text": "x", "tokens": 60, "documents": 9, "examples": []}
FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a size that is a text": (lambda c: first_file(c).update(bytes="7"), r"\.bytes is '7'"),
    "a size beyond 64 bits": (lambda c: first_file(c).update(bytes=2**64), r"\.bytes is 1844"),
    "a size below 0": (lambda c: first_file(c).update(bytes=-1), r"\.bytes is -1"),
    "a hash that is a list": (lambda c: first_file(c).update(sha256=[]), r"\.sha256 is \[\]"),
    "a count that is a mapping": (
        lambda c: c["sources"][0].update(tokens={}),
        r"sources\[0\]\.tokens is \{\}, must be a whole number",
    ),
    "counts that are texts": (
        lambda c: c["sources"][0].update(rejects={"x": "y"}),
        r"sources\[0\]\.rejects",
    ),
    "dropped text without counts": (
        lambda c: c["sources"][0].update(dropped={"exact copies": 3}),
        r"sources\[0\]\.dropped",
    ),
    "stock text with a negative count": (
        lambda c: c.update(stock_text=[STOCK_TEXT | {"documents": -1}]),
        r"stock_text\[0\]\.documents is -1",
    ),
    "stock text without its examples": (
        lambda c: c.update(stock_text=[{"text": "x"}]),
        r"lacks or misnames a key",
    ),
    "a listing of another form": (
        lambda c: c["inputs"]["en"].update(listed=[["a", 1]]),
        r"inputs\.en\.listed",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_value_of_another_type_is_named(built: Path, name: str) -> None:
    check_files(built, read_manifest(built), verify=True)
    change, message = FORGERIES[name]
    forge(built, change)
    with pytest.raises(DataError, match=message):
        read_manifest(built)


def test_guard_domain_of_an_unknown_source_is_named(built: Path) -> None:
    domain = {"name": "d", "language": "en", "sources": ["nowhere"]}
    forge(built, lambda content: content.update(guard_domains=[domain]))
    with pytest.raises(DataError, match=r"guard_domains\[0\]\.sources names \['nowhere'\]"):
        read_manifest(built)


def test_shards_are_in_the_order_of_their_numbers_beyond_five_digits(built: Path) -> None:
    entry = FileEntry(bytes=1, sha256="")
    names = [f"documents-{number:05d}.tokens" for number in (9, 99_999, 100_000, 100_001)]
    files = {f"en/{name}": entry for name in reversed(names)}
    files |= {"en/train/documents-00000.tokens": entry, "en2/documents-00000.tokens": entry}
    manifest = dataclasses.replace(read_manifest(built), files=files)
    assert manifest.shard_names("en") == names


def test_a_manifest_of_version_4_is_read_without_what_it_did_not_count(built: Path) -> None:
    def make_older(content: dict[str, Any]) -> None:
        content["format_version"] = 4
        del content["stock_text"]
        for source in content["sources"]:
            for key in ("read_documents", "read_tokens", "dropped", "exempted", "stages"):
                del source[key]

    tokens = read_manifest(built).sources[0].tokens
    forge(built, make_older)
    manifest = read_manifest(built)
    assert manifest.sources[0].tokens == tokens
    assert manifest.sources[0].dropped == {} and manifest.stock_text == ()

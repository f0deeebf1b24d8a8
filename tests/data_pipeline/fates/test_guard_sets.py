"""Guard text is large enough, hashed, and in no training row.

Training text that holds some of it is dropped and counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build.build import build
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.fates.guard_sets import describe_guard_sets
from data_pipeline.mixture.ledger import mix_hash
from data_pipeline.mixture.settings import mix_settings
from data_pipeline.store.manifest import read_manifest
from data_pipeline.text.tokenizer import decode
from tests.data_pipeline.inputs import WORDS, MakeMix, make_texts, write_jsonl

SPLIT_WORDS = [
    " ".join(WORDS[(n * 7 + i * i * 3 + i) % len(WORDS)] + str(n * i) for i in range(60))
    for n in range(40)
]
"""Return long texts that share no run of 50 tokens."""


def own_files(tmp_path: Path, texts: list[str], **keys: Any) -> dict[str, Any]:
    """Write a guard domain with a file of its own."""
    write_jsonl(tmp_path / "in" / "mine.jsonl", texts)
    domain = {"name": "mine", "language": "en", "path": "mine.jsonl"}
    return {"guard": {"domains": [domain], **keys}, "decontaminate_tokens": 50}


def training_text(built: BuiltData) -> str:
    rows = [
        built.read_row(s, r)
        for s in range(len(built.source_names))
        for r in range(built.num_rows(s))
    ]
    return "\n".join(decode(row.input_ids.astype("uint32")) for row in rows)


def test_guard_files_are_measured_never_trained_on_and_what_holds_them_is_dropped(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    guard, training = SPLIT_WORDS[:8], SPLIT_WORDS[8:]
    quoting = f"A page that quotes: {guard[1]} and goes on."
    mix = make_mix(
        {"en": [*training, guard[0], quoting]}, seq_len=512, **own_files(tmp_path, guard)
    )
    manifest = build(mix, tmp_path / "out", progress=False)
    source, own = manifest.sources
    assert (source.held_out_copies, source.contaminated, source.documents) == (1, 1, len(training))
    assert (own.name, own.rows, own.held_out_documents, own.held_out_found) == (
        "guard-mine",
        0,
        8,
        2,
    )
    assert (
        "guard domain mine: 8 documents" in (text := describe_guard_sets(manifest))
        and "2 found in training" in text
    )
    built = BuiltData.open(tmp_path / "out", mix=mix)
    assert [domain.name for domain in built.held_out] == ["mine"] and built.held_out[
        0
    ].num_documents == 8
    words = training_text(built)
    assert not any(text[40:200] in words for text in guard) and training[3][40:200] in words


def test_the_guard_hash_follows_from_the_guard_text_alone(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    def hash_of(name: str, training: list[str], guard: list[str]) -> str:
        write_jsonl(tmp_path / "in" / "mine.jsonl", guard)
        mix = make_mix({"en": training}, **own_files(tmp_path, guard))
        return build(mix, tmp_path / name, progress=False).guard_sets()["mine"].hash

    first = hash_of("a", SPLIT_WORDS[10:], SPLIT_WORDS[:8])
    assert first == hash_of("b", SPLIT_WORDS[20:], SPLIT_WORDS[:8][::-1])
    assert first != hash_of("c", SPLIT_WORDS[10:], SPLIT_WORDS[:7])


def test_guard_files_may_be_conversations(make_mix: MakeMix, tmp_path: Path) -> None:
    sample = Path(__file__).parents[3] / "data_pipeline" / "sample" / "en_chat.jsonl"
    domain = {"name": "chat", "language": "en", "path": str(sample), "format": "harmony"}
    mix = make_mix(
        {"en": make_texts(20, "en")},
        seq_len=1024,
        guard={"domains": [domain]},
        decontaminate_tokens=50,
    )
    build(mix, tmp_path / "out", progress=False)
    built = BuiltData.open(tmp_path / "out", mix=mix)
    assert built.held_out[0].num_documents == len(sample.read_text().splitlines())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"min_documents": 9},
            r"'mine': 8 documents are held out, must be at least 9 .*Add guard files",
        ),
        ({"min_tokens": 10**6}, r"'mine': \d+ tokens are held out, must be at least 1000000"),
    ],
)
def test_a_tiny_guard_set_is_refused_at_build_and_when_a_build_is_opened(
    make_mix: MakeMix, tmp_path: Path, keys: dict[str, int], message: str
) -> None:
    texts = {"en": SPLIT_WORDS[8:]}
    with pytest.raises(DataError, match=message):
        build(
            make_mix(texts, **own_files(tmp_path, SPLIT_WORDS[:8], **keys)),
            tmp_path / "out",
            progress=False,
        )
    build(make_mix(texts, **own_files(tmp_path, SPLIT_WORDS[:8])), tmp_path / "out", progress=False)
    with pytest.raises(DataError, match=message):
        BuiltData.open(
            tmp_path / "out", mix=make_mix(texts, **own_files(tmp_path, SPLIT_WORDS[:8], **keys))
        )


def test_guard_files_made_from_a_training_source_are_refused_with_the_figure(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    mix = make_mix(
        {"en": SPLIT_WORDS[:12], "ja": make_texts(20, "ja")}, **own_files(tmp_path, SPLIT_WORDS[:8])
    )
    with pytest.raises(
        DataError, match="source 'en': 8 of 12 training documents are, or hold, text that"
    ):
        build(mix, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({"path": "none.jsonl"}, "which matches no file"),
        ({"path": "en.jsonl", "sources": ["en"]}, "together with sources"),
        ({"sources": []}, "is an empty list"),
        ({"sources": ["en"], "format": "harmony"}, "need a path"),
        ({"path": "en.jsonl", "served_by": ["eng"]}, "is 'eng', which is no source. .*'en'"),
        ({"path": "en.jsonl", "served_by": ["en", "en"]}, "which the list already has"),
        (
            {"path": "en.jsonl", "name": "taken"},
            "needs the source name 'guard-taken', which is taken",
        ),
    ],
)
def test_a_wrong_guard_domain_is_refused(
    make_mix: MakeMix, domain: dict[str, Any], message: str
) -> None:
    listed = [{"name": "mine", "language": "en", **domain}]
    with pytest.raises(ConfigError, match=message):
        make_mix(
            {"en": ["a"], "guard-taken": ["b"]},
            held_out_share=0.1,
            guard={"domains": listed},
            decontaminate_tokens=50,
        )


def japanese_files(tmp_path: Path, texts: list[str], **keys: Any) -> dict[str, Any]:
    """Write guard files beside Japanese training text that is cleaned."""
    found = own_files(tmp_path, texts)
    found["guard"]["domains"][0] |= {"language": "ja", **keys}
    return found | {"sources": {"ja": {"normalise": ["control", "width"]}}, "seq_len": 256}


def test_guard_files_are_found_in_text_that_is_cleaned(make_mix: MakeMix, tmp_path: Path) -> None:
    wide = str.maketrans("0123456789", "".join(chr(0xFF10 + digit) for digit in range(10)))
    plain = [" ".join(str(101 * n + at) for at in range(40)) for n in range(8)]
    guard = [text.translate(wide) for text in plain]
    others = [f"{n} other words that stand nowhere else {n * n}" for n in range(20)]
    texts = {"ja": [*guard, *others]}
    found = {}
    for steps in (["control", "width"], []):
        mix = make_mix(texts, **japanese_files(tmp_path, guard, normalise=steps))
        manifest = build(mix, tmp_path / f"out{len(steps)}", progress=False)
        found[len(steps)] = manifest.guard_sets()["mine"].found
        trained = training_text(BuiltData.open(tmp_path / f"out{len(steps)}"))
        assert (plain[3] in trained) == (not steps)
    assert found == {2: len(guard), 0: 0}


def test_guard_files_beside_text_that_is_cleaned_say_how_they_are(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    message = (
        r"normalise is missing, but the source 'ja' .* \[control, width\].* or normalise: \[\]"
    )
    with pytest.raises(ConfigError, match=message):
        make_mix({"ja": ["a"]}, **japanese_files(tmp_path, ["b"]))
    other = japanese_files(tmp_path, ["b"], language="en")
    assert make_mix({"ja": ["a"]}, **other).sources[1].normalise == ()
    with pytest.raises(ConfigError, match="normalise lists nfc and nfkc"):
        make_mix({"ja": ["a"]}, **japanese_files(tmp_path, ["b"], normalise=["nfc", "nfkc"]))
    measured = {"name": "mine", "language": "ja", "sources": ["ja"], "normalise": ["nfc"]}
    with pytest.raises(ConfigError, match="normalise needs a path"):
        make_mix({"ja": ["a"]}, held_out_share=0.5, guard={"domains": [measured]})


def test_guard_files_that_are_not_cleaned_are_those_of_earlier_versions(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    keys = own_files(tmp_path, SPLIT_WORDS[:8])
    before = make_mix({"en": SPLIT_WORDS[8:]}, **keys)
    keys["guard"]["domains"][0]["normalise"] = []
    now = make_mix({"en": SPLIT_WORDS[8:]}, **keys)
    assert mix_hash(now) == mix_hash(before) and now.sources == before.sources
    assert "normalise" not in mix_settings(now)["guard"]["mine"]
    manifest = build(now, tmp_path / "out", progress=False)
    assert "normalise" not in manifest.content()["guard_domains"][0]
    assert read_manifest(tmp_path / "out").hash == manifest.hash


def test_guard_files_without_decontamination_are_refused(make_mix: MakeMix, tmp_path: Path) -> None:
    keys = own_files(tmp_path, SPLIT_WORDS[:8]) | {"decontaminate_tokens": 0}
    with pytest.raises(ConfigError, match="decontaminate_tokens is 0"):
        make_mix({"en": SPLIT_WORDS[8:]}, **keys)


def test_domain_with_files_of_its_own_is_served_by_the_sources_that_it_names(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    keys = own_files(tmp_path, SPLIT_WORDS[:8])
    (domain,) = keys["guard"]["domains"]
    mix = make_mix({"en": SPLIT_WORDS[8:], "code": ["b"]}, **keys)
    assert mix.serving_sources() == {"mine": ()}
    hash_before = mix_hash(mix)
    keys["guard"]["domains"] = [{**domain, "served_by": ["en", "code"]}]
    served = make_mix({"en": SPLIT_WORDS[8:], "code": ["b"]}, **keys)
    assert served.serving_sources() == {"mine": ("en", "code")}
    assert served.guard_domains()[0].sources == ("guard-mine",)
    assert mix_hash(served) != hash_before
    # a checkpoint of before the key was there holds the hash of a mix without it
    assert "served_by" not in mix_settings(mix)["guard"]["mine"]
    manifest = build(served, tmp_path / "out", progress=False)
    assert read_manifest(tmp_path / "out").guard_domains == manifest.guard_domains
    assert manifest.guard_domains[0].served_by == ("en", "code")

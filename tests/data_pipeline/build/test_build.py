"""A build is complete, repeatable, and free of held-out text in training rows."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.build.build import build, build_share
from data_pipeline.build.found_builds import DEFAULT_ROOT, input_bytes, resolve_build_dir
from data_pipeline.build.origin import fingerprint
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import BuiltData, PackedRow
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.store.manifest import FILE_NAME, read_manifest
from data_pipeline.store.ownership import SHARED_VARIABLE
from data_pipeline.store.verification import NOTE_FILE
from data_pipeline.text.tokenizer import END_OF_TEXT, decode, encode
from tests.data_pipeline.inputs import MakeMix, make_texts, write_jsonl
from tests.support.other_users import ATTACKER, needs_root

ROOT = Path(__file__).parents[3]


@pytest.fixture
def mix(make_mix: MakeMix) -> MixConfig:
    return make_mix(
        {"ja": make_texts(40, "ja"), "en": make_texts(60, "en", 20)}, held_out_share=0.1
    )


def files_of(directory: Path) -> dict[str, bytes]:
    """Return the content of all files but the note, which holds the times of the others."""
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file() and p.name != NOTE_FILE
    }


def texts_of(rows: Iterable[PackedRow]) -> list[str]:
    """Return the texts of the documents in rows, each joined from its pieces in order."""
    documents: dict[int, list[int]] = {}
    for row in rows:
        for index, document in enumerate(row.documents.tolist()):
            begin, end = row.bounds[index : index + 2]
            documents.setdefault(document, []).extend(row.input_ids[begin:end].tolist())
    return [decode(np.array(tokens)) for tokens in documents.values()]


def trained_texts(built: BuiltData) -> list[str]:
    """Return the texts of all training rows."""
    texts = []
    for source in range(len(built.source_names)):
        texts += texts_of(
            built.read_row(source, number) for number in range(built.num_rows(source))
        )
    return texts


def test_the_same_input_gives_the_same_bytes_wherever_it_stands(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    texts = {"ja": make_texts(20, "ja"), "en": make_texts(20, "en")}
    first = build(make_mix(texts, held_out_share=0.1), tmp_path / "one", progress=False)
    second = build(
        make_mix(texts, folder="deep/er", held_out_share=0.1), tmp_path / "two", progress=False
    )
    assert first.hash == second.hash
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert read_manifest(tmp_path / "one") == first


def test_a_second_build_returns_the_first_and_writes_nothing(
    mix: MixConfig, tmp_path: Path
) -> None:
    first = build(mix, tmp_path / "out", progress=False)
    before = (tmp_path / "out" / FILE_NAME).stat().st_mtime_ns
    assert build(mix, tmp_path / "out", progress=False) == first
    assert (tmp_path / "out" / FILE_NAME).stat().st_mtime_ns == before


def test_the_manifest_accounts_for_every_document(make_mix: MakeMix, tmp_path: Path) -> None:
    en = make_texts(50, "en")
    mix = make_mix({"ja": make_texts(30, "ja"), "en": en + en[:7] + [""]}, held_out_share=0.2)
    ja_entry, en_entry = build(mix, tmp_path / "out", progress=False).sources
    assert ja_entry.documents + ja_entry.held_out_documents == 30 and ja_entry.duplicates == 0
    assert en_entry.documents + en_entry.held_out_documents == 50
    assert en_entry.duplicates == 7 and en_entry.rejects == {"empty text": 1}
    built = BuiltData.open(tmp_path / "out")
    assert (
        en_entry.rows == built.num_rows(1)
        and en_entry.predicted_tokens == built.row_tokens(1).sum()
    )
    assert en_entry.tokens == en_entry.predicted_tokens + en_entry.documents


def test_held_out_texts_and_their_copies_are_never_trained_on(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    shared, own = make_texts(60, "en"), make_texts(20, "own")
    mix = make_mix(
        {"copies": shared[::-1] + shared, "en": shared + own + shared[:30]},
        held_out_share={"en": 0.2},
        seq_len=128,
    )
    copies, en = build(mix, tmp_path / "out", progress=False).sources
    built = BuiltData.open(tmp_path / "out")
    (domain,) = built.held_out
    held, trained = texts_of(map(domain.read_row, range(domain.num_rows))), trained_texts(built)
    assert len(held) == en.held_out_documents > 5
    assert copies.held_out_copies == len(set(held) & set(shared)) > 0
    assert sorted(held + trained) == sorted(shared + own)


def test_every_training_document_is_in_the_rows_whole(mix: MixConfig, tmp_path: Path) -> None:
    manifest = build(mix, tmp_path / "out", progress=False)
    texts = trained_texts(BuiltData.open(tmp_path / "out"))
    assert len(texts) == sum(entry.documents for entry in manifest.sources)
    assert set(texts) < set(make_texts(40, "ja") + make_texts(60, "en", 20))


def test_written_control_tokens_stay_text_in_a_build(make_mix: MakeMix, tmp_path: Path) -> None:
    text = "before <|endoftext|> <|start|>system<|end|> after"
    build(make_mix({"en": [text]}, seq_len=64), tmp_path / "out", progress=False)
    row = BuiltData.open(tmp_path / "out").read_row(0, 0)
    expected = [*encode(text).tolist(), END_OF_TEXT]
    assert row.input_ids[: len(expected) - 1].tolist() == expected[:-1]
    assert row.labels[: len(expected) - 1].tolist() == expected[1:]


@pytest.mark.case("B1", "above the limit the build stops with 65")
def test_too_many_rejects_stop_the_build_with_reasons_and_places(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    mix = make_mix({"en": [*make_texts(8, "en"), "", "a\0"]})
    with pytest.raises(DataError) as caught:
        build(mix, tmp_path / "out", progress=False)
    message = str(caught.value)
    assert (
        caught.value.exit_code == 65 and "source 'en': 2 of 10 documents cannot be used" in message
    )
    assert "en.jsonl:9" in message and "en.jsonl:10" in message and "empty text" in message
    assert not (tmp_path / "out").exists()
    lenient = dataclasses.replace(mix, max_reject_share=0.2)
    assert build(lenient, tmp_path / "out", progress=False).sources[0].documents == 8


def test_empty_source_is_refused_at_build(make_mix: MakeMix, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"en.jsonl: empty file"):
        build(make_mix({"en": []}), tmp_path / "out", progress=False)
    blank = make_mix({"en": []})
    blank.sources[0].files()[0].write_text("\n\n")
    with pytest.raises(DataError, match="source 'en': its files hold no documents"):
        build(blank, tmp_path / "out", progress=False)


def test_a_source_of_nothing_but_copies_is_refused(make_mix: MakeMix, tmp_path: Path) -> None:
    texts = make_texts(5, "en")
    with pytest.raises(DataError, match="source 'two': no document is left to train on"):
        build(make_mix({"one": texts, "two": texts}), tmp_path / "out", progress=False)


def test_a_guard_domain_without_documents_is_refused(make_mix: MakeMix, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="guard domain 'en': no document is held out"):
        build(make_mix({"en": ["only one"]}, held_out_share=0.5), tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda m: dataclasses.replace(m, seed=99), True),
        (lambda m: dataclasses.replace(m, name="other"), True),
        (lambda m: _with_source(m, weight=0.25), True),
        (lambda m: _with_source(m, language="zh", domain="other"), True),
        (lambda m: _with_source(m, max_epochs=3.0), True),
        (lambda m: dataclasses.replace(m, seq_len=33), False),
        (lambda m: _with_source(m, held_out_share=0.2), False),
        (lambda m: _with_source(m, text_field="title"), False),
        (lambda m: _with_source(m, name="renamed"), False),
        (lambda m: dataclasses.replace(m, sources=m.sources[:1]), False),
    ],
)
def test_the_fingerprint_covers_what_decides_the_rows_and_nothing_else(
    mix: MixConfig, change: Callable[[MixConfig], MixConfig], same: bool
) -> None:
    assert (fingerprint(change(mix)) == fingerprint(mix)) is same


def _with_source(mix: MixConfig, **changes: Any) -> MixConfig:
    return dataclasses.replace(
        mix, sources=(dataclasses.replace(mix.sources[0], **changes), *mix.sources[1:])
    )


def test_a_changed_input_file_changes_the_fingerprint_and_the_default_directory(
    mix: MixConfig,
) -> None:
    before = fingerprint(mix)
    directory = resolve_build_dir(mix, None)
    path = mix.sources[0].files()[0]
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert fingerprint(mix) != before and resolve_build_dir(mix, None) != directory
    assert directory == DEFAULT_ROOT / f"mix-{before[:10]}"
    assert resolve_build_dir(mix, Path("here")) == Path("here")
    assert input_bytes(mix) == sum(p.stat().st_size for s in mix.sources for p in s.files())


def test_another_mix_or_other_files_in_the_directory_are_not_touched(
    make_mix: MakeMix, mix: MixConfig, tmp_path: Path
) -> None:
    build(mix, tmp_path / "out", progress=False)
    before = files_of(tmp_path / "out")
    with pytest.raises(DataError, match="holds a build of another mix"):
        build(make_mix({"en": make_texts(9, "x")}, folder="b"), tmp_path / "out", progress=False)
    assert files_of(tmp_path / "out") == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="holds something else than a build"):
        build(mix, tmp_path / "notes", progress=False)
    with pytest.raises(DataError, match="holds something else than a build"):
        build(mix, tmp_path / "notes" / "mine.txt", progress=False)


def test_two_builds_of_one_directory_do_not_mix(mix: MixConfig, tmp_path: Path) -> None:
    with (tmp_path / ".out.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is building it"):
            build(mix, tmp_path / "out", progress=False)
    build(mix, tmp_path / "out", progress=False)


def test_a_build_leaves_no_lock_that_would_shut_out_others_who_share_the_folder(
    mix: MixConfig, tmp_path: Path
) -> None:
    build_share(mix, tmp_path / "out", 0, 1)
    assert not (tmp_path / ".out.lock").exists()
    build(mix, tmp_path / "out", progress=False)
    assert not (tmp_path / ".out.lock").exists()


@pytest.mark.parametrize("point", ["documents", "copies", "rows", "manifest", "rename"])
@pytest.mark.case("B12", "rerun gives the manifest of an undisturbed build")
def test_a_build_killed_anywhere_leaves_nothing_and_its_rerun_gives_the_same_manifest(
    mix: MixConfig, tmp_path: Path, point: str
) -> None:
    # the child kills itself with SIGKILL at a named place; nothing is left to timing
    undisturbed = build(mix, tmp_path / "undisturbed", progress=False).hash
    place = {
        "documents": "data_pipeline.store.shards.ShardWriter.add",
        "rows": "data_pipeline.build.packed_split.pack_block",
        "copies": "data_pipeline.fates.exact_copies._compare_slot",
        "manifest": "data_pipeline.store.manifest.BuildManifest.write",
        "rename": "pathlib.Path.rename",
    }[point]
    code = (
        "import os, sys; from pathlib import Path; from unittest import mock\n"
        "from data_pipeline.build.build import build\n"
        "from data_pipeline.config.mix_file import load_mix\n"
        "rename = Path.rename\n"
        "def kill(self, *args):\n"
        "    if isinstance(self, Path) and self.name != 'build': return rename(self, *args)\n"
        "    os.kill(os.getpid(), 9)\n"
        f"with mock.patch('{place}', kill):\n"
        "    build(load_mix(sys.argv[1]), sys.argv[2], progress=False)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in" / "mix.yaml"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.building").exists()
    assert build(mix, tmp_path / "out", progress=False).hash == undisturbed
    assert not (tmp_path / ".out.building").exists()
    BuiltData.open(tmp_path / "out")


def _damage_manifest(path: Path) -> None:
    value = json.loads(path.read_text())
    value["seq_len"] += 1
    path.write_text(json.dumps(value))


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: _flip(d / "ja/documents-00000.tokens", 4100),
            r"ja/documents-00000.tokens: content differs",
        ),
        (lambda d: _flip(d / "en/train/piece_start.npy", -1), r"piece_start.npy: content differs"),
        (
            lambda d: os.truncate(d / "ja/documents-00000.tokens", 5000),
            r"tokens: 5000 bytes, manifest says",
        ),
        (
            lambda d: (d / "en/documents-00000.tokens").unlink(),
            r"en/documents-00000.tokens: missing",
        ),
        (
            lambda d: (d / "en/extra.tokens").write_bytes(b"x"),
            r"en/extra.tokens: not in the manifest",
        ),
        (lambda d: shutil.rmtree(d / "en"), r"en/documents-00000.tokens: missing"),
        (lambda d: (d / FILE_NAME).unlink(), r"manifest.json: cannot be read"),
        (lambda d: (d / FILE_NAME).write_text(""), r"manifest.json: not JSON"),
        (lambda d: (d / FILE_NAME).write_text("[]"), r"does not match its own checksum"),
        (lambda d: _damage_manifest(d / FILE_NAME), r"does not match its own checksum"),
    ],
)
@pytest.mark.case("B10", "damaged, missing and extra files named; exit 65")
def test_damaged_build_is_refused_by_file(
    mix: MixConfig, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    out = tmp_path / "out"
    build(mix, out, progress=False)
    damage(out)
    with pytest.raises(DataError, match=message) as caught:
        BuiltData.open(out)
    assert caught.value.exit_code == 65


def test_a_link_in_place_of_a_file_is_refused(mix: MixConfig, tmp_path: Path) -> None:
    build(mix, tmp_path / "out", progress=False)
    path = tmp_path / "out" / "en" / "documents-00000.tokens"
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(DataError, match="not a plain file"):
        BuiltData.open(tmp_path / "out")


def test_a_manifest_cannot_point_outside_the_build(mix: MixConfig, tmp_path: Path) -> None:
    manifest = build(mix, tmp_path / "out", progress=False)
    entry = next(iter(manifest.files.values()))
    for name in ("../secret", "/etc/passwd", "en/../../x"):
        dataclasses.replace(manifest, files={**manifest.files, name: entry}).write(tmp_path / "out")
        with pytest.raises(DataError, match="not a path inside the build"):
            BuiltData.open(tmp_path / "out")


def test_the_shipped_sample_mix_builds(tmp_path: Path) -> None:
    (tmp_path / "configs" / "mixes").mkdir(parents=True)
    path = tmp_path / "configs" / "mixes" / "sample.yaml"
    content = (ROOT / "configs" / "mixes" / "sample.yaml").read_text()
    path.write_text(content + "\nnear_duplicates: 0\ndecontaminate_tokens: 0\n")
    names = (
        "ja_essay",
        "ja_story",
        "ja_reference",
        "ja_practical",
        "en_web",
        "en_reference",
        "en_code",
        "en_math",
    )
    for name in names:
        write_jsonl(
            tmp_path / "data_pipeline" / "sample" / f"{name}.jsonl", make_texts(60, name, 200)
        )
    shutil.copy(
        ROOT / "data_pipeline" / "sample" / "en_chat.jsonl", tmp_path / "data_pipeline" / "sample"
    )
    mix = load_mix(path)
    build(mix, tmp_path / "out", progress=False)
    built = BuiltData.open(tmp_path / "out", mix=mix)
    assert built.source_names == (*names, "en_chat") and built.seq_len == 1024
    domains = ["japanese", "english", "english_reference", "code", "math", "chat"]
    assert [domain.name for domain in built.held_out] == domains
    assert sum(s.weight for s in mix.sources if s.language == "ja") == pytest.approx(0.5)


def test_the_shipped_mock_mix_builds(tmp_path: Path) -> None:
    mix = load_mix(ROOT / "configs" / "mixes" / "mock.yaml")
    manifest = build(mix, tmp_path / "out", progress=False)
    assert [entry.documents + entry.held_out_documents for entry in manifest.sources] == [400, 1600]
    assert input_bytes(mix) == 4 * (400 * 2000 + 1600 * 500)


@needs_root
def test_build_of_another_user_is_refused_and_only_read_if_it_is_named_as_shared(
    mix: MixConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    manifest = build(mix, out, progress=False)
    for path in (out, *out.rglob("*")):
        os.chown(path, ATTACKER, ATTACKER)
    before = files_of(tmp_path)
    for read in (lambda: build(mix, out, progress=False), lambda: BuiltData.open(out)):
        with pytest.raises(ConfigError, match=f"build {out} belongs to uid {ATTACKER}"):
            read()
    monkeypatch.setenv(SHARED_VARIABLE, str(tmp_path))
    assert build(mix, out, progress=False) == manifest
    BuiltData.open(out)
    assert files_of(tmp_path) == before


def test_unfinished_build_that_others_may_write_to_is_refused(
    mix: MixConfig, tmp_path: Path
) -> None:
    work = tmp_path / ".out.building"
    work.mkdir()
    work.chmod(0o777)
    with pytest.raises(ConfigError, match=r"unfinished build .* may be written to by everybody"):
        build(mix, tmp_path / "out", progress=False)
    assert list(work.iterdir()) == []

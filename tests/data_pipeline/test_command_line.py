"""`python -m data_pipeline` says what it did, or what is wrong, and exits with the right code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.__main__ import main
from data_pipeline.store.manifest import read_manifest
from tests.data_pipeline.inputs import MakeMix, make_texts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mix_path(make_mix: MakeMix, tmp_path: Path) -> Path:
    texts = {"ja": make_texts(30, "ja"), "en": make_texts(30, "en", 10)}
    make_mix(texts, held_out_share=0.1, sources={"en": {"max_epochs": 3}})
    return tmp_path / "in" / "mix.yaml"


def test_build_shows_every_source_and_the_manifest_hash(
    mix_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(mix_path), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split()[:4] == ["source", "language", "documents", "tokens"]
    assert read_manifest(tmp_path / "out").hash[:16] in shown


def test_plan_builds_what_is_missing_and_shows_shares(
    mix_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(mix_path), "--steps", "5", "--global_batch_size", "4"]) == 0
    shown = capsys.readouterr().out
    assert "5 steps of 4 rows" in shown and "ja 5" in shown
    assert [
        path.name[:4] for path in (tmp_path / "data").iterdir() if not path.name.startswith(".")
    ] == ["mix-"]


def test_a_plan_beyond_the_epoch_limit_is_refused(
    mix_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "plan",
        str(mix_path),
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "100",
        "--global_batch_size",
        "8",
    ]
    assert main(arguments) == 65
    assert "source 'en': 100 steps take" in capsys.readouterr().err


def test_a_mistake_of_the_user_is_told_without_a_stack_trace(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text("seq_len: 64\nsede: 1\nsources: []\n")
    command = [
        sys.executable,
        "-m",
        "data_pipeline",
        "build",
        str(tmp_path / "mix.yaml"),
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 78 and done.stdout == ""
    assert done.stderr.splitlines() == [
        f"{tmp_path}/mix.yaml:2: sede is not a known key. Did you mean 'seed'?",
        f"{tmp_path}/mix.yaml:1: seed is missing. It has no default: add it.",
        f"{tmp_path}/mix.yaml:3: sources is an empty list. Add at least one source.",
    ]


def test_the_old_word_corpus_is_refused_with_where_it_went(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["corpus", "--out", "somewhere"]) == 78
    assert "run `python bench/corpus.py --out DIR`" in capsys.readouterr().err


def test_bad_data_exits_65(
    mix_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "en.jsonl").write_bytes(b'{"text": "\xff"}\n')
    assert main(["build", str(mix_path), "--out", str(tmp_path / "out")]) == 65
    assert "1 invalid UTF-8" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_an_error_and_not_a_trace(
    mix_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["build", str(mix_path), "--out", str(tmp_path / "file" / "out")]) == 74
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_the_pipeline_imports_neither_torch_nor_the_trainer() -> None:
    code = (
        "import pkgutil, sys, importlib, data_pipeline\n"
        "for module in pkgutil.walk_packages(data_pipeline.__path__, 'data_pipeline.'):\n"
        "    if module.name != 'data_pipeline.__main__': importlib.import_module(module.name)\n"
        "assert 'data_pipeline.build.assembly' in sys.modules\n"
        "assert not {'torch', 'deepspeed', 'cpt', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

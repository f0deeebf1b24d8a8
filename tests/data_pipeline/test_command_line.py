"""`python -m data_pipeline` says what it did, or what is wrong, and exits with the right code."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.__main__ import main
from data_pipeline.store.manifest import read_manifest
from tests.data_pipeline.inputs import MakeMix, make_texts, write_jsonl

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


def test_plan_builds_nothing_unless_it_is_asked_to(
    mix_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = ["plan", str(mix_path), "--steps", "5", "--global_batch_size", "4"]
    assert main(plan) == 78
    told = capsys.readouterr().err
    assert f"Build it: python -m data_pipeline build {mix_path}, or add --build" in told
    assert not (tmp_path / "data").exists()
    assert main([*plan, "--out", "here"]) == 78
    assert f"build {mix_path} --out here, or add" in capsys.readouterr().err
    assert not (tmp_path / "here").exists()


def test_diff_builds_nothing_and_compares_the_builds_that_it_is_given(
    mix_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    edited = mix_path.with_name("edited.yaml")
    edited.write_text(mix_path.read_text().replace("weight: 0.5", "weight: 0.25", 1))
    edited.write_text(edited.read_text().replace("weight: 0.5", "weight: 0.75", 1))
    diff = ["diff", str(mix_path), str(edited), "--steps", "2", "--global_batch_size", "2"]
    assert main(diff) == 78
    assert "sources[ja].weight: 0.5 -> 0.25" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()
    assert main(["build", str(mix_path), "--out", "built"]) == 0
    # both mixes have one fingerprint, so one build is that of both
    assert main([*diff, "--old_out", "built", "--new_out", "built"]) == 0
    assert f"build of {edited}: built" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


def test_plan_finds_a_build_of_any_name_and_needs_no_raw_files(
    mix_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    other = mix_path.with_name("other.yaml")
    other.write_text(mix_path.read_text())
    assert main(["build", str(other)]) == 0
    (built,) = [path for path in Path("data").iterdir() if path.name.startswith("other-")]
    run = ["--steps", "2", "--global_batch_size", "2"]
    capsys.readouterr()
    assert main(["plan", str(mix_path), *run]) == 0
    assert f"build of {mix_path}: {built}" in capsys.readouterr().out
    for path in mix_path.parent.glob("*.jsonl"):
        path.unlink()
    assert main(["plan", str(other), *run]) == 0
    assert main(["plan", str(mix_path), *run, "--out", str(built)]) == 0
    assert main(["diff", str(mix_path), str(other), *run, "--old_out", str(built)]) == 0


def test_files_of_equal_names_and_sizes_are_not_taken_for_those_of_a_build(
    mix_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["build", str(mix_path)]) == 0
    path = tmp_path / "in" / "en.jsonl"
    path.write_bytes(path.read_bytes().replace(b"river", b"RIVER"))
    assert main(["plan", str(mix_path)]) == 78
    assert "of the same names and sizes, but of other content" in capsys.readouterr().err


def test_plan_builds_what_is_missing_and_shows_shares(
    mix_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(mix_path), "--build", "--steps", "5", "--global_batch_size", "4"]) == 0
    shown = capsys.readouterr().out
    assert "5 steps of 4 rows" in shown and "ja 5" in shown
    names = [path.name for path in (tmp_path / "data").iterdir() if path.name[0] != "."]
    assert sorted(name[:4] for name in names) == ["mix-", "part"]


def test_a_plan_beyond_the_epoch_limit_is_refused(
    mix_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "plan",
        str(mix_path),
        "--build",
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


def run_in(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the program with variables set or, if empty, unset."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "data_pipeline", *map(str, arguments)]
    return subprocess.run(
        command,
        env={name: value for name, value in variables.items() if value},
        check=False,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd=ROOT,
    )


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


def japanese_mix(folder: Path) -> Path:
    """Write a mix whose file and folder have Japanese names, and return its path."""
    write_jsonl(folder / "\u65e5\u672c.jsonl", [*make_texts(20, "ja"), ""])
    path = folder / "mix.yaml"
    path.write_text(
        "seq_len: 64\nseed: 1\nnear_duplicates: 0\ndecontaminate_tokens: 0\n"
        "max_reject_share: 0.01\nsources:\n"
        "  - {name: ja, language: ja, domain: \u7db2, path: \u65e5\u672c.jsonl, weight: 1.0}\n",
        encoding="utf-8",
    )
    return path


def test_a_terminal_that_is_not_utf_8_gets_every_line_of_a_build_and_an_audit(
    tmp_path: Path,
) -> None:
    mix = japanese_mix(tmp_path / "\u30c7\u30fc\u30bf")
    out = tmp_path / "\u30c7\u30fc\u30bf" / "out"
    done = run_in({"PYTHONIOENCODING": "ascii"}, "build", mix, "--out", out)
    assert done.returncode == 65 and "\\u65e5\\u672c.jsonl:21" in done.stderr
    assert "Traceback" not in done.stderr
    mix.write_text(mix.read_text("utf-8").replace("0.01", "0.5"), encoding="utf-8")
    done = run_in({"PYTHONIOENCODING": "ascii"}, "build", mix, "--out", out)
    assert done.returncode == 0 and "\\u30c7\\u30fc\\u30bf" in done.stdout
    page = tmp_path / "\u30c7\u30fc\u30bf.html"
    done = run_in({"PYTHONIOENCODING": "ascii"}, "audit", mix, "--out", page)
    assert "Traceback" not in done.stderr and page.exists()


def test_a_locale_that_cannot_name_a_file_is_told_with_the_cure(tmp_path: Path) -> None:
    mix = japanese_mix(tmp_path / "\u30c7\u30fc\u30bf")
    done = run_in(C_LOCALE, "build", mix, "--out", tmp_path / "out")
    assert done.returncode == 78 and "Traceback" not in done.stderr
    assert "is no file name in this locale, whose encoding is ascii" in done.stderr
    assert "Set PYTHONUTF8=1" in done.stderr
    (mix.parent / "plain.jsonl").symlink_to(mix.parent / "\u65e5\u672c.jsonl")
    mix.write_text(
        mix.read_text("utf-8").replace("\u65e5\u672c.jsonl", "plain.jsonl").replace("0.01", "0.5"),
        encoding="utf-8",
    )
    done = run_in(C_LOCALE, "build", mix, "--out", mix.parent / "out")
    assert done.returncode == 0, done.stderr
    page = mix.parent / "\u9801.html"
    done = run_in(C_LOCALE, "audit", mix, "--out", page)
    assert "Traceback" not in done.stderr and page.exists()


def test_a_file_name_that_is_not_utf_8_is_read_and_told(tmp_path: Path) -> None:
    name = os.fsdecode("\u65e5\u672c".encode("shift_jis") + b".jsonl")
    write_jsonl(tmp_path / name, [*make_texts(20, "ja"), ""])
    (tmp_path / "mix.yaml").write_text(
        "seq_len: 64\nseed: 1\nnear_duplicates: 0\ndecontaminate_tokens: 0\n"
        "max_reject_share: 0.01\nsources:\n"
        "  - {name: ja, language: ja, domain: web, path: '*.jsonl', weight: 1.0}\n"
    )
    done = run_in({}, "build", tmp_path / "mix.yaml", "--out", tmp_path / "out")
    assert done.returncode == 65 and "jsonl:21" in done.stderr and "Traceback" not in done.stderr
    write_jsonl(tmp_path / name, make_texts(20, "ja"))
    for _ in range(2):  # the second time, what the first has written is read
        done = run_in({}, "build", tmp_path / "mix.yaml", "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
    done = run_in({}, "audit", tmp_path / "mix.yaml", "--out", tmp_path / "page.html")
    assert "Traceback" not in done.stderr and (tmp_path / "page.html").exists()


def limited(soft: int, hard: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the program with limits on its open files."""
    command = [sys.executable, "-m", "data_pipeline", *map(str, arguments)]
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )


def test_more_files_than_descriptors_are_built_and_planned(tmp_path: Path) -> None:
    for number in range(150):
        write_jsonl(tmp_path / f"{number:03}.jsonl", [f"text {number} {'word ' * 9}"])
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        "seq_len: 64\nseed: 1\nnear_duplicates: 0\ndecontaminate_tokens: 0\nsources:\n"
        "  - {name: en, language: en, domain: web, path: '*.jsonl', weight: 1.0}\n"
    )
    for command in ("build", "plan"):
        done = limited(100, 100, command, mix, "--out", tmp_path / "out", "--workers", "1")
        assert done.returncode == 0, done.stderr


def test_a_bug_exits_70_and_keeps_its_trace_in_a_file(
    mix_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object, **keys: object) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr("data_pipeline.__main__.build", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["build", str(mix_path), "--out", str(tmp_path / "out")]) == 70
    told = capsys.readouterr().err
    (log,) = tmp_path.glob("data_pipeline-*.log")
    assert told.startswith("internal error: KeyError: 'no such thing'. This is a bug")
    assert str(log) in told and "Traceback" not in told
    assert "Traceback" in log.read_text() and "in fail" in log.read_text()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted."),
        (MemoryError(), 74, "not enough memory. Use fewer --workers"),
        (OSError(errno.EMFILE, "Too many open files", "a"), 74, "a: Too many .* ulimit -n"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), 74, "a: No space .* Free space"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), 74, "Change the permissions"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_a_person_or_a_machine_causes_has_a_code_and_a_cure(
    error: BaseException,
    code: int,
    message: str,
    mix_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object, **keys: object) -> None:
        raise error

    monkeypatch.setattr("data_pipeline.__main__.build", fail)
    assert main(["build", str(mix_path), "--out", "unused"]) == code
    assert re.search(message, capsys.readouterr().err)


def test_output_that_nobody_reads_or_that_has_no_room_ends_with_a_code(mix_path: Path) -> None:
    for target in ("| head -c 0", "> /dev/full"):
        program = f"{sys.executable} -m data_pipeline plan {mix_path} --build {target}"
        command = program + "; exit ${PIPESTATUS[0]}"
        done = subprocess.run(
            ["bash", "-c", command], check=False, capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode in (0, 74) and "Traceback" not in done.stderr, target
        assert "Exception ignored" not in done.stderr


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["seq_len", "seed", "sources", "name", "path", "weight"])
                    | st.text(max_size=5),
                    inner,
                    max_size=5,
                )
            ),
            max_leaves=12,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_mix_is_read_or_ends_with_a_code_of_the_contract(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as told:
        path = Path(folder) / "mix.yaml"
        path.write_bytes(content)
        code = main(["build", str(path), "--out", str(Path(folder) / "out")])
        assert code in (65, 78) and told.getvalue().strip(), content
        assert "internal error" not in told.getvalue()


def test_a_device_is_written_to_and_never_replaced(
    mix_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    plan = ["plan", str(mix_path), "--build", "--out", str(tmp_path / "out"), "--steps", "3"]
    assert main([*plan, "--json", str(pipe)]) == 0
    assert json.loads(os.read(reader, 1 << 20))["steps"] == 3
    os.close(reader)
    assert pipe.is_fifo()
    assert main(["build", str(mix_path), "--out", str(pipe)]) == 65
    assert pipe.is_fifo() and "holds something else than a build" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--steps", "9" * 30], 78, "is not from 1 to 8,589,934,592"),
        (["--steps", "4294967296", "--global_batch_size", "4"], 78, "rows; at most 8,589,934,592"),
        (["--steps", "9" * 5000], 78, "invalid _positive value"),
        (["--out", "/"], 78, "is no directory for a build"),
        (["--out", "x" * 300], 74, "File name too long"),
    ],
)
def test_arguments_that_cannot_be_right_end_at_once_with_a_code(
    arguments: list[str],
    code: int,
    message: str,
    mix_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        found = main(["plan", str(mix_path), "--build", *arguments])
    except SystemExit as stop:
        found = int(str(stop.code))
    assert found == code and message in capsys.readouterr().err

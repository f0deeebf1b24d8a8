"""Workers, machines and kills do not change the manifest; memory stays bounded (B7, B12)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.build.build import build, build_share
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import DataError
from data_pipeline.reading import units
from data_pipeline.reading.sources import read_texts
from data_pipeline.text.cleaning import Tally
from tests.data_pipeline.inputs import MakeMix, make_texts, mix_of_several_units, write_jsonl

ROOT = Path(__file__).parents[3]


@pytest.fixture
def mix(make_mix: MakeMix, monkeypatch: pytest.MonkeyPatch) -> MixConfig:
    return mix_of_several_units(make_mix, monkeypatch)


def run(
    mix_path: Path, out: Path, *arguments: str, unit_bytes: int = 4000
) -> subprocess.CompletedProcess[str]:
    """Run the command line with small units, in a process of its own."""
    code = (
        "import sys; from data_pipeline.reading import units\n"
        f"units.MIN_UNIT_BYTES = {unit_bytes}\n"
        "from data_pipeline.__main__ import main\n"
        "code = main(sys.argv[1:])\n"
        # of this image alone: ru_maxrss of a fresh process starts from that of the process that
        # started it
        "import re, resource, pathlib\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "own = int(re.search(r'VmHWM:\\s+(\\d+)', status)[1])\n"
        "workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
        "print('peak KiB', max(own, workers), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, "-c", code, "build", str(mix_path), "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def test_units_are_many_and_their_boundaries_change_no_document(
    mix: MixConfig, tmp_path: Path
) -> None:
    counts = [len(units.split_into_units(source)) for source in mix.sources]
    assert min(counts) > 3
    split_up = [list(read_texts(source, Tally())) for source in mix.sources]
    units.MIN_UNIT_BYTES = 1 << 30
    assert [list(read_texts(source, Tally())) for source in mix.sources] == split_up


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(
        st.sampled_from(
            [
                b'{"text": "a"}',
                b'{"text": "\xe6\xb0\xb4"}',
                b"",
                b"\r",
                b"x",
                b'{"text": ""}',
                b" " * 30,
            ]
        )
    ),
    mark=st.booleans(),
    last=st.sampled_from([b"", b"\n", b'{"text": "end"}', b'{"te']),
    unit_bytes=st.integers(1, 60),
    line_limit=st.integers(10, 40),
)
def test_where_units_begin_changes_no_text_and_no_account(
    lines: list[bytes], mark: bool, last: bytes, unit_bytes: int, line_limit: int
) -> None:
    content = (b"\xef\xbb\xbf" if mark else b"") + b"".join(line + b"\n" for line in lines) + last
    if not content.removeprefix(b"\xef\xbb\xbf"):
        return
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(content)
        source = SourceConfig(name="s", language="en", domain="web", path=str(path), weight=1.0)
        patch.setattr("data_pipeline.reading.sources.MAX_LINE_BYTES", line_limit)
        results = []
        for size in (1 << 20, unit_bytes):
            patch.setattr(units, "MIN_UNIT_BYTES", size)
            tally = Tally()
            results.append((list(read_texts(source, tally)), tally.to_json() | {"lines": 0}))
        assert results[0] == results[1]


def test_rejects_in_later_units_are_named_by_their_line_in_the_file(mix: MixConfig) -> None:
    tally = Tally()
    list(read_texts(mix.sources[0], tally))
    assert [str(place).rsplit(":", 1)[1] for place in tally.places["empty text"]] == ["123"]


def test_workers_and_shares_give_the_manifest_of_one_process(
    mix: MixConfig, tmp_path: Path
) -> None:
    expected = build(mix, tmp_path / "one", progress=False).hash
    assert build(mix, tmp_path / "two", progress=False, workers=2).hash == expected
    made = [build_share(mix, tmp_path / "shared", index, 3) for index in (2, 0, 1)]
    assert sum(made) == sum(len(units.split_into_units(source)) for source in mix.sources)
    assert not (tmp_path / "shared").exists()
    assert build(mix, tmp_path / "shared", progress=False).hash == expected
    BuiltData.open(tmp_path / "shared", mix=mix)


def test_a_lost_share_is_made_by_the_build_that_finishes(mix: MixConfig, tmp_path: Path) -> None:
    expected = build(mix, tmp_path / "one", progress=False).hash
    build_share(mix, tmp_path / "shared", 1, 3)
    assert build(mix, tmp_path / "shared", progress=False).hash == expected


def test_shares_of_different_mixes_do_not_meet(
    mix: MixConfig, make_mix: MakeMix, tmp_path: Path
) -> None:
    build_share(mix, tmp_path / "out", 0, 2)
    with pytest.raises(DataError, match="holds parts of another mix"):
        build_share(make_mix({"en": make_texts(9, "x")}, folder="b"), tmp_path / "out", 0, 2)


def test_a_rerun_makes_only_what_is_missing(
    mix: MixConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline.parts import part_cache as module

    build_share(mix, tmp_path / "out", 0, 2)
    made: list[int] = []
    original = module.make_part
    monkeypatch.setattr(
        module, "make_part", lambda part: (made.append(part.number), original(part))[1]
    )
    build(mix, tmp_path / "out", progress=False)
    total = sum(len(units.split_into_units(source)) for source in mix.sources)
    assert len(made) == total - (total + 1) // 2


@pytest.mark.case("B12", "rerun gives the manifest of an undisturbed build")
def test_killed_at_any_moment_a_rerun_gives_the_same_manifest(
    tmp_path: Path, make_mix: MakeMix
) -> None:
    texts = {"ja": make_texts(4000, "ja"), "en": make_texts(4000, "en")}
    make_mix(
        texts, held_out_share=0.01, decontamination={"stock_text": 1e-4}, decontaminate_tokens=50
    )
    path = tmp_path / "in" / "mix.yaml"
    undisturbed = run(path, tmp_path / "undisturbed", "--workers", "1", unit_bytes=30_000)
    assert undisturbed.returncode == 0, undisturbed.stderr
    code = (
        "import sys; from data_pipeline.reading import units; units.MIN_UNIT_BYTES = 30_000\n"
        "from data_pipeline.__main__ import main; sys.exit(main(sys.argv[1:]))\n"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "build",
        str(path),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    parts = tmp_path / ".out.building" / "parts"
    for wanted in (1, 9, 40):  # parts that are there when SIGKILL comes
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while child.poll() is None and len(list(parts.rglob("*.json"))) < wanted:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "the build ended before it could be killed"
    done = run(path, tmp_path / "out", "--workers", "1", unit_bytes=30_000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("manifest ")[1] == undisturbed.stdout.split("manifest ")[1]


def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from data_pipeline.engine.local import LocalExecutor\n"
        "if __name__ == '__main__':\n"
        "    for _ in LocalExecutor(2).run(time.sleep, [60.0, 60.0]): pass\n"
    )
    (tmp_path / "parent.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], env=environment)

    def workers() -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if parent == child.pid and b"spawn_main" in arguments:
                found.append(int(entry.name))
        return found

    deadline = time.monotonic() + 30
    while len(known := workers()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(known) == 2
    time.sleep(1)  # both have asked the kernel to die with their parent
    child.kill()
    child.wait()
    while any(
        Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
        for pid in known
    ):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def _build_with_limit(mix_path: Path, out: Path) -> tuple[int, str, float]:
    """Return (exit code, messages, peak memory in GiB) of a build in a process of its own."""
    done = run(mix_path, out, "--workers", "1", unit_bytes=16 * 2**20)
    peak = int(re.search(r"peak KiB (\d+)", done.stderr)[1]) / 2**20  # type: ignore[index]
    return done.returncode, done.stdout + done.stderr, peak


@pytest.mark.case("B7", "bounded memory")
def test_a_line_of_a_gigabyte_is_rejected_in_bounded_memory(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_jsonl(folder / "en.jsonl", make_texts(200, "en"))
    with (folder / "en.jsonl").open("ab") as file:
        file.write(b'{"text": "')
        for _ in range(1024):
            file.write(b"x " * 2**19)
        file.write(b'"}\n{"text": "the last document stands behind it"}\n')
    _write_mix(folder)
    code, text, peak = _build_with_limit(folder / "mix.yaml", tmp_path / "out")
    assert code == 0, text
    assert "1 line longer than 67108864 bytes" in text and peak < 1, peak
    assert BuiltData.open(tmp_path / "out").manifest.sources[0].documents == 201
    (folder / "en.jsonl").unlink()


@pytest.mark.case("B7", "bounded memory")
def test_a_document_of_fifty_megabytes_is_kept_in_bounded_memory(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    rng = np.random.default_rng(0)
    words = np.array(["river", "stone", "\u6c34\u3092\u98f2\u3080\u3002", "lamp,", "seven"])
    write_jsonl(
        folder / "en.jsonl", [" ".join(words[rng.integers(0, 5, 6_000_000)].tolist())[:44_000_000]]
    )
    assert (folder / "en.jsonl").stat().st_size > 50_000_000
    _write_mix(folder)
    code, text, peak = _build_with_limit(folder / "mix.yaml", tmp_path / "out")
    assert code == 0, text
    assert peak < 1, peak
    entry = BuiltData.open(tmp_path / "out").manifest.sources[0]
    assert entry.documents == 1 and entry.bytes > 40_000_000


def _write_mix(folder: Path) -> None:
    (folder / "mix.yaml").write_text(
        "seq_len: 1024\nseed: 1\nnear_duplicates: 0\n"
        "sources: [{name: en, language: en, domain: web, path: en.jsonl, weight: 1.0}]\n"
    )
    load_mix(folder / "mix.yaml")

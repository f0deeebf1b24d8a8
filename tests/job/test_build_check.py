"""All ranks verify a build together, once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.errors import DataError
from cpt.job import build_check
from data_pipeline.build.build import build
from data_pipeline.config.mix_file import load_mix
from data_pipeline.store import verification
from data_pipeline.store.manifest import FILE_NAME, read_manifest
from data_pipeline.store.verification import NOTE_FILE
from tests.data_pipeline.inputs import make_texts, write_jsonl

RANKS = 4


class Ranks:
    """Ranks that are threads; an instance stands in for their process group."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.hashed: list[tuple[int, str]] = []
        """Rank and name of each file that was hashed."""
        self._here = threading.local()
        self._values: list[Any] = [None] * RANKS
        self._barrier = threading.Barrier(RANKS, timeout=60)
        self._sha256_of = verification.sha256_of
        patch.setattr(build_check.dist, "get_rank", lambda group: self._here.rank)
        patch.setattr(build_check, "gather_json", self._gather)
        patch.setattr(build_check, "together", self._together)
        patch.setattr(verification, "sha256_of", self._recorded)

    def verify(self, directory_of: Callable[[int], Path]) -> list[Exception | None]:
        """Verify on all ranks; return what each of them raised."""
        raised: list[Exception | None] = [None] * RANKS

        def run(rank: int) -> None:
            self._here.rank = rank
            try:
                build_check.verify_together(self, directory_of(rank))  # type: ignore[arg-type]
            except DataError as error:
                raised[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return raised

    def _gather(self, value: Any, group: object) -> list[Any]:
        self._values[self._here.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def _together(self, group: object, action: Callable[[], Any]) -> Any:
        result = error = None
        try:
            result = action()
        except DataError as caught:
            error = caught
        for failure in self._gather(error, group):
            if failure is not None:
                raise failure
        return result

    def _recorded(self, path: Path) -> str:
        self.hashed.append((self._here.rank, path.name))
        return self._sha256_of(path)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    sources = []
    for name in ("en", "ja"):
        write_jsonl(tmp_path / f"{name}.jsonl", make_texts(20, name))
        sources.append(
            {
                "name": name,
                "language": name,
                "domain": "web",
                "path": f"{name}.jsonl",
                "weight": 0.5,
            }
        )
    mix = {"seq_len": 32, "seed": 1, "near_duplicates": 0, "decontaminate_tokens": 0}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({**mix, "sources": sources}))
    build(load_mix(tmp_path / "mix.yaml"), tmp_path / "out", progress=False)
    return tmp_path / "out"


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def test_build_with_a_note_is_not_read_by_any_rank(
    built: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []
    inspect = build_check.inspect

    def recorded(directory: Path, manifest: Any) -> Any:
        looks.append(directory)
        return inspect(directory, manifest)

    monkeypatch.setattr(build_check, "inspect", recorded)
    assert ranks.verify(lambda rank: built) == [None] * RANKS
    assert ranks.hashed == []
    assert looks == [built]


def test_every_file_is_hashed_by_one_rank_and_the_next_start_reads_nothing(
    built: Path, ranks: Ranks
) -> None:
    (built / NOTE_FILE).unlink()
    assert ranks.verify(lambda rank: built) == [None] * RANKS
    assert len(ranks.hashed) == len(read_manifest(built).files)
    assert {rank for rank, _ in ranks.hashed} == set(range(RANKS))
    ranks.hashed.clear()
    assert ranks.verify(lambda rank: built) == [None] * RANKS
    assert ranks.hashed == []


def test_damage_is_told_by_all_ranks_and_no_note_is_left(built: Path, ranks: Ranks) -> None:
    (built / NOTE_FILE).unlink()
    damaged = sorted(built.rglob("*.tokens"))
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    raised = ranks.verify(lambda rank: built)
    for error in raised:
        for path in damaged:
            assert f"{path}: content differs from the manifest" in str(error)
    assert not (built / NOTE_FILE).exists()


def test_rows_that_leave_their_documents_are_refused_by_all_ranks(
    built: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes that fit, of rows that do not: whoever made them was wrong."""
    (built / NOTE_FILE).unlink()
    monkeypatch.setattr(verification, "damaged_files", lambda *arguments: [])
    monkeypatch.setattr(build_check, "damaged_files", lambda *arguments: [])
    path = built / "en" / "train" / "piece_start.npy"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    for error in ranks.verify(lambda rank: built):
        assert "row arrays do not fit the documents" in str(error)


def test_nodes_that_read_copies_of_their_own_verify_each_of_them(
    built: Path, ranks: Ranks, tmp_path: Path
) -> None:
    manifest = read_manifest(built)
    copies = [tmp_path / "copy0", tmp_path / "copy1"]
    for copy in copies:
        for name in (FILE_NAME, *manifest.files):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((built / name).read_bytes())
    assert ranks.verify(lambda rank: copies[rank % 2]) == [None] * RANKS
    assert len(ranks.hashed) == 2 * len(manifest.files)
    by_rank = [sum(1 for rank, _ in ranks.hashed if rank == number) for number in range(RANKS)]
    assert by_rank[0] + by_rank[2] == by_rank[1] + by_rank[3] == len(manifest.files)
    assert all((copy / NOTE_FILE).is_file() for copy in copies)

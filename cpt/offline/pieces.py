"""Work of offline commands in pieces that survive the process, divided over its ranks.

    items 0..n of a series -> rounds -> a span of items on each rank -> one pass an item
        -> piece: <out>.partial/<series>.<first>-<end>.<xxh3>.<json|safetensors>
    all pieces -> the result, written by the first rank -> the folder is removed

Decisions
    A piece is a file of its own, written by the rank that computed it, and complete or absent. Its
    name says which items it holds and hashes its content. So a start needs no journal: what no
    piece holds is still to be computed, by however many ranks there are now.
    work.json says what the pieces were computed from. A command with other settings, another model
    or other data is refused; nothing is thrown away.
    Under expert parallelism all ranks make equally many passes: a rank without an item left gets
    None and computes a filler.
    Ranks agree on a stop between two passes. Then the round ends, everything that is computed is
    written, and all leave. A function that divides the items itself may end a round with
    GenerationStopped: then the span in progress is not kept.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import xxhash
from safetensors.torch import load, save

from cpt.errors import ConfigError, DataError
from cpt.model.weights.checksums import is_identity
from cpt.offline.ranks import OfflineRanks
from cpt.parallel.agreement import gather_json
from cpt.resilience.faults import fault_point
from cpt.resilience.lock import RunLock, take_lock
from cpt.training.generate import GenerationStopped
from data_pipeline.bounded.json_text import read_json
from data_pipeline.console.progress import ProgressBar, show_progress
from data_pipeline.store.files import PARTIAL_SUFFIX, atomic_write, make_folder, write_json
from data_pipeline.store.ownership import refuse_foreign

IDENTITY_FILE = "work.json"
FORMAT_VERSION = 1
_PIECE = re.compile(r"(.+)\.(\d+)-(\d+)\.([0-9a-f]{32})\.(json|safetensors)")

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A finished piece."""

    path: Path
    """Its file."""
    series: str
    """The list of items that it is a part of."""
    items: range
    """The items that it holds."""
    digest: str
    """xxh3_128 of the file."""
    kind: str
    """json or safetensors."""

    @classmethod
    def of(cls, path: Path) -> Piece | None:
        """Return the piece that a file is, by its name; None if it is none."""
        match = _PIECE.fullmatch(path.name)
        if match is None:
            return None
        series, first, end, digest, kind = match.groups()
        items = range(int(first), int(end))
        return cls(path=path, series=series, items=items, digest=digest, kind=kind)

    def content(self) -> Any:
        """Return the JSON value or the tensors of the piece.

        Raises:
            DataError: the file has changed since it was written.
        """
        data = self.path.read_bytes()
        if xxhash.xxh3_128_hexdigest(data) != self.digest:
            raise DataError(
                f"{self.path}: damaged, its hash is not the one in its name. Remove it and start "
                "the same command again: only these items are computed anew."
            )
        return load(data) if self.kind == "safetensors" else json.loads(data)


def partial_folder(out: Path) -> Path:
    """Return the folder of the pieces of a result."""
    return out.with_name(out.name + PARTIAL_SUFFIX)


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemSeries:
    """A list of items that are to be computed."""

    name: str
    """A part of file names, the same at every start."""
    num_items: int
    """Length of the list."""
    unit: str
    """An item, for people: row, text."""


Compute = Callable[[int | None], Result]
"""Computes an item, or a filler for None; all ranks call it at the same time."""
Pack = Callable[[Sequence[Result]], Any]
"""Turns the results of consecutive items into the content of a piece: a JSON value, or tensors."""
Report = Callable[[int, int], None]
"""Takes the finished items and the tokens of a call of `generate` so far."""
ComputeTogether = Callable[[range, Report], Any]
"""Computes consecutive items on all ranks together and returns the content of their piece."""

SAVE_SECONDS = 60.0
"""Seconds after which a round ends early, so that little is lost with the process."""


class Pieces:
    """The pieces of one result; all ranks call the same methods together."""

    def __init__(self, folder: Path, ranks: OfflineRanks) -> None:
        """Look at what is there."""
        self.folder = folder
        self.ranks = ranks
        self._num_passes = 0
        self._num_rounds = 0
        self._pieces: list[Piece] = []
        self._add(ranks.on_first(lambda: sorted(path.name for path in folder.iterdir())))

    def missing(self, series: ItemSeries) -> list[int]:
        """Return the items that no piece holds, in order."""
        done: set[int] = set()
        for piece in self._pieces:
            if piece.series == series.name:
                done.update(piece.items)
        return [item for item in range(series.num_items) if item not in done]

    def compute(self, series: ItemSeries, compute: Compute[Result], pack: Pack[Result]) -> None:
        """Compute what is missing, each rank its share.

        Raises:
            RequeueRequested: on all ranks, if any has been asked to stop; the pieces stay.
        """
        rank = self.ranks.topology.rank
        world_size = self.ranks.topology.world_size
        missing = self.missing(series)
        with self._progress_bar(series, len(missing)) as bar:
            while missing:
                self._begin_round(series)
                spans = next_spans(missing, world_size, self.ranks.options.save_every)
                results = self._compute_round(spans, compute, bar)
                mine = spans[rank][: len(results)]
                self._save(series, mine, functools.partial(pack, results))
                missing = self.missing(series)

    def compute_together(
        self, series: ItemSeries, compute: ComputeTogether, *, span_length: int
    ) -> None:
        """Compute what is missing with a function that divides the items itself.

        Args:
            series: The items.
            compute: Computes consecutive items.
            span_length: Items of a piece at most.

        Raises:
            RequeueRequested: see `compute`.
        """
        missing = self.missing(series)
        with self._progress_bar(series, len(missing)) as bar:
            while missing:
                self._begin_round(series)
                self._begin_pass()
                (span,) = next_spans(missing, 1, span_length)
                try:
                    content = compute(span, functools.partial(self._report, bar))
                except GenerationStopped:
                    self._leave_if_asked(series)
                    raise
                mine = span if self.ranks.is_first else range(0)
                self._save(series, mine, functools.partial(_itself, content))
                bar.update(len(span))
                missing = self.missing(series)

    def read(self, series: ItemSeries) -> Iterator[Any]:
        """Yield the contents of all pieces of a series, in the order of its items.

        Raises:
            DataError: a piece is damaged.
        """
        own = [piece for piece in self._pieces if piece.series == series.name]
        end = 0
        for piece in sorted(own, key=lambda piece: piece.items.start):
            assert piece.items.start == end, (piece.path, end)
            end = piece.items.stop
            yield piece.content()
        assert end == series.num_items, (series, end)

    def read_items(self, series: ItemSeries) -> list[Any]:
        """Return the JSON values of all items; all ranks call it together, the first one reads.

        Raises:
            DataError: a piece is damaged.
        """

        def read() -> list[Any]:
            values = []
            for content in self.read(series):
                values += content
            return values

        return self.ranks.on_first(read)

    def _progress_bar(self, series: ItemSeries, num_missing: int) -> ProgressBar:
        return show_progress(
            series.num_items,
            series.name,
            series.unit,
            initial=series.num_items - num_missing,
            hidden=not self.ranks.is_first or not num_missing,
        )

    def _begin_round(self, series: ItemSeries) -> None:
        self._leave_if_asked(series)
        self._num_rounds += 1

    def _leave_if_asked(self, series: ItemSeries) -> None:
        """Leave here if anybody asks: all that is to be kept is on disk."""

        def done() -> str:
            num_done = series.num_items - len(self.missing(series))
            return (
                f"{num_done} of {series.num_items} {series.unit}s of {series.name} are done and "
                f"kept in {self.folder}. The same command goes on from there."
            )

        self.ranks.leave_if_asked(done)

    def _begin_pass(self) -> None:
        self._num_passes += 1
        self.ranks.clock.enter("evaluate", self._num_rounds)
        fault_point("offline_pass", self._num_passes)

    def _report(self, bar: ProgressBar, num_finished: int, num_tokens: int) -> None:
        """Show that a call of `generate` goes on, to people and to the watchdog."""
        self.ranks.clock.enter("sample", self._num_rounds)
        bar.set_postfix_str(f"{num_finished} ready, {num_tokens} tokens")

    def _compute_round(
        self, spans: Sequence[range], compute: Compute[Result], bar: ProgressBar
    ) -> list[Result]:
        """Compute this rank's span, or its first part if the round ends early."""
        mine = spans[self.ranks.topology.rank]
        begun_at = time.monotonic()
        results = []
        for index in range(max(map(len, spans))):
            if index and self._ends_early(begun_at):
                break
            self._begin_pass()
            if index < len(mine):
                results.append(compute(mine[index]))
            else:
                compute(None)
            bar.update(sum(index < len(span) for span in spans))
        return results

    def _ends_early(self, begun_at: float) -> bool:
        """Return whether any rank has been asked to stop, or finds the round too long."""
        is_long = time.monotonic() - begun_at > SAVE_SECONDS
        wish = torch.tensor(int(is_long or self.ranks.options.stop.requested()))
        dist.all_reduce(wish, dist.ReduceOp.MAX, group=self.ranks.topology.control_group)
        return bool(wish)

    def _save(self, series: ItemSeries, mine: range, content: Callable[[], Any]) -> None:
        """Write this rank's piece, if it has items, and learn the names of the others' pieces."""

        def write() -> list[str]:
            fault_point("offline_piece", self._num_rounds)
            return [write_piece(self.folder, series.name, mine, content())] if mine else []

        self.ranks.clock.enter("save", self._num_rounds)
        own = self.ranks.together(write)
        for names in gather_json(own, self.ranks.topology.control_group):
            self._add(names)

    def _add(self, names: Sequence[str]) -> None:
        for name in names:
            piece = Piece.of(self.folder / name)
            if piece is not None:
                self._pieces.append(piece)


def _itself(content: Any) -> Any:
    return content


def write_piece(folder: Path, series: str, items: range, content: Any) -> str:
    """Write a piece atomically and return the name of its file.

    Args:
        folder: Folder of the pieces.
        series: Name of the list of items.
        items: The items that it holds.
        content: A dict of tensors, or a JSON value.
    """
    tensors = isinstance(content, dict) and all(
        isinstance(value, torch.Tensor) for value in content.values()
    )
    data = save(content) if tensors else json.dumps(content).encode("ascii")
    digest = xxhash.xxh3_128_hexdigest(data)
    kind = "safetensors" if tensors else "json"
    name = f"{series}.{items.start:09d}-{items.stop:09d}.{digest}.{kind}"
    with atomic_write(folder / name) as file:
        file.write(data)
    return name


def next_spans(missing: Sequence[int], world_size: int, save_every: int) -> list[range]:
    """Return the items of the next round, a span without a gap for each rank.

    Spans are as long as they can be if all rounds that follow are to be even, so that no rank idles
    while others have much left.

    Args:
        missing: The items that are still to be computed, ascending.
        world_size: Number of ranks.
        save_every: Largest length of a span.

    Returns:
        By rank; empty where nothing is left.
    """
    num_rounds = math.ceil(len(missing) / (world_size * save_every))
    length = math.ceil(len(missing) / (world_size * max(1, num_rounds)))
    spans: list[range] = []
    for item in missing:
        last = spans[-1] if spans else range(0)
        if last and len(last) < length and last.stop == item:
            spans[-1] = range(last.start, item + 1)
        elif len(spans) == world_size:
            break
        else:
            spans.append(range(item, item + 1))
    return spans + [range(0)] * (world_size - len(spans))


@contextmanager
def kept_pieces(
    out: Path, identity: Mapping[str, Any], ranks: OfflineRanks, *, keep: bool = False
) -> Iterator[Pieces]:
    """Hold the pieces of a result; the folder goes once the block has ended without an error.

    Args:
        out: The result: a file or a folder.
        identity: What the pieces are computed from, as JSON values.
        ranks: The ranks that compute them.
        keep: Whether the folder stays, because another command makes the result of it.

    Raises:
        ConfigError: the folder holds pieces of something else, or another job works there.
        StorageError: it cannot be written.
    """
    folder = partial_folder(out)
    locks: list[RunLock] = []

    def begin() -> None:
        make_folder(folder)
        refuse_foreign(folder, "folder of pieces")
        locks.append(take_lock(folder, "--out"))
        _identify(folder, identity)

    is_done = False
    try:
        ranks.on_first(begin)
        yield Pieces(folder, ranks)
        is_done = True
    finally:
        for lock in locks:
            lock.release()
        if locks and ((is_done and not keep) or not _pieces_in(folder)):
            shutil.rmtree(folder, ignore_errors=True)


def _pieces_in(folder: Path) -> list[Piece]:
    found = []
    for path in sorted(folder.iterdir()):
        piece = Piece.of(path)
        if piece is not None:
            found.append(piece)
    return found


def _identify(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write what the pieces are computed from, or compare it with what is there.

    Raises:
        ConfigError: there are pieces, and they were computed from something else.
    """
    content = {"format_version": FORMAT_VERSION, **identity}
    path = folder / IDENTITY_FILE
    pieces = _pieces_in(folder)
    if not pieces:
        write_json(path, content, indent=1)
        return
    try:
        found = read_json(path)
    except (OSError, ValueError):
        found = {}
    differences = []
    for key, value in json.loads(json.dumps(content)).items():
        if key not in found:
            differences.append(f"{key} is not recorded there")
        elif not is_identity(found[key], value):
            differences.append(f"{key} was {_shown(found[key])}, is now {_shown(value)}")
    if differences:
        raise ConfigError(
            f"{folder} holds {len(pieces)} pieces of other work: {'; '.join(differences)}. Go on "
            "with the command that began it, give another --out, or remove the folder."
        )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

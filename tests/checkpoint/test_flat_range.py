"""Ranges of flat tensors that some ranks wrote are read by other ranks, cut elsewhere, bit for bit.

All ranks live in one process here.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.manifest import METADATA
from cpt.checkpoint.metadata import write_metadata
from cpt.checkpoint.old_metadata import read_old_metadata
from cpt.checkpoint.range_index import group_ranges, index_of_archives
from cpt.checkpoint.reader import read_ranges
from cpt.checkpoint.writer import write_ranges
from cpt.errors import CheckpointError, InternalError

Ranges = dict[str, FlatRange]


def save(folder: Path, ranks: list[Ranges]) -> None:
    """Let all ranks write their files in turn, and write where the ranges lie."""
    written = []
    for rank, ranges in enumerate(ranks):
        written += write_ranges(folder, ranges, rank, step=1).ranges
    write_metadata(folder, group_ranges(written))


def load(folder: Path, ranges: Ranges) -> None:
    index = index_of_archives(read_old_metadata((folder / METADATA).read_bytes()))
    read_ranges(folder, index, ranges)


def pieces(whole: Tensor, cuts: list[int]) -> list[FlatRange]:
    """Return `whole` cut at `cuts`; empty pieces are left out, as by `local_shards`."""
    bounds = [0, *sorted(cuts), whole.numel()]
    found = []
    for first, last in pairwise(bounds):
        if last > first:
            piece = FlatRange(tensor=whole[first:last], offset=first, global_numel=whole.numel())
            found.append(piece)
    return found


def empty_like(piece: FlatRange) -> FlatRange:
    tensor = torch.full_like(piece.tensor, float("nan"))
    return FlatRange(tensor=tensor, offset=piece.offset, global_numel=piece.global_numel)


def bits(tensor: Tensor) -> list[int]:
    return tensor.view(torch.int32).tolist()


def numbers(numel: int, seed: int = 0) -> Tensor:
    """Return numbers of any bits, not-a-number and negative zero among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31 - 1, (numel,), generator=generator)
    return bits.to(torch.int32).view(torch.float32)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    numel = draw(st.integers(1, 60))
    somewhere = st.lists(st.integers(0, numel), max_size=5)
    return numel, draw(somewhere), draw(somewhere)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts())
def test_any_cut_reads_what_any_other_cut_wrote(
    tmp_path_factory: pytest.TempPathFactory, sizes: tuple[int, list[int], list[int]]
) -> None:
    numel, written, read = sizes
    folder = tmp_path_factory.mktemp("cut")
    whole = numbers(numel)
    save(folder, [{"w": piece} for piece in pieces(whole, written)])
    for piece in pieces(whole, read):
        target = empty_like(piece)
        load(folder, {"w": target})
        assert bits(target.tensor) == bits(piece.tensor)


def test_many_tensors_of_a_rank_come_back_under_their_names(tmp_path: Path) -> None:
    tensors = {}
    for layer in range(4):
        tensors[f"master/layer.{layer}.weight"] = numbers(10 + layer, layer)
        tensors[f"exp_avg/layer.{layer}.weight"] = numbers(10 + layer, 4 + layer)
    ranks: list[Ranges] = [{}, {}, {}]
    targets = {}
    for name, tensor in tensors.items():
        for ranges, piece in zip(ranks, pieces(tensor, [3, 7]), strict=True):
            ranges[name] = piece
        targets[name] = empty_like(pieces(tensor, [])[0])
    save(tmp_path, ranks)
    load(tmp_path, targets)
    for name, tensor in tensors.items():
        assert bits(targets[name].tensor) == bits(tensor)


def test_rank_that_holds_nothing_of_a_tensor_takes_part(tmp_path: Path) -> None:
    whole = numbers(20)
    other = numbers(8, 1)
    first, second = pieces(whole, [12])
    save(tmp_path, [{"w": first, "v": pieces(other, [])[0]}, {"w": second}, {}])
    target = empty_like(pieces(whole, [])[0])
    load(tmp_path, {"w": target})
    assert bits(target.tensor) == bits(whole)


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    save(tmp_path, [{"w": pieces(numbers(20), [])[0], "v": pieces(numbers(8, 1), [])[0]}])
    target = empty_like(pieces(numbers(8, 1), [])[0])
    load(tmp_path, {"v": target})
    assert bits(target.tensor) == bits(numbers(8, 1))


def test_view_of_a_larger_buffer_is_filled_in_place(tmp_path: Path) -> None:
    """ZeRO's shards are views of one flat buffer; what lies beside them must stay."""
    whole = numbers(20)
    save(tmp_path, [{"w": piece} for piece in pieces(whole, [5])])
    buffer = torch.zeros(40)
    load(tmp_path, {"w": FlatRange(tensor=buffer[10:20], offset=8, global_numel=20)})
    assert bits(buffer[10:20]) == bits(whole[8:18])
    assert (buffer[:10] == 0).all() and (buffer[20:] == 0).all()


def test_every_rank_writes_one_file_of_its_own(tmp_path: Path) -> None:
    save(tmp_path, [{"w": piece} for piece in pieces(numbers(20), [5, 9])])
    shards = ["__0_0.distcp", "__1_0.distcp", "__2_0.distcp"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [".metadata", *shards]


def test_file_holds_a_range_and_not_the_buffer_behind_it(tmp_path: Path) -> None:
    buffer = torch.zeros(1_000_000)
    save(tmp_path, [{"w": FlatRange(tensor=buffer[:10], offset=0, global_numel=10)}])
    assert (tmp_path / "__0_0.distcp").stat().st_size < 100_000


def test_ranks_that_together_leave_a_hole_cannot_save(tmp_path: Path) -> None:
    first, _, third = pieces(numbers(20), [5, 9])
    with pytest.raises(InternalError):
        save(tmp_path, [{"w": first}, {"w": third}])


def test_ranks_whose_ranges_overlap_cannot_save(tmp_path: Path) -> None:
    whole = numbers(20)
    first = FlatRange(tensor=whole[0:12], offset=0, global_numel=20)
    second = FlatRange(tensor=whole[10:20], offset=10, global_numel=20)
    with pytest.raises(InternalError):
        save(tmp_path, [{"w": first}, {"w": second}])


def test_unknown_key_is_named(tmp_path: Path) -> None:
    save(tmp_path, [{"w": pieces(numbers(20), [])[0]}])
    with pytest.raises(CheckpointError, match="master/lm_head"):
        load(tmp_path, {"master/lm_head": empty_like(pieces(numbers(20), [])[0])})


@pytest.mark.parametrize("offset", [15, 20, 100])
def test_range_beyond_what_is_stored_is_refused(tmp_path: Path, offset: int) -> None:
    """Otherwise the rest of the range would keep whatever was in memory."""
    save(tmp_path, [{"w": pieces(numbers(20), [])[0]}])
    beyond = FlatRange(tensor=torch.zeros(10), offset=offset, global_numel=offset + 10)
    with pytest.raises(CheckpointError, match="are asked for, the checkpoint holds 20"):
        load(tmp_path, {"w": beyond})


def test_failure_while_reading_is_a_checkpoint_error(tmp_path: Path) -> None:
    save(tmp_path, [{"w": pieces(numbers(20), [])[0]}])
    (tmp_path / "__0_0.distcp").unlink()
    target = empty_like(pieces(numbers(20), [])[0])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: .*No such file"):
        load(tmp_path, {"w": target})

"""Values pass to a file through a buffer of a set size, and are hashed on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.manifest import record_file
from cpt.checkpoint.write_buffer import HashedFile, WriteBuffer
from cpt.checkpoint.writer import would_write, write_ranges
from cpt.job.step_event import peak_resident_bytes
from cpt.storage.narrow_moments import Blocks
from cpt.storage.state_bytes import MOMENT_BLOCK


def whole(values: torch.Tensor) -> FlatRange:
    return FlatRange(tensor=values, offset=0, global_numel=len(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("buffer_bytes", [1, 60, 6000])
def test_pieces_are_the_fp32_values_in_order(dtype: torch.dtype, buffer_bytes: int) -> None:
    values = torch.randn(1000).to(dtype)[3:703]
    passed = b"".join(bytes(piece) for piece in WriteBuffer(buffer_bytes).pieces(whole(values)))
    assert torch.equal(torch.frombuffer(bytearray(passed), dtype=torch.float32), values.float())


@pytest.mark.parametrize("buffer_bytes", [1, 6000])
@pytest.mark.parametrize("signed", [True, False])
def test_pieces_of_8_bit_blocks_are_what_they_stand_for(buffer_bytes: int, *, signed: bool) -> None:
    codes = torch.zeros(30 * MOMENT_BLOCK, dtype=torch.uint8)
    exponents = torch.zeros(30, dtype=torch.uint8)
    blocks = Blocks(codes=codes, exponents=exponents, signed=signed)
    blocks.fill(torch.randn(len(codes)).abs())
    expected = torch.empty(len(codes))
    blocks.decode(expected)
    part = FlatRange(
        tensor=codes, offset=0, global_numel=len(codes), exponents=exponents, signed=signed
    )
    passed = b"".join(bytes(piece) for piece in WriteBuffer(buffer_bytes).pieces(part))
    assert torch.equal(torch.frombuffer(bytearray(passed), dtype=torch.float32), expected)


def test_fp32_values_in_host_memory_are_not_copied() -> None:
    values = torch.randn(1000)
    pieces = list(WriteBuffer().pieces(whole(values[10:])))
    values[500] = 7.0
    assert 7.0 in torch.frombuffer(pieces[0], dtype=torch.float32).tolist()


def test_file_is_hashed_as_it_is_written(tmp_path: Path) -> None:
    ranges = {
        "master/a": FlatRange(tensor=torch.randn(5000)[7:4007], offset=7, global_numel=5000),
        "master/b": FlatRange(tensor=torch.ones(9).bfloat16(), offset=0, global_numel=9),
    }
    written = write_ranges(tmp_path, ranges, 0, step=1)
    assert written.file == record_file(tmp_path / "__0_0.distcp")
    assert would_write("__0_0.distcp", ranges, WriteBuffer(100)) == written, "in pieces of any size"


class ShortWrites:
    """A file that takes no more than three bytes at once, as the kernel may."""

    def __init__(self) -> None:
        self.content = b""

    def write(self, data: memoryview) -> int:
        self.content += bytes(data[:3])
        return min(3, len(data))


def test_what_the_kernel_does_not_take_at_once_is_written_again() -> None:
    file = ShortWrites()
    sink = HashedFile(file)  # type: ignore[arg-type]
    assert sink.write(b"0123456789") == 10 and sink.num_bytes == 10
    assert file.content == b"0123456789"


def test_write_takes_a_buffer_and_not_a_copy_of_the_tensor(tmp_path: Path) -> None:
    """128 MB are written of a tensor of 64 MB; as one fp32 copy they would be seen."""
    values = torch.ones(2**25, dtype=torch.bfloat16)
    ranges = {"master/a": FlatRange(tensor=values, offset=0, global_numel=2**25)}
    write_ranges(tmp_path, {}, 1, step=1)  # what libraries take at their first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = peak_resident_bytes()
    write_ranges(tmp_path, ranges, 0, step=1, buffer=WriteBuffer(6 * 2**20))
    assert peak_resident_bytes() - before < 32 * 2**20

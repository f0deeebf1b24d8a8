"""Moments in 2 bytes or in 8-bit blocks: from fp32 values and back.

Forms
    bf16   The upper 16 bits of fp32.
    int8   Blocks of `MOMENT_BLOCK` consecutive elements. An element keeps the 3 highest bits of its
           mantissa, and its exponent counted from that of the largest of its block, which is stored
           once, as the byte that fp32 has. Every operation is one on whole numbers: the bits of
           fp32 are shifted and a number of the block is added.
           Signed (the first moment): a sign and 7 bits, 16 binades. What lies below them is zero.
           Unsigned (the second moment): 8 bits, 32 binades. What lies below them is held as the
           smallest value: a second moment that is too large makes an update small, one of zero
           would make it huge. The binades of the two fit each other, because the second is a
           square.

Rounding
    A value is first rounded to the bits of mantissa that its form has: the bits that are cut off
    plus a random number of as many bits carry into what stays, or do not (stochastic rounding, no
    error on average), or half a unit is added (nearest). The exponent of a block is taken
    afterwards. So what was decoded is encoded to the same bits, whatever the random numbers are.

Sources: blocks of 8-bit state, Dettmers et al., 2022 (arXiv 2110.02861); a shared power of two, the
OCP microscaling formats 1.0.

Shape letters: n blocks, B elements of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpt.storage.state_bytes import MOMENT_BLOCK, MomentForm

CUT: dict[MomentForm, int] = {"bf16": 16, "int8": 20}
"""Lowest bits of fp32 that a form does not have."""
EXPONENTS = ":exponents"
"""Suffix of the key under which an optimizer keeps the exponents of a moment's blocks."""
_MANTISSA = 3
_BINADES = {True: 16, False: 32}
"""Binades that a code reaches down from the largest, by whether it is signed."""
_MAGNITUDE = 0x7FF
"""The upper 12 bits of fp32 without the sign."""
_CODE_OF_SIGN = 128
_BF16_SHIFT = CUT["int8"] - CUT["bf16"]


class Scratch:
    """Memory for whole numbers of 2 bytes while blocks are made or read.

    What is allocated anew for each chunk costs a CPU as much as the work.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        self._memory = torch.empty((3, numel), dtype=torch.int16, device=device)

    def halves(self, numel: int) -> list[torch.Tensor]:
        """Return three tensors (n, B) for so many elements, with any values."""
        return [row[:numel].view(-1, MOMENT_BLOCK) for row in self._memory]


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Consecutive elements of a moment in the form int8."""

    codes: torch.Tensor
    """(n * MOMENT_BLOCK,) uint8."""
    exponents: torch.Tensor
    """(n,) uint8."""
    signed: bool
    """Whether it is a first moment."""

    def narrow(self, start: int, numel: int) -> Blocks:
        """Return a view of some elements, which consist of whole blocks."""
        first, rest = divmod(start, MOMENT_BLOCK)
        num_blocks, partial = divmod(numel, MOMENT_BLOCK)
        assert rest == 0 and partial == 0, f"{start} and {numel} cut blocks of {MOMENT_BLOCK}"
        return Blocks(
            codes=self.codes.narrow(0, start, numel),
            exponents=self.exponents.narrow(0, first, num_blocks),
            signed=self.signed,
        )

    def on_host(self) -> Blocks:
        """Return the same in host memory: a copy of what lies on a device, else a view."""
        return Blocks(codes=self.codes.cpu(), exponents=self.exponents.cpu(), signed=self.signed)

    def decode(self, out: torch.Tensor, scratch: Scratch | None = None) -> None:
        """Write the values to an fp32 tensor (numel,)."""
        halves = (scratch or Scratch(out.numel(), out.device)).halves(out.numel())
        if self.signed:
            _decode_signed(self, out.view(-1, MOMENT_BLOCK), halves)
        else:
            _decode_unsigned(self, out.view(-1, MOMENT_BLOCK), halves)

    def encode(self, values: torch.Tensor, scratch: Scratch | None = None) -> None:
        """Take fp32 values (numel,); they are overwritten.

        The lowest bits are cut off, so whoever rounds has added noise or half a unit to the bits.
        """
        halves = (scratch or Scratch(values.numel(), values.device)).halves(values.numel())
        if self.signed:
            _encode_signed(self, values.view(-1, MOMENT_BLOCK), halves)
        else:
            _encode_unsigned(self, values.view(-1, MOMENT_BLOCK))

    def fill(self, values: torch.Tensor) -> None:
        """Take any fp32 values (numel,), each rounded to the nearest."""
        rounded = values.to(self.codes.device, torch.float32, copy=True)
        add_half_(rounded, "int8")
        self.encode(rounded)


def add_half_(values: torch.Tensor, form: MomentForm) -> None:
    """Add half a unit of a form to fp32 values in place: cut off then, they are the nearest."""
    values.view(torch.int32).add_(1 << (CUT[form] - 1))


def cut_(values: torch.Tensor, form: MomentForm) -> None:
    """Set the bits of fp32 values to zero that a form does not have, in place."""
    values.view(torch.int32).bitwise_and_(-(1 << CUT[form]))


def _decode_signed(blocks: Blocks, out_nB: torch.Tensor, halves: list[torch.Tensor]) -> None:
    codes_nB, upper_nB, is_not_zero_nB = halves
    codes_nB.copy_(blocks.codes.view_as(out_nB))
    torch.bitwise_and(codes_nB, _CODE_OF_SIGN - 1, out=upper_nB)
    torch.clamp(upper_nB, max=1, out=is_not_zero_nB)
    upper_nB.addcmul_(is_not_zero_nB, _lowest(blocks, torch.int16))
    upper_nB.bitwise_left_shift_(_BF16_SHIFT)
    # 256 times the bit of the code is the sign of bf16
    upper_nB.add_(codes_nB.bitwise_and_(_CODE_OF_SIGN), alpha=256)
    out_nB.copy_(upper_nB.view(torch.bfloat16))


def _encode_signed(blocks: Blocks, values_nB: torch.Tensor, halves: list[torch.Tensor]) -> None:
    codes_nB, upper_nB, _ = halves
    upper_nB.copy_(values_nB.view(torch.int32).bitwise_right_shift_(CUT["int8"]))
    torch.bitwise_and(upper_nB, _MAGNITUDE, out=codes_nB)
    blocks.exponents.copy_(codes_nB.amax(1) >> _MANTISSA)
    codes_nB.sub_(_lowest(blocks, torch.int16)).clamp_(min=0)
    # the shift has filled the upper bits with the sign
    codes_nB.add_(upper_nB.bitwise_right_shift_(4).bitwise_and_(_CODE_OF_SIGN))
    blocks.codes.view_as(values_nB).copy_(codes_nB)


def _decode_unsigned(blocks: Blocks, out_nB: torch.Tensor, halves: list[torch.Tensor]) -> None:
    upper_nB = halves[0].copy_(blocks.codes.view_as(out_nB))
    upper_nB.add_(_lowest(blocks, torch.int16)).bitwise_left_shift_(_BF16_SHIFT)
    out_nB.copy_(upper_nB.view(torch.bfloat16))


def _encode_unsigned(blocks: Blocks, values_nB: torch.Tensor) -> None:
    upper_nB = values_nB.view(torch.int32).bitwise_right_shift_(CUT["int8"])
    blocks.exponents.copy_(upper_nB.amax(1) >> _MANTISSA)
    upper_nB.sub_(_lowest(blocks, torch.int32)).clamp_(min=0)
    blocks.codes.view_as(values_nB).copy_(upper_nB)


def _lowest(blocks: Blocks, dtype: torch.dtype) -> torch.Tensor:
    """Return the upper 12 bits of the fp32 value at which the codes of each block begin, (n, 1)."""
    below_n = blocks.exponents.to(dtype) - (_BINADES[blocks.signed] - 1)
    return below_n.clamp_(min=0)[:, None] << _MANTISSA

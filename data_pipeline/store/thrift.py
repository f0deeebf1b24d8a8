"""Structures of Thrift's compact protocol, as Parquet files hold them.

    bytes, Struct -> the fields that the Struct names; all others are passed over

Decisions
    What is read here is read again by pyarrow, and both must see the same numbers. Where an honest
    writer leaves no doubt and a hostile one could make two readers differ, the bytes are refused: a
    field that is given twice, a number that is longer than its type, a list whose items are of
    another type than the format says.
    A footer can have 16 MiB, so what is passed over is passed over in plain loops.

Source: thrift-compact-protocol.md of Apache Thrift.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

I32 = 5
I64 = 6
BINARY = 8
LIST = 9
STRUCT = 12
_BOOLEANS = (1, 2)
_BYTE = 3
_NUMBERS = (4, 5, 6)
_DOUBLE = 7
_SET = 10
_MAX_DEPTH = 16
_MAX_FIELD = 2**15
MAX_ITEMS = 100_000
"""Items of a list: row groups, columns, keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListOf:
    """A list that the format knows."""

    items: int | Struct
    """Type of the items, which are passed over, or the structure that each of them is."""

    @property
    def kind(self) -> int:
        """Type of the items."""
        return self.items if isinstance(self.items, int) else STRUCT


@dataclass(frozen=True, kw_only=True, slots=True)
class Struct:
    """A structure of the format: what is read of it."""

    name: str
    """What messages call it."""
    fields: Mapping[int, int | ListOf | Struct]
    """By number: I32, I64, a list or a structure. Others are passed over."""
    make: Callable[[dict[int, Any]], Any] = dict
    """What is made of the fields that were found; a KeyError tells that one is missing."""


def parse_struct(data: bytes, at: int, struct: Struct, depth: int = 0) -> tuple[Any, int]:
    """Return (what `struct` makes of the fields, position behind the structure).

    Raises:
        IndexError: it goes on behind `data`.
        ValueError: it is no such structure.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"{struct.name} is nested too deeply")
    found: dict[int, Any] = {}
    field = 0
    while data[at]:
        kind = data[at] & 15
        field, at = _field(data, at, field)
        wanted = struct.fields.get(field)
        if wanted is None or kind != _kind_of(wanted):
            at = _skip(data, at, kind, depth)
            continue
        if field in found:
            raise ValueError(f"{struct.name} has its field {field} twice")
        if isinstance(wanted, ListOf):
            found[field], at = _parse_list(data, at, wanted, depth)
        elif isinstance(wanted, Struct):
            found[field], at = parse_struct(data, at, wanted, depth + 1)
        else:
            found[field], at = _number(data, at, 32 if wanted == I32 else 64)
    try:
        return struct.make(found), at + 1
    except KeyError as error:
        raise ValueError(f"{struct.name} lacks its field {error}") from None


def _kind_of(wanted: int | ListOf | Struct) -> int:
    if isinstance(wanted, int):
        return wanted
    return LIST if isinstance(wanted, ListOf) else STRUCT


def _field(data: bytes, at: int, before: int) -> tuple[int, int]:
    """Return (number of the field that begins at `at`, position of its value)."""
    step = data[at] >> 4
    if step:
        return before + step, at + 1
    field, at = _number(data, at + 1, 64)
    if not 0 <= field < _MAX_FIELD:
        raise ValueError(f"there is no field {field}")
    return field, at


def _number(data: bytes, at: int, bits: int) -> tuple[int, int]:
    """Return (number of 7 bits a byte, whose last bit is its sign; position behind it)."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if value >> bits:
                break
            return (value >> 1) ^ -(value & 1), at
    raise ValueError(f"a number has more than {bits} bits")


def _length(data: bytes, at: int) -> tuple[int, int]:
    """Return (number of 7 bits a byte, without a sign; position behind it)."""
    value = data[at]
    at += 1
    if value < 128:
        return value, at
    value &= 127
    for shift in range(7, 35, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a length has more than 32 bits")


def _list_head(data: bytes, at: int) -> tuple[int, int, int]:
    """Return (number of items, their type, position of the first one)."""
    count = data[at] >> 4
    kind = data[at] & 15
    at += 1
    if count == 15:
        count, at = _length(data, at)
    if count > MAX_ITEMS:
        raise ValueError(f"a list claims {count:,} items, at most {MAX_ITEMS:,} are read")
    return count, kind, at


def _parse_list(data: bytes, at: int, wanted: ListOf, depth: int) -> tuple[list[Any], int]:
    """Return (what is made of each item; none if they are passed over, position behind them)."""
    count, kind, at = _list_head(data, at)
    if count and kind != wanted.kind:
        raise ValueError(f"a list has items of type {kind}, must have type {wanted.kind}")
    if isinstance(wanted.items, int):
        return [], _skip_items(data, at, count, kind, depth)
    items = []
    for _ in range(count):
        item, at = parse_struct(data, at, wanted.items, depth + 1)
        items.append(item)
    return items, at


def _skip(data: bytes, at: int, kind: int, depth: int) -> int:
    """Return the position behind a value."""
    if kind in _NUMBERS:
        while data[at] > 127:
            at += 1
        return at + 1
    if kind == BINARY:
        length, at = _length(data, at)
        return at + length
    if kind == STRUCT:
        return _skip_struct(data, at, depth + 1)
    if kind in _BOOLEANS:  # the type is the value
        return at
    if kind == _BYTE:
        return at + 1
    if kind == _DOUBLE:
        return at + 8
    if kind in (LIST, _SET):
        count, kind, at = _list_head(data, at)
        return _skip_items(data, at, count, kind, depth)
    raise ValueError(f"a value is of the unknown type {kind}")


def _skip_struct(data: bytes, at: int, depth: int) -> int:
    if depth > _MAX_DEPTH:
        raise ValueError("a structure is nested too deeply")
    while True:
        head = data[at]
        if not head:
            return at + 1
        at += 1
        if head < 16:  # the number of the field follows
            while data[at] > 127:
                at += 1
            at += 1
        at = _skip(data, at, head & 15, depth)


def _skip_items(data: bytes, at: int, count: int, kind: int, depth: int) -> int:
    if kind in _BOOLEANS:  # in a list they take a byte each
        return at + count
    for _ in range(count):
        at = _skip(data, at, kind, depth + 1)
    return at

"""Crafted `.metadata` of an old checkpoint is refused at once, and leaves nothing behind.

Hashes and manifest of every crafted checkpoint are right: its author can compute them.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.filesystem as torch_files
import torch.distributed.checkpoint.metadata as torch_metadata
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpt.checkpoint.old_metadata import read_old_metadata
from cpt.checkpoint.reader import refusal_of
from cpt.errors import CheckpointError
from tests.support.checkpoints import OLD_CHECKPOINT, old_checkpoint, sign_file

METADATA = ".metadata"
SECONDS = 0.1
TRIES = 5
"""On a busy machine one try can take twice its time."""
MEMORY = 8 * 2**20
"""Hashing reads 4 MiB at a time."""


def refusal(tmp_path: Path, content: bytes) -> str:
    """Return why an old checkpoint with this `.metadata` is refused; it must be so quickly."""
    folder = old_checkpoint(tmp_path)
    (folder / METADATA).write_bytes(content)
    sign_file(folder, METADATA)
    seconds = SECONDS
    for _ in range(TRIES):
        began = time.process_time()
        reason = refusal_of(folder)
        seconds = time.process_time() - began
        if seconds < SECONDS:
            break
    tracemalloc.start()  # which slows down, so the time is taken without it
    try:
        refusal_of(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reason is not None and f"{folder.name}/{METADATA}: " in reason, reason
    assert seconds < SECONDS, f"{seconds:.2f} s of CPU time"
    assert peak < MEMORY, f"{peak:,} bytes"
    return reason


class Changed:
    """Stands for a class or a function whose attributes the pickle sets."""

    def __init__(self, target: Any, attributes: dict[str, Any]) -> None:
        self.target = target
        self.attributes = attributes


class Forger(pickle._Pickler):  # type: ignore[name-defined]
    """Writes `Changed` as BUILD with a state of slots, which sets attributes of anything."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, Changed):
            super().save(obj, save_persistent_id)
            return
        self.save(obj.target)
        self.save((None, obj.attributes))
        self.write(pickle.BUILD)


def forged(value: Any) -> bytes:
    buffer = io.BytesIO()
    Forger(buffer, 4).dump(value)
    return buffer.getvalue()


def honest() -> Any:
    return pickle.loads((OLD_CHECKPOINT / METADATA).read_bytes())


def leading_out() -> bytes:
    """Return metadata that names no file, and finds every range in the folder beside its own."""
    metadata = honest()
    places = {}
    for index, info in metadata.storage_data.items():
        path = f"../victim/{info.relative_path}"
        places[index] = torch_files._StorageInfo(path, info.offset, info.length)
    finder = Changed(torch.serialization._get_layout, {"cache": places})
    attributes = {"values": torch.Size, "__class_getitem__": finder}
    metadata.storage_data = Changed(torch_metadata.BytesStorageMetadata, attributes)
    return forged(metadata)


def replaced_constructor() -> bytes:
    return forged([Changed(torch_metadata.StorageMeta, {"__init__": torch.Size})])


WATCHED = (
    torch_metadata.BytesStorageMetadata,
    torch_metadata.ChunkStorageMetadata,
    torch_metadata.Metadata,
    torch_metadata.MetadataIndex,
    torch_metadata.StorageMeta,
    torch_metadata.TensorProperties,
    torch_metadata.TensorStorageMetadata,
    torch_files._StorageInfo,
    torch.serialization._get_layout,
)


@pytest.mark.parametrize("craft", [leading_out, replaced_constructor])
@pytest.mark.case("X1", "attributes set on classes that it may name: refused, nothing is changed")
def test_metadata_that_changes_classes_is_refused_and_changes_nothing(
    tmp_path: Path, craft: Callable[[], bytes]
) -> None:
    content = craft()
    before = [dict(vars(watched)) for watched in WATCHED]
    try:
        refusal(tmp_path, content)
        after = [dict(vars(watched)) for watched in WATCHED]
    finally:
        for watched, attributes in zip(WATCHED, before, strict=True):
            _restore(watched, attributes)
    assert after == before


def _restore(watched: Any, attributes: dict[str, Any]) -> None:
    """Undo what a pickle has done to this process, for the tests that follow."""
    for name in set(vars(watched)) - attributes.keys():
        delattr(watched, name)
    for name, value in attributes.items():
        if vars(watched).get(name) is not value:
            setattr(watched, name, value)


def nested_key(depth: int) -> bytes:
    """Return a dictionary whose key is a tuple of twice the same tuple, and so on."""
    key = pickle.EMPTY_TUPLE
    for level in range(depth):
        key += pickle.MEMOIZE + pickle.BINGET + bytes([level]) + pickle.TUPLE2
    return b"\x80\x04" + pickle.EMPTY_DICT + key + pickle.NONE + pickle.SETITEM + pickle.STOP


BOMBS = {
    "a place far out in the memo": b"\x80\x04]r" + struct.pack("<I", 2**25) + b".",
    "a key that takes 2^26 steps to hash": nested_key(26),
    "a long whole number": b"\x80\x04\x8b" + struct.pack("<i", 2**20) + b"\xff" * 2**20 + b".",
    "a text longer than the file": b"\x80\x04X" + struct.pack("<I", 2**32 - 1) + b"x.",
    "a text of 64-bit length": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "very many lists": b"\x80\x04" + b"]" * 2**20 + b".",
    "very many marks": b"\x80\x04" + b"(" * 2**20 + b".",
    "tuples in tuples": b"\x80\x04)" + b"\x85" * 20_000 + b".",
    "bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "a frame longer than the file": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "a recursive list": b"\x80\x04]\x94h\x00a.",
    "nothing to take": b"\x80\x04\x85.",
    "no mark": b"\x80\x04]u.",
    "an old protocol": b"\x80\x02]q\x00.",
    "a call of text": b"\x80\x04\x8c\x01a)R.",
    "an unknown opcode": b"\x80\x04\xff.",
    "more after the end": b"\x80\x04N.N.",
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
@pytest.mark.case("X1", "bombs of memory and time: refused within 0.1 s and 8 MiB")
def test_bomb_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    refusal(tmp_path, content)


def opcodes(count: int) -> bytes:
    """Return a list of that many empty dictionaries, in batches."""
    batch = b"(" + b"}" * 4000 + b"e"
    return b"\x80\x04]" + batch * (count // 4000) + b"."


def with_planner_data(size: int) -> bytes:
    metadata = honest()
    metadata.planner_data = [{} for _ in range(size)]
    return pickle.dumps(metadata, 4)


def with_attribute() -> bytes:
    metadata = honest()
    metadata.extra = {}
    return pickle.dumps(metadata, 4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (opcodes(40_000), "opcodes"),
        (opcodes(1_000_000), "tensors in 3 files could need"),
        (with_planner_data(30_000), "opcodes"),
        (with_planner_data(1), "its planner_data is not empty"),
        (with_attribute(), "it has the attribute 'extra', which none of ours has"),
    ],
    ids=["cheap opcodes", "many bytes", "planner data", "little planner data", "attribute"],
)
@pytest.mark.case("X1", "more than the tensors of the manifest need is refused at once")
def test_metadata_holds_no_more_than_its_tensors_need(
    tmp_path: Path, content: bytes, words: str
) -> None:
    assert words in refusal(tmp_path, content)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_changed_metadata_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    content = bytearray((OLD_CHECKPOINT / METADATA).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.binary(max_size=4))
        content[position : position + data.draw(st.integers(0, 4))] = change
    with contextlib.suppress(CheckpointError):
        read_old_metadata(bytes(content))

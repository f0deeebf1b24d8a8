"""The `.metadata` of checkpoints of format 1, which have no `ranges.json`.

The file is a pickle. It is read as data by `inert_pickle`, and only what describes fp32 tensors in
ranges is taken from it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cpt.checkpoint.inert_pickle import MOST_OPCODES, Call, Name, Pairs, read_pickle
from cpt.errors import CheckpointError

_ATTRIBUTES = {"state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"}
_DESCRIPTIONS = "torch.distributed.checkpoint.metadata."
_PLACE = "torch.distributed.checkpoint.filesystem._StorageInfo"


class OldRange(NamedTuple):
    """One range of a tensor and the place of its archive."""

    offset: int
    """First element in the flattened tensor."""
    numel: int
    """Number of elements."""
    file: str
    """Name of the file."""
    file_offset: int
    """First byte of the archive in the file."""
    file_bytes: int
    """Bytes of the archive."""


def read_old_metadata(
    content: bytes, most_opcodes: int = MOST_OPCODES
) -> dict[str, list[OldRange]]:
    """Return the ranges of every tensor that a `.metadata` describes, by key, in order.

    Only the form is checked, and that each range has one place; the numbers are not negative.

    Args:
        content: The file.
        most_opcodes: See `read_pickle`.

    Raises:
        CheckpointError: the file does not describe fp32 tensors in one dimension, or holds anything
            else.
    """
    try:
        root = _state(read_pickle(content, most_opcodes), _DESCRIPTIONS + "Metadata")
        if unknown := root.keys() - _ATTRIBUTES:
            raise ValueError(f"it has the attribute {min(unknown)!r}, which none of ours has")
        if root.get("planner_data") is not None:
            raise ValueError("its planner_data is not empty, as that of ours is")
        places = _places(root["storage_data"])
        found = {}
        for key, entry in _items(root["state_dict_metadata"]):
            found[_text(key)] = _ranges(_text(key), entry, places.pop(key, {}))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"does not describe tensors: {error}.") from error
    if places:
        raise CheckpointError(f"has places of {min(places)!r}, which it does not describe.")
    return found


def _places(pairs: Any) -> dict[str, dict[int, tuple[str, int, int]]]:
    """Return file, first byte and bytes of every range, by key and first element."""
    places: dict[str, dict[int, tuple[str, int, int]]] = {}
    for index, place in _items(pairs):
        which = _state(index, _DESCRIPTIONS + "MetadataIndex")
        where = _state(place, _PLACE)
        if where.get("transform_descriptors") is not None:
            raise ValueError("a range is stored transformed")
        ranges = places.setdefault(_text(which["fqn"]), {})
        first = _only_number(which["offset"])
        if first in ranges:
            raise ValueError(f"a range of {which['fqn']!r} has two places")
        ranges[first] = (
            _text(where["relative_path"]),
            _number(where["offset"]),
            _number(where["length"]),
        )
    return places


def _ranges(key: str, entry: Any, places: dict[int, tuple[str, int, int]]) -> list[OldRange]:
    """Return the ranges of one tensor; each must have a place, and each place a range."""
    if type(entry) is Call and entry.name == _DESCRIPTIONS + "BytesStorageMetadata":
        raise CheckpointError(
            f"{key!r} is stored as bytes, not as a tensor; such entries are not read."
        )
    tensor = _state(entry, _DESCRIPTIONS + "TensorStorageMetadata")
    _check_float32(key, tensor["properties"])
    numel = _only_number(tensor["size"])
    chunks = tensor["chunks"]
    if type(chunks) is not list or len(chunks) != len(places):
        raise ValueError(f"{key!r} does not have one place for each range")
    found = []
    for chunk in chunks:
        described = _state(chunk, _DESCRIPTIONS + "ChunkStorageMetadata")
        offset = _only_number(described["offsets"])
        if offset not in places:
            raise ValueError(f"the range of {key!r} at {offset} has no place, or comes twice")
        found.append(OldRange(offset, _only_number(described["sizes"]), *places.pop(offset)))
    found.sort()
    if sum(one.numel for one in found) != numel:
        raise ValueError(f"{key!r} has {numel} elements, its ranges have others")
    return found


def _check_float32(key: str, properties: Any) -> None:
    """Refuse another dtype; the properties are stored as a tuple that begins with it."""
    if type(properties) is not Call or properties.name != _DESCRIPTIONS + "TensorProperties":
        raise ValueError(f"{key!r} has no properties")
    state = properties.state
    dtype = state[0] if type(state) is tuple and state else None
    if type(dtype) is not Name or dtype.text != "torch.float32":
        shown = dtype.text if type(dtype) is Name else type(dtype).__name__
        raise ValueError(f"{key!r} is {shown}, not torch.float32")


def _state(value: Any, name: str) -> dict[str, Any]:
    """Return the attributes of an instance of a class."""
    if type(value) is not Call or value.name != name:
        shown = value.name if type(value) is Call else type(value).__name__
        raise ValueError(f"it holds {shown} where {name} should be")
    return {_text(key): attribute for key, attribute in _items(value.state)}


def _items(value: Any) -> Pairs:
    if type(value) is not Pairs:
        raise ValueError(f"a {type(value).__name__} where a dictionary should be")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"a {type(value).__name__} where text should be")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**61:
        raise ValueError("something that is no size where a size should be")
    return value


def _only_number(value: Any) -> int:
    """Return the number of a `torch.Size` of one dimension."""
    if type(value) is not Call or value.name != "torch.Size" or len(value.arguments) != 1:
        raise ValueError("something that is no torch.Size where one should be")
    sizes = value.arguments[0]
    if type(sizes) is not tuple or len(sizes) != 1:
        raise ValueError("a torch.Size that does not have one dimension")
    return _number(sizes[0])

"""Check the blocks of the DeepSpeed JSON that offload state: where it goes, and where gradients add
up meanwhile.
"""

from __future__ import annotations

import json
from typing import Any

from data_pipeline.config.strict_yaml import Located

OFFLOADS = ("offload_optimizer", "offload_param")
"""The blocks, under `zero_optimization`."""
OFFLOAD_DEVICES = ("none", "cpu", "nvme")
GRADIENT_PLACES = ("host", "device")
"""Values of the key `gradients` of `offload_optimizer`, which is this project's own."""
REFUSED_OPTIMIZER_KEYS = {
    "super_offload": (
        "it needs DeepSpeed's own CPU Adam, which runs in a process whose moments no save would "
        "see; without clipping it updates weights before the ranks know whether the update is to "
        "be dropped, and with clipping it overlaps nothing. Remove it."
    ),
    "cpuadam_cores_perc": "it belongs to super_offload, which is refused. Remove it.",
    "ratio": (
        "DeepSpeed splits the state between host and device for its own CPU Adam only, and the "
        "optimizer here is torch's. Remove it; gradients: device is another way to need less "
        "memory on the host."
    ),
}
"""Keys of `offload_optimizer` that DeepSpeed knows and this project refuses, and why."""


def offload_problems(file: Located, zero: dict[str, Any]) -> list[str]:
    """Return what is wrong with the blocks that offload state."""
    problems = []
    places = []
    for name in OFFLOADS:
        block = zero.get(name)
        if isinstance(block, dict):
            places.append(block.get("device"))
            problems += _problems_of_one_offload(file, name, block, zero.get("stage"))
    if "nvme" in places and "aio" in file.value:
        problems.append(
            f"{file.where(('aio',))} has no effect: state on NVMe is mapped into memory. Remove it."
        )
    return problems


def _problems_of_one_offload(
    file: Located, name: str, block: dict[str, Any], stage: Any
) -> list[str]:
    problems = []
    place = block.get("device")
    if place not in OFFLOAD_DEVICES:
        problems.append(
            f"{file.where(('zero_optimization', name, 'device'))} is {json.dumps(place)}, must be "
            f"one of {', '.join(OFFLOAD_DEVICES)}."
        )
    reason = _why_not_in_stage(name, place)
    if stage in (1, 2) and reason:
        problems.append(
            f"{file.where(('zero_optimization', name))} has device {place!r}, but DeepSpeed "
            f"{reason} in ZeRO stage {stage}. Use stage 3, or remove the block."
        )
    if place == "nvme":
        problems += _nvme_problems(file, name, block)
    if name == "offload_optimizer":
        problems += _refused_keys(file, block)
    if "gradients" in block:
        problems += _place_problems(file, name, block["gradients"], stage)
    return problems


def _refused_keys(file: Located, block: dict[str, Any]) -> list[str]:
    problems = []
    for key, reason in REFUSED_OPTIMIZER_KEYS.items():
        if block.get(key, False) not in (False, None) and not _is_whole(key, block[key]):
            where = file.where(("zero_optimization", "offload_optimizer", key))
            problems.append(f"{where} is {json.dumps(block[key])}, which is refused: {reason}")
    return problems


def _is_whole(key: str, value: Any) -> bool:
    """Return whether all state is offloaded, which is what happens without the key."""
    return key == "ratio" and value == 1


def _place_problems(file: Located, name: str, place: Any, stage: Any) -> list[str]:
    """Return what is wrong with the place where gradients add up."""
    where = file.where(("zero_optimization", name, "gradients"))
    if name == "offload_param":
        return [f"{where} belongs into offload_optimizer, whose gradients it places. Move it."]
    if place not in GRADIENT_PLACES:
        places = ", ".join(GRADIENT_PLACES)
        return [f"{where} is {json.dumps(place)}, must be one of {places}."]
    if place == "device" and stage == 1:
        return [
            f"{where} is 'device', but ZeRO stage 1 reduces gradients once, at the end of a step, "
            "and hands them to the host at once. Remove the key, or use stage 2 or 3."
        ]
    return []


def _why_not_in_stage(name: str, place: Any) -> str:
    """Return why ZeRO stages 1 and 2 cannot offload this, or an empty string."""
    if name == "offload_param" and place in ("cpu", "nvme"):
        return "keeps weights whole on every GPU"
    if place == "nvme":
        return "keeps no state in files"
    return ""


def _nvme_problems(file: Located, name: str, block: dict[str, Any]) -> list[str]:
    """Return what is wrong with one block for state on NVMe."""
    problems = []
    path = block.get("nvme_path")
    if not isinstance(path, str) or not path:
        where = file.where(("zero_optimization", name, "nvme_path"))
        problems.append(f"{where} is {json.dumps(path)}, must be a folder on a disk of each node.")
    for key in block:
        if key not in ("device", "nvme_path", "gradients", *REFUSED_OPTIMIZER_KEYS):
            problems.append(
                f"{file.where(('zero_optimization', name, key))} has no effect on state on NVMe: "
                "the files are mapped into memory, and the kernel decides which pages stay there. "
                "Remove it."
            )
    return problems

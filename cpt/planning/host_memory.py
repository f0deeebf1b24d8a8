"""Memory of one rank on its host, and in files on NVMe, by part; and the tables of a dry run.

State is exact. Beside it lie what an update takes, and what torch adds to page-locked memory: it
rounds the bytes of a tensor up to a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.planning.hardware import gigabytes
from cpt.planning.memory import (
    GIB,
    ParameterCounts,
    counts_of,
    device_memory,
    offloads,
    optimizer_groups,
    optimizer_state,
    trained_per_rank,
    update_groups,
)
from cpt.planning.step_memory import local_tokens
from cpt.storage.allocation import page_locked_bytes
from cpt.storage.state_bytes import (
    FP32_BYTES,
    gradient_place,
    host_gradient_bytes,
)


def host_memory(
    config: RunConfig, model: GptOssConfig, counts: ParameterCounts, place: str = "cpu"
) -> dict[str, int]:
    """Return the bytes that offloading takes for one rank, by part.

    Args:
        config: The layout.
        model: Gives the sizes.
        counts: Parameters of the whole model.
        place: `cpu`, host memory, or `nvme`, files: the value of the key `device` of an offload
            block.
    """
    trained = trained_per_rank(config, counts)
    zero = config.engine_json["zero_optimization"]
    parts: dict[str, int] = {}
    if zero.get("offload_optimizer", {}).get("device") == place:
        parts["optimizer"] = optimizer_state(config, counts)
        parts["gradients"] = host_gradient_bytes(config.engine_json) * trained
    if zero.get("offload_param", {}).get("device") == place:
        parts["weights"] = config.itemsize * ((counts.dense + counts.experts) // config.world_size)
    if place == "cpu":
        layer_input = config.itemsize * local_tokens(config) * model.hidden_size
        if config.model.offload_checkpoints:
            parts["layer inputs"] = model.num_hidden_layers * layer_input
        parts |= _host_buffers(config, counts)
        waste = 0
        for number, size in _page_locked(config, counts, parts, layer_input):
            waste += number * (page_locked_bytes(size) - size)
        parts["page-locked, rounded up"] = waste
    return {name: size for name, size in parts.items() if size}


def _host_buffers(config: RunConfig, counts: ParameterCounts) -> dict[str, int]:
    """Return what an update takes on the host beside the state."""
    if not offloads(config, "optimizer"):
        return {}
    if config.zero_stage != 3:
        # DeepSpeed keeps the rounded weights on their way to the device
        return {"rounded weights": config.itemsize * trained_per_rank(config, counts)}
    largest = largest_sub_group(config, counts)
    update = _num_arrivals(config, counts) * FP32_BYTES * largest
    if not offloads(config, "param") and config.itemsize != FP32_BYTES:
        update += config.itemsize * largest  # torch rounds the weights before it copies them
    return {"update": update}


def _num_arrivals(config: RunConfig, counts: ParameterCounts) -> int:
    """Return how many sub-groups of gradients from the device are on the host at a time."""
    if gradient_place(config.engine_json) != "device" or config.zero_stage != 3:
        return 0
    num_groups = sum(1 for group in update_groups(config, counts) if group)
    return min(2, num_groups)


def _page_locked(
    config: RunConfig, counts: ParameterCounts, parts: dict[str, int], layer_input: int
) -> Iterator[tuple[int, int]]:
    """Yield (number, bytes of each) of the large tensors that are page-locked."""
    yield parts.get("layer inputs", 0) // layer_input, layer_input
    if "weights" in parts and is_page_locked(config, "param"):
        # one buffer for each group of the optimizer, and one for each frozen parameter
        for group in optimizer_groups(config, counts):
            yield 1, config.itemsize * sum(group)
        for numel in counts.frozen_matrices:
            yield 1, config.itemsize * (numel // config.world_size)
    if "optimizer" not in parts or not is_page_locked(config, "optimizer"):
        return
    if config.zero_stage == 3:
        if gradient_place(config.engine_json) == "host":
            yield 1, parts["gradients"]
        largest = largest_sub_group(config, counts)
        yield _num_arrivals(config, counts), FP32_BYTES * largest
        return
    for group in update_groups(config, counts):
        # the master weights, their gradients, and the rounded weights
        yield 2, FP32_BYTES * sum(group)
        yield 1, config.itemsize * sum(group)


def is_page_locked(config: RunConfig, what: str) -> bool:
    """Return whether copies of offloaded state run beside computing; files are never page-locked.

    Args:
        config: The layout.
        what: `optimizer` or `param`. What is not offloaded keeps nothing waiting.
    """
    block = config.engine_json["zero_optimization"].get(f"offload_{what}")
    if block is None:
        return True
    return block["device"] == "cpu" and bool(block.get("pin_memory", True))


def largest_sub_group(config: RunConfig, counts: ParameterCounts) -> int:
    """Return this rank's elements of the largest group that is updated at a time."""
    return max(sum(group) for group in update_groups(config, counts))


def host_problem(
    config: RunConfig, model: GptOssConfig, ranks_of_node: int, available_bytes: int | None
) -> str | None:
    """Return why a node cannot hold what its ranks keep on the host; None if it can.

    Args:
        config: The layout.
        model: Gives the sizes.
        ranks_of_node: Ranks that share the host.
        available_bytes: What they can still take there; None if that is not known.
    """
    parts = host_memory(config, model, counts_of(config, model))
    needed = ranks_of_node * sum(parts.values())
    if available_bytes is None or needed <= available_bytes:
        return None
    told = [f"{name} {gigabytes(ranks_of_node * size)}" for name, size in parts.items()]
    return (
        f"the {ranks_of_node} ranks of this node keep {gigabytes(needed)} on the host "
        f"({', '.join(told)}), of which {gigabytes(available_bytes)} are available; the kernel "
        "would end the run. A batch job has the memory that it has asked for (SLURM: --mem=0 for "
        "all). If that is the whole node, take more nodes, a smaller train.optimizer_state, "
        'offload_optimizer with "gradients": "device", or state on NVMe; cpt plan --host_gb N '
        "--nvme_gb N searches for a layout."
    )


def memory_tables(config: RunConfig, model: GptOssConfig, ranks_of_node: int) -> str:
    """Return what one rank takes, on its device and, if state is offloaded, elsewhere.

    Args:
        config: The layout.
        model: Gives the sizes.
        ranks_of_node: Ranks that share a host and its disks.
    """
    counts = counts_of(config, model)
    tables = [_table("memory", device_memory(config, model, counts))]
    shared = {
        "host memory": host_memory(config, model, counts),
        "NVMe space": host_memory(config, model, counts, "nvme"),
    }
    for place, parts in shared.items():
        if parts:
            of_node = gigabytes(ranks_of_node * sum(parts.values()))
            tables.append(_table(place, parts))
            tables.append(f"  of the {ranks_of_node} ranks of a node: {of_node}")
    return "\n".join(tables)


def _table(place: str, parts: dict[str, int]) -> str:
    """Return the parts and their sum, one a line."""
    width = max(map(len, parts))
    lines = [f"{place} of one rank (estimate, see cpt/planning/memory.py)"]
    for name, size in parts.items():
        if size:
            lines.append(f"  {name:<{width}}  {size / GIB:9.2f} GiB")
    lines.append(f"  {'sum':<{width}}  {sum(parts.values()) / GIB:9.2f} GiB")
    return "\n".join(lines)

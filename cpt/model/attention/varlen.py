"""The conventions and limits that the variable-length CUDA kernels share.

They take tokens first, (tokens, heads, head size), and documents as offsets. A window is counted in
keys to the left of the query, the query not included: a window of 128 keys is (127, 0), and full
causal attention is (-1, 0).

Shape letters: T tokens of all rows (flattened), H heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpt.model.attention.interface import AttentionInputs
from cpt.model.attention.machine import Machine
from cpt.model.attention.rows import PackedRows
from cpt.storage.transfer import to_device

HALF_TYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of packed rows as the kernels want them."""

    offsets: torch.Tensor
    """Start of each document, then the number of tokens; int32, on the device."""
    longest_tokens: int
    """Tokens of the longest document."""

    @classmethod
    def of(cls, inputs: AttentionInputs) -> Documents:
        """Return the documents that a layer attends within."""
        return cls.on(inputs.rows, inputs.q_HTD.device)

    @classmethod
    def on(cls, rows: PackedRows, device: torch.device) -> Documents:
        """Return the documents of rows, which are copied at the first call and kept with the rows.

        The host does not wait for the copy.
        """

        def build() -> Documents:
            offsets = to_device(torch.tensor(rows.bounds, dtype=torch.int32), device)
            return cls(offsets, rows.longest_document_tokens)

        return rows.derive(("documents", device), build)


def keys_to_the_left(window: int | None) -> int:
    """Return how many keys before itself a query sees, -1 for all."""
    return -1 if window is None else window - 1


def tokens_first(x_HTD: torch.Tensor) -> torch.Tensor:
    """Return (T, H, D), a view."""
    return x_HTD.transpose(0, 1)


def checked_lse(lse: torch.Tensor, q_HTD: torch.Tensor, source: str) -> torch.Tensor:
    """Return `lse` if it is (H, T) in float32 (in float64 for float64).

    Releases before flash-attn 2.6 and torch 2.5 return (documents, H, longest document) instead.

    Raises:
        RuntimeError: It is something else: the kernel is not the one that this was written for.
    """
    dtype = torch.promote_types(q_HTD.dtype, torch.float32)
    if lse.shape != q_HTD.shape[:2] or lse.dtype != dtype:
        raise RuntimeError(
            f"{source} returned a log-sum-exp of shape {tuple(lse.shape)} in {lse.dtype}, expected "
            f"{tuple(q_HTD.shape[:2])} in {dtype}. Use another model.attention, and report this "
            "version."
        )
    return lse


def gpu_problems(
    machine: Machine,
    dtype: torch.dtype,
    head_dim: int,
    *,
    dtypes: tuple[torch.dtype, ...] = HALF_TYPES,
    majors: tuple[int, ...] = (8, 9, 10, 11, 12),
) -> list[str]:
    """Return why a CUDA kernel cannot serve these tensors on a machine.

    Args:
        machine: The machine that it would run on.
        dtype: Type of queries, keys and values.
        head_dim: Size of a head.
        dtypes: The dtypes that the kernel has code for.
        majors: The GPU generations that it has code for.
    """
    problems = []
    generations = ", ".join(f"SM{major}x" for major in majors)
    if machine.is_rocm:
        problems.append(
            f"torch {machine.torch_build} is built for AMD GPUs, for which nothing here was checked"
        )
    elif machine.compute_capability is None:
        build = " (torch is a CPU build)" if machine.torch_build.endswith("+cpu") else ""
        problems.append(
            f"no CUDA GPU is visible{build}: needs one of {generations} and a CUDA build of torch"
        )
    elif machine.compute_capability[0] not in majors:
        generation = "SM{}{}".format(*machine.compute_capability)
        problems.append(f"it has no code for this GPU, {generation}: needs one of {generations}")
    if dtype not in dtypes:
        wanted = " or ".join(str(known).removeprefix("torch.") for known in dtypes)
        problems.append(f"it has no code for {dtype}: needs {wanted} (train.dtype)")
    if head_dim % 8 or head_dim > LARGEST_HEAD_DIM:
        problems.append(f"head_dim {head_dim} is not a multiple of 8 up to {LARGEST_HEAD_DIM}")
    return problems

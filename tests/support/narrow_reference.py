"""Moments in fewer bytes by their definition, in NumPy and on whole parameters.

`round_moments` is called after a step of torch's plain AdamW in fp32. No code under test is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

U64 = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
BLOCK = 64
STOCHASTIC = {"bf16": ("exp_avg_sq",), "int8": ("exp_avg", "exp_avg_sq")}


def splitmix(values: U64) -> U64:
    """Return SplitMix64's output function of each number."""
    with np.errstate(over="ignore"):
        z = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hashed(value: int) -> int:
    """Return the hash of one number."""
    return int(splitmix(np.array([(value + 0x9E3779B97F4A7C15) % 2**64], dtype=np.uint64))[0])


@cache
def table() -> npt.NDArray[np.int64]:
    """Return the numbers below 2^20 in the order of the hashes of their places."""
    with np.errstate(over="ignore"):
        places = np.arange(2**20, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.argsort(splitmix(places))


def random_bits(name: str, moment: str, numel: int, *, seed: int, step: int) -> U64:
    """Return a number below 2^20 for each element of a whole parameter."""
    key = hashed(hashed(seed) ^ (2 * step + ("exp_avg", "exp_avg_sq").index(moment)))
    parameter = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    found = []
    for window in range(-(-numel // 2**20)):
        first = hashed(hashed(key ^ parameter) ^ window) >> 44
        found.append(table()[(first + np.arange(2**20)) % 2**20])
    return np.concatenate(found)[:numel].astype(np.uint64)


def cut(values: Floats, lowest_bits: int, noise: U64 | None) -> Floats:
    """Round magnitudes so that their lowest bits are zero; without noise to the nearest."""
    bits = values.view(np.uint32).astype(np.uint64)
    unit = np.uint64(1 << lowest_bits)
    rest = bits % unit
    threshold = unit // np.uint64(2) if noise is None else noise
    carried = (rest + threshold) // unit
    rounded: Floats = ((bits - rest) + carried * unit).astype(np.uint32).view(np.float32)
    return rounded


def blocks_of_8_bits(values: Floats, *, signed: bool) -> Floats:
    """Return what blocks hold of values whose mantissas are rounded already."""
    in_blocks = values.astype(np.float64).reshape(-1, BLOCK)
    largest = np.abs(in_blocks).max(1, keepdims=True)
    binade = 2.0 ** np.floor(np.log2(np.where(largest == 0, 1, largest)))
    if signed:
        held = np.where(np.abs(in_blocks) > binade * 2.0**-15, in_blocks, 0)
    else:
        held = np.maximum(in_blocks, binade * 2.0**-31)
    held = np.where(largest == 0, 0, held)
    return held.astype(np.float32).reshape(-1)


def rounded_moment(
    values: torch.Tensor, form: str, name: str, moment: str, *, seed: int, step: int
) -> torch.Tensor:
    """Return what is kept of one moment of a whole parameter after a step."""
    flat = values.detach().flatten().numpy()
    noise = None
    lowest_bits = 16 if form == "bf16" else 20
    if moment in STOCHASTIC[form]:
        noise = random_bits(name, moment, flat.size, seed=seed, step=step)
        noise >>= np.uint64(20 - lowest_bits)
    if form == "bf16" and noise is None:
        return values.detach().bfloat16().float()
    kept = cut(flat, lowest_bits, noise)
    if form == "int8":
        kept = blocks_of_8_bits(kept, signed=moment == "exp_avg")
    return torch.from_numpy(kept).view(values.shape)


def has_blocks(name: str) -> bool:
    """Return whether a parameter's moments may be held in blocks: it is a matrix, and no router."""
    small = name.endswith(("bias", "sinks")) or "norm" in name
    return not small and ".mlp.router." not in name


def round_moments(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, torch.nn.Parameter],
    form: str,
    *,
    seed: int,
    step: int,
) -> None:
    """Round the moments that plain AdamW has just updated.

    Args:
        optimizer: torch's AdamW.
        named: The trained parameters, whole, by name.
        form: bf16 or int8.
        seed: `train.seed`.
        step: Steps done, this one included.
    """
    for name, parameter in named.items():
        if form == "int8" and not has_blocks(name):
            continue
        state = optimizer.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            kept = rounded_moment(state[moment], form, name, moment, seed=seed, step=step)
            state[moment].copy_(kept)

"""Random bits for stochastic rounding that belong to (seed, step, parameter, position).

A number that is rounded up with a probability of the part that is cut off has no error on average.
The random bits are looked up, not drawn: those of an element depend on where it lies in the whole
parameter and on nothing else, so every layout has the same, and a resumed run repeats them.

How the bits are found
    A table holds every number below 2^20 once, in an order that a hash of its places gives. An
    element in window w of its parameter, 2^20 elements each, takes the entry that lies at its place
    in the window plus h, where h is a hash of (seed, step, parameter, moment, w). Over h each
    number is equally likely, so rounding is exactly unbiased. A slice of the table costs one
    addition an element; a hash of every element would cost six passes.

The hash is SplitMix64 (Steele, Lea and Flood, 2014, figure 15), which is a bijection.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from data_pipeline.store.hashing import splitmix64_numbers

TABLE_BITS = 20
"""Bits of a random number."""
WINDOW = 1 << TABLE_BITS
"""Elements of a parameter that share one hash; as many as the table has different entries."""
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


class NoisyRun(NamedTuple):
    """Consecutive elements of one parameter in one window, as a rank holds them."""

    start: int
    """First element in the rank's flat partition."""
    numel: int
    """Number of elements."""
    parameter: int
    """Number of the parameter, from `number_of_name`."""
    window: int
    """Number of the window in the whole parameter."""
    place: int
    """First element in the window."""


def number_of_name(name: str) -> int:
    """Return a number of 64 bits that stands for the name of a parameter."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def noisy_runs(start: int, numel: int, offset: int, parameter: int) -> list[NoisyRun]:
    """Cut a part of a parameter at the borders of windows.

    Args:
        start: First element in the rank's flat partition.
        numel: Number of elements.
        offset: First element in the whole parameter.
        parameter: Number of the parameter.
    """
    runs = []
    done = 0
    while done < numel:
        window, place = divmod(offset + done, WINDOW)
        length = min(numel - done, WINDOW - place)
        runs.append(NoisyRun(start + done, length, parameter, window, place))
        done += length
    return runs


def mixed(state: int) -> int:
    """Return the hash of a number of 64 bits."""
    state = (state + _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * _FIRST) & _MASK
    state = ((state ^ (state >> 27)) * _SECOND) & _MASK
    return state ^ (state >> 31)


def place_in_table(key: int, run: NoisyRun) -> int:
    """Return the entry of the first element of a run.

    Args:
        key: A hash of what is the same for all parameters: seed, step, and which moment.
        run: The run.
    """
    hashed = mixed(mixed(key ^ run.parameter) ^ run.window)
    return (hashed >> (64 - TABLE_BITS)) + run.place


@lru_cache(maxsize=4)
def noise_table(bits: int, device: torch.device) -> torch.Tensor:
    """Return the table of random numbers of so many bits, (2 * WINDOW,) int32.

    The second half repeats the first, so that a window that begins anywhere is one slice.
    """
    # the state before the first number, which is 0, scatters to 0
    scattered = np.append(np.uint64(0), splitmix64_numbers(WINDOW - 1))
    order = np.argsort(scattered).astype(np.int32) >> (TABLE_BITS - bits)
    return torch.from_numpy(np.concatenate([order, order])).to(device)


def add_noise_(
    bits_int32: torch.Tensor, start: int, runs: list[NoisyRun], key: int, noise_bits: int
) -> None:
    """Add random numbers to the bits of consecutive elements of a flat partition.

    Args:
        bits_int32: (numel,) bits of fp32 values, changed in place.
        start: Their first element in the flat partition.
        runs: The runs that the elements belong to, cut at their first and last element. Elements of
            no run are padding and get nothing.
        key: See `place_in_table`.
        noise_bits: Bits of a random number: as many as will be cut off.
    """
    table = noise_table(noise_bits, bits_int32.device)
    for run in runs:
        first = place_in_table(key, run)
        own = bits_int32.narrow(0, run.start - start, run.numel)
        own.add_(table.narrow(0, first, run.numel))


def runs_within(runs: list[NoisyRun], start: int, stop: int) -> list[NoisyRun]:
    """Return the parts of sorted runs that lie in elements `start` to `stop` of the partition."""
    found = []
    first = bisect_right(runs, start, key=lambda run: run.start) - 1
    for number in range(max(0, first), len(runs)):
        run = runs[number]
        if run.start >= stop:
            break
        low = max(run.start, start)
        high = min(run.start + run.numel, stop)
        if low < high:
            place = run.place + low - run.start
            found.append(NoisyRun(low, high - low, run.parameter, run.window, place))
    return found

"""Random bits belong to (seed, step, parameter, position), and rounding with them has no bias."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpt.storage.rounding_noise import (
    WINDOW,
    NoisyRun,
    add_noise_,
    mixed,
    noise_table,
    noisy_runs,
    number_of_name,
    place_in_table,
    runs_within,
)

CPU = torch.device("cpu")
NAME = number_of_name("model.embed_tokens.weight")


def noise(start: int, numel: int, *, key: int = 1, parameter: int = NAME) -> torch.Tensor:
    """Return the random numbers of some elements of a parameter that is held from `start` on."""
    bits = torch.zeros(numel, dtype=torch.int32)
    add_noise_(bits, 0, noisy_runs(0, numel, start, parameter), key, 20)
    return bits


@pytest.mark.parametrize("bits", [16, 20])
def test_every_number_is_equally_likely(bits: int) -> None:
    table = noise_table(bits, CPU)
    counts = torch.bincount(table[:WINDOW], minlength=1 << bits)
    assert counts.min() == counts.max() == WINDOW >> bits
    assert torch.equal(table[:WINDOW], table[WINDOW:])


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of the generator that is seeded with 0, as published implementations."""
    golden = 0x9E3779B97F4A7C15
    found = [mixed(golden * n % 2**64) for n in range(3)]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_random_numbers_of_an_element_do_not_depend_on_how_the_parameter_is_cut() -> None:
    start, numel = WINDOW - 1000, 3000  # across the border of two windows
    whole = noise(start, numel)
    parts = torch.cat([noise(start, 700), noise(start + 700, 1300), noise(start + 2000, 1000)])
    assert torch.equal(whole, parts)


def test_chunks_of_a_partition_give_what_the_whole_gives_and_padding_gets_nothing() -> None:
    first = noisy_runs(0, 500, 90, NAME)
    second = noisy_runs(500, 300, WINDOW - 100, number_of_name("lm_head.weight"))
    runs = [*first, *second]
    whole = torch.zeros(1000, dtype=torch.int32)
    add_noise_(whole, 0, runs, 5, 16)
    chunks = torch.zeros(1000, dtype=torch.int32)
    for start in range(0, 1000, 130):
        stop = min(start + 130, 1000)
        add_noise_(chunks[start:stop], start, runs_within(runs, start, stop), 5, 16)
    assert torch.equal(whole, chunks)
    assert not whole[800:].any()
    assert whole[:800].any()


def test_another_key_parameter_or_window_has_other_numbers() -> None:
    base = noise(0, 1000)
    other = number_of_name("lm_head.weight")
    for found in (noise(0, 1000, key=2), noise(0, 1000, parameter=other), noise(WINDOW, 1000)):
        assert int((found == base).sum()) < 20


def test_neighbors_and_steps_are_not_correlated() -> None:
    """Among 4,000 draws a correlation has a standard deviation of 0.016."""
    run = NoisyRun(0, 2, NAME, 0, 17)
    table = noise_table(20, CPU).numpy()
    places = np.array([place_in_table(mixed(step), run) for step in range(4001)])
    here = table[places].astype(np.float64)
    neighbor = table[places + 1].astype(np.float64)
    assert abs(np.corrcoef(here, neighbor)[0, 1]) < 0.08
    assert abs(np.corrcoef(here[:-1], here[1:])[0, 1]) < 0.08
    assert here.mean() == pytest.approx((WINDOW - 1) / 2, rel=0.05)

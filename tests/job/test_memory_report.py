"""The peak of a block on a CPU is what was allocated at once, also when the profiler misses
frees.
"""

from __future__ import annotations

import threading

import torch

from cpt.job.memory_report import highest_level, peak_within

MEBI = 2**20


def test_peak_is_the_most_that_the_block_held_at_a_time() -> None:
    with peak_within(torch.device("cpu")) as peak:
        first = torch.zeros(2 * MEBI, dtype=torch.uint8)
        second = torch.zeros(16 * MEBI, dtype=torch.uint8)
        del first
        third = torch.zeros(MEBI, dtype=torch.uint8)
        del second, third
    assert peak.num_bytes == 18 * MEBI


def test_memory_that_is_handed_out_again_counts_once() -> None:
    """What a thread of gloo frees goes unseen; its address comes again."""
    seen = [
        (1, 0xA, 64),
        (2, 0xB, 10),
        (3, 0xB, -10),
        (4, 0xA, 64),
        (5, 0xA, 32),
        (6, 0xC, 8),
        (7, 0xA, -32),
    ]
    assert highest_level(seen) == 74
    assert highest_level([(1, 0xA, -64), (2, 0xB, 16)]) == 0, (
        "what was there before the block had been counted"
    )


def test_profiler_does_not_see_what_other_threads_free() -> None:
    """If it did, this would be 64 MiB, and `highest_level` a plain sum; an address that is not used
    again stays.
    """
    rounds = 10
    with peak_within(torch.device("cpu")) as peak:
        for _ in range(rounds):
            held = [torch.zeros(64 * MEBI, dtype=torch.uint8)]
            thread = threading.Thread(target=held.clear)
            thread.start()
            thread.join()
    assert 64 * MEBI <= peak.num_bytes < rounds * 64 * MEBI / 2

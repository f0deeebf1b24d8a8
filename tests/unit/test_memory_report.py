"""The peak of a block on a CPU is what was allocated at once, whichever thread frees it."""

from __future__ import annotations

import threading

import torch

from cpt.memory_report import peak_within

MEBI = 2**20


def test_peak_is_the_most_that_the_block_held_at_a_time() -> None:
    with peak_within(torch.device("cpu")) as peak:
        first = torch.zeros(2 * MEBI, dtype=torch.uint8)
        second = torch.zeros(16 * MEBI, dtype=torch.uint8)
        del first
        third = torch.zeros(MEBI, dtype=torch.uint8)
        del second, third
    assert peak.num_bytes == 18 * MEBI


def test_memory_that_another_thread_frees_counts_once() -> None:
    """As gloo's threads do; the profiler follows the main thread alone."""
    with peak_within(torch.device("cpu")) as peak:
        for _ in range(5):
            held = [torch.zeros(64 * MEBI, dtype=torch.uint8)]
            thread = threading.Thread(target=held.clear)
            thread.start()
            thread.join()
    assert peak.num_bytes == 64 * MEBI

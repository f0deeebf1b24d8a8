"""What a GPU is taken to reach, in one place; the counted milliseconds follow from it."""

from __future__ import annotations

MEMORY_BYTES_PER_SECOND = 3.0e12
"""A copy on an H100."""
PRODUCT_FLOPS_PER_SECOND = 600e12
"""Large bf16 products on an H100."""
EIGHT_BIT_FLOPS_PER_SECOND = 1200e12
"""The same in 8 bits: twice as many, by the data sheet."""
LAUNCH_SECONDS = 5e-6
"""The host's time for one kernel."""
SECTOR_BYTES = 32
"""The least that travels to or from a GPU's memory."""

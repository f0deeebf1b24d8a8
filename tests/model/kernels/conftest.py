"""Where the kernels are tested: on a GPU, or under Triton's interpreter without one."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def kernel_device() -> torch.device:
    pytest.importorskip("triton", reason="triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""Shared by all tests."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # two threads on a busy two-core machine wait for each other more than they compute

"""The gradient norm takes every element once, in few sums, and is right for large shares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpt.deepspeed_adapter import gradients
from cpt.deepspeed_adapter.gradients import apply_update, joined, squared_gradient_norm
from cpt.errors import InternalError


def engine_of(*groups: list[torch.Tensor]) -> Any:
    """Return what `squared_gradient_norm` reads of a ZeRO-3 engine without offload."""
    zero = SimpleNamespace(offload_optimizer=False, averaged_gradients=dict(enumerate(groups)))
    return SimpleNamespace(optimizer=zero, zero_optimization_stage=lambda: 3)


def test_views_that_follow_each_other_become_one_and_others_stay() -> None:
    buffer = torch.arange(24.0)
    other = torch.arange(100.0, 110.0)
    views = [buffer[0:5], buffer[5:12].view(7, 1), buffer[12:12], buffer[12:20]]
    transposed = other[:6].view(2, 3).t()
    parts = joined([*views, buffer[21:24], other[6:], transposed])
    assert [part.numel() for part in parts] == [20, 3, 4, 6]
    assert torch.equal(parts[0], buffer[:20])
    assert torch.equal(parts[1], buffer[21:])
    assert torch.equal(parts[2], other[6:])
    assert torch.equal(parts[3], transposed)
    assert all(part.data_ptr() != 0 for part in parts)


def test_neighbors_in_another_dtype_are_not_joined() -> None:
    buffer = torch.zeros(8)
    halves = buffer.view(torch.bfloat16)
    assert len(joined([buffer[:4], halves[4:]])) == 2


def test_the_norm_counts_every_element_of_all_groups_once() -> None:
    first = torch.randn(50)
    second = torch.randn(3, 7)
    engine = engine_of([first[:20], first[20:]], [second])
    expected = float(first.double().square().sum() + second.double().square().sum())
    norm = squared_gradient_norm(engine)
    assert norm.dtype == torch.float64 and norm.dim() == 0
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    assert float(squared_gradient_norm(engine_of())) == 0.0


def test_what_is_not_finite_anywhere_shows_in_the_norm() -> None:
    gradient = torch.ones(10)
    gradient[7] = float("nan")
    assert squared_gradient_norm(engine_of([torch.ones(3)], [gradient])).isnan()
    gradient[7] = float("inf")
    assert squared_gradient_norm(engine_of([torch.ones(3)], [gradient])).isinf()


def test_a_large_share_on_the_host_is_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is lowered so that the test stays small; the true one is 16 million elements."""
    monkeypatch.setattr(gradients, "LARGEST_HOST_SUM", 1 << 10)
    monkeypatch.setattr(gradients, "HOST_PART", 1 << 8)
    sizes = []
    plain = torch.linalg.vector_norm

    def recorded(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        sizes.append(part.numel())
        return plain(part, dtype=dtype)

    monkeypatch.setattr(torch.linalg, "vector_norm", recorded)
    large = torch.randn(1030)
    small = torch.randn(1024)
    norm = squared_gradient_norm(engine_of([small, large]))
    assert sizes == [1024, 256, 256, 256, 256, 6]
    expected = float(large.double().square().sum() + small.double().square().sum())
    assert float(norm) == pytest.approx(expected, rel=1e-6)


class Zero:
    """The part of a ZeRO-3 optimizer that computes the norm for clipping."""

    offload_optimizer = False

    def __init__(self) -> None:
        self.fp32_partitioned_groups_flat = [torch.zeros(3)]

    def _get_norm_groups(self) -> list[torch.Tensor]:
        return [torch.tensor(5.0)]


class Engine:
    """A DeepSpeed engine that notes the norm which a step clips by."""

    def __init__(self, *, applies: bool = True) -> None:
        self.optimizer = Zero()
        self.clipped_by: list[float] = []
        self._applies = applies

    def zero_optimization_stage(self) -> int:
        return 3

    def step(self) -> None:
        self.clipped_by += [float(norm) for norm in self.optimizer._get_norm_groups()]

    def was_step_applied(self) -> bool:
        return self._applies


def test_a_gpu_clips_by_the_norm_that_is_known_and_a_cpu_by_deepspeeds_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine()
    apply_update(engine, 7.0)
    monkeypatch.setattr(gradients, "_repeats_norm_on_gpu", lambda engine: True)
    apply_update(engine, 7.0)
    monkeypatch.undo()
    apply_update(engine, 7.0)
    assert engine.clipped_by == [5.0, 7.0, 5.0]


def test_an_update_that_is_dropped_is_an_internal_error() -> None:
    with pytest.raises(InternalError, match="DeepSpeed dropped an update"):
        apply_update(Engine(applies=False), 1.0)


def test_a_sum_stays_within_32_bit_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "LARGEST_JOINED", 10)
    buffer = torch.zeros(20)
    parts = joined([buffer[:6], buffer[6:10], buffer[10:12], buffer[12:]])
    assert [part.numel() for part in parts] == [10, 10]

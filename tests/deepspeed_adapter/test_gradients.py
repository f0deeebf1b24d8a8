"""The gradient norm takes every element once, in few sums, and is right for large shares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpt.deepspeed_adapter import gradients
from cpt.deepspeed_adapter.gradients import apply_update, joined, squared_gradient_norm
from cpt.deepspeed_adapter.state_reading import StateReading
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


def test_the_norm_of_a_table_of_the_real_size_is_right_on_a_host() -> None:
    """The embedding of gpt-oss-20b has 201,088 x 2,880 elements; one fp32 sum is 11 % low."""
    pattern = torch.randn(2880 * 64, generator=torch.Generator().manual_seed(0))
    table = pattern.repeat(201_088 // 64)
    assert table.numel() == 201_088 * 2880
    expected = float(pattern.double().square().sum()) * (201_088 // 64)
    norm = squared_gradient_norm(engine_of([table[:-5], table[-5:]]))
    assert float(norm) == pytest.approx(expected, rel=1e-7)


def test_the_norm_does_not_depend_on_how_a_tensor_is_divided_among_ranks() -> None:
    gradient = torch.randn(1_000_003, generator=torch.Generator().manual_seed(1))
    whole = float(squared_gradient_norm(engine_of([gradient])))
    for num_ranks in (2, 3, 8):
        parts = gradient.tensor_split(num_ranks)
        summed = sum(float(squared_gradient_norm(engine_of([part]))) for part in parts)
        assert summed == pytest.approx(whole, rel=1e-7)


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
        self.state_reading = StateReading()
        self.clipped_by: list[float] = []
        self._applies = applies

    def zero_optimization_stage(self) -> int:
        return 3

    def step(self) -> None:
        self.clipped_by += [float(norm) for norm in self.optimizer._get_norm_groups()]

    def was_step_applied(self) -> bool:
        return self._applies


def test_an_update_is_clipped_by_the_norm_that_is_known_and_by_no_other_later() -> None:
    engine = Engine()
    apply_update(engine, 7.0)
    assert engine.clipped_by == [7.0]
    engine.step()
    assert engine.clipped_by == [7.0, 5.0]


def test_an_update_that_is_dropped_is_an_internal_error() -> None:
    with pytest.raises(InternalError, match="DeepSpeed dropped an update"):
        apply_update(Engine(applies=False), 1.0)


def test_a_sum_stays_within_32_bit_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "LARGEST_JOINED", 10)
    buffer = torch.zeros(20)
    parts = joined([buffer[:6], buffer[6:10], buffer[10:12], buffer[12:]])
    assert [part.numel() for part in parts] == [10, 10]

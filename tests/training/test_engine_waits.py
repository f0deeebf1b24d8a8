"""The host reads what the device computed once per optimizer step, and once more for the routers.

On a CPU nothing has to be waited for, so the calls are counted that would wait on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch.utils._python_dispatch import TorchDispatchMode

from cpt.config.precision_sections import QuantizeSection
from cpt.deepspeed_adapter.state_reading import StateReading
from cpt.model.experts.router_watch import RouterWatch
from cpt.parallel.traffic import Traffic
from cpt.resilience.phase import PhaseClock
from cpt.training.engine import StepResult, TrainingEngine
from cpt.training.loader import MicroBatch, cut_rows, filler_row
from cpt.training.rounding import ExpertRounding

SEQ_LEN = 6
EXPERTS = 4
TOP_K = 2
MICRO_STEPS = 3
READS = ("cpu", "tolist", "item", "numpy")
"""Methods that bring values to the host."""
WAITING_OPERATORS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select")


class Reads(TorchDispatchMode):
    """Counts what would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if str(op).startswith(WAITING_OPERATORS):
            self.names.append(str(op))
        return op(*args, **(kwargs or {}))

    def record(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        plain = getattr(torch.Tensor, name)

        def recorded(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            return plain(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, recorded)


class StandIn:
    """An engine of one layer: a routed embedding whose loss is the sum of the token's row."""

    def __init__(self, watch: RouterWatch) -> None:
        self.weight = torch.randn(20, EXPERTS, requires_grad=True)
        self.state_reading = StateReading()
        self.watch = watch
        self.optimizer = self
        self.offload_optimizer = False
        self.fp32_partitioned_groups_flat = [self.weight]

    @property
    def averaged_gradients(self) -> dict[int, list[torch.Tensor]]:
        assert self.weight.grad is not None
        return {0: list(self.weight.grad.detach())}

    def zero_optimization_stage(self) -> int:
        return 3

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        logits_NE = self.weight[input_ids.view(-1)]
        values_Nk, choice_Nk = logits_NE.topk(TOP_K)
        weights_Nk = self.watch.observe(0, logits_NE, logits_NE, values_Nk.softmax(1), choice_Nk)
        self.watch.computed(choice_Nk.numel())
        return (weights_Nk * values_Nk).sum(1).view_as(input_ids)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        pass

    def was_step_applied(self) -> bool:
        return True


@contextmanager
def one_process(folder: Any) -> Iterator[Any]:
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield SimpleNamespace(
            world_size=1,
            sp_size=1,
            sp_rank=0,
            device=torch.device("cpu"),
            control_group=dist.group.WORLD,
            traffic=Traffic(),
        )
    finally:
        dist.destroy_process_group()


def make_engine(topology: Any) -> Any:
    """Return a training engine without DeepSpeed, whose constructor has not run."""
    engine: Any = object.__new__(TrainingEngine)
    engine.topology = topology
    engine.router_watch = RouterWatch(
        num_layers=1,
        num_experts=EXPERTS,
        top_k=TOP_K,
        aux_coef=0.0,
        z_coef=0.1,
        device=topology.device,
    )
    engine.deepspeed = StandIn(engine.router_watch)
    engine._clock = PhaseClock()
    device = torch.device("cpu")
    engine.rounding = ExpertRounding(QuantizeSection(), engine.deepspeed, device, engine._clock)
    engine._sequence_parallel = None
    engine._kernel = None
    engine._positions = MICRO_STEPS * 2 * SEQ_LEN
    engine._has_targets = False
    engine._kl_weight = 0.0
    engine._save_wait_seconds = 0.0
    return engine


def micro_batches(topology: Any) -> list[MicroBatch]:
    batches = []
    for number in range(MICRO_STEPS):
        rows = [filler_row(SEQ_LEN) for _ in range(2)]
        for row in rows:
            row.input_ids[:] = torch.randint(0, 20, (SEQ_LEN,)).numpy()
        batches.append(cut_rows(rows, [number % 2, 1], topology))
    return batches


@pytest.mark.parametrize(("measure", "expected_reads"), [(False, 1), (True, 2)])
def test_micro_batches_read_nothing_and_a_step_reads_once(
    measure: bool, expected_reads: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    reads = Reads()
    seen: list[int] = []

    def watched(batches: list[MicroBatch]) -> Iterator[MicroBatch]:
        for batch in batches:
            yield batch
            seen.append(len(reads.names))

    with one_process(tmp_path) as topology:
        engine = make_engine(topology)
        batches = micro_batches(topology)
        expected = expected_nats(engine, batches)
        for name in READS:
            reads.record(monkeypatch, name)
        with reads:
            result: StepResult = engine.step(
                watched(batches), [5, 7], step=1, measure_routers=measure
            )
    assert seen == [0] * MICRO_STEPS
    assert reads.names.count("cpu") == expected_reads
    assert result.nll_by_source == pytest.approx(expected, rel=1e-6)
    assert result.applied and (result.router is not None) == measure
    gradient = engine.deepspeed.weight.grad
    assert result.grad_norm == pytest.approx(float(gradient.norm()), rel=1e-6)


def test_what_a_backward_leaves_on_the_list_of_running_modules_is_taken_off(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list(FWD_MODULE_STACK)

    def backward(loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        FWD_MODULE_STACK.append("a layer that was computed again")

    with one_process(tmp_path) as topology:
        engine = make_engine(topology)
        monkeypatch.setattr(engine.deepspeed, "backward", backward)
        engine.step(micro_batches(topology), [5, 7], step=1)
    assert before == FWD_MODULE_STACK


def expected_nats(engine: Any, batches: list[MicroBatch]) -> list[float]:
    """Return the sums by source, taken one row after another."""
    nats = [0.0, 0.0]
    engine.router_watch.begin(num_sources=2, positions=1, world_size=1, measure=False)
    for batch in batches:
        losses_BS = engine.deepspeed(batch.input_ids).detach()
        for source, losses_S in zip(batch.source_of_row.tolist(), losses_BS, strict=True):
            nats[source] += float(losses_S.double().sum())
    return nats


def test_update_waits_for_a_save_that_still_reads_and_backward_does_not(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    order: list[str] = []
    with one_process(tmp_path) as topology:
        engine = make_engine(topology)
        reading = engine.deepspeed.state_reading
        batches = micro_batches(topology)

        def read_in_the_background() -> None:
            order.append("read")
            reading.end()

        def watched() -> Iterator[MicroBatch]:
            yield from batches
            order.append("backward")
            threading.Timer(0.1, read_in_the_background).start()

        def update() -> None:
            if "backward" in order:  # before, it only counts micro steps
                order.append("update")

        monkeypatch.setattr(engine.deepspeed, "step", update)
        reading.begin()
        engine.step(watched(), [5, 7], step=1)
    assert order == ["backward", "read", "update"]
    assert engine.take_save_wait() > 0.05 and engine.take_save_wait() == 0.0
    assert not reading.is_open


def test_step_without_an_update_does_not_wait_for_a_save(tmp_path: Any) -> None:
    torch.manual_seed(0)
    with one_process(tmp_path) as topology:
        engine = make_engine(topology)
        engine.deepspeed.weight.data[:, 0] = float("nan")
        engine.deepspeed.state_reading.begin()  # and nobody ends it
        engine.deepspeed.was_step_applied = lambda: False
        result = engine.step(micro_batches(topology), [5, 7], step=1)
    assert not result.applied and engine.deepspeed.state_reading.is_open

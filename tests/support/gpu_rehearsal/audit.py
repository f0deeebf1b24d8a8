"""Watches every operator of a step on the fake device: what it costs, and what should not be.

It notes costs by part and phase, tensors of two devices that meet in one operator, and every place
where the host waits for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from cpt.model import recomputation
from tests.support.gpu_rehearsal import fake_cuda
from tests.support.gpu_rehearsal.costs import Cost, cost_of, tensors_in
from tests.support.gpu_rehearsal.parts import ENGINE, part_of_stack, place_in_code

READS_A_VALUE = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal.")
SIZES_ITS_RESULT = ("aten.nonzero_numpy", "aten.masked_select", "aten.unique", "aten._unique")
SIZES_ITS_RESULT += ("aten.bincount",)
INDEXES = ("aten.index.Tensor", "aten.index_put", "aten._index_put", "aten._unsafe_index")
COPIES = ("aten._to_copy", "aten.copy_")


@dataclass(slots=True)
class Totals:
    """Sums over the operators of one part and phase."""

    launches: int = 0
    num_bytes: int = 0
    product_bytes: int = 0
    """Bytes of operators with products."""
    flops: int = 0
    seconds: float = 0.0

    def add(self, cost: Cost) -> None:
        """Add one operator."""
        self.launches += cost.launches
        self.num_bytes += cost.num_bytes
        self.flops += cost.flops
        self.seconds += cost.seconds
        if cost.flops:
            self.product_bytes += cost.num_bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that happened at one place of the code."""

    stage: str
    what: str
    file: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.stage}: {self.what} at {self.file}:{self.line} ({self.function})"


class Audit(TorchDispatchMode):
    """The mode that watches; enter it inside a FakeTensorMode."""

    def __init__(
        self,
        host_value: Callable[[torch.Tensor], int],
        stage: Callable[[], str],
    ) -> None:
        """Start with nothing counted.

        Args:
            host_value: What the host is told when it reads an integer of a fake tensor.
            stage: Names what the engine is doing, for findings.
        """
        super().__init__()
        self._host_value = host_value
        self._stage = stage
        self.totals: dict[tuple[str, str], Totals] = {}
        self.waits: Counter[Finding] = Counter()
        self.mixes: Counter[Finding] = Counter()
        self.operators: Counter[str] = Counter()
        self._part_of_node: dict[int, str] = {}

    def __enter__(self) -> Audit:
        fake_cuda._listeners.append(self.note_wait)
        self._tolist = FakeTensor.tolist
        self._tensor = torch.tensor
        FakeTensor.tolist = self._reader("tolist")  # type: ignore[method-assign]
        FakeTensor.numpy = self._reader("numpy", np.array)  # type: ignore[method-assign]
        torch.tensor = self._make_tensor
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        fake_cuda._listeners.remove(self.note_wait)
        FakeTensor.tolist = self._tolist  # type: ignore[method-assign]
        del FakeTensor.numpy
        torch.tensor = self._tensor

    def note_wait(self, what: str) -> None:
        """Count a wait of the host at the present place."""
        self.waits[self._finding(what)] += 1

    def _finding(self, what: str) -> Finding:
        return Finding(self._stage(), what, *place_in_code())

    def _make_tensor(self, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        tensor = self._tensor(*args, **kwargs)
        return tensor if device is None else tensor.to(device)

    def _reader(
        self, name: str, make: Callable[[Any], Any] = lambda values: values
    ) -> Callable[[torch.Tensor], Any]:
        """Return a method that gives the host made-up values of a fake tensor."""

        def read(tensor: torch.Tensor) -> Any:
            if tensor.is_cuda:
                self.note_wait(name)
            return make(self._nested(tensor, tuple(tensor.shape)))

        return read

    def _nested(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> Any:
        if not shape:
            return self._value(tensor)
        return [self._nested(tensor, shape[1:]) for _ in range(shape[0])]

    def _value(self, tensor: torch.Tensor) -> float | int | bool:
        if tensor.dtype.is_floating_point:
            return 1.0
        if tensor.dtype is torch.bool:
            return True
        return self._host_value(tensor)

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(op)
        self._remember_node()
        inputs = list(tensors_in([*args, *kwargs.values()]))
        on_device = any(tensor.is_cuda for tensor in inputs)
        if name.startswith(READS_A_VALUE):
            if on_device:
                self.note_wait(name)
            return self._value(inputs[0]) if "dense" in name else True
        if name.startswith("aten.nonzero."):
            return self._nonzero(name, inputs[0])
        if on_device:
            self._look_at_inputs(name, args, kwargs, inputs)
        if kwargs.get("pin_memory"):
            return fake_cuda.mark_pinned(op(*args, **{**kwargs, "pin_memory": False}))
        out = op(*args, **kwargs)
        if name.startswith(COPIES) and self._is_transfer(name, args, kwargs, out):
            return out
        cost = cost_of(op, args, kwargs, out)
        if cost is not None:
            self._add(name, cost)
        return out

    def _nonzero(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.shape[0]
        if tensor.is_cuda:
            self.note_wait(name)
            self._add(name, Cost(num_bytes=tensor.numel() * tensor.element_size() + 8 * rows))
        # All rows are taken to be different from zero.
        return torch.arange(rows, device=tensor.device)[:, None]

    def _look_at_inputs(
        self, name: str, args: tuple[Any, ...], kwargs: Any, inputs: list[torch.Tensor]
    ) -> None:
        """Note what makes the host wait, and tensors of the host among those of the device."""
        if name.startswith(SIZES_ITS_RESULT):
            self.note_wait(name)
        if name.startswith("aten.repeat_interleave.Tensor") and kwargs.get("output_size") is None:
            self.note_wait("repeat_interleave without output_size")
        if name.startswith(INDEXES):
            for index in tensors_in(args[1]):
                if index.dtype in (torch.bool, torch.uint8) and index.is_cuda:
                    self.note_wait("index with a mask")
        if name.startswith(COPIES):
            return
        own = name.startswith("cpt.")
        for tensor in inputs:
            if not tensor.is_cuda and (tensor.ndim > 0 or own):
                self.mixes[self._finding(f"{name} with a {tensor.device.type} tensor")] += 1

    def _is_transfer(self, name: str, args: tuple[Any, ...], kwargs: Any, out: Any) -> bool:
        """Return whether a copy goes between host and device, and note it if the host waits."""
        source = args[1] if "copy_." in name else args[0]
        if source.is_cuda == out.is_cuda:
            return False
        non_blocking = kwargs.get("non_blocking", False)
        if "copy_." in name and len(args) > 2:
            non_blocking = args[2]
        host_side = out if source.is_cuda else source
        if non_blocking and fake_cuda.is_pinned(host_side):
            return True
        direction = "device to host" if source.is_cuda else "host to device"
        memory = "pinned" if fake_cuda.is_pinned(host_side) else "pageable"
        self.note_wait(f"copy {direction}, {memory}, {'not ' if non_blocking else ''}blocking")
        return True

    def _add(self, name: str, cost: Cost) -> None:
        self.operators[name] += cost.launches
        phase = "forward"
        if torch._C._current_autograd_node() is not None:
            phase = "recompute" if recomputation.is_second_run() else "backward"
        self.totals.setdefault((self._part(), phase), Totals()).add(cost)

    def _part(self) -> str:
        part = part_of_stack()
        node = torch._C._current_autograd_node()
        if part is None and node is not None:
            part = self._part_of_node.get(node._sequence_nr())
        return part or ENGINE

    def _remember_node(self) -> None:
        """Note which part the autograd node that was made last belongs to, views included."""
        if torch._C._current_autograd_node() is None:
            number = torch.autograd._get_sequence_nr() - 1
            if number not in self._part_of_node:
                self._part_of_node[number] = self._part()

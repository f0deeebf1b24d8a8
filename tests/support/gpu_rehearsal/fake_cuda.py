"""A CUDA device that is not there: importing this module imports torch with the fake guard.

It must be imported before torch, in a process of its own, and needs the environment variable
GUARD_LIBRARY, which names what `build_guard` compiled. Tensors on the device must be fake
(`torch._subclasses.FakeTensorMode`): they have shapes, dtypes and devices, but no memory.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GUARD_LIBRARY = "CPT_FAKE_CUDA_GUARD"
"""Environment variable with the path of the compiled guard."""
SOURCE = Path(__file__).with_name("guard.cpp")
CAPABILITY = (9, 0)
"""Compute capability that the device claims: an H100."""


def torch_folder() -> Path:
    """Return the folder of the torch package, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def reason_against() -> str:
    """Return why there can be no rehearsal on this machine, or an empty string."""
    if sys.platform != "linux":
        return "the fake device is made for Linux"
    if shutil.which("g++") is None:
        return "g++ is missing: the fake device's guard cannot be compiled"
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "this torch is a CUDA build, whose own device cannot be replaced by a fake one"
    if importlib.util.find_spec("triton") is None:
        return "triton is missing: the fused operators would not be chosen"
    return ""


def build_guard(folder: Path) -> Path:
    """Compile the guard into a folder and return the library; it takes two seconds."""
    torch_at = torch_folder()
    library = folder / "guard.so"
    include = torch_at / "include"
    command = ["g++", "-O0", "-std=c++20", "-fPIC", "-shared", str(SOURCE), "-o", str(library)]
    command += [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    command += [f"-L{torch_at / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    return library


class Stream:
    """Stands in for torch.cuda.Stream: everything is in order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Do nothing."""

    def wait_event(self, event: Any) -> None:
        """Do nothing."""

    def record_event(self, event: Any = None) -> Event:
        """Return an event."""
        return event or Event()

    def synchronize(self) -> None:
        """Note that the host waits."""
        note_wait("stream.synchronize")


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Do nothing."""

    def wait(self, stream: Any = None) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Say that everything before has run."""
        return True

    def synchronize(self) -> None:
        """Note that the host waits."""
        note_wait("event.synchronize")


_listeners: list[Any] = []
"""Functions that learn of each wait of the host; the audits append theirs."""


def note_wait(what: str) -> None:
    """Tell the listeners that the host waits for the device."""
    for listener in _listeners:
        listener(what)


_pinned: dict[int, torch.Tensor] = {}
"""Pinned host tensors by the address of their storage; they are kept so that no address is used
twice.
"""


def mark_pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Remember that a host tensor is pinned."""
    _pinned[tensor.untyped_storage()._cdata] = tensor
    return tensor


def is_pinned(tensor: torch.Tensor, *args: Any) -> bool:
    """Return whether `mark_pinned` was told of a tensor or of what it is a view of."""
    return tensor.untyped_storage()._cdata in _pinned


def _pin(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
    return tensor if is_pinned(tensor) else mark_pinned(tensor.clone())


def install() -> None:
    """Load the guard, import torch, and let torch.cuda speak of the fake device."""
    assert "torch" not in sys.modules, "the guard must be registered before torch is imported"
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(os.environ[GUARD_LIBRARY], mode=ctypes.RTLD_GLOBAL)
    import torch

    current = Stream()

    def enter_stream(stream: Any) -> AbstractContextManager[None]:
        return nullcontext()

    fakes: dict[str, Any] = {
        "get_device_capability": lambda device=None: CAPABILITY,
        "synchronize": lambda device=None: note_wait("cuda.synchronize"),
        "Stream": Stream,
        "Event": Event,
        "stream": enter_stream,
        "current_stream": lambda device=None: current,
    }
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    torch.Tensor.pin_memory = _pin  # type: ignore[method-assign, assignment]
    torch.Tensor.is_pinned = is_pinned  # type: ignore[method-assign, assignment]
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]

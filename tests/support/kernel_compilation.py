"""Triton's compiler for a GPU that is not there: launches compile, down to machine code.

The interpreter runs what the compiler refuses (an annotation that is no Triton type, a shape that
is no power of 2), so kernels are compiled, too.  Triton brings the assembler along.

    with compiling_only(capability=90) as compiled:
        launch(tensors on the CPU)

TRITON_INTERPRET must not be set when triton is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

WARP_SIZE = 32


class _AbsentGpu:
    """What the compiler asks a driver."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, WARP_SIZE)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_only(capability: int) -> Iterator[list[str]]:
    """Let launches compile for a compute capability; yield the names of the compiled kernels."""
    assert not triton.knobs.runtime.interpret, "unset TRITON_INTERPRET before triton is imported"
    compiled: list[str] = []
    run = JITFunction.run

    def compile_it(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(kernel, *args, **{**kwargs, "warmup": True})
        assert result.asm["cubin"]
        compiled.append(kernel.fn.__name__)
        return result

    JITFunction.run = compile_it
    driver.set_active(_AbsentGpu(capability))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver.set_active(None)

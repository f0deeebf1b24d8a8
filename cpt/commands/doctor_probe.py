"""The parity probe of every attention backend that can run on this machine, in every dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cpt.errors import ConfigError, InternalError
from cpt.model.attention.choice import BACKENDS, Backend
from cpt.model.attention.machine import Machine
from cpt.model.attention.probe import (
    LIMITS,
    ProbeReport,
    ProbeSetting,
    ProbeShape,
    measure,
    probe_shape,
)
from data_pipeline.console.say import say


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One backend on one device in one dtype."""

    backend: Backend
    """The line of the table of backends."""
    device: torch.device
    """Device of its tensors."""
    dtype: torch.dtype
    """Type of queries, keys and values."""

    def __str__(self) -> str:
        return f"{self.backend.name} on {self.device} in {str(self.dtype).removeprefix('torch.')}"


def print_probes(head_dim: int, num_query_heads: int, num_kv_heads: int, window: int) -> None:
    """Compare every usable backend with the definition of sink attention and print the errors.

    Raises:
        ConfigError: The sizes describe no attention layer.
        InternalError: A backend is off by more than its limit, or does not run.
    """
    _check_sizes(head_dim, num_query_heads, num_kv_heads, window)
    shape = probe_shape(num_query_heads, num_kv_heads, head_dim, window, sp_size=1)
    say(
        f"attention against an explicit softmax in float64: head size {head_dim}, "
        f"{num_query_heads} query heads, {num_kv_heads} key/value heads, window {window}.\n"
        "Relative l2 errors, `!` where above the limit."
    )
    failed = []
    for case in usable_cases(head_dim):
        say(f"\n{case}")
        if not _agrees(case, shape):
            failed.append(str(case))
    if failed:
        raise InternalError(
            f"attention is wrong here: {'; '.join(failed)}. Train with another model.attention, "
            "and report the table above with the output of `cpt doctor`."
        )


def usable_cases(head_dim: int) -> Iterator[Case]:
    """Return every backend that can serve this head size here, on each device in each dtype."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    for device in devices:
        machine = Machine.of(device)
        for backend in BACKENDS:
            for dtype in LIMITS:
                if backend.usable(device, dtype, head_dim, machine) is None:
                    yield Case(backend=backend, device=device, dtype=dtype)


def _agrees(case: Case, shape: ProbeShape) -> bool:
    """Print the errors of one case and return whether all are within their limits."""
    setting = ProbeSetting(attention=case.backend.attention, device=case.device, dtype=case.dtype)
    try:
        report: ProbeReport = measure(setting, shape)
    except Exception as error:  # a backend that breaks must not hide the others
        say(f"does not run: {type(error).__name__}: {error}")
        return False
    say(report.table())
    return report.passed


def _check_sizes(head_dim: int, num_query_heads: int, num_kv_heads: int, window: int) -> None:
    sizes = {
        "--head_dim": head_dim,
        "--query_heads": num_query_heads,
        "--kv_heads": num_kv_heads,
        "--window": window,
    }
    problems = [f"{name} is {size}, must be >= 1." for name, size in sizes.items() if size < 1]
    if not problems and num_query_heads % num_kv_heads:
        problems.append(
            f"--kv_heads {num_kv_heads} does not divide --query_heads {num_query_heads}: every "
            "key/value head serves the same number of query heads."
        )
    if problems:
        raise ConfigError(problems)

"""One rank of the attention comparison.

It compares SP 1, 2 and 4 with both exchanges against a dense softmax, and injects faults.  Every
rank computes its part of the same problems; with SP < 4 the groups do so side by side.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpt.deepspeed_adapter.groups import create_topology, init_distributed
from cpt.errors import ConfigError
from cpt.job.engine_setup import probe_attention
from cpt.model.attention import PackedRows, choose, sink_attention
from cpt.parallel.agreement import gather_json
from cpt.parallel.halo import WindowHalo
from cpt.parallel.topology import Topology
from cpt.parallel.ulysses import Ulysses
from tests.dist.cases import model_config
from tests.model.attention.yardstick import (
    LIMITS,
    Problem,
    definition,
    norms,
    relative_errors,
    sizes_of,
)

TOKENS = 256
WINDOW = 32
CPU = torch.device("cpu")
BOUNDS = {
    "one document": (0, TOKENS),
    # a boundary between two ranks, one just before, one just after, documents of one token, one
    # across three ranks
    "packed": (0, 1, 40, 63, 64, 129, 250, 251, TOKENS),
}
HEADS = {"8/8 heads": (8, 8, 16), "8/2 heads": (8, 2, 16)}
"""Query heads, key/value heads and head size.

At SP 4 the second needs copies of key/value heads.
"""


def exchanges(topology: Topology) -> dict[str, Ulysses | None]:
    if topology.sp_size == 1:
        return {"no exchange": None}
    return {"ulysses": Ulysses(topology), "halo": Ulysses(topology, WindowHalo(topology, WINDOW))}


def solve_part(
    problem: Problem,
    rows: PackedRows,
    window: int | None,
    dtype: torch.dtype,
    exchange: Ulysses | None,
    mine: slice,
) -> list[Tensor]:
    """Return out, dq, dk and dv of this rank's tokens, and its share of dsink."""

    def local(whole_HTD: Tensor) -> Tensor:
        return whole_HTD[None, :, mine].to(dtype, copy=True).requires_grad_()

    q = local(problem.q_HTD)
    k = local(problem.k_KTD)
    v = local(problem.v_KTD)
    sinks_dtype = torch.promote_types(dtype, torch.float32)
    sinks = problem.sinks_H.to(sinks_dtype, copy=True).requires_grad_()
    arguments: dict[str, Any] = {
        "scaling": 0.25,
        "sliding_window": window,
        "s_aux": sinks,
        "packed_rows": rows,
    }
    out, _ = sink_attention(nn.Identity(), q, k, v, None, sequence_parallel=exchange, **arguments)
    d_out = problem.d_out_HTD[None, :, mine].transpose(1, 2).to(dtype)
    dq, dk, dv, dsinks = torch.autograd.grad(out, (q, k, v, sinks), d_out)
    return [out.detach()[0].transpose(0, 1), dq[0], dk[0], dv[0], dsinks]


def compare(
    topology: Topology, name: str, exchange: Ulysses | None
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the relative errors of each case; dsink is summed as the engine sums it."""
    local = TOKENS // topology.sp_size
    mine = slice(topology.sp_rank * local, (topology.sp_rank + 1) * local)
    cases = itertools.product(BOUNDS.items(), HEADS.items(), (None, WINDOW))
    for (rows_name, bounds), (heads_name, heads), window in cases:
        rows = PackedRows.from_bounds([bounds], TOKENS)
        problem = Problem.draw(TOKENS, heads, sinks=(-3, 9))
        want = problem.solve(definition, rows, window)
        part = [whole[:, mine] for whole in want[:4]]
        part.append(want[4])
        sizes = [*norms(part[:4]), sizes_of(problem, rows, window, want)[4]]
        for dtype in LIMITS:
            got = solve_part(problem, rows, window, dtype, exchange, mine)
            dist.all_reduce(got[4], group=topology.sp_group)
            layer = "full" if window is None else "window"
            case = f"SP {topology.sp_size}, {name}, {rows_name}, {heads_name}, {layer}, {dtype}"
            yield case, relative_errors(got, part, sizes)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def refusal(topology: Topology) -> str:
    """Return the message of a run's start-up probe on this rank; empty if it finds no fault."""
    kernel = choose("auto", device=CPU, dtype=torch.bfloat16, head_dim=16)
    exchange = Ulysses(topology, WindowHalo(topology, WINDOW))
    try:
        probe_attention(kernel, exchange, torch.bfloat16, model_config(), topology)
    except ConfigError as error:
        return str(error)
    return ""


def first_slice_everywhere(self: Ulysses, sinks_H: Tensor, group: int) -> Tensor:
    return sinks_H[: sinks_H.shape[0] // self.size]


def all_sinks(self: Ulysses, sinks_H: Tensor, group: int) -> Tensor:
    return sinks_H


def main() -> None:
    torch.set_num_threads(1)
    init_distributed(CPU)
    errors: dict[str, dict[str, float]] = {}
    refusals = {}
    for sp_size in (1, 2, 4):
        topology = create_topology(sp_size=sp_size, ep_size=1, device=CPU)
        for name, exchange in exchanges(topology).items():
            errors |= dict(compare(topology, name, exchange))
        if sp_size == 2:
            refusals["nothing"] = refusal(topology)
            for fault in (first_slice_everywhere, all_sinks):
                with replaced(Ulysses, "local_sinks", fault):
                    refusals[fault.__name__] = refusal(topology)
    found = gather_json({"errors": errors, "refusals": refusals}, topology.control_group)
    if topology.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""The CUDA backends give the right arguments to kernels, and right results where there is a GPU.

Without a GPU each kernel is replaced by a stand-in on the CPU (tests/model/attention/stand_ins.py),
so what is proven is everything but the kernel: layouts, offsets, window sizes, the fold of the
sinks, and what goes into the backward.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from cpt.model.attention import Attention, AttentionInputs, FoldedSinks, PackedRows
from cpt.model.attention.choice import BACKENDS
from cpt.model.attention.flash_attn_2 import FlashAttn2Kernel
from cpt.model.attention.flash_attn_4 import FlashAttn4
from cpt.model.attention.flex import Flex, block_mask
from cpt.model.attention.machine import Machine
from cpt.model.attention.torch_flash import TorchFlashKernel
from cpt.model.attention.varlen import checked_lse
from tests.model.attention import stand_ins
from tests.model.attention.yardstick import LIMITS, Problem, assert_close, definition

ROWS = {
    "one document": PackedRows.from_bounds([(0, 300)], 300),
    "packed": PackedRows.from_bounds([(0, 1, 2, 3, 40, 49, 200, 300)], 300),
    "two rows": PackedRows.from_bounds([(0, 190), (0, 37, 170, 190)], 190),
    "documents of one token": PackedRows.from_bounds([range(41)], 40),
}
HEADS = {"8/2 heads of 64": (8, 2, 64), "4/4 heads of 16": (4, 4, 16)}
WINDOWS = {"full": None, "window 128": 128, "window 32": 32}
CUDA_BACKENDS = ("flash_attn_4", "torch_flash", "flash_attn_2", "flex")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Waiting for one another costs threads more than work of these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Backend:
    """A backend whose kernel is a stand-in, and the calls that the stand-in saw."""

    attention: Attention
    install: Callable[[list[dict[str, Any]]], AbstractContextManager[None]] | None = None
    sink_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    calls: list[dict[str, Any]] = field(default_factory=list)


def stand_in_for(name: str) -> Backend:
    if name == "torch_flash":
        return Backend(FoldedSinks(TorchFlashKernel()), stand_ins.torch_operators)
    if name == "flash_attn_2":
        return Backend(
            FoldedSinks(FlashAttn2Kernel()),
            lambda calls: stand_ins.installed(stand_ins.flash_attn_2_package(calls)),
        )
    if name == "flash_attn_4":
        return Backend(
            FlashAttn4(), lambda calls: stand_ins.installed(stand_ins.flash_attn_4_package(calls))
        )
    return Backend(Flex(lambda: stand_ins.flex_attention))


@pytest.fixture(params=CUDA_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    found = stand_in_for(request.param)
    with ExitStack() as stack:
        if found.install is not None:
            stack.enter_context(found.install(found.calls))
        yield found


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_output_and_every_gradient_are_those_of_the_definition(
    backend: Backend,
    rows: PackedRows,
    heads: tuple[int, int, int],
    window: int | None,
    dtype: torch.dtype,
) -> None:
    problem = Problem.draw(rows.num_tokens, heads, sinks=(-2, 2))
    want = problem.solve(definition, rows, window)
    got = problem.solve(backend.attention, rows, window, dtype)
    limit = LIMITS[dtype]
    if isinstance(backend.attention, FlashAttn4):
        # It reads sinks in float32 at most; 1e-7 of a sink near 2 is felt in all results.
        limit = max(limit, 2e-6)
    assert_close(got, want, limit)


@pytest.mark.parametrize("name", ["torch_flash", "flash_attn_2", "flash_attn_4"])
def test_a_window_of_128_keys_is_127_keys_to_the_left(name: str) -> None:
    found = stand_in_for(name)
    rows = ROWS["packed"]
    assert found.install is not None
    with found.install(found.calls):
        for window in (128, None):
            Problem.draw(rows.num_tokens, (4, 2, 16)).solve(
                found.attention, rows, window, torch.float32
            )
    assert {call["window"] for call in found.calls} == {(127, 0), (-1, 0)}
    assert [call["name"] for call in found.calls][:2] == (
        ["forward", "forward"] if name == "flash_attn_4" else ["forward", "backward"]
    )


@pytest.mark.parametrize("name", ["torch_flash", "flash_attn_2", "flash_attn_4"])
def test_offsets_of_documents_are_computed_once_per_batch(name: str) -> None:
    found = stand_in_for(name)
    rows = PackedRows.from_bounds([(0, 37, 170, 190)], 190)
    assert found.install is not None
    with found.install(found.calls):
        for window in (32, None, 32):
            Problem.draw(rows.num_tokens, (4, 2, 16)).solve(
                found.attention, rows, window, torch.float32
            )
    first = found.calls[0]["offsets"]
    assert len(found.calls) >= 3 and all(call["offsets"] is first for call in found.calls)
    assert first.tolist() == [0, 37, 170, 190] and found.calls[0]["longest"] == 133


@pytest.mark.parametrize("sink_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_the_sinks_has_their_dtype(backend: Backend, sink_dtype: torch.dtype) -> None:
    rows = ROWS["packed"]
    problem = Problem.draw(rows.num_tokens, (4, 2, 16))
    sinks_H = torch.tensor([-1.0, 0.5, 1.5, 3.0], dtype=sink_dtype).requires_grad_()
    q, k, v = (x.bfloat16() for x in (problem.q_HTD, problem.k_KTD, problem.v_KTD))
    out = backend.attention(AttentionInputs(q, k, v, sinks_H, rows, 32, 0.25))
    (gradient,) = torch.autograd.grad(out, sinks_H, problem.d_out_HTD.bfloat16())
    assert gradient.dtype == sink_dtype and out.dtype == torch.bfloat16


def test_a_query_that_a_cuda_kernel_reports_without_keys_gets_no_gradient() -> None:
    """FlashAttention 2 reports such a query with lse +inf."""
    calls: list[dict[str, Any]] = []
    modules = stand_ins.flash_attn_2_package(calls)
    interface: Any = modules["flash_attn.flash_attn_interface"]
    forward = interface._flash_attn_varlen_forward

    def without_keys(*arguments: Any, **settings: Any) -> tuple[Tensor, ...]:
        out, lse, debug, state = forward(*arguments, **settings)
        out[5] = 0
        lse[:, 5] = torch.inf
        return out, lse, debug, state

    interface._flash_attn_varlen_forward = without_keys
    problem = Problem.draw(40, (4, 2, 16))
    problem.d_out_HTD[:, 5] = 0
    with stand_ins.installed(modules):
        out, *gradients = problem.solve(
            FoldedSinks(FlashAttn2Kernel()),
            PackedRows.from_bounds([(0, 40)], 40),
            None,
            torch.float32,
        )
    assert not out[:, 5].any() and all(x.isfinite().all() for x in (out, *gradients))


def test_another_layout_of_lse_is_refused() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"torch 2\.1 returned a log-sum-exp of shape \(3, 4, 8\).*expected \(4, 20\)",
    ):
        checked_lse(torch.zeros(3, 4, 8), torch.zeros(4, 20, 16), "torch 2.1")


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize(
    "bounds", [(0, 1000), (0, 5, 128, 256, 700, 701, 1000), tuple(range(1001))], ids=len
)
def test_blocks_of_flex_cover_what_is_seen_and_whole_ones_are_whole(
    bounds: tuple[int, ...], window: int | None
) -> None:
    rows = PackedRows.from_bounds([bounds], 1000)
    mask = block_mask(rows, window, torch.device("cpu"))
    index = torch.arange(1024).clamp_max(999)
    visible = mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index)
    per_block = visible.view(8, 128, 8, 128)
    counts = {
        "partial": (mask.kv_num_blocks, mask.kv_indices),
        "whole": (mask.full_kv_num_blocks, mask.full_kv_indices),
    }
    found = {}
    for name, (numbers, indices) in counts.items():
        found[name] = torch.zeros(8, 8, dtype=torch.bool)
        for query, number in enumerate(numbers[0, 0].tolist()):
            found[name][query, indices[0, 0, query, :number].long()] = True
    assert torch.equal(found["partial"] | found["whole"], per_block.any(3).any(1))
    assert torch.equal(found["whole"], per_block.all(3).all(1) & ~torch.eye(8, dtype=torch.bool))


def test_torch_takes_the_blocks_of_flex() -> None:
    """On the CPU the real flex_attention runs forward only and reads the mask, not the blocks."""
    from torch.nn.attention.flex_attention import flex_attention

    rows = ROWS["packed"]
    problem = Problem.draw(rows.num_tokens, (4, 2, 16), sinks=(-2, 4))
    exact = problem.inputs(rows, 32)
    rounded = exact._replace(
        q_HTD=exact.q_HTD.float(), k_KTD=exact.k_KTD.float(), v_KTD=exact.v_KTD.float()
    )
    got = Flex(lambda: flex_attention)(rounded)
    want = definition(exact)
    assert (got - want).norm() <= 2e-6 * want.norm()


def _gpu_cases() -> list[tuple[str, torch.dtype]]:
    return [(name, dtype) for name in CUDA_BACKENDS for dtype in (torch.bfloat16, torch.float32)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("window", [None, 128], ids=["full", "window 128"])
@pytest.mark.parametrize("rows_name", ["one document", "packed", "two rows"])
@pytest.mark.parametrize(("name", "dtype"), _gpu_cases())
def test_on_a_gpu_every_usable_backend_agrees_with_float64(
    name: str, dtype: torch.dtype, rows_name: str, window: int | None
) -> None:
    device = torch.device("cuda")
    rows = ROWS[rows_name]
    line = next(backend for backend in BACKENDS if backend.name == name)
    if reason := line.usable(device, dtype, 64, Machine.of(device)):
        pytest.skip(reason)
    problem = Problem.draw(rows.num_tokens, (16, 2, 64), sinks=(-3, 9))

    def on_gpu(inputs: AttentionInputs) -> Tensor:
        q, k, v, sinks, *others = inputs
        moved = (x.to(device) for x in (q, k, v, sinks))
        return line.attention(AttentionInputs(*moved, *others)).cpu()

    # In float32 flex_attention may round its factors to tf32.
    limit = LIMITS[torch.bfloat16] if dtype == torch.bfloat16 else 1e-3
    assert_close(
        problem.solve(on_gpu, rows, window, dtype), problem.solve(definition, rows, window), limit
    )

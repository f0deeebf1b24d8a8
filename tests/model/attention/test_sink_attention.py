"""Sink attention against its definition, for the output and every gradient.

The yardstick is a dense softmax in float64.

Shape letters: T tokens of all rows (flattened), H query heads, K key/value heads, D head size.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpt.model.attention import (
    Attention,
    AttentionInputs,
    FoldedSinks,
    PackedRows,
    choose,
    reference_attention,
)
from cpt.model.attention.cpu import CpuKernel
from tests.model.attention.yardstick import (
    LIMITS,
    NAMES,
    Problem,
    assert_close,
    definition,
    relative_errors,
    sizes_of,
)

CPU = FoldedSinks(CpuKernel())

ROWS = {
    "one document": PackedRows.from_bounds([(0, 300)], 300),
    "whole blocks": PackedRows.from_bounds([(0, 256)], 256),
    "shorter than a block": PackedRows.from_bounds([(0, 77)], 77),
    "packed": PackedRows.from_bounds([(0, 1, 2, 3, 40, 49, 200, 300)], 300),
    "two rows": PackedRows.from_bounds([(0, 190), (0, 37, 170, 190)], 190),
}
HEADS = {
    "16/2 heads of 64": (16, 2, 64),
    "8/8 heads of 16": (8, 8, 16),
    "4/1 heads of 64": (4, 1, 64),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Waiting for one another costs threads more than work of these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", "reference"])
def attention(request: pytest.FixtureRequest) -> Attention:
    return choose(request.param, device=torch.device("cpu"), dtype=torch.float32, head_dim=64)


@functools.cache
def solved(
    rows_name: str, heads_name: str, window: int | None
) -> tuple[Problem, list[Tensor], list[Tensor]]:
    """Return a problem, its solution, and the size of each part of it."""
    rows = ROWS[rows_name]
    problem = Problem.draw(rows.num_tokens, HEADS[heads_name])
    want = problem.solve(definition, rows, window)
    return problem, want, sizes_of(problem, rows, window, want)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("window", [None, 128, 32], ids=["full", "window 128", "window 32"])
@pytest.mark.parametrize("heads_name", HEADS)
@pytest.mark.parametrize("rows_name", ROWS)
def test_output_and_every_gradient_are_those_of_the_definition(
    attention: Attention, rows_name: str, heads_name: str, window: int | None, dtype: torch.dtype
) -> None:
    problem, want, sizes = solved(rows_name, heads_name, window)
    assert_close(
        problem.solve(attention, ROWS[rows_name], window, dtype), want, LIMITS[dtype], sizes
    )


@pytest.mark.parametrize("window", [None, 128], ids=["full", "window 128"])
@pytest.mark.parametrize(
    "bounds", [(0, 512), (0, 37, 200, 210, 411, 512)], ids=["one document", "packed"]
)
def test_bf16_is_within_its_limit_of_dsink_itself_in_a_longer_row(
    bounds: tuple[int, ...], window: int | None
) -> None:
    rows = PackedRows.from_bounds([bounds], 512)
    problem = Problem.draw(512, (16, 2, 64), sinks=(-3, 9))
    got = problem.solve(CPU, rows, window, torch.bfloat16)
    want = problem.solve(definition, rows, window)
    assert_close(got, want, LIMITS[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 32], ids=["full", "window 32"])
def test_documents_of_one_token_are_right(
    attention: Attention, window: int | None, dtype: torch.dtype
) -> None:
    """Sinks are near the scores; far from them dq is a difference of nearly equal numbers."""
    rows = PackedRows.from_bounds([(*range(150), 300)], 300)
    problem = Problem.draw(rows.num_tokens, (16, 2, 64), sinks=(-2, 2))
    got = problem.solve(attention, rows, window, dtype)
    want = problem.solve(definition, rows, window)
    assert_close(got, want, LIMITS[dtype])


def test_every_head_is_right_whatever_its_sink(attention: Attention) -> None:
    """Errors per head, since heads with a large sink hardly count in the norm over all heads."""
    rows = ROWS["packed"]
    problem = Problem.draw(rows.num_tokens, (16, 2, 64))
    got, want = (problem.solve(a, rows, 128) for a in (attention, definition))
    for i in (0, 1, 4):
        error = (got[i] - want[i]).reshape(16, -1).norm(dim=1) / want[i].reshape(16, -1).norm(dim=1)
        assert error.max() <= LIMITS[torch.float64], f"{NAMES[i]}: {error.tolist()}"


def test_gradients_are_those_of_finite_differences(attention: Attention) -> None:
    rows = PackedRows.from_bounds([(0, 3, 5), (0, 1, 5)], 5)
    shapes = [(4, 10, 3), (2, 10, 3), (2, 10, 3), (4,)]
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]
    for window in (None, 2):
        assert torch.autograd.gradcheck(
            lambda *tensors, window=window: attention(AttentionInputs(*tensors, rows, window, 0.6)),
            leaves,
        )


def test_first_token_of_a_document_sees_itself_and_the_sink_alone(attention: Attention) -> None:
    rows = ROWS["packed"]
    problem = Problem.draw(rows.num_tokens, (4, 1, 64))
    out_HTD = attention(problem.inputs(rows, 128))
    for first in rows.bounds[:-1]:
        score_H = problem.q_HTD[:, first] @ problem.k_KTD[0, first] * 0.125
        want_HD = torch.sigmoid(score_H - problem.sinks_H)[:, None] * problem.v_KTD[0, first]
        torch.testing.assert_close(out_HTD[:, first], want_HD, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 128, 32], ids=["full", "window 128", "window 32"])
def test_another_document_changes_no_bit(window: int | None, dtype: torch.dtype) -> None:
    rows = PackedRows.from_bounds([(0, 40, 50, 55, 300), (0, 60, 300)], 300)
    problem = Problem.draw(rows.num_tokens, (8, 2, 64))
    before = problem.solve(CPU, rows, window, dtype)
    changed = slice(50, 55), slice(300, 360)
    for tokens in changed:
        for x in (problem.q_HTD, problem.k_KTD, problem.v_KTD, problem.d_out_HTD):
            x[:, tokens] = x[:, tokens] * -3 + 1
    after = problem.solve(CPU, rows, window, dtype)
    others = torch.ones(rows.num_tokens, dtype=torch.bool)
    for tokens in changed:
        others[tokens] = False
    for name, b, a in zip(NAMES[:4], before, after, strict=False):
        assert torch.equal(b[:, others], a[:, others]), (
            f"{name} differs by up to {(b - a)[:, others].abs().max()}"
        )
        assert not torch.equal(b[:, ~others], a[:, ~others]), (
            f"{name} does not depend on the changed documents"
        )


def test_packed_documents_give_what_each_gives_alone() -> None:
    """To the bit for full layers, where each document is a call of its own either way."""
    rows = PackedRows.from_bounds([(0, 40, 170, 300)], 300)
    problem = Problem.draw(rows.num_tokens, (8, 2, 64))
    together = problem.solve(CPU, rows, None, torch.bfloat16)
    for start, end in itertools.pairwise(rows.bounds):
        q, k, v, d_out = (
            x[:, start:end]
            for x in (problem.q_HTD, problem.k_KTD, problem.v_KTD, problem.d_out_HTD)
        )
        alone = Problem(q, k, v, problem.sinks_H, d_out)
        single = alone.solve(
            CPU, PackedRows.from_bounds([(0, end - start)], end - start), None, torch.bfloat16
        )
        assert all(
            torch.equal(t[:, start:end], s) for t, s in zip(together[:4], single, strict=False)
        )


def test_a_window_of_129_keys_would_be_noticed() -> None:
    rows = ROWS["one document"]
    problem = Problem.draw(rows.num_tokens, (16, 2, 64))
    errors = relative_errors(problem.solve(CPU, rows, 129), problem.solve(definition, rows, 128))
    assert min(errors.values()) > 1e-3, errors
    assert_close(
        problem.solve(CPU, rows, 129), problem.solve(definition, rows, 129), LIMITS[torch.float64]
    )


class _DropsLseGradient(torch.autograd.Function):
    """A kernel that drops its lse gradient, as torch's varlen_attn does (torchtitan issue 4796)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, rows: PackedRows, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, _ = CpuKernel().forward(AttentionInputs(q, k, v, sinks, rows, None, scale))
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.rows = rows
        ctx.scale = scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        inputs = AttentionInputs(q, k, v, sinks, ctx.rows, None, ctx.scale)
        dq, dk, dv = CpuKernel().backward(inputs, gradients[0], out, lse, ())
        return dq, dk, dv, None, None, None


def _scaled_by_sigmoid(inputs: AttentionInputs) -> Tensor:
    q_HTD, k_KTD, v_KTD, sinks_H, rows, _, scale = inputs
    out_HTD: Tensor
    out_HTD, lse_HT = _DropsLseGradient.apply(q_HTD, k_KTD, v_KTD, sinks_H, rows, scale)  # type: ignore[no-untyped-call]
    return out_HTD * torch.sigmoid(lse_HT - sinks_H[:, None])[..., None]


def test_a_dropped_gradient_of_lse_would_be_noticed() -> None:
    rows = ROWS["one document"]
    problem = Problem.draw(rows.num_tokens, (16, 2, 64))
    errors = relative_errors(
        problem.solve(_scaled_by_sigmoid, rows, None), problem.solve(definition, rows, None)
    )
    assert max(errors["out"], errors["dv"], errors["dsink"]) < 1e-12, errors
    assert min(errors["dq"], errors["dk"]) > max(LIMITS.values()), errors


@pytest.mark.parametrize("sink_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sinks_are_read_as_they_are_and_their_gradient_has_their_dtype(
    sink_dtype: torch.dtype,
) -> None:
    rows = ROWS["packed"]
    problem = Problem.draw(rows.num_tokens, (4, 1, 64))
    sinks_H = torch.tensor([-1.0017, 0.3333, 1.7771, 3.1416], dtype=sink_dtype).requires_grad_()
    q, k, v = (x.bfloat16() for x in (problem.q_HTD, problem.k_KTD, problem.v_KTD))
    inputs = AttentionInputs(q, k, v, sinks_H, rows, None, 0.125)
    lse_HT = CpuKernel().forward(inputs)[1]
    assert lse_HT.dtype == torch.float32
    out_HTD = CPU(inputs)
    (gradient_H,) = torch.autograd.grad(out_HTD, sinks_H, problem.d_out_HTD.bfloat16())
    assert gradient_H.dtype == sink_dtype
    plain_HTD = CpuKernel().forward(inputs)[0]
    factor_HT = torch.sigmoid(lse_HT - sinks_H.detach().float()[:, None])
    # One multiplication in float32 and one rounding: equal but for rare ties.
    assert (out_HTD != (plain_HTD * factor_HT[..., None]).bfloat16()).float().mean() < 1e-3


class _WithoutKeys(CpuKernel):
    """Reports that query 5 has no key, in the way FlashAttention 2 does on CUDA."""

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        out_HTD, lse_HT, _ = super().forward(*arguments)
        out_HTD[:, 5] = 0
        lse_HT[:, 5] = torch.inf
        return out_HTD, lse_HT, (torch.arange(3),)

    def backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *_, extra = arguments
        assert torch.equal(extra[0], torch.arange(3))
        return super().backward(*arguments)


def test_a_query_without_keys_is_harmless_and_a_kernel_gets_its_extra_tensors_back() -> None:
    rows = ROWS["shorter than a block"]
    problem = Problem.draw(rows.num_tokens, (4, 1, 64))
    problem.d_out_HTD[:, 5] = 0
    out, *gradients = problem.solve(FoldedSinks(_WithoutKeys()), rows, None)
    assert out[:, 5].abs().max() == 0
    assert all(x.isfinite().all() for x in gradients)
    torch.testing.assert_close(
        gradients[3], problem.solve(definition, rows, None)[4], rtol=1e-10, atol=0
    )


def test_nan_in_a_key_is_not_hidden() -> None:
    rows = ROWS["shorter than a block"]
    problem = Problem.draw(rows.num_tokens, (4, 1, 64))
    problem.k_KTD[0, 70, 0] = torch.nan
    out_HTD = CPU(problem.inputs(rows, None))
    assert out_HTD[:, 70:].isnan().all()
    assert out_HTD[:, :70].isfinite().all()


@pytest.mark.parametrize("window", [None, 32], ids=["full", "window 32"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0)], ids=str)
def test_any_strides_give_the_same_bits(order: tuple[int, int, int], window: int | None) -> None:
    """The CPU operator would read a head dimension with a stride other than 1 wrongly."""
    rows = ROWS["packed"]
    problem = Problem.draw(rows.num_tokens, (4, 2, 16))
    inverse = [order.index(i) for i in range(3)]

    def laid_out(x: Tensor) -> Tensor:
        return x.permute(order).contiguous().permute(inverse)

    strided = Problem(
        laid_out(problem.q_HTD),
        laid_out(problem.k_KTD),
        laid_out(problem.v_KTD),
        problem.sinks_H,
        laid_out(problem.d_out_HTD),
    )
    got, want = (each.solve(CPU, rows, window) for each in (strided, problem))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_gradient_of_a_sum_is_that_of_ones() -> None:
    """`out.sum().backward()` hands over an expanded tensor, all of whose strides are 0."""
    rows = ROWS["packed"]
    problem = Problem.draw(rows.num_tokens, (4, 1, 16))
    ones_HTD = torch.ones(1, 1, 1, dtype=torch.float64).expand_as(problem.d_out_HTD)
    assert ones_HTD.stride() == (0, 0, 0)
    got = replace(problem, d_out_HTD=ones_HTD).solve(CPU, rows, 128)
    want = replace(problem, d_out_HTD=ones_HTD.contiguous()).solve(CPU, rows, 128)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_a_window_larger_than_a_block_is_right() -> None:
    rows = PackedRows.from_bounds([(0, 20, 700)], 700)
    problem = Problem.draw(rows.num_tokens, (4, 2, 16))
    assert_close(
        problem.solve(CPU, rows, 200), problem.solve(definition, rows, 200), LIMITS[torch.float64]
    )


def test_the_gradient_cannot_be_differentiated_by_mistake() -> None:
    rows = ROWS["shorter than a block"]
    problem = Problem.draw(rows.num_tokens, (4, 1, 16))
    q_HTD = problem.q_HTD.requires_grad_()
    out_HTD = CPU(problem.inputs(rows, None)._replace(q_HTD=q_HTD))
    (gradient,) = torch.autograd.grad(out_HTD.square().sum(), q_HTD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]


def _peak_bytes(run: Callable[[], object]) -> int:
    """Return by how much the resident memory of this process grows at most during `run`."""

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peak memory"
)
@pytest.mark.parametrize("window", [None, 128], ids=["full", "window 128"])
def test_a_row_of_16k_tokens_needs_no_square_matrix(window: int | None) -> None:
    num_tokens = 16 * 1024
    rows = PackedRows.from_bounds([(0, 5000, num_tokens)], num_tokens)
    problem = Problem.draw(num_tokens, (2, 1, 16))
    peak = _peak_bytes(lambda: problem.solve(CPU, rows, window, torch.float32))
    square_of_bytes = num_tokens**2
    assert peak < square_of_bytes / 2, (
        f"{peak / 2**20:.0f} MiB; a boolean mask has {square_of_bytes / 2**20:.0f}"
    )


def test_masks_are_built_once_per_batch_and_window(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    def counted(
        document_T: Tensor, block: int, window: int, group: int, dtype: torch.dtype
    ) -> Tensor:
        built.append(window)
        return original(document_T, block, window, group, dtype)

    from cpt.model.attention import cpu

    original = cpu._band_mask
    monkeypatch.setattr(cpu, "_band_mask", counted)
    rows = PackedRows.from_bounds([(0, 140, 300)], 300)
    problem = Problem.draw(rows.num_tokens, (4, 2, 16))
    for window in (32, 64, 32, 64):
        problem.solve(CPU, rows, window)
    assert built == [32, 64]


def test_documents_are_found_where_positions_do_not_go_on() -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [3, 4, 5, 7, 8, 0, 1]])
    rows = PackedRows.from_position_ids(position_ids)
    assert rows.bounds == (0, 3, 5, 6, 7, 10, 12, 14)
    assert rows == PackedRows.from_bounds([(0, 3, 5, 6, 7), (0, 3, 5, 7)], 7)
    assert rows.document_ids(torch.device("cpu")).tolist() == [
        0,
        0,
        0,
        1,
        1,
        2,
        3,
        4,
        4,
        4,
        5,
        5,
        6,
        6,
    ]
    assert rows.longest_document_tokens == 3


def _bad_rows() -> Iterator[tuple[Callable[[], PackedRows], str]]:
    yield (
        lambda: PackedRows(batch_size=2, seq_len=4, bounds=(0, 3, 8)),
        "no document starts at token 4",
    )
    yield lambda: PackedRows(batch_size=1, seq_len=4, bounds=(0, 2, 2, 4)), "2 is followed by 2"
    yield (
        lambda: PackedRows(batch_size=1, seq_len=4, bounds=(0, 2)),
        r"must run from 0 to 4 .*got \[0, 2\]",
    )
    yield lambda: PackedRows(batch_size=1, seq_len=0, bounds=(0,)), "need tokens"
    yield (
        lambda: PackedRows.from_bounds([(0, 4), (0, 3)], 4),
        "bounds of row 1 must run from 0 to seq_len=4",
    )
    yield (
        lambda: PackedRows.from_position_ids(torch.arange(4)),
        r"shape \(rows, tokens\), got \(4,\)",
    )


@pytest.mark.parametrize(
    ("make", "message"), list(_bad_rows()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_bounds_that_describe_no_rows_are_refused(
    make: Callable[[], PackedRows], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_auto_is_the_cpu_kernel_on_a_cpu_and_never_the_reference() -> None:
    cpu = torch.device("cpu")
    assert choose("auto", device=cpu, dtype=torch.bfloat16, head_dim=64) == CPU
    assert choose("reference", device=cpu, dtype=torch.bfloat16, head_dim=64) is reference_attention
    with pytest.raises(
        ValueError, match=r"attention 'auto' cannot run\. cpu: it has no code for torch\.int32"
    ):
        choose("auto", device=cpu, dtype=torch.int32, head_dim=64)


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(ValueError, match="cpu: it reads CPU tensors, these are on meta"):
        choose("cpu", device=torch.device("meta"), dtype=torch.float32, head_dim=64)
    with pytest.raises(
        ValueError, match=r"unknown attention 'cpuu'\. Known are: auto, .*, cpu, reference"
    ):
        choose("cpuu", device=torch.device("cpu"), dtype=torch.float32, head_dim=64)

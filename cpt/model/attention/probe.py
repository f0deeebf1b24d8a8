"""The parity probe: before a run trains, its attention is compared with an explicit softmax in
float64.

Errors of attention with sinks are silent: the loss looks right while dq and dk are 10 % off, or
sinks never move. So each backend answers for itself, on the device, in the dtype and with the
exchange of this very run:

    layers     full and window
    row        documents across all ranks, a document of one token, a padding tail of documents of one token
    sinks 3    near 3 and different in every head: finds wrong masks, lost or unsliced sinks, dropped gradients
    large      scores and sinks near 16: finds a log-sum-exp that is kept in bf16
    SP = n     the part of each rank, through the exchange, against the same yardstick

The row is cut into documents short enough that the yardstick is cheap; it costs less than a second.

Shape letters: B rows (one), S tokens of this rank, T tokens of the row, H query heads, K key/value
heads, D head size, L tokens of a document.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import nn

from cpt.errors import ConfigError
from cpt.model.attention import Attention, PackedRows, SequenceParallel, sink_attention

NAMES = ("out", "dq", "dk", "dv", "dsink")

LIMITS = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    # The CPU kernel reaches 5e-3; a window of 129 keys costs 4e-2 and more.
    torch.bfloat16: 1.2e-2,
    torch.float16: 1.2e-2,
}
"""Largest relative l2 error of each result."""

SINKS_NEAR_3 = (2.0, 4.0)
LARGE_SINKS = (14.0, 18.0)
LARGE_QUERIES = 6.0
"""Factor on the queries that brings the log-sum-exp of large scores to 16 and more, where bf16 is
0.06 off.
"""

FULL_LAYER = "full layer"
WINDOW_LAYER = "window layer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What the probe attends over."""

    num_query_heads: int
    """Of all ranks together."""
    num_kv_heads: int
    """Of all ranks together."""
    head_dim: int
    """Size of a head."""
    window: int
    """Keys that a query of a window layer sees, itself included."""
    seq_len: int
    """Tokens of the row."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of one case."""

    case: str
    """Layer, scores and exchange."""
    result: str
    """One of NAMES."""
    error: float
    """Relative l2 error; infinite where a gradient is missing."""
    limit: float
    """The largest error that is accepted."""

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.error <= self.limit


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """All figures of a probe."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether every result of every case is within its limit."""
        return all(finding.passed for finding in self.findings)

    @property
    def largest_error(self) -> float:
        """Largest relative l2 error of all results."""
        return max(finding.error for finding in self.findings)

    def table(self) -> str:
        """Return one line per case, with the relative l2 error of each result; `!` marks those
        above the limit.
        """
        cases = list(dict.fromkeys(finding.case for finding in self.findings))
        width = max(map(len, cases), default=0)
        lines = [" " * width + "".join(f"{name:>11}" for name in NAMES) + f"{'limit':>11}"]
        for case in cases:
            own = [finding for finding in self.findings if finding.case == case]
            shown = "".join(
                f"{finding.error:>10.1e}{' ' if finding.passed else '!'}" for finding in own
            )
            lines.append(f"{case:<{width}}{shown}{own[0].limit:>11.1e}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Problem:
    """Inputs of one case in float64, on the device, rounded to the dtype of the run."""

    q_HTD: torch.Tensor
    k_KTD: torch.Tensor
    v_KTD: torch.Tensor
    sinks_H: torch.Tensor
    d_out_HTD: torch.Tensor


def run_probe(
    attention: Attention,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    num_query_heads: int,
    num_kv_heads: int,
    window: int,
    sequence_parallel: SequenceParallel | None = None,
    sp_size: int = 1,
    sp_rank: int = 0,
) -> ProbeReport:
    """Compare an attention with the definition and refuse it if it is off.

    Under sequence parallelism all ranks of a group call this together. Each raises or returns by
    itself and only after all exchanges are done: make the outcome common to all ranks
    (`cpt.parallel.agreement.together`).

    Args:
        attention: What the layers of the run call.
        device: Where they run.
        dtype: Type of queries, keys and values.
        head_dim: Size of a head.
        num_query_heads: Of the model.
        num_kv_heads: Of the model.
        window: Keys that a query of a window layer sees, itself included.
        sequence_parallel: The exchange of the run, if it has one.
        sp_size: Ranks that share a row.
        sp_rank: This rank among them.

    Raises:
        ConfigError: A result is off by more than its limit, or the attention does not run. The
            message has all figures.
    """
    shape = probe_shape(num_query_heads, num_kv_heads, head_dim, window, sp_size)
    try:
        report = measure(attention, shape, device, dtype, sequence_parallel, sp_size, sp_rank)
    except Exception as error:
        raise ConfigError(
            f"attention does not run on {device} in {dtype}: {type(error).__name__}: {error}. "
            "Choose another model.attention; `cpt doctor` lists what is usable here."
        ) from error
    if not report.passed:
        raise ConfigError(
            f"attention is wrong on {device} in {dtype} (rank {sp_rank} of {sp_size} in its sequence-parallel group). "
            "Relative l2 errors against an explicit softmax in float64, `!` where above the limit:\n"
            f"{report.table()}\n"
            "Training with it would go wrong without a sign of it. Choose another model.attention; `cpt doctor` lists "
            "what is usable here."
        )
    return report


def probe_shape(
    num_query_heads: int, num_kv_heads: int, head_dim: int, window: int, sp_size: int
) -> Shape:
    """Return four windows, or as many as give each rank one; two groups of heads are enough for one
    rank.
    """
    if sp_size == 1:
        group = num_query_heads // num_kv_heads
        num_kv_heads = min(num_kv_heads, 2)
        num_query_heads = num_kv_heads * group
    local_tokens = max(-(-4 * window // sp_size), window)
    return Shape(
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        window=window,
        seq_len=local_tokens * sp_size,
    )


def measure(
    attention: Attention,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    sequence_parallel: SequenceParallel | None = None,
    sp_size: int = 1,
    sp_rank: int = 0,
) -> ProbeReport:
    """Return the errors of an attention, whatever they are."""
    rows = _probe_rows(shape)
    findings: list[Finding] = []
    for layer, window in ((FULL_LAYER, None), (WINDOW_LAYER, shape.window)):
        for scores in ("sinks 3", "large"):
            problem = _draw(shape, device, dtype, large=scores == "large")
            want = _definition(problem, rows, window)
            tokens = range(shape.seq_len)
            got = _solve(attention, problem, rows, window, dtype, None, tokens)
            findings += _compare(f"{layer}, {scores}", got, want, dtype)
            if sequence_parallel is None or sp_size == 1 or scores == "large":
                continue
            tokens, sink_terms = _parts_of_rank(shape, window, sequence_parallel, sp_size, sp_rank)
            got = _solve(attention, problem, rows, window, dtype, sequence_parallel, tokens)
            findings += _compare(
                f"{layer}, {scores}, SP = {sp_size}", got, _part(want, tokens, *sink_terms), dtype
            )
    return ProbeReport(tuple(findings))


def _probe_rows(shape: Shape) -> PackedRows:
    """Return one row of documents longer than a window and shorter than three, and a tail of
    one-token documents.
    """
    window, seq_len = shape.window, shape.seq_len
    lengths = itertools.cycle((2 * window + window // 3, 1, window + window // 2, 5))
    bounds, tail = [0], max(seq_len - window // 4, 1)
    while bounds[-1] < tail:
        bounds.append(min(bounds[-1] + next(lengths), tail))
    return PackedRows.from_bounds([(*bounds, *range(tail + 1, seq_len + 1))], seq_len)


def _draw(shape: Shape, device: torch.device, dtype: torch.dtype, *, large: bool) -> _Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int, factor: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(heads, shape.seq_len, shape.head_dim, generator=generator) * factor
        return drawn.to(dtype).to(device).double()

    lowest, highest = LARGE_SINKS if large else SINKS_NEAR_3
    # Neighbouring heads differ, and so do the slices of any two ranks.
    sinks_H = torch.linspace(lowest, highest, shape.num_query_heads).to(dtype).to(device).double()
    return _Problem(
        q_HTD=normal(shape.num_query_heads, LARGE_QUERIES if large else 1.0),
        k_KTD=normal(shape.num_kv_heads),
        v_KTD=normal(shape.num_kv_heads),
        sinks_H=sinks_H,
        d_out_HTD=normal(shape.num_query_heads),
    )


def _definition(problem: _Problem, rows: PackedRows, window: int | None) -> list[torch.Tensor]:
    """Return out, dq, dk, dv, and the gradient of the sinks token by token, (H, T), by softmax and
    autograd.
    """
    num_heads, num_tokens, head_dim = problem.q_HTD.shape
    group = num_heads // len(problem.k_KTD)
    sinks_HT = problem.sinks_H[:, None].expand(-1, num_tokens)
    leaves = [
        x.detach().clone().requires_grad_()
        for x in (problem.q_HTD, problem.k_KTD, problem.v_KTD, sinks_HT)
    ]
    parts = []
    for start, end in itertools.pairwise(rows.bounds):
        q_HLD, k_KLD, v_KLD, sinks_HL = (x[:, start:end] for x in leaves)
        k_HLD, v_HLD = k_KLD.repeat_interleave(group, 0), v_KLD.repeat_interleave(group, 0)
        scores_HLL = q_HLD @ k_HLD.transpose(1, 2) * head_dim**-0.5
        visible_LL = torch.ones_like(scores_HLL[0], dtype=torch.bool).tril()
        if window is not None:
            visible_LL = visible_LL.triu(1 - window)
        scores_HLL = scores_HLL.masked_fill(~visible_LL, -torch.inf)
        probability_HLL = torch.cat([scores_HLL, sinks_HL.unsqueeze(2)], 2).softmax(2)[..., :-1]
        parts.append(probability_HLL @ v_HLD)
    out_HTD = torch.cat(parts, 1)
    return [out_HTD.detach(), *torch.autograd.grad(out_HTD, leaves, problem.d_out_HTD)]


def _part(
    want: list[torch.Tensor], tokens: range, sink_tokens: range, sink_heads: range
) -> list[torch.Tensor]:
    """Return what one rank has of the results: its tokens, and its terms of the sinks' gradient,
    (H, T).
    """
    mine = slice(tokens.start, tokens.stop)
    terms_HT = torch.zeros_like(want[4])
    block = slice(sink_heads.start, sink_heads.stop), slice(sink_tokens.start, sink_tokens.stop)
    terms_HT[block] = want[4][block]
    return [*(x[:, mine] for x in want[:4]), terms_HT]


def _parts_of_rank(
    shape: Shape,
    window: int | None,
    sequence_parallel: SequenceParallel,
    sp_size: int,
    sp_rank: int,
) -> tuple[range, tuple[range, range]]:
    """Return a rank's tokens, and which tokens and heads its gradient of the sinks sums over.

    After the all-to-all a rank has all tokens of its heads, with the halo all heads of its tokens.
    """
    local_tokens, local_heads = shape.seq_len // sp_size, shape.num_query_heads // sp_size
    tokens = range(sp_rank * local_tokens, (sp_rank + 1) * local_tokens)
    halo = sequence_parallel.halo
    if halo is not None and halo.window == window:
        return tokens, (tokens, range(shape.num_query_heads))
    return tokens, (range(shape.seq_len), range(sp_rank * local_heads, (sp_rank + 1) * local_heads))


def _compare(
    case: str, got: list[torch.Tensor | None], want: list[torch.Tensor], dtype: torch.dtype
) -> list[Finding]:
    """Return relative l2 errors; the sinks' gradient, whose terms may cancel, is measured against
    the terms.
    """
    expected = [*want[:4], want[4].sum(1)]
    scales = [*(x.norm() for x in want[:4]), torch.maximum(expected[4].norm(), want[4].norm())]
    findings = []
    for name, x, y, scale in zip(NAMES, got, expected, scales, strict=True):
        error = (
            float("inf") if x is None else float((x.double() - y).norm() / scale.clamp(min=1e-30))
        )
        findings.append(Finding(case, name, error, LIMITS[dtype]))
    return findings


def _solve(
    attention: Attention,
    problem: _Problem,
    rows: PackedRows,
    window: int | None,
    dtype: torch.dtype,
    sequence_parallel: SequenceParallel | None,
    tokens: range,
) -> list[torch.Tensor | None]:
    """Return what this rank gets from the attention function that the model calls, as (heads,
    tokens, D).
    """
    mine = slice(tokens.start, tokens.stop)
    q, k, v = (
        x[None, :, mine].to(dtype, copy=True).requires_grad_()
        for x in (problem.q_HTD, problem.k_KTD, problem.v_KTD)
    )
    sinks_H = problem.sinks_H.to(dtype, copy=True).requires_grad_()
    out_1SHD, _ = sink_attention(
        nn.Identity(),
        q,
        k,
        v,
        None,
        scaling=q.shape[3] ** -0.5,
        sliding_window=window,
        s_aux=sinks_H,
        packed_rows=rows,
        sequence_parallel=sequence_parallel,
        kernel=attention,
    )
    d_out_1SHD = problem.d_out_HTD[None, :, mine].transpose(1, 2).to(out_1SHD.dtype)
    gradients = torch.autograd.grad(out_1SHD, (q, k, v, sinks_H), d_out_1SHD, allow_unused=True)
    heads_first = [None if x is None else x[0] for x in gradients[:3]]
    return [out_1SHD.detach()[0].transpose(0, 1), *heads_first, gradients[3]]

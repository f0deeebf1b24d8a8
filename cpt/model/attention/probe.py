"""The parity probe: an attention is compared with an explicit softmax in float64 before it trains.

Errors of attention with sinks are silent: the loss looks right while dq and dk are 10 % off, or
while the sinks never move. So each backend answers for itself, on the device, in the dtype and with
the exchange of this very run:

    layers     full and window
    row        documents across all ranks, a document of one token, a padding tail of documents of
               one token
    sinks 3    near 3 and different in every head: finds wrong masks, lost or unsliced sinks,
               dropped gradients
    large      scores and sinks near 16: finds a log-sum-exp that is kept in bf16
    SP = n     the part of each rank, through the exchange, against the same yardstick

The row is cut into documents short enough that the yardstick is cheap. A probe costs less than a
second.

Shape letters: B rows (one), S tokens of this rank, T tokens of the row, H query heads, K key/value
heads, D head size, L tokens of a document.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import nn

from cpt.errors import ConfigError
from cpt.model.attention.interface import Attention, AttentionInputs, SequenceParallel
from cpt.model.attention.rows import PackedRows
from cpt.model.attention.sink import sink_attention

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
"""Factor on the queries. It brings the log-sum-exp to 16 and more, where bf16 is 0.06 off."""

FULL_LAYER = "full layer"
WINDOW_LAYER = "window layer"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeShape:
    """The sizes of the row that the probe attends over."""

    num_query_heads: int
    """Query heads of all ranks together."""
    num_kv_heads: int
    """Key/value heads of all ranks together."""
    head_dim: int
    """Size of a head."""
    window: int
    """Keys that a query of a window layer sees, itself included."""
    seq_len: int
    """Tokens of the row."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The error of one result of one case."""

    case: str
    """Layer, scores and exchange of the case."""
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

    def shown(self) -> str:
        """Return the error in 11 columns, with `!` if it is above the limit."""
        mark = " " if self.passed else "!"
        return f"{self.error:>10.1e}{mark}"


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """The errors of all results of a probe."""

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
        """Return a line per case with the relative l2 errors; `!` marks those above the limit."""
        by_case: dict[str, list[Finding]] = {}
        for finding in self.findings:
            by_case.setdefault(finding.case, []).append(finding)
        width = max(map(len, by_case), default=0)
        heading = "".join(f"{name:>11}" for name in (*NAMES, "limit"))
        lines = [" " * width + heading]
        for case, findings in by_case.items():
            errors = "".join(finding.shown() for finding in findings)
            lines.append(f"{case:<{width}}{errors}{findings[0].limit:>11.1e}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSetting:
    """The attention under test, and where and how it runs."""

    attention: Attention
    """The attention that the layers of the run call."""
    device: torch.device
    """Device of all tensors."""
    dtype: torch.dtype
    """Type of queries, keys and values."""
    sequence_parallel: SequenceParallel | None = None
    """The exchange of the run, if it has one."""
    sp_size: int = 1
    """Ranks that share a row."""
    sp_rank: int = 0
    """This rank among them."""


@dataclass(frozen=True, slots=True)
class _Problem:
    """One case, rounded to the dtype of the run and held in float64 on its device."""

    inputs: AttentionInputs
    d_out_HTD: torch.Tensor


@dataclass(frozen=True, slots=True)
class _RankPart:
    """The part of the whole row that one rank computes."""

    tokens: slice
    """Its tokens, for which it has out, dq, dk and dv."""
    sink_tokens: slice
    sink_heads: slice
    """The tokens and heads that its gradient of the sinks sums over."""


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
    """Compare an attention with the definition, and refuse it if it is off.

    Under sequence parallelism all ranks of a group call this together. Each raises or returns by
    itself, and only after all exchanges are done: make the outcome common to all ranks
    (`cpt.parallel.agreement.together`).

    Args:
        attention: What the layers of the run call.
        device: Where they run.
        dtype: Type of queries, keys and values.
        head_dim: Size of a head.
        num_query_heads: Query heads of the model.
        num_kv_heads: Key/value heads of the model.
        window: Keys that a query of a window layer sees, itself included.
        sequence_parallel: The exchange of the run, if it has one.
        sp_size: Ranks that share a row.
        sp_rank: This rank among them.

    Raises:
        ConfigError: A result is off by more than its limit, or the attention does not run. The
            message has all figures.
    """
    setting = ProbeSetting(
        attention=attention,
        device=device,
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        sp_size=sp_size,
        sp_rank=sp_rank,
    )
    shape = probe_shape(num_query_heads, num_kv_heads, head_dim, window, sp_size)
    try:
        report = measure(setting, shape)
    except Exception as error:
        raise ConfigError(
            f"attention does not run on {device} in {dtype}: {type(error).__name__}: {error}. "
            "Choose another model.attention; `cpt doctor` lists what is usable here."
        ) from error
    if not report.passed:
        raise ConfigError(_refusal(setting, report))
    return report


def _refusal(setting: ProbeSetting, report: ProbeReport) -> str:
    return (
        f"attention is wrong on {setting.device} in {setting.dtype} (rank {setting.sp_rank} of "
        f"{setting.sp_size} in its sequence-parallel group). Relative l2 errors against an "
        "explicit softmax in float64, `!` where above the limit:\n"
        f"{report.table()}\n"
        "Training with it would go wrong without a sign of it. Choose another model.attention; "
        "`cpt doctor` lists what is usable here."
    )


def probe_shape(
    num_query_heads: int, num_kv_heads: int, head_dim: int, window: int, sp_size: int
) -> ProbeShape:
    """Return a row of four windows, or of one window per rank if that is longer.

    One rank alone needs no more than two groups of heads.
    """
    if sp_size == 1:
        group = num_query_heads // num_kv_heads
        num_kv_heads = min(num_kv_heads, 2)
        num_query_heads = num_kv_heads * group
    local_tokens = max(-(-4 * window // sp_size), window)
    return ProbeShape(
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        window=window,
        seq_len=local_tokens * sp_size,
    )


def measure(setting: ProbeSetting, shape: ProbeShape) -> ProbeReport:
    """Return the errors of an attention, whatever they are."""
    findings: list[Finding] = []
    for layer, window in ((FULL_LAYER, None), (WINDOW_LAYER, shape.window)):
        for scores in ("sinks 3", "large"):
            problem = _draw(shape, setting, window, large=scores == "large")
            want = _definition(problem)
            got = _solve(setting, problem, None, slice(0, shape.seq_len))
            case = f"{layer}, {scores}"
            findings += _compare(case, got, want, setting.dtype)
            exchange = setting.sequence_parallel
            if exchange is None or setting.sp_size == 1 or scores == "large":
                continue
            part = _part_of_rank(shape, window, exchange, setting)
            got = _solve(setting, problem, exchange, part.tokens)
            case += f", SP = {setting.sp_size}"
            findings += _compare(case, got, _restricted(want, part), setting.dtype)
    return ProbeReport(tuple(findings))


def _probe_rows(shape: ProbeShape) -> PackedRows:
    """Return one row: documents of one to three windows, then a tail of one-token documents."""
    window = shape.window
    seq_len = shape.seq_len
    lengths = itertools.cycle((2 * window + window // 3, 1, window + window // 2, 5))
    tail = max(seq_len - window // 4, 1)
    bounds = [0]
    while bounds[-1] < tail:
        bounds.append(min(bounds[-1] + next(lengths), tail))
    return PackedRows.from_bounds([(*bounds, *range(tail + 1, seq_len + 1))], seq_len)


def _draw(shape: ProbeShape, setting: ProbeSetting, window: int | None, *, large: bool) -> _Problem:
    generator = torch.Generator().manual_seed(0)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(setting.dtype).to(setting.device).double()

    def normal(heads: int, factor: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(heads, shape.seq_len, shape.head_dim, generator=generator)
        return rounded(drawn * factor)

    lowest, highest = LARGE_SINKS if large else SINKS_NEAR_3
    inputs = AttentionInputs(
        q_HTD=normal(shape.num_query_heads, LARGE_QUERIES if large else 1.0),
        k_KTD=normal(shape.num_kv_heads),
        v_KTD=normal(shape.num_kv_heads),
        # Neighboring heads differ, and so do the slices of any two ranks.
        sinks_H=rounded(torch.linspace(lowest, highest, shape.num_query_heads)),
        rows=_probe_rows(shape),
        window=window,
        scale=shape.head_dim**-0.5,
    )
    return _Problem(inputs, normal(shape.num_query_heads))


def _definition(problem: _Problem) -> list[torch.Tensor]:
    """Return out, dq, dk, dv, and the sinks' gradient token by token, (H, T), by autograd."""
    inputs = problem.inputs
    num_heads, num_tokens, _ = inputs.q_HTD.shape
    group = num_heads // len(inputs.k_KTD)
    sinks_HT = inputs.sinks_H[:, None].expand(-1, num_tokens)
    leaves = [
        x.detach().clone().requires_grad_()
        for x in (inputs.q_HTD, inputs.k_KTD, inputs.v_KTD, sinks_HT)
    ]
    outs = []
    for start, end in itertools.pairwise(inputs.rows.bounds):
        q_HLD, k_KLD, v_KLD, sinks_HL = (x[:, start:end] for x in leaves)
        k_HLD = k_KLD.repeat_interleave(group, 0)
        v_HLD = v_KLD.repeat_interleave(group, 0)
        scores_HLL = q_HLD @ k_HLD.transpose(1, 2) * inputs.scale
        visible_LL = torch.ones_like(scores_HLL[0], dtype=torch.bool).tril()
        if inputs.window is not None:
            visible_LL = visible_LL.triu(1 - inputs.window)
        scores_HLL = scores_HLL.masked_fill(~visible_LL, -torch.inf)
        probability_HLL = torch.cat([scores_HLL, sinks_HL.unsqueeze(2)], 2).softmax(2)[..., :-1]
        outs.append(probability_HLL @ v_HLD)
    out_HTD = torch.cat(outs, 1)
    return [out_HTD.detach(), *torch.autograd.grad(out_HTD, leaves, problem.d_out_HTD)]


def _part_of_rank(
    shape: ProbeShape, window: int | None, exchange: SequenceParallel, setting: ProbeSetting
) -> _RankPart:
    """Return what this rank computes.

    A halo gives all heads of its tokens, an all-to-all all tokens of its heads.
    """
    local_tokens = shape.seq_len // setting.sp_size
    local_heads = shape.num_query_heads // setting.sp_size
    tokens = slice(setting.sp_rank * local_tokens, (setting.sp_rank + 1) * local_tokens)
    heads = slice(setting.sp_rank * local_heads, (setting.sp_rank + 1) * local_heads)
    halo = exchange.halo
    if halo is not None and halo.window == window:
        return _RankPart(tokens, sink_tokens=tokens, sink_heads=slice(0, shape.num_query_heads))
    return _RankPart(tokens, sink_tokens=slice(0, shape.seq_len), sink_heads=heads)


def _restricted(want: list[torch.Tensor], part: _RankPart) -> list[torch.Tensor]:
    """Return what one rank has of the results: its tokens, and its terms of the sinks' gradient."""
    all_terms_HT = want[4]
    terms_HT = torch.zeros_like(all_terms_HT)
    block = part.sink_heads, part.sink_tokens
    terms_HT[block] = all_terms_HT[block]
    return [*(x[:, part.tokens] for x in want[:4]), terms_HT]


def _compare(
    case: str, got: list[torch.Tensor | None], want: list[torch.Tensor], dtype: torch.dtype
) -> list[Finding]:
    """Return the relative l2 error of each result.

    The terms of the sinks' gradient may cancel, so it is measured against the norm of the terms.
    """
    terms_HT = want[4]
    expected = [*want[:4], terms_HT.sum(1)]
    scales = [x.norm() for x in expected]
    scales[4] = torch.maximum(scales[4], terms_HT.norm())
    findings = []
    for name, x, y, scale in zip(NAMES, got, expected, scales, strict=True):
        error = float("inf")
        if x is not None:
            error = float((x.double() - y).norm() / scale.clamp(min=1e-30))
        findings.append(Finding(case, name, error, LIMITS[dtype]))
    return findings


def _solve(
    setting: ProbeSetting, problem: _Problem, exchange: SequenceParallel | None, tokens: slice
) -> list[torch.Tensor | None]:
    """Return what this rank gets from the attention function, heads first: (H, S, D)."""
    inputs = problem.inputs

    def leaf(x_HTD: torch.Tensor) -> torch.Tensor:
        return x_HTD[None, :, tokens].to(setting.dtype, copy=True).requires_grad_()

    q_1HSD = leaf(inputs.q_HTD)
    k_1KSD = leaf(inputs.k_KTD)
    v_1KSD = leaf(inputs.v_KTD)
    sinks_H = inputs.sinks_H.to(setting.dtype, copy=True).requires_grad_()
    out_1SHD, _ = sink_attention(
        nn.Identity(),
        q_1HSD,
        k_1KSD,
        v_1KSD,
        None,
        scaling=inputs.scale,
        sliding_window=inputs.window,
        s_aux=sinks_H,
        packed_rows=inputs.rows,
        sequence_parallel=exchange,
        kernel=setting.attention,
    )
    d_out_1SHD = problem.d_out_HTD[None, :, tokens].transpose(1, 2).to(out_1SHD.dtype)
    leaves = (q_1HSD, k_1KSD, v_1KSD, sinks_H)
    gradients = torch.autograd.grad(out_1SHD, leaves, d_out_1SHD, allow_unused=True)
    heads_first = [None if x is None else x[0] for x in gradients[:3]]
    return [out_1SHD.detach()[0].transpose(0, 1), *heads_first, gradients[3]]

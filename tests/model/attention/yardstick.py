"""The yardstick of all attention tests: a dense softmax in float64, and what counts as close to it.

The definition is written here anew with Hugging Face's formula, on inputs that bf16 can hold.

Shape letters: T tokens of all rows (flattened), H query heads, K key/value heads, D head size.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cpt.model.attention import Attention, AttentionInputs, PackedRows

NAMES = ("out", "dq", "dk", "dv", "dsink")

LIMITS = {
    # Rounding of one operation, times the growth over some hundred terms of a sum.
    torch.float64: 1e-10,
    torch.float32: 2e-6,
    # One rounding to bf16 costs 1.7e-3 in l2; out is rounded twice, and dk and dv are sums of
    # rounded group members.
    torch.bfloat16: 6e-3,
}


@dataclass(frozen=True)
class Problem:
    """Inputs of one attention call and the gradient of its output, in float64."""

    q_HTD: Tensor
    k_KTD: Tensor
    v_KTD: Tensor
    sinks_H: Tensor
    d_out_HTD: Tensor

    @classmethod
    def draw(
        cls, num_tokens: int, heads: tuple[int, int, int], sinks: tuple[float, float] = (-30, 30)
    ) -> "Problem":
        num_heads, num_kv_heads, size = heads
        generator = torch.Generator().manual_seed(num_tokens)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).bfloat16().double()

        q_HTD, d_out_HTD = (normal(num_heads, num_tokens, size) for _ in range(2))
        k_KTD, v_KTD = (normal(num_kv_heads, num_tokens, size) for _ in range(2))
        return cls(q_HTD, k_KTD, v_KTD, torch.linspace(*sinks, num_heads).double(), d_out_HTD)

    @property
    def scale(self) -> float:
        """Factor on q k^T."""
        return self.q_HTD.shape[2] ** -0.5

    def inputs(self, rows: PackedRows, window: int | None) -> AttentionInputs:
        """Return what an attention is given, in float64."""
        return AttentionInputs(
            self.q_HTD, self.k_KTD, self.v_KTD, self.sinks_H, rows, window, self.scale
        )

    def solve(
        self,
        attention: Attention,
        rows: PackedRows,
        window: int | None,
        dtype: torch.dtype = torch.float64,
    ) -> list[Tensor]:
        """Return out, dq, dk, dv and dsink in this dtype; sinks stay in float32 at least."""
        q, k, v = (
            x.to(dtype, copy=True).requires_grad_() for x in (self.q_HTD, self.k_KTD, self.v_KTD)
        )
        sinks = self.sinks_H.to(
            torch.promote_types(dtype, torch.float32), copy=True
        ).requires_grad_()
        inputs = AttentionInputs(q, k, v, sinks, rows, window, self.scale)
        out = attention(inputs)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v, sinks), self.d_out_HTD.to(dtype))]


def definition(inputs: AttentionInputs) -> Tensor:
    """Dense attention after `eager_attention_forward` of transformers' modeling_gpt_oss.py."""
    q_HTD, k_KTD, v_KTD, sinks_H, rows, window, scale = inputs
    num_tokens = q_HTD.shape[1]
    group = q_HTD.shape[0] // k_KTD.shape[0]
    visible = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for start, end in itertools.pairwise(rows.bounds):
        visible[start:end, start:end] = True
    visible = visible.tril() if window is None else visible.tril() & ~visible.tril(-window)
    k_HTD = k_KTD.repeat_interleave(group, 0)
    v_HTD = v_KTD.repeat_interleave(group, 0)
    weights = (torch.matmul(q_HTD, k_HTD.transpose(1, 2)) * scale).masked_fill(~visible, -torch.inf)
    logits = torch.cat(
        [weights, sinks_H.reshape(len(q_HTD), -1, 1).expand(-1, num_tokens, -1)], dim=-1
    )
    logits = logits - logits.max(dim=-1, keepdim=True).values
    return torch.matmul(logits.softmax(dim=-1)[..., :-1], v_HTD)


def norms(results: list[Tensor]) -> list[Tensor]:
    return [x.double().norm() for x in results]


def sizes_of(
    problem: Problem, rows: PackedRows, window: int | None, want: list[Tensor]
) -> list[Tensor]:
    """Return the size of each part of the solution.

    dsink is a sum of terms of both signs, which may cancel by chance while their rounding errors do
    not: its size is the one that it has on average over the signs, the root of the sum of the
        squared terms.
    """
    sink_per_token = replace(problem, sinks_H=problem.sinks_H[:, None].expand(-1, rows.num_tokens))
    dsink_terms_HT = sink_per_token.solve(definition, rows, window)[4]
    return [*norms(want[:4]), dsink_terms_HT.norm()]


def relative_errors(
    got: list[Tensor], want: list[Tensor], sizes: list[Tensor] | None = None
) -> dict[str, float]:
    """Return the l2 error of each result relative to its size, by default to the norm of `want`."""
    errors = norms([g.double() - w.double() for g, w in zip(got, want, strict=True)])
    return {
        name: (e / size).item()
        for name, e, size in zip(NAMES, errors, sizes or norms(want), strict=True)
    }


def assert_close(
    got: list[Tensor], want: list[Tensor], limit: float, sizes: list[Tensor] | None = None
) -> None:
    report = []
    errors = relative_errors(got, want, sizes)
    for name, g, w in zip(NAMES, got, want, strict=True):
        difference = (g.double() - w.double()).abs()
        where = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        report.append(
            f"{name}: relative l2 {errors[name]:.2e}, largest {difference.max():.2e} at {where}, "
            f"mean {difference.mean():.2e}"
        )
    # Written so that a NaN fails.
    assert all(error <= limit for error in errors.values()), f"above {limit}:\n" + "\n".join(report)

"""The divergence from k likeliest tokens, in few tiles, is what all logits at once would give.

Shape letters: N tokens, n those with a target, M model size, V vocabulary, k listed tokens, K = k +
1.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cpt.model.loss import tiles
from cpt.model.loss.divergence import TopKTargets
from cpt.model.loss.head import LossHead
from data_pipeline.dataset import IGNORED_LABEL

N = 37
M = 24
V = 1009
K = 5
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 2e-6,  # another order of summation over 1009 entries
    # Logits and their gradient are rounded to 8 bits before they are used.
    torch.bfloat16: 1.2e-2,
}


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", 8 * N * 100)
    monkeypatch.setattr(tiles, "SMALLEST_TILE_WORDS", 1)


def inputs(
    dtype: torch.dtype, *, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, TopKTargets, Tensor]:
    """Hidden states, weights, labels, targets for half of them, and gradients of both losses."""
    generator = torch.Generator().manual_seed(0)
    hidden_NM = torch.randn(N, M, generator=generator, dtype=torch.float64) * scale
    weight_VM = torch.randn(V, M, generator=generator, dtype=torch.float64) * 0.3
    label_N = torch.randint(0, V, (N,), generator=generator)
    label_N[0] = 0
    label_N[1] = V - 1
    label_N[2::5] = IGNORED_LABEL
    at_n = (label_N != IGNORED_LABEL).nonzero().squeeze(1)[::2].contiguous()
    ids_nk = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in at_n])
    ids_nk[0] = torch.tensor([0, V - 1, 3, 4, 5])  # the label of token 0 is listed
    log_p_nK = torch.randn(len(at_n), K + 1, generator=generator, dtype=torch.float64).log_softmax(
        1
    )
    grad_2N = torch.rand(2, N, generator=generator, dtype=torch.float64) + 0.5
    return (
        hidden_NM.to(dtype),
        weight_VM.to(dtype),
        label_N,
        TopKTargets(at_n=at_n, ids_nk=ids_nk, log_p_nK=log_p_nK),
        grad_2N,
    )


def head_of(weight_VM: Tensor) -> LossHead:
    head = LossHead(M, V, bias=False, dtype=weight_VM.dtype)
    head.weight = torch.nn.Parameter(weight_VM.clone())
    return head


def tiled(
    hidden_NM: Tensor, weight_VM: Tensor, label_N: Tensor, targets: TopKTargets, grad_2N: Tensor
) -> tuple[Tensor, ...]:
    head = head_of(weight_VM)
    hidden_NM = hidden_NM.clone().requires_grad_()
    losses_2N = head(hidden_NM, label_N, targets)
    (losses_2N * grad_2N.to(losses_2N.dtype)).sum().backward()
    return losses_2N[0].detach(), losses_2N[1].detach(), hidden_NM.grad, head.weight.grad


def explicit(
    hidden_NM: Tensor, weight_VM: Tensor, label_N: Tensor, targets: TopKTargets, grad_2N: Tensor
) -> tuple[Tensor, ...]:
    """All logits in float64, torch's log_softmax, and the parts of q added up one by one."""
    hidden_NM = hidden_NM.double().requires_grad_()
    weight_VM = weight_VM.double().requires_grad_()
    log_q_NV = (hidden_NM @ weight_VM.T).log_softmax(1)
    nll_N = torch.where(label_N < 0, 0, -log_q_NV.gather(1, label_N.clamp(min=0)[:, None])[:, 0])
    log_q_nV = log_q_NV[targets.at_n]
    listed = torch.zeros_like(log_q_nV, dtype=torch.bool).scatter(1, targets.ids_nk, True)
    others_n = log_q_nV.masked_fill(listed, float("-inf")).logsumexp(1)
    log_q_nK = torch.cat([log_q_nV.gather(1, targets.ids_nk), others_n[:, None]], 1)
    kl_n = torch.nn.functional.kl_div(
        log_q_nK, targets.log_p_nK.double(), reduction="none", log_target=True
    ).sum(1)
    kl_N = torch.zeros(N, dtype=torch.float64).index_copy(0, targets.at_n, kl_n)
    (torch.stack([nll_N, kl_N]) * grad_2N).sum().backward()
    return nll_N.detach(), kl_N.detach(), hidden_NM.grad, weight_VM.grad


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("only", ["both", "divergence"])
def test_tiles_give_the_divergence_and_gradients_of_all_logits_at_once(
    dtype: torch.dtype, only: str
) -> None:
    *given, grad_2N = inputs(dtype)
    if only == "divergence":  # its gradient alone, which the larger one of the loss could hide
        grad_2N[0] = 0
    names = ("loss", "divergence", "hidden_gradient", "weight_gradient")
    found = tiled(*given, grad_2N)
    expected = explicit(*given, grad_2N)
    errors = {name: relative_error(f, e) for name, f, e in zip(names, found, expected, strict=True)}
    assert max(errors.values()) <= TOLERANCES[dtype], errors


@pytest.mark.parametrize("words", [1, 7, 500, V - 1, V, V + 1])
def test_tile_of_any_size_gives_the_same(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", words * N * 8)
    given = inputs(torch.float64)
    for found, expected in zip(tiled(*given), explicit(*given), strict=True):
        assert relative_error(found, expected) <= 1e-10


@pytest.mark.parametrize("k", [1, 5, 64])
def test_top_k_lists_the_likeliest_tokens_and_the_sum_of_the_others(k: int) -> None:
    hidden_NM, weight_VM, *_ = inputs(torch.float64)
    ids_Nk, log_p_NK = head_of(weight_VM).top_k(hidden_NM, k)
    log_q_NV = (hidden_NM @ weight_VM.T).log_softmax(1)
    expected = log_q_NV.topk(k)
    assert torch.equal(ids_Nk, expected.indices)
    others_N = log_q_NV.scatter(1, expected.indices, float("-inf")).logsumexp(1)
    assert torch.allclose(
        log_p_NK, torch.cat([expected.values, others_N[:, None]], 1), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_divergence_and_its_gradient_are_zero_at_the_weights_that_gave_the_targets(
    dtype: torch.dtype,
) -> None:
    hidden_NM, weight_VM, label_N, targets, grad_2N = inputs(dtype)
    ids_Nk, log_p_NK = head_of(weight_VM).top_k(hidden_NM, K)
    at_n = targets.at_n
    own = TopKTargets(
        at_n=at_n, ids_nk=ids_Nk[at_n], log_p_nK=log_p_NK[at_n].float()
    )  # as it is stored
    grad_2N[0] = 0
    _, kl_N, d_hidden_NM, d_weight_VM = tiled(hidden_NM, weight_VM, label_N, own, grad_2N)
    largest = [float(values.abs().max()) for values in (kl_N, d_hidden_NM, d_weight_VM)]
    assert max(largest) <= 1e-6, largest  # of log-probabilities rounded to fp32
    moved = tiled(hidden_NM, 1.1 * weight_VM, label_N, own, grad_2N)
    assert min(moved[1][at_n]) > 1e-5 and float(moved[2].abs().max()) > 1e-3


def test_divergence_is_never_below_zero_beyond_rounding_and_zero_without_a_target() -> None:
    given = inputs(torch.float32)
    targets = given[3]
    kl_N = tiled(*given)[1]
    without = torch.ones(N, dtype=torch.bool).index_fill(0, targets.at_n, False)
    assert (kl_N[targets.at_n] > 0).all() and (kl_N[without] == 0).all()


def test_targets_leave_the_loss_of_tokens_without_one_bit_for_bit_as_it_is() -> None:
    hidden_NM, weight_VM, label_N, targets, grad_2N = inputs(torch.float32)
    plain_N = head_of(weight_VM)(hidden_NM, label_N)
    found_N = tiled(hidden_NM, weight_VM, label_N, targets, grad_2N)[0]
    without = torch.ones(N, dtype=torch.bool).index_fill(0, targets.at_n, False)
    assert torch.equal(plain_N[without], found_N[without])
    assert torch.allclose(plain_N, found_N, rtol=2e-6, atol=0)


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
def test_huge_logits_overflow_nowhere(scale: float) -> None:
    given = inputs(torch.float32, scale=scale)
    for found in tiled(*given):
        assert torch.isfinite(found).all()


def test_labels_of_rows_keep_their_shape() -> None:
    hidden_NM, weight_VM, label_N, targets, _ = inputs(torch.float32)
    inside = targets.at_n < 36
    some = TopKTargets(
        **{
            field.name: getattr(targets, field.name)[inside]
            for field in dataclasses.fields(targets)
        }
    )
    head = head_of(weight_VM)
    rows = head(hidden_NM[:36].view(4, 9, M), label_N[:36].view(4, 9), some)
    assert rows.shape == (2, 4, 9) and torch.equal(
        rows.view(2, 36), head(hidden_NM[:36], label_N[:36], some)
    )


def test_off_the_cpu_targets_ask_for_no_value() -> None:
    # A meta tensor has no values: any question that makes a host wait for a GPU is an error.
    hidden_NM, _, label_N, targets, _ = inputs(torch.float32)
    moved = {}
    for field in dataclasses.fields(targets):
        moved[field.name] = getattr(targets, field.name).to("meta")
    head = LossHead(M, V, bias=False, device="meta")
    hidden_NM = hidden_NM.to("meta").requires_grad_()
    losses_2N = head(hidden_NM, label_N.to("meta"), TopKTargets(**moved), num_labels=20)
    losses_2N.sum().backward()
    assert losses_2N.shape == (2, N)
    assert hidden_NM.grad.shape == hidden_NM.shape


def test_head_lists_the_likeliest_tokens_where_there_is_a_label() -> None:
    hidden_NM, weight_VM, label_N, *_ = inputs(torch.float64)
    head = head_of(weight_VM)
    ids_nk, log_p_nK = head(hidden_NM, label_N, top_k=5)
    expected_ids_Nk, expected_NK = head.top_k(hidden_NM, 5)
    has_label_N = label_N != IGNORED_LABEL
    assert 0 < int(has_label_N.sum()) < N
    assert torch.equal(ids_nk, expected_ids_Nk[has_label_N])
    assert torch.allclose(log_p_nK, expected_NK[has_label_N], rtol=0, atol=1e-12)


def test_head_lists_nothing_where_no_token_has_a_label() -> None:
    hidden_NM, weight_VM, label_N, *_ = inputs(torch.float64)
    ids_nk, log_p_nK = head_of(weight_VM)(hidden_NM, torch.full_like(label_N, -100), top_k=5)
    assert ids_nk.shape == (0, 5) and log_p_nK.shape == (0, 6)

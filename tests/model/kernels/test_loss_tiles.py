"""The loss kernels agree with float64, tile by tile and through the whole head.

Under Triton's interpreter every store is fp32, because it truncates bf16 stores; on a GPU the
gradient is written in place in bf16, as in training.

Shape letters: N tokens, M model size, V vocabulary, v one tile of it, n tokens with a target, k
listed tokens, K = k + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from cpt.model.kernels.loss_tiles import loss_gradient, loss_statistics
from cpt.model.loss import head as loss_head
from cpt.model.loss import tiles
from cpt.model.loss.divergence import TopKTargets
from cpt.model.loss.head import LossHead
from data_pipeline.dataset import IGNORED_LABEL

N = 11
TILE_WORDS = 5_001  # more than a kernel's block, and odd
V = 2 * TILE_WORDS + 613
FIRST = TILE_WORDS
LAST = 2 * TILE_WORDS - 1  # first and last word of the tile in the middle

STATISTICS_TOLERANCE = 1e-6  # a dozen roundings to fp32
GRADIENT_TOLERANCE = 2e-6  # an exponent of size 20 carries 20 roundings
BF16_TOLERANCE = 4e-3  # one rounding to 8 bits


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = getattr(torch, request.param)
    return found


def logits_of(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(N, V) logits with rows that are hard to add up."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = 3 * torch.randn(N, V, generator=generator)
    logits_NV[1] += 1e4
    logits_NV[2] -= 1e4
    logits_NV[3] *= 1e3
    logits_NV[4] = 0.5
    logits_NV[5, :TILE_WORDS] = float("-inf")  # a whole tile is hidden
    logits_NV[6, TILE_WORDS + 7 :] = float("-inf")
    logits_NV[7, ::2] = float("-inf")
    logits_NV[8] = -200 + logits_NV[8]
    logits_NV[8, LAST] = 0  # holds all of the softmax
    return logits_NV.to(device, dtype)


def labels_of(device: torch.device) -> Tensor:
    labels = [0, FIRST, LAST, TILE_WORDS - 1, LAST + 1, V - 1, IGNORED_LABEL, 1, LAST, FIRST, 77]
    return torch.tensor(labels, device=device)


def walk(logits_NV: Tensor) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, V, TILE_WORDS):
        yield first, logits_NV[:, first : first + TILE_WORDS].contiguous()


def lse_of(logits_NV: Tensor) -> Tensor:
    return logits_NV.double().logsumexp(1)


def expected_gradient(
    logits_NV: Tensor, label_N: Tensor, lse_N: Tensor, grad_N: Tensor, pull_N: Tensor | None
) -> Tensor:
    q_NV = (logits_NV.double() - lse_N.double().unsqueeze(1)).exp()
    is_label_NV = torch.arange(V, device=label_N.device) == label_N.unsqueeze(1)
    d_NV = (q_NV - is_label_NV.double()) * grad_N.double().unsqueeze(1)
    if pull_N is not None:
        d_NV += q_NV * pull_N.double().unsqueeze(1)
    return d_NV.masked_fill((label_N == IGNORED_LABEL).unsqueeze(1), 0)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def factors(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return gradients of the losses, and what else multiplies the softmax."""
    generator = torch.Generator().manual_seed(1)
    grad_N = torch.rand(N, generator=generator) + 0.5
    pull_N = torch.randn(N, generator=generator)
    return grad_N.to(device), pull_N.to(device)


def statistics_of(compute: Any, logits_NV: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
    lse_N = torch.full((N,), float("-inf"), device=logits_NV.device)
    target_N = torch.zeros_like(lse_N)
    for first, tile_Nv in walk(logits_NV):
        compute(tile_Nv, label_N, lse_N, target_N, first)
    return lse_N, target_N


def check_statistics(compute: Any, dtype: torch.dtype, device: torch.device) -> None:
    logits_NV = logits_of(dtype, device)
    label_N = labels_of(device)
    lse_N, target_N = statistics_of(compute, logits_NV, label_N)
    expected_N = lse_of(logits_NV)
    close = torch.isclose(
        lse_N.double(), expected_N, rtol=STATISTICS_TOLERANCE, atol=STATISTICS_TOLERANCE
    )
    assert close.all(), (lse_N.double() - expected_N).tolist()
    wanted_N = logits_NV.float().gather(1, label_N.clamp(min=0).unsqueeze(1)).squeeze(1)
    assert torch.equal(target_N, wanted_N.masked_fill(label_N == IGNORED_LABEL, 0))


def test_kernel_adds_up_the_statistics(dtype: torch.dtype, kernel_device: torch.device) -> None:
    from cpt.model.kernels import triton_loss_tiles

    check_statistics(triton_loss_tiles.statistics, dtype, kernel_device)


def test_operator_adds_up_the_statistics(dtype: torch.dtype, kernel_device: torch.device) -> None:
    check_statistics(loss_statistics, dtype, kernel_device)


def test_label_beside_the_tile_leaves_the_noted_logit_alone(kernel_device: torch.device) -> None:
    from cpt.model.kernels import triton_loss_tiles

    tile_Nv = torch.ones(4, 3, device=kernel_device)
    label_N = torch.tensor([9, 10, 12, 13], device=kernel_device)  # the tile has 10, 11 and 12
    lse_N = torch.zeros(4, device=kernel_device)
    target_N = torch.full((4,), 7.0, device=kernel_device)
    triton_loss_tiles.statistics(tile_Nv, label_N, lse_N, target_N, 10)
    assert target_N.tolist() == [7, 1, 1, 7]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_not_finite_shows_in_the_sum_of_its_row_alone(
    value: float, kernel_device: torch.device
) -> None:
    from cpt.model.kernels import triton_loss_tiles

    logits_NV = logits_of(torch.float32, kernel_device)
    logits_NV[0, FIRST + 4_500] = value
    lse_N, _ = statistics_of(triton_loss_tiles.statistics, logits_NV, labels_of(kernel_device))
    assert not torch.isfinite(lse_N[0])
    assert torch.isfinite(lse_N[1:]).all()


@pytest.mark.parametrize("pulled", [False, True], ids=["loss", "loss_and_divergence"])
def test_kernel_gives_the_gradient(
    pulled: bool, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    from cpt.model.kernels import triton_loss_tiles

    logits_NV = logits_of(dtype, kernel_device)
    label_N = labels_of(kernel_device)
    lse_N = lse_of(logits_NV).float()
    grad_N, pull_N = factors(kernel_device)
    given = label_N, lse_N, grad_N, pull_N if pulled else None
    expected_NV = expected_gradient(logits_NV, *given)
    for first, tile_Nv in walk(logits_NV):
        expected_Nv = expected_NV[:, first : first + TILE_WORDS]
        d_Nv = torch.full_like(tile_Nv, 7, dtype=torch.float32)
        triton_loss_tiles.gradient(tile_Nv, *given, first, out_Nv=d_Nv)
        assert relative_error(d_Nv, expected_Nv) <= GRADIENT_TOLERANCE
        assert float((d_Nv - expected_Nv).abs().max()) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("pulled", [False, True], ids=["loss", "loss_and_divergence"])
def test_operator_puts_the_gradient_in_place(
    pulled: bool, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    logits_NV = logits_of(dtype, kernel_device)
    label_N = labels_of(kernel_device)
    lse_N = lse_of(logits_NV).float()
    grad_N, pull_N = factors(kernel_device)
    given = label_N, lse_N, grad_N, pull_N if pulled else None
    expected_NV = expected_gradient(logits_NV, *given)
    tolerance = GRADIENT_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    for first, tile_Nv in walk(logits_NV):
        loss_gradient(tile_Nv, *given, first)
        assert relative_error(tile_Nv, expected_NV[:, first : first + TILE_WORDS]) <= tolerance


def test_token_without_a_label_has_gradient_zero_whatever_its_logits(
    kernel_device: torch.device,
) -> None:
    from cpt.model.kernels import triton_loss_tiles

    tile_Nv = torch.tensor([[1.0, 2, 3], [float("nan"), float("inf"), 1e4]], device=kernel_device)
    label_N = torch.full((2,), IGNORED_LABEL, device=kernel_device)
    ones_N = torch.ones(2, device=kernel_device)
    triton_loss_tiles.gradient(tile_Nv, label_N, ones_N, ones_N, ones_N, 0, out_Nv=tile_Nv)
    assert (tile_Nv == 0).all()


def test_two_runs_give_the_same_bits(dtype: torch.dtype, kernel_device: torch.device) -> None:
    from cpt.model.kernels import triton_loss_tiles

    logits_NV = logits_of(dtype, kernel_device)
    label_N = labels_of(kernel_device)
    first_run = statistics_of(triton_loss_tiles.statistics, logits_NV, label_N)
    second_run = statistics_of(triton_loss_tiles.statistics, logits_NV, label_N)
    for one, other in zip(first_run, second_run, strict=True):
        assert torch.equal(one, other)


def test_no_tokens_are_no_work(kernel_device: torch.device) -> None:
    from cpt.model.kernels import triton_loss_tiles

    tile_Nv = torch.empty(0, 9, device=kernel_device)
    label_N = torch.empty(0, dtype=torch.int64, device=kernel_device)
    none_N = torch.empty(0, device=kernel_device)
    triton_loss_tiles.statistics(tile_Nv, label_N, none_N, none_N, 0)
    triton_loss_tiles.gradient(tile_Nv, label_N, none_N, none_N, None, 0, out_Nv=tile_Nv)


def test_tile_with_strides_is_refused(kernel_device: torch.device) -> None:
    from cpt.model.kernels import triton_loss_tiles

    tile_Nv = torch.zeros(4, 2, device=kernel_device).T
    label_N = torch.zeros(2, dtype=torch.int64, device=kernel_device)
    with pytest.raises(ValueError, match=r"shape \(2, 4\) and strides \(1, 2\)"):
        triton_loss_tiles.statistics(tile_Nv, label_N, label_N.float(), label_N.float(), 0)


def test_operators_keep_the_promises_of_their_schemas(kernel_device: torch.device) -> None:
    def given() -> tuple[Tensor, ...]:
        tile_Nv = torch.randn(3, 5, device=kernel_device)
        label_N = torch.tensor([1, IGNORED_LABEL, 4], device=kernel_device)
        return tile_Nv, label_N, *torch.rand(2, 3, device=kernel_device).unbind()

    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(loss_statistics, (*(t.clone() for t in given()), 0), test_utils=tests)
    torch.library.opcheck(loss_gradient, (*(t.clone() for t in given()), None, 0), test_utils=tests)


M = 24
WHOLE_V = 1_009
TOP_K = 5


def whole_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor, TopKTargets, Tensor]:
    """Hidden states, weights, labels, targets of some tokens, and gradients of both losses."""
    generator = torch.Generator().manual_seed(2)
    hidden_NM = torch.randn(37, M, generator=generator)
    weight_VM = 0.3 * torch.randn(WHOLE_V, M, generator=generator)
    label_N = torch.randint(0, WHOLE_V, (37,), generator=generator)
    label_N[2::3] = IGNORED_LABEL
    label_N[0] = WHOLE_V - 1
    at_n = torch.tensor([0, 1, 6, 21])
    ids_nk = torch.stack([torch.randperm(WHOLE_V, generator=generator)[:TOP_K] for _ in at_n])
    ids_nk[0, 2] = WHOLE_V - 1  # the label of token 0 is listed
    log_p_nK = torch.randn(len(at_n), TOP_K + 1, generator=generator).log_softmax(1)
    targets = TopKTargets(
        at_n=at_n.to(device), ids_nk=ids_nk.to(device), log_p_nK=log_p_nK.to(device)
    )
    grad_2N = torch.rand(2, 37, generator=generator) + 0.5
    return hidden_NM, weight_VM, label_N.to(device), targets, grad_2N.to(device)


def expected_of_head(
    hidden_NM: Tensor, weight_VM: Tensor, label_N: Tensor, targets: TopKTargets, grad_2N: Tensor
) -> tuple[Tensor, ...]:
    """All logits in float64, and torch's log_softmax."""
    hidden_NM = hidden_NM.double().requires_grad_()
    weight_VM = weight_VM.double().requires_grad_()
    log_q_NV = (hidden_NM @ weight_VM.T).log_softmax(1)
    nll_N = -log_q_NV.gather(1, label_N.clamp(min=0).unsqueeze(1)).squeeze(1)
    nll_N = nll_N.masked_fill(label_N == IGNORED_LABEL, 0)
    log_q_nV = log_q_NV[targets.at_n]
    others_n = log_q_nV.scatter(1, targets.ids_nk, float("-inf")).logsumexp(1)
    log_q_nK = torch.cat([log_q_nV.gather(1, targets.ids_nk), others_n.unsqueeze(1)], 1)
    log_p_nK = targets.log_p_nK.double()
    kl_n = (log_p_nK.exp() * (log_p_nK - log_q_nK)).sum(1)
    losses_2N = torch.stack([nll_N, torch.zeros_like(nll_N).index_copy(0, targets.at_n, kl_n)])
    (losses_2N * grad_2N.double()).sum().backward()
    return losses_2N.detach(), hidden_NM.grad, weight_VM.grad


@contextmanager
def no_host_wait(device: torch.device) -> Iterator[None]:
    """On a GPU, raise where the host waits for it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def head_of_kernels(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss head with several tiles and with Triton's kernels, also on a CPU."""
    from cpt.model.kernels import triton_loss_tiles

    def gradient(logits_Nv: Tensor, *given: Any) -> None:
        triton_loss_tiles.gradient(logits_Nv, *given, out_Nv=logits_Nv)

    monkeypatch.setattr(tiles, "SMALLEST_TILE_WORDS", 1)
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", 4 * 37 * 200)
    monkeypatch.setattr(tiles, "GPU_TILE_WORDS", 256)
    if kernel_device.type == "cpu":
        monkeypatch.setattr(loss_head, "loss_statistics", triton_loss_tiles.statistics)
        monkeypatch.setattr(loss_head, "loss_gradient", gradient)


WHOLE_TOLERANCES = {
    torch.float32: 3e-6,  # another order of summation over 1009 entries
    torch.bfloat16: 1.2e-2,  # logits and their gradient are rounded to 8 bits before they are used
}


@pytest.mark.usefixtures("head_of_kernels")
@pytest.mark.parametrize("way", ["all_tokens", "labels_counted", "with_targets", "both"])
def test_head_gives_losses_and_gradients_of_all_logits_at_once(
    way: str, dtype: torch.dtype, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel_device.type == "cpu":
        if dtype == torch.bfloat16:
            pytest.skip("Triton's interpreter truncates bf16 where a GPU rounds")
        if way in ("all_tokens", "with_targets"):  # as on a GPU that does not know the count
            monkeypatch.setattr(loss_head, "_tokens_to_keep", lambda label_N, num_labels: None)
    hidden_NM, weight_VM, label_N, targets, grad_2N = whole_inputs(kernel_device)
    hidden_NM = hidden_NM.to(kernel_device, dtype).requires_grad_()
    head = LossHead(M, WHOLE_V, bias=False, dtype=dtype)
    head.weight = torch.nn.Parameter(weight_VM.to(kernel_device, dtype))
    num_labels = int((label_N != IGNORED_LABEL).sum())
    with_targets = way in ("with_targets", "both")
    if not with_targets:
        grad_2N[1] = 0
    expected = expected_of_head(hidden_NM.detach(), head.weight.detach(), label_N, targets, grad_2N)
    with no_host_wait(kernel_device):
        losses = head(
            hidden_NM,
            label_N,
            targets if with_targets else None,
            num_labels if way in ("labels_counted", "both") else None,
        ).view(-1, 37)
        (losses * grad_2N[: len(losses)]).sum().backward()
    found = losses.detach(), hidden_NM.grad, head.weight.grad
    errors = [
        relative_error(found[0], expected[0][: len(losses)]),
        relative_error(found[1], expected[1]),
        relative_error(found[2], expected[2]),
    ]
    assert max(errors) <= WHOLE_TOLERANCES[dtype], errors
    assert (losses[:, label_N == IGNORED_LABEL] == 0).all()
    assert (hidden_NM.grad[label_N == IGNORED_LABEL] == 0).all()


@pytest.mark.usefixtures("head_of_kernels")
def test_head_without_any_label_has_zero_losses_and_gradients(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_head, "_tokens_to_keep", lambda label_N, num_labels: None)
    hidden_NM = torch.randn(5, M, device=kernel_device, requires_grad=True)
    head = LossHead(M, WHOLE_V, bias=False, device=kernel_device)
    losses_N = head(hidden_NM, torch.full((5,), IGNORED_LABEL, device=kernel_device))
    losses_N.sum().backward()
    for tensor in (losses_N, hidden_NM.grad, head.weight.grad):
        assert (tensor == 0).all()

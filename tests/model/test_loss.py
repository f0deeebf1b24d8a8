"""The tiled loss is the loss of all logits at once, in value and gradients, in little memory.

Shape letters: N tokens, M model size, V vocabulary.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpt.model.loss import tiles
from cpt.model.loss.head import LossHead
from data_pipeline.dataset import IGNORED_LABEL

ROOT = Path(__file__).resolve().parents[2]
N = 37
M = 24
V = 1009
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,  # another order of summation over 1009 entries
    # Logits and their gradient are rounded to 8 bits before they are used.
    torch.bfloat16: 6e-3,
}


def inputs(dtype: torch.dtype, *, ignored: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weights, labels and the gradient of every token's loss."""
    generator = torch.Generator().manual_seed(0)
    hidden_NM = torch.randn(N, M, generator=generator, dtype=torch.float64)
    weight_VM = torch.randn(V, M, generator=generator, dtype=torch.float64) * 0.3
    label_N = torch.randint(0, V, (N,), generator=generator)
    label_N[0] = 0
    label_N[1] = V - 1
    if ignored:
        label_N[2::5] = IGNORED_LABEL
    grad_N = torch.rand(N, generator=generator, dtype=torch.float64) + 0.5
    return hidden_NM.to(dtype), weight_VM.to(dtype), label_N, grad_N


def loss_and_gradients(
    hidden_NM: Tensor, weight_VM: Tensor, label_N: Tensor, grad_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    head = LossHead(weight_VM.shape[1], weight_VM.shape[0], bias=False, dtype=weight_VM.dtype)
    head.weight = torch.nn.Parameter(weight_VM.clone())
    hidden_NM = hidden_NM.clone().requires_grad_()
    nll_N = head(hidden_NM, label_N)
    (nll_N * grad_N.to(nll_N.dtype)).sum().backward()
    return nll_N.detach(), hidden_NM.grad, head.weight.grad


def reference(
    hidden_NM: Tensor, weight_VM: Tensor, label_N: Tensor, grad_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own cross entropy in float64 on the same (rounded) numbers."""
    hidden_NM = hidden_NM.double().requires_grad_()
    weight_VM = weight_VM.double().requires_grad_()
    nll_N = F.cross_entropy(
        hidden_NM @ weight_VM.T, label_N, reduction="none", ignore_index=IGNORED_LABEL
    )
    (nll_N * grad_N).sum().backward()
    return nll_N.detach(), hidden_NM.grad, weight_VM.grad


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("part", [0, 1, 2], ids=["loss", "hidden_gradient", "weight_gradient"])
def test_tiles_give_torchs_cross_entropy(
    part: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a hundred words or two, so that tiles must join
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", 8 * N * 100)
    given = inputs(dtype)
    error = relative_error(loss_and_gradients(*given)[part], reference(*given)[part])
    assert error <= TOLERANCES[dtype], error


@pytest.mark.parametrize("words", [1, 2, 7, 500, V - 1, V, V + 1])
def test_tile_of_any_size_gives_the_same(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(torch.float64, ignored=False)
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", words * N * 8)
    for found, expected in zip(loss_and_gradients(*given), reference(*given), strict=True):
        assert relative_error(found, expected) <= 1e-12


def test_ignored_tokens_have_no_loss() -> None:
    _, _, label_N, _ = given = inputs(torch.float32)
    assert (loss_and_gradients(*given)[0][label_N == IGNORED_LABEL] == 0).all()


def test_ignored_tokens_have_no_gradient() -> None:
    _, _, label_N, _ = given = inputs(torch.float32)
    assert (loss_and_gradients(*given)[1][label_N == IGNORED_LABEL] == 0).all()


def test_ignored_tokens_leave_the_others_as_they_are() -> None:
    hidden_NM, weight_VM, label_N, grad_N = inputs(torch.float64)
    kept = label_N != IGNORED_LABEL
    alone = loss_and_gradients(hidden_NM[kept], weight_VM, label_N[kept], grad_N[kept])
    together = loss_and_gradients(hidden_NM, weight_VM, label_N, grad_N)
    assert relative_error(together[0][kept], alone[0]) <= 1e-15
    assert relative_error(together[2], alone[2]) <= 1e-15


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_batch_without_any_label_has_zero_loss_and_zero_gradients(dtype: torch.dtype) -> None:
    hidden_NM, weight_VM, label_N, grad_N = inputs(dtype)
    for tensor in loss_and_gradients(
        hidden_NM, weight_VM, torch.full_like(label_N, IGNORED_LABEL), grad_N
    ):
        assert (tensor == 0).all()


def test_gradients_have_the_dtype_of_what_they_belong_to() -> None:
    _, d_hidden_NM, d_weight_VM = loss_and_gradients(*inputs(torch.bfloat16))
    assert d_hidden_NM.dtype == d_weight_VM.dtype == torch.bfloat16


def test_loss_of_bf16_states_is_fp32() -> None:
    assert loss_and_gradients(*inputs(torch.bfloat16))[0].dtype == torch.float32


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_huge_logits_overflow_nowhere(scale: float) -> None:
    hidden_NM, weight_VM, label_N, grad_N = inputs(torch.float32)
    given = hidden_NM * scale, weight_VM, label_N, grad_N
    for found, expected in zip(loss_and_gradients(*given), reference(*given), strict=True):
        # exponents of size `scale` carry an absolute error of scale x 6e-8; the largest term
        # decides
        assert torch.isfinite(found).all() and relative_error(found, expected) <= 1e-3


def test_shape_of_the_labels_is_the_shape_of_the_loss() -> None:
    hidden_NM, weight_VM, label_N, _ = inputs(torch.float32)
    head = LossHead(M, V, bias=False)
    head.weight = torch.nn.Parameter(weight_VM)
    rows = head(hidden_NM[:36].view(4, 9, M), label_N[:36].view(4, 9))
    assert torch.equal(rows, head(hidden_NM[:36], label_N[:36]).view(4, 9))


def test_head_without_labels_gives_logits() -> None:
    hidden_NM, weight_VM, _, _ = inputs(torch.float32)
    head = LossHead(M, V, bias=False)
    head.weight = torch.nn.Parameter(weight_VM)
    assert torch.equal(head(hidden_NM), F.linear(hidden_NM, weight_VM))


MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from cpt.model.loss.head import LossHead

def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", status).group(1)) * 1024

# Two threads that share their cores with another process take eight times as long.
torch.set_num_threads(1)
tokens, model_size, vocabulary = map(int, sys.argv[1:])
head = LossHead(model_size, vocabulary, bias=False)
small = LossHead(model_size, 64, bias=False)
states = torch.randn(8, model_size, requires_grad=True)
# Libraries take their own memory at first use.
small(states, torch.zeros(8, dtype=torch.long)).sum().backward()
hidden = torch.randn(tokens, model_size, requires_grad=True)
label = torch.randint(0, vocabulary, (tokens,))
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
before = memory("VmRSS")
head(hidden, label).sum().backward()
peak = memory("VmHWM")
wanted = (hidden.grad.numel() + head.weight.grad.numel()) * 4
print(json.dumps({"extra": peak - before - wanted}))
"""


def extra_bytes(tokens: int, model_size: int, vocabulary: int) -> int:
    """Return the peak memory of forward and backward beyond inputs and gradients.

    From /proc, not from `resource.ru_maxrss`, which a child inherits from the process that started
    it.
    """
    command = [sys.executable, "-c", MEASURE, *map(str, (tokens, model_size, vocabulary))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["extra"])


LIMIT_BYTES = 400_000_000


@pytest.mark.parametrize(
    ("tokens", "vocabulary"),
    [
        (4_096, 201_088),  # all logits would take 3.3 GB
        (
            32_768,
            4_096,
        ),  # all logits would take 0.5 GB, twice; the vocabulary only sets the number of tiles
    ],
)
def test_loss_takes_less_than_400_mb_beyond_inputs_and_gradients(
    tokens: int, vocabulary: int
) -> None:
    extra = extra_bytes(tokens, 64, vocabulary)
    assert extra <= LIMIT_BYTES, f"{extra / 1e6:.0f} MB"


@pytest.mark.parametrize(("tokens", "words"), [(1, 16_384), (32_768, 16_384), (49_152, 10_880)])
def test_tile_on_a_gpu_has_as_many_words_as_a_gibibyte_holds_up_to_a_limit(
    tokens: int, words: int
) -> None:
    assert tiles.words_of_a_tile("cuda", tokens, 2) == words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 4_096, 131_072])
def test_work_bytes_are_the_memory_of_a_tile_on_a_gpu(tokens: int, dtype: torch.dtype) -> None:
    hidden_NM = torch.empty(tokens, M, dtype=dtype, device="meta")
    weight_VM = torch.empty(201_088, M, dtype=dtype, device="meta")
    tile = next(tiles.logit_tiles(hidden_NM, weight_VM))
    tile_bytes = (tile.memory.numel() - 1) * dtype.itemsize
    assert tiles.work_bytes("cuda", tokens, dtype.itemsize) == tile_bytes


@pytest.mark.parametrize("num_labels", [None, N, N // 2, 0])
def test_off_the_cpu_the_head_never_asks_for_a_value(num_labels: int | None) -> None:
    # A meta tensor has no values: any question that makes a host wait for a GPU is an error.
    head = LossHead(M, V, bias=False, device="meta")
    hidden_NM = torch.empty(N, M, device="meta", requires_grad=True)
    label_N = torch.empty(N, device="meta", dtype=torch.int64)
    loss_N = head(hidden_NM, label_N, num_labels=num_labels)
    loss_N.sum().backward()
    assert loss_N.shape == (N,)
    assert hidden_NM.grad.shape == hidden_NM.shape

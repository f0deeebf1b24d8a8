"""The expert layer gives the output and the gradients of transformers' GptOssMLP.

Here with one rank; tests/dist compares layouts.  Shape letters: N tokens, M model size, I expert
size, E experts.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from cpt.deepspeed_adapter.experts import is_expert
from cpt.model.experts.grouped import ALIGNMENT_BYTES, Groups, product
from cpt.model.experts.layer import EXPERT_TENSORS, ExpertParallelMLP, LocalExperts
from cpt.parallel.traffic import Traffic

NUM_EXPERTS = 8
TOP_K = 3
BATCH = 2
TOKENS = 19
SIZES = pytest.mark.parametrize(
    ("model_size", "expert_size"), [(24, 40), (32, 32)], ids=["M!=I", "M==I"]
)
TOLERANCE = 1e-10  # float64; only the order of summation differs


def topology(ep_size: int = 1, ep_rank: int = 0) -> Any:
    """A rank that exchanges nothing."""
    return SimpleNamespace(ep_size=ep_size, ep_rank=ep_rank, ep_group=None, traffic=Traffic())


def transformers_mlp(model_size: int, expert_size: int) -> GptOssMLP:
    """Biases are random, as zero ones hide half of the errors; large weights reach both clamps."""
    config = GptOssConfig(
        hidden_size=model_size,
        intermediate_size=expert_size,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    mlp = GptOssMLP(config).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in mlp.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return mlp.train()


def hidden_states(model_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(BATCH, TOKENS, model_size, generator=generator, dtype=torch.float64)


def output_and_gradients(mlp: torch.nn.Module, hidden_BSM: Tensor) -> dict[str, Tensor]:
    hidden_BSM = hidden_BSM.clone().requires_grad_()
    out_BSM, _ = mlp(hidden_BSM)
    weight = torch.linspace(-1, 1, out_BSM.numel(), dtype=torch.float64).view_as(out_BSM)
    (out_BSM * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in mlp.named_parameters()}
    assert hidden_BSM.grad is not None
    return {"output": out_BSM.detach(), "hidden": hidden_BSM.grad, **gradients}


PARTS = [
    "output",
    "hidden",
    "router.weight",
    "router.bias",
    *(f"experts.{name}" for name in EXPERT_TENSORS),
]


def assert_equal(found: Tensor, expected: Tensor) -> None:
    difference = (found - expected).abs() / expected.norm() * expected.numel() ** 0.5
    assert difference.max() <= TOLERANCE, f"largest {difference.max()}, mean {difference.mean()}"


@SIZES
@pytest.mark.parametrize("part", PARTS)
def test_layer_gives_what_transformers_gives(part: str, model_size: int, expert_size: int) -> None:
    source = transformers_mlp(model_size, expert_size)
    expected = output_and_gradients(source, hidden_states(model_size))
    mlp = ExpertParallelMLP(copy.deepcopy(source), topology())
    assert_equal(output_and_gradients(mlp, hidden_states(model_size))[part], expected[part])


def test_random_weights_reach_both_clamps() -> None:
    """Otherwise the comparison above would not see a clamp that is missing or on the wrong side."""
    source = transformers_mlp(24, 40)
    experts = source.experts
    gate_up = (
        hidden_states(24).view(-1, 24) @ experts.gate_up_proj[0] + experts.gate_up_proj_bias[0]
    )
    gate = gate_up[:, ::2]
    up = gate_up[:, 1::2]
    assert (gate > 7).any() and (gate < -7).any() and (up > 7).any() and (up < -7).any()


@SIZES
@pytest.mark.parametrize("part", PARTS)
def test_expert_without_tokens_changes_nothing(
    part: str, model_size: int, expert_size: int
) -> None:
    source = transformers_mlp(model_size, expert_size)
    source.router.bias.data[[0, 5]] = -1e6
    expected = output_and_gradients(source, hidden_states(model_size))
    mlp = ExpertParallelMLP(copy.deepcopy(source), topology())
    assert_equal(output_and_gradients(mlp, hidden_states(model_size))[part], expected[part])


@pytest.mark.parametrize("name", EXPERT_TENSORS)
def test_expert_without_tokens_has_zero_gradients(name: str) -> None:
    source = transformers_mlp(24, 40)
    source.router.bias.data[5] = -1e6
    gradient = output_and_gradients(ExpertParallelMLP(source, topology()), hidden_states(24))[
        f"experts.{name}"
    ]
    assert (gradient[5] == 0).all() and (gradient[4] != 0).any()


@SIZES
@pytest.mark.parametrize("part", PARTS)
def test_all_tokens_on_the_same_experts_give_what_transformers_gives(
    part: str, model_size: int, expert_size: int
) -> None:
    source = transformers_mlp(model_size, expert_size)
    source.router.bias.data[[1, 6, 7]] = 1e6
    expected = output_and_gradients(source, hidden_states(model_size))
    mlp = ExpertParallelMLP(copy.deepcopy(source), topology())
    found = output_and_gradients(mlp, hidden_states(model_size))[part]
    assert (found - expected[part]).abs().max() <= TOLERANCE * max(
        1.0, float(expected[part].abs().max())
    )


def test_one_token_gives_what_transformers_gives() -> None:
    source = transformers_mlp(24, 40)
    hidden_BSM = hidden_states(24)[:1, :1]
    expected = output_and_gradients(source, hidden_BSM)
    found = output_and_gradients(ExpertParallelMLP(copy.deepcopy(source), topology()), hidden_BSM)
    assert_equal(found["output"], expected["output"])


def test_layer_returns_the_routing_weights_as_transformers_does() -> None:
    source = transformers_mlp(24, 40)
    expected = source(hidden_states(24))[1]
    assert torch.equal(
        ExpertParallelMLP(copy.deepcopy(source), topology())(hidden_states(24))[1], expected
    )


def test_order_of_tokens_does_not_matter() -> None:
    mlp = ExpertParallelMLP(transformers_mlp(24, 40), topology())
    hidden_BSM = hidden_states(24)[:1]
    shuffled = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    out = mlp(hidden_BSM)[0][:, shuffled]
    assert_equal(mlp(hidden_BSM[:, shuffled])[0], out)


@pytest.mark.parametrize("ep_rank", [0, 1, 2, 3])
def test_rank_holds_its_slice_of_the_expert_axis(ep_rank: int) -> None:
    source = transformers_mlp(24, 40)
    mlp = ExpertParallelMLP(source, topology(ep_size=4, ep_rank=ep_rank))
    for name in EXPERT_TENSORS:
        assert torch.equal(
            getattr(mlp.experts, name), getattr(source.experts, name)[2 * ep_rank : 2 * ep_rank + 2]
        )


def test_layer_keeps_the_names_of_transformers() -> None:
    source = transformers_mlp(24, 40)
    assert [*ExpertParallelMLP(source, topology()).state_dict()] == [*source.state_dict()]


def groups(*counts: int) -> Groups:
    return Groups(torch.tensor(counts))


def test_local_experts_give_rows_in_the_order_they_came() -> None:
    source = transformers_mlp(24, 40).experts
    experts = LocalExperts(source, 2, 3)
    rows_RM = hidden_states(24).view(-1, 24)[:9]
    weights_R = torch.linspace(0, 1, 9, dtype=torch.float64)
    one = [
        experts(rows_RM[i : i + 1], weights_R[i : i + 1], groups(int(i < 4), 0, int(i >= 4)))
        for i in range(9)
    ]
    assert_equal(experts(rows_RM, weights_R, groups(4, 0, 5)), torch.cat(one))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_local_experts_without_a_single_row_give_none(dtype: torch.dtype) -> None:
    experts = LocalExperts(transformers_mlp(24, 40).experts.to(dtype), 0, 4)
    out = experts(torch.empty(0, 24, dtype=dtype), torch.empty(0, dtype=dtype), groups(0, 0, 0, 0))
    out.sum().backward()
    assert out.shape == (0, 24)
    assert all((parameter.grad == 0).all() for parameter in experts.parameters())


def test_expert_parameters_are_marked_for_the_engine_and_others_are_not() -> None:
    mlp = ExpertParallelMLP(transformers_mlp(24, 40), topology(ep_size=2))
    marked = {name for name, parameter in mlp.named_parameters() if is_expert(parameter)}
    assert marked == {f"experts.{name}" for name in EXPERT_TENSORS}


class OnGpu(Tensor):
    """A tensor of the host that says it lies on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


@pytest.mark.parametrize("first_element", [0, 1, 4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_that_begin_between_16_bytes_are_multiplied_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, first_element: int, transposed: bool
) -> None:
    """Where one rank alone has an expert, ZeRO-3 puts it behind parts of any size."""
    grouped_mm = torch._grouped_mm
    copied = []

    def kernel(rows: Tensor, matrices: Tensor, *, offs: Tensor) -> Tensor:
        # as check_valid_strides_and_return_transposed of torch's GroupedMMUtils.h
        assert matrices.data_ptr() % ALIGNMENT_BYTES == 0, "expected data_ptr to be aligned"
        copied.append(matrices.storage_offset() != first_element)
        return grouped_mm(rows.as_subclass(Tensor), matrices.as_subclass(Tensor), offs=offs)

    monkeypatch.setattr(torch, "_grouped_mm", kernel)
    generator = torch.Generator().manual_seed(5)
    parts = torch.randn(first_element + 2 * 16 * 16, generator=generator)
    matrices = parts[first_element:].view(2, 16, 16)
    if transposed:
        matrices = matrices.transpose(1, 2)
    rows = torch.randn(7, 16, generator=generator)
    expected = torch.cat([rows[:3] @ matrices[0], rows[3:] @ matrices[1]])
    groups = Groups(torch.tensor([3, 4]))
    found = product(rows, matrices.as_subclass(OnGpu), groups, grouped=True)
    torch.testing.assert_close(found, expected)
    assert copied == [first_element % 4 != 0]

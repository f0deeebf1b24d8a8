"""Muon orthogonalizes each linear map by itself, whoever holds which part of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpt.config import TrainSection
from cpt.model.linear_maps import LinearMaps, linear_maps
from cpt.model.parameters import parameter_shapes
from cpt.training import muon
from cpt.training.newton_schulz import COEFFICIENTS, SMALLEST_NORM, orthogonalize
from cpt.training.optimizer import create_optimizer
from tests.dist.cases import SETTINGS, model_config, reference_model
from tests.support.cut_tensors import cut
from tests.support.plain_muon import PlainMuon, matrices_of, orthogonalized
from tests.support.threaded_ranks import ThreadedRanks

CPU = torch.device("cpu")
SHAPES = [(48, 64), (64, 48), (50, 50)]


def section(**keys: Any) -> TrainSection:
    """Return a `train` section for Muon."""
    rows: dict[str, Any] = {"seq_len": 8, "global_batch_size": 1, "total_steps": 1}
    return TrainSection(**rows, **SETTINGS, optimizer="muon", **keys)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_orthogonalized_matrix_keeps_its_singular_vectors_and_has_values_near_one(
    shape: tuple[int, int],
) -> None:
    """Those that are tiny next to the norm of the matrix are still small after 5 steps."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    scaled = values / values.norm()
    expected = scaled
    a, b, c = COEFFICIENTS
    for _ in range(5):
        expected = a * expected + b * expected**3 + c * expected**5
    rotated = u.T @ orthogonalize(matrix[None], steps=5)[0] @ vh.T
    assert torch.allclose(rotated, torch.diag(expected), rtol=0, atol=1e-4)
    near_one = expected[scaled > 0.01]
    assert float(near_one.min()) > 0.65 and float(near_one.max()) < 1.25


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bf16_the_iteration_is_that_of_torch(shape: tuple[int, int]) -> None:
    """Only the norm differs, which torch takes in bf16: by less than its rounding."""
    torch_muon = pytest.importorskip("torch.optim._muon")
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    expected = torch_muon._zeropower_via_newtonschulz(matrix, COEFFICIENTS, 5, SMALLEST_NORM)
    result = orthogonalize(matrix.bfloat16()[None], steps=5)[0]
    error = (result - expected).float().norm() / expected.float().norm()
    assert float(error) < 2**-7


def test_a_batch_is_its_matrices_and_a_matrix_of_zeros_stays_zero() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(4, 20, 30)
    matrices[2] = 0
    for matrix, result in zip(matrices, orthogonalize(matrices, steps=5), strict=True):
        assert torch.allclose(orthogonalized(matrix), result, rtol=0, atol=1e-5)
    assert not orthogonalize(matrices, steps=5)[2].any()


def test_muon_trains_the_maps_of_attention_and_experts_and_adamw_the_rest() -> None:
    for name, shape in parameter_shapes(model_config()).items():
        maps = linear_maps(name, shape)
        expected = matrices_of(name, torch.empty(shape))
        assert (0 if maps is None else maps.blocks * maps.interleaved) == len(expected), name
        if maps is not None:
            assert {tuple(one.shape) for one in expected} == {(maps.rows, maps.columns)}


def test_one_process_without_an_engine_takes_the_steps_of_the_definition() -> None:
    expected = reference_model()
    plain = PlainMuon(expected, SETTINGS)
    found = reference_model()
    optimizer = create_optimizer(found, section())
    for step in range(3):
        torch.manual_seed(step)
        for one, other in zip(expected.parameters(), found.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        plain.step()
        optimizer.step()
    moved = 3 * SETTINGS["lr"]
    named = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        assert float((parameter - named[name]).detach().abs().max()) < 1e-4 * moved, name


def test_an_update_has_the_root_mean_square_that_is_asked_for() -> None:
    torch.manual_seed(0)
    model = reference_model()
    optimizer = create_optimizer(model, section())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = matrices_of(name, (parameter - before[name]).detach() / SETTINGS["lr"])
        for matrix in moved:
            rms = float(matrix.square().mean().sqrt())
            assert 0.8 * 0.2 < rms < 1.15 * 0.2, (name, rms)


ODD = LinearMaps(blocks=3, rows=5, columns=4, interleaved=2)
PLAIN = LinearMaps(blocks=1, rows=7, columns=3)


@pytest.mark.parametrize("cuts", [[40, 41], [60, 60], [0, 139]])
@pytest.mark.parametrize("nesterov", [True, False])
def test_ranks_that_share_matrices_make_the_update_of_one_that_has_them_whole(
    cuts: list[int], nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks' ranges begin and end anywhere, in the middle of interleaved rows, too."""
    torch.manual_seed(0)
    tensors = [ODD, PLAIN]
    numels = [tensor.blocks * tensor.block_numel for tensor in tensors]
    weights = torch.randn(sum(numels))
    gradients = torch.randn(3, sum(numels))
    settings = section(muon=muon.MuonSection(nesterov=nesterov))

    def trained(rank: int, cuts: list[int]) -> torch.Tensor:
        bounds = [0, *cuts, sum(numels)]
        flat = weights[bounds[rank] : bounds[rank + 1]].clone().requires_grad_()
        group = muon.muon_group([flat], weight_decay=0.1)
        adamw = torch.optim.AdamW([group], lr=1e-2, fused=True)
        optimizer = muon.MatrixOptimizer(adamw, settings.muon, CPU)
        optimizer.hold(flat, muon.plan_work(tensors, cut(numels, cuts), rank=rank, group=ranks))
        for gradient in gradients:
            flat.grad = gradient[bounds[rank] : bounds[rank + 1]].clone()
            optimizer.step()
        return flat.detach()

    ranks: Any = ThreadedRanks(3, monkeypatch)
    found = torch.cat(ranks.run(lambda rank: trained(rank, cuts)))
    expected = trained(0, [])
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert float((found - weights).abs().max()) > 1e-3

"""Penalties on the routers have the gradient of their formula; the statistics are right."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from cpt.model.experts.layer import ExpertParallelMLP
from cpt.model.experts.router_watch import RouterWatch
from cpt.parallel.traffic import Traffic
from cpt.telemetry.router import router_event

ROWS = 4
TOKENS = 25
MODEL = 16
EXPERTS = 8
TOP_K = 2
LAYERS = 2
WORLD = 3  # ranks over which the engine would average
AUX = 0.3
Z = 0.1


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def make_model() -> Any:
    config = GptOssConfig(
        hidden_size=MODEL,
        intermediate_size=24,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    torch.manual_seed(0)
    topology: Any = SimpleNamespace(ep_size=1, ep_rank=0, ep_group=None, traffic=Traffic())
    layers = nn.ModuleList()
    for _ in range(LAYERS):
        mlp = GptOssMLP(config)
        for parameter in mlp.parameters():
            nn.init.normal_(parameter, std=0.5)
        layer = nn.Module()
        layer.mlp = ExpertParallelMLP(mlp, topology)
        layers.append(layer)
    return SimpleNamespace(model=SimpleNamespace(layers=layers))


def make_watch(model: Any, aux_coef: float = AUX, z_coef: float = Z) -> RouterWatch:
    watch = RouterWatch(
        num_layers=LAYERS,
        num_experts=EXPERTS,
        top_k=TOP_K,
        aux_coef=aux_coef,
        z_coef=z_coef,
        device=torch.device("cpu"),
    )
    watch.attach(model)
    return watch


def hidden_states(seed: int = 4) -> Tensor:
    return torch.randn(ROWS, TOKENS, MODEL, generator=torch.Generator().manual_seed(seed))


def step(
    model: Any, watch: RouterWatch, group: Any, hidden: Tensor, rows_per_pass: int, *, measure: bool
) -> Any:
    """Run the passes of one optimizer step, with a plain sum as the loss besides the penalties."""
    watch.begin(num_sources=2, positions=ROWS * TOKENS, world_size=WORLD, measure=measure)
    for first in range(0, ROWS, rows_per_pass):
        watch.enter(torch.arange(first, first + rows_per_pass) % 2)
        x = hidden[first : first + rows_per_pass]
        for layer in model.model.layers:
            x = layer.mlp(x)[0]
        x.sum().backward()
    return watch.finish(group)


def routers(model: Any) -> list[Any]:
    return [layer.mlp.router for layer in model.model.layers]


def penalty(model: Any, hidden: Tensor, load_LE: Tensor) -> Tensor:
    """The formula of the module's docstring, over the whole batch."""
    total = torch.zeros(())
    x = hidden
    for layer, load_E in zip(model.model.layers, load_LE, strict=True):
        logits = layer.mlp.router(x.reshape(-1, MODEL))[0]
        total = total + AUX * EXPERTS * (load_E * logits.softmax(1).mean(0)).sum()
        total = total + Z * logits.logsumexp(1).square().mean()
        x = layer.mlp(x)[0]
    return total * WORLD


@pytest.mark.parametrize("rows_per_pass", [1, 2, 4])
def test_gradients_are_those_of_the_formula_however_the_batch_is_cut(
    group: Any, rows_per_pass: int
) -> None:
    model = make_model()
    plain = copy.deepcopy(model)
    watched = copy.deepcopy(model)
    watch = make_watch(watched)
    load_LE = torch.full((LAYERS, EXPERTS), 1 / EXPERTS)
    for seed in (4, 5):  # equal shares first, then those of the first batch
        hidden = hidden_states(seed)
        for candidate in (plain, watched):
            candidate.model.layers.zero_grad()
        step(watched, watch, group, hidden, rows_per_pass, measure=False)
        x = hidden
        choices = []
        for layer in plain.model.layers:
            choices.append(layer.mlp.router(x.reshape(-1, MODEL))[2])
            x = layer.mlp(x)[0]
        (x.sum() + penalty(plain, hidden, load_LE)).backward()
        load_LE = torch.stack(
            [torch.bincount(c.view(-1), minlength=EXPERTS) / c.numel() for c in choices]
        )
        for expected, found in zip(
            plain.model.layers.parameters(), watched.model.layers.parameters(), strict=True
        ):
            assert expected.grad is not None and found.grad is not None
            assert (expected.grad - found.grad).norm() <= 1e-5 * expected.grad.norm()


def test_penalties_are_off_without_coefficients(group: Any) -> None:
    model = make_model()
    plain = copy.deepcopy(model)
    assert (
        step(model, make_watch(model, 0.0, 0.0), group, hidden_states(), 4, measure=False) is None
    )
    x = hidden_states()
    for layer in plain.model.layers:
        x = layer.mlp(x)[0]
    x.sum().backward()
    for expected, found in zip(routers(plain), routers(model), strict=True):
        assert torch.equal(expected.weight.grad, found.weight.grad)


def test_shares_survive_a_checkpoint_bit_for_bit(group: Any) -> None:
    model = make_model()
    watch = make_watch(model)
    step(model, watch, group, hidden_states(), 2, measure=False)
    other = make_watch(model)
    other.restore(watch.state())
    assert torch.equal(other._load_LE, watch._load_LE) and watch._load_LE.std() > 0


def test_event_tells_load_entropy_language_and_drift(group: Any) -> None:
    model = make_model()
    watch = make_watch(model, 0.0, 0.0)
    watch.original = [(r.weight.detach().clone(), r.bias.detach().clone()) for r in routers(model)]
    logits, _, choice = routers(model)[0](hidden_states().view(-1, MODEL))
    event = router_event(
        7, step(model, watch, group, hidden_states(), 2, measure=True), ["en", "ja"]
    )
    counts = torch.bincount(choice.view(-1), minlength=EXPERTS).double()
    assert event["step"] == 7 and event["dropped"] == 0
    assert event["load_max_over_mean"][0] == pytest.approx(
        float(counts.max() / counts.mean()), abs=1e-4
    )
    p = logits.detach().softmax(1)
    assert event["entropy"][0] == pytest.approx(float(-(p * p.log()).sum(1).mean()), abs=1e-4)
    assert (
        event["overlap"] == [1.0] * LAYERS
        and event["by_language"]["ja"]["overlap"] == [1.0] * LAYERS
    )
    even = torch.bincount(choice.view(ROWS, -1)[::2].reshape(-1), minlength=EXPERTS).double()
    distance = float((even / even.sum() - counts / counts.sum()).abs().sum() / 2)
    assert event["by_language"]["en"]["distance"][0] == pytest.approx(distance, abs=1e-4)
    with torch.no_grad():
        routers(model)[1].bias[:TOP_K] += 1e6  # now every token takes these two
    event = router_event(
        8, step(model, watch, group, hidden_states(), 4, measure=True), ["en", "ja"]
    )
    assert event["overlap"][0] == 1.0 and event["overlap"][1] < 0.6
    assert event["load_max_over_mean"][1] == pytest.approx(EXPERTS / TOP_K)


def test_a_row_that_no_expert_computed_is_counted(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    watch = make_watch(model, 0.0, 0.0)
    honest = watch.computed
    monkeypatch.setattr(watch, "computed", lambda rows: honest(rows - 3))
    event = router_event(
        1, step(model, watch, group, hidden_states(), 4, measure=True), ["en", "ja"]
    )
    assert event["dropped"] == 3 * LAYERS


def test_nothing_is_counted_while_scoring(group: Any) -> None:
    model = make_model()
    watch = make_watch(model, 0.0, 0.0)
    watch.begin(num_sources=2, positions=ROWS * TOKENS, world_size=WORLD, measure=True)
    model.model.layers.eval()
    model.model.layers[0].mlp(hidden_states())
    sums = watch.finish(group)
    assert sums is not None and sums.counts_LSE.sum() == 0 and sums.rows_computed == 0

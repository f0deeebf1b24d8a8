"""Every layout gives the numbers of one process with Hugging Face's eager code and plain AdamW.

Every layout takes fp32 sums in another order, which the tolerances allow for: 2e-5 in loss, and
1e-6 relative in the norm.  In bf16 activations are rounded at other places (2e-2).
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.manifest import PARTS, read_manifest, verify_files
from cpt.checkpoint.range_index import read_range_index
from cpt.checkpoint.reader import read_ranges, step_folder
from cpt.model.experts.grouped import ALIGNMENT_BYTES
from cpt.model.freezing import freeze
from cpt.planning.traffic import exchanges
from cpt.training.optimizer import parameter_groups
from data_pipeline.dataset import PackedRow
from tests.dist.cases import (
    CLIPPING,
    KL_WEIGHT,
    NUM_LAYERS,
    ROWS,
    SEQ_LEN,
    SETTINGS,
    STEPS,
    WINDOW,
    Scenario,
    model_config,
    num_predicted,
    parameter_file,
    reference_model,
    rows_of_step,
    rows_of_two_passes,
    targets_of_step,
    write_targets,
)
from tests.dist.spread_routing import RouterWatch
from tests.dist.worker import config_of
from tests.support.launcher import ROOT, launch
from tests.support.narrow_reference import round_moments

pytestmark = pytest.mark.dist

TRAIN_SEED = 1234
"""The default of `train.seed`."""
WORKER = ROOT / "tests" / "dist" / "worker.py"
LEAST_MARGIN = 0.1
"""Between the last chosen and the first other router logit; layouts differ by far less in fp32.

Seen in three steps, by layer: 1.62, 0.96 and 0.76, in 9,216 choices of two among eight.
"""
LAYOUTS = [
    (1, 1, 1, 3),
    (2, 2, 1, 3),
    (2, 1, 2, 3),
    (4, 2, 2, 3),
    (4, 4, 4, 3),
    (4, 1, 4, 3),
    (2, 2, 1, 2),
    (2, 1, 2, 1),
    (4, 1, 2, 1),
    (4, 2, 2, 2),
]
"""World size, SP, EP and ZeRO stage."""
FULL = [
    Scenario(
        world_size=w,
        sp=s,
        ep=e,
        stage=z,
        micro_batch_size=rows_of_two_passes(w, s) if z == 3 else 1,
        saves_first=True,
    )
    for w, s, e, z in LAYOUTS
]
TWO_STEPS: dict[str, Any] = {"stage": 3, "steps": 2}
"""Other ways to the same gradients take two steps; what follows from these is shown by `FULL`."""
CHECKPOINTED = Scenario(
    world_size=2, sp=1, ep=2, micro_batch_size=4, checkpointing=True, **TWO_STEPS
)
VARIANTS = [
    Scenario(world_size=2, sp=2, ep=1, micro_batch_size=2, exchange="ulysses", **TWO_STEPS),
    Scenario(world_size=4, sp=4, ep=1, micro_batch_size=2, exchange="ulysses", **TWO_STEPS),
    Scenario(world_size=1, sp=1, ep=1, micro_batch_size=8, **TWO_STEPS),
    Scenario(world_size=4, sp=2, ep=2, micro_batch_size=2, checkpointing=True, **TWO_STEPS),
    replace(CHECKPOINTED, expert_recompute="keep"),
    CHECKPOINTED,
    replace(CHECKPOINTED, offload_checkpoints=True),
]
SMALL = [
    Scenario(world_size=1, sp=1, ep=1, stage=3, micro_batch_size=4),
    Scenario(world_size=2, sp=2, ep=1, stage=3, micro_batch_size=2),
    Scenario(world_size=4, sp=2, ep=2, stage=3, micro_batch_size=2, checkpointing=True),
]
PENALIZED = [replace(scenario, steps=2, router_penalties=True) for scenario in SMALL]
WITH_KL = [replace(scenario, steps=2, kl=True) for scenario in SMALL]
ONE_MASKED: dict[str, Any] = {"steps": 1, "masked": True}
MASKED = [
    Scenario(world_size=1, sp=1, ep=1, stage=3, micro_batch_size=4, **ONE_MASKED),
    Scenario(world_size=2, sp=2, ep=1, stage=3, **ONE_MASKED),
    Scenario(world_size=2, sp=2, ep=1, stage=2, micro_batch_size=2, kl=True, **ONE_MASKED),
    Scenario(world_size=2, sp=1, ep=2, stage=1, micro_batch_size=2, **ONE_MASKED),
    Scenario(
        world_size=4, sp=2, ep=2, stage=3, micro_batch_size=2, checkpointing=True, **ONE_MASKED
    ),
]
"""The second has micro batches without a label on any rank."""
LOSS_WEIGHTS = (0.25, 3.0)
WEIGHTED = [
    replace(MASKED[2], loss_weights=LOSS_WEIGHTS),
    replace(MASKED[4], loss_weights=LOSS_WEIGHTS),
]
BF16_LAYOUTS = [(2, 2, 1, 3), (2, 1, 2, 1), (4, 2, 2, 3)]
"""Those in bf16; tests/dist/test_bf16_layouts.py has the others."""
BF16 = [
    Scenario(
        world_size=w,
        sp=s,
        ep=e,
        stage=z,
        dtype="bf16",
        micro_batch_size=rows_of_two_passes(w, s),
        steps=2,
    )
    for w, s, e, z in BF16_LAYOUTS
]


class Reference:
    """Losses, gradient norms and Adam's first moments of the single process."""

    def __init__(
        self,
        folder: Path,
        *,
        frozen: tuple[str, ...] = (),
        num_steps: int = STEPS,
        moment_form: str = "fp32",
    ) -> None:
        torch.set_num_threads(1)  # the other pytest worker needs the other core
        model = reference_model()
        freeze(model, frozen)
        model.save_pretrained(str(folder / "model"))
        self.routing = RouterWatch(model)
        self.names = [name for name, _ in model.named_parameters()]
        groups = parameter_groups(model, SETTINGS["weight_decay"])
        optimizer = torch.optim.AdamW(
            groups,
            lr=SETTINGS["lr"],
            betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
            eps=SETTINGS["eps"],
        )
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.nll_by_source: list[list[float]] = []
        for step in range(num_steps):
            loss, by_source = backward_of_step(model, step)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
            optimizer.step()
            if moment_form != "fp32":
                trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
                round_moments(optimizer, trained, moment_form, seed=TRAIN_SEED, step=step + 1)
            self.losses.append(loss)
            self.nll_by_source.append(by_source)
            self.norms.append(float(norm))
            if step == 0:
                self.first_moments = moments_of(model, optimizer, "exp_avg")
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.moments = {key: moments_of(model, optimizer, key) for key in PARTS[1:]}


def backward_of_step(model: torch.nn.Module, step: int) -> tuple[float, list[float]]:
    """Leave the gradients of a step; return its loss, and the sum of nats of each source."""
    model.zero_grad()
    rows = rows_of_step(step)
    tokens = num_predicted(rows)
    total = 0.0
    by_source = [0.0, 0.0]
    for index, row in enumerate(rows):
        labels = torch.from_numpy(row.labels)
        logits = eager_logits(model, row)
        nll = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        (nll / tokens).backward()
        total += nll.item()
        by_source[index % 2] += nll.item()
    return total / tokens, by_source


def moments_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, key: str
) -> dict[str, torch.Tensor]:
    """Return one of Adam's moments of every trained parameter."""
    moments = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moments[name] = optimizer.state[parameter][key].clone()
    return moments


def eager_logits(model: torch.nn.Module, row: PackedRow) -> torch.Tensor:
    """Return the logits (T, V) of Hugging Face's own code."""
    output = model(
        input_ids=torch.from_numpy(row.input_ids)[None],
        position_ids=torch.from_numpy(row.position_ids)[None],
        attention_mask=explicit_masks(row.bounds),
        use_cache=False,
    )
    logits: torch.Tensor = output.logits[0]
    return logits


def explicit_masks(bounds: list[int]) -> dict[str, torch.Tensor]:
    """Return additive 4-D masks for both kinds of layer.

    transformers does not isolate packed documents by itself.
    """
    index = torch.arange(SEQ_LEN)
    document = torch.bucketize(index, torch.tensor(bounds[1:]), right=True)
    back = index[:, None] - index
    allowed = (back >= 0) & (document[:, None] == document)
    lowest = torch.finfo(torch.float32).min

    def additive(visible: torch.Tensor) -> torch.Tensor:
        return torch.zeros(visible.shape).masked_fill(~visible, lowest)[None, None]

    return {
        "full_attention": additive(allowed),
        "sliding_attention": additive(allowed & (back < WINDOW)),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def results(folder: Path, reference: Reference) -> dict[str, list[dict[str, Any]]]:
    """Results of all scenarios, by name and number of steps."""
    write_targets(folder / "targets")
    write_targets(folder / "targets-masked", masked=True)
    return run_all(folder, [*FULL, *VARIANTS, *PENALIZED, *WITH_KL, *MASKED, *WEIGHTED, *BF16])


def run_all(
    folder: Path, scenarios: list[Scenario], *, timeout_seconds: float = 400
) -> dict[str, list[dict[str, Any]]]:
    """Run scenarios; return their steps by name and number of steps.

    There is one launch per world size, because starting up takes longer than running.
    """
    found = {}
    for world_size in sorted({scenario.world_size for scenario in scenarios}):
        chosen = [scenario for scenario in scenarios if scenario.world_size == world_size]
        found.update(run_together(folder, chosen, world_size, timeout_seconds=timeout_seconds))
    return found


def run_together(
    folder: Path, scenarios: list[Scenario], world_size: int, *, timeout_seconds: float
) -> dict[str, list[dict[str, Any]]]:
    """Run scenarios in one launch; return their steps by name and number of steps."""
    arguments = [str(folder), *(scenario.dump() for scenario in scenarios)]
    codes = launch(WORKER, world_size, arguments, timeout_seconds=timeout_seconds)
    assert codes == [0] * world_size, codes
    found = {}
    for scenario in scenarios:
        found[key_of(scenario)] = json.loads(parameter_file(folder, scenario).read_text())
    return found


def key_of(scenario: Scenario) -> str:
    """Return the key of a scenario in `results`."""
    return scenario.name + str(scenario.steps)


def loss_differences(steps: list[dict[str, Any]], losses: list[float]) -> list[float]:
    """Return how far the loss of each step is from the expected one."""
    pairs = zip(steps, losses, strict=True)
    return [abs(step["loss"] - expected) for step, expected in pairs]


def norm_differences(steps: list[dict[str, Any]], norms: list[float]) -> list[float]:
    """Return the relative difference of each step's gradient norm from the expected one."""
    pairs = zip(steps, norms, strict=True)
    return [abs(step["grad_norm"] / expected - 1) for step, expected in pairs]


def assert_alike(
    steps: list[dict[str, Any]], losses: list[float], norms: list[float], *, bf16: bool = False
) -> None:
    """Assert that steps have the expected losses and norms, within the tolerances of the dtype."""
    by_loss = loss_differences(steps, losses)
    by_norm = norm_differences(steps, norms)
    told = f"loss differences {by_loss}, relative norm differences {by_norm}"
    assert max(by_loss) <= (2e-2 if bf16 else 2e-5), told
    assert max(by_norm) <= (2e-2 if bf16 else 1e-6), told


def assert_same_tensors(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Assert that tensors are equal to the last bit."""
    errors = {}
    for name, tensor in expected.items():
        if not torch.equal(tensor, found[name]):
            errors[name] = float((found[name] - tensor).abs().max())
    assert errors == {}


def named(scenarios: list[Scenario]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scenario", scenarios, ids=lambda s: s.name)


def test_tokens_go_to_many_experts_unevenly(reference) -> None:
    """Else the layouts would hardly exchange anything, and all of them the same."""
    loads = reference.routing.loads
    used = loads > 0
    assert used.any(0).all(), f"an expert is never used: {loads}"
    assert used.sum(1).min() >= 6, f"a layer uses few experts: {loads}"
    assert not used.all(), f"no expert is ever without a token: {loads}"
    assert (loads.amax(1) / loads.sum(1)).max() <= 0.35, f"an expert outweighs the rest: {loads}"
    spread = loads.float().std(1) / loads.float().mean(1)
    assert spread.min() >= 0.4, f"a layer loads its experts evenly: {loads}"


def test_no_token_has_two_experts_that_suit_it_alike(reference) -> None:
    """Else it could go to another expert in another layout, and losses differ for no fault."""
    assert reference.routing.margins.min() >= LEAST_MARGIN, reference.routing.margins


@named([*FULL, *VARIANTS])
@pytest.mark.case("N5", "finite, equal to one process in ten layouts")
def test_loss_and_grad_norm_equal_the_single_process_at_every_step(
    scenario, results, reference
) -> None:
    losses = reference.losses[: scenario.steps]
    norms = reference.norms[: scenario.steps]
    assert_alike(results[key_of(scenario)], losses, norms)


@named(PENALIZED[1:])
def test_router_penalties_train_alike_in_every_layout(scenario, results, reference) -> None:
    """Their gradients as such are compared with the formula in tests/model/test_router_watch.py."""
    expected = results[key_of(PENALIZED[0])]
    found = results[key_of(scenario)]
    losses = [step["loss"] for step in found]
    norms = [step["grad_norm"] for step in found]
    assert_alike(expected, losses, norms)
    without = norm_differences(expected, reference.norms[:2])
    assert min(without) > 1e-3, f"the penalties did nothing: {without}"


@dataclass(frozen=True, kw_only=True)
class FirstStep:
    """The first step of the eager model, from all logits."""

    loss: float
    """Nats per label."""
    divergence: float
    """Sum of nats."""
    norm: float
    """Norm of all gradients before they are clipped."""
    gradients: dict[str, torch.Tensor]
    """Clipped gradients by name."""


def eager_first_step(
    *, masked: bool, kl_weight: float, loss_weights: tuple[float, float] = (1.0, 1.0)
) -> FirstStep:
    """Do the first step; loss and divergence of the result are not weighted."""
    model = reference_model()
    rows = rows_of_step(0, masked=masked)
    tokens = num_predicted(rows)
    sum_of_weights = 0.0
    for source, loss_weight in enumerate(loss_weights):
        sum_of_weights += loss_weight * num_predicted(rows[source::2])
    nats = 0.0
    divergence = 0.0
    for index, row in enumerate(rows):
        log_q = eager_logits(model, row).log_softmax(1)
        labels = torch.from_numpy(row.labels)
        loss = F.nll_loss(log_q, labels, reduction="sum", ignore_index=-100)
        nats += loss.item()
        trained = loss_weights[index % 2] * loss / sum_of_weights
        if index % 2 == 0:
            ids, log_p = targets_of_step(0, masked=masked)[index // 2]
            q = log_q[labels >= 0].exp().gather(1, ids)
            log_parts = torch.cat([q, 1 - q.sum(1, keepdim=True)], 1).log()
            kl = F.kl_div(log_parts, log_p, reduction="sum", log_target=True)
            trained = trained + kl_weight * kl / tokens
            divergence += kl.item()
        trained.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING))
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradients[name] = parameter.grad
    return FirstStep(loss=nats / tokens, divergence=divergence, norm=norm, gradients=gradients)


@pytest.fixture(scope="module")
def first_step_with_kl() -> FirstStep:
    return eager_first_step(masked=False, kl_weight=KL_WEIGHT)


@pytest.fixture(scope="module")
def masked_first_steps() -> dict[tuple[bool, bool], FirstStep]:
    """The first step with loss masks; with the divergence from targets, with loss weights."""
    found = {}
    for kl, weighted in itertools.product((False, True), repeat=2):
        found[kl, weighted] = eager_first_step(
            masked=True,
            kl_weight=KL_WEIGHT if kl else 0.0,
            loss_weights=LOSS_WEIGHTS if weighted else (1.0, 1.0),
        )
    return found


@named([*MASKED, *WEIGHTED])
def test_masked_and_weighted_labels_give_the_loss_and_every_gradient_of_the_single_process(
    scenario, results, masked_first_steps, folder
) -> None:
    """Whole rows, and a rank's part of a row, have no label at all."""
    expected = masked_first_steps[scenario.kl, bool(scenario.loss_weights)]
    (step,) = results[key_of(scenario)]
    assert_alike([step], [expected.loss], [expected.norm])
    if scenario.kl:
        assert step["kl_by_source"][0] == pytest.approx(expected.divergence, rel=2e-5)
    moments = stored_tensors(step_folder(folder / scenario.name, 1), "exp_avg")
    errors = {}
    for name, gradient in expected.gradients.items():
        moment = (1 - SETTINGS["beta1"]) * gradient
        errors[name] = float((moments[name] - moment).norm() / moment.norm().clamp(min=1e-9))
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-4, f"largest relative error {errors[worst]} in {worst}"


@named(WITH_KL)
def test_divergence_from_targets_trains_alike_in_every_layout(
    scenario, results, reference, first_step_with_kl
) -> None:
    expected = results[key_of(WITH_KL[0])]
    found = results[key_of(scenario)]
    for one, other in zip(expected, found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0, abs=2e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4, abs=1e-4)
        assert other["kl_by_source"] == pytest.approx(one["kl_by_source"], rel=2e-5, abs=2e-5)
    nats, others = found[0]["kl_by_source"]
    norm = found[0]["grad_norm"]
    assert nats == pytest.approx(first_step_with_kl.divergence, rel=2e-5) and others == 0
    assert norm == pytest.approx(first_step_with_kl.norm, rel=1e-4)
    assert found[0]["loss"] == pytest.approx(reference.losses[0], abs=2e-5), (
        "the divergence is in the loss that is reported"
    )
    assert abs(norm / reference.norms[0] - 1) > 1e-3, "the divergence did nothing"


@named(FULL)
def test_loss_of_each_source_equals_the_single_process(scenario, results, reference) -> None:
    steps = results[key_of(scenario)]
    for step, expected in zip(steps, reference.nll_by_source, strict=True):
        assert step["nll_by_source"] == pytest.approx(expected, rel=1e-5)


@named(BF16)
def test_bf16_stays_within_its_rounding(scenario, results, reference) -> None:
    steps = results[key_of(scenario)]
    losses = reference.losses[: scenario.steps]
    norms = reference.norms[: scenario.steps]
    assert_alike(steps, losses, norms, bf16=True)


def stored_tensors(step: Path, part: str) -> dict[str, torch.Tensor]:
    """Return the whole tensors of one part of a checkpoint, of all parameters that have it."""
    manifest = read_manifest(step)
    verify_files(step, manifest)
    tensors = {}
    ranges = {}
    for name, record in manifest.tensors.items():
        if part not in record.parts:
            continue
        numel = torch.Size(record.shape).numel()
        flat = torch.full((numel,), float("nan"))
        tensors[name] = flat.view(record.shape)
        ranges[f"{part}/{name}"] = FlatRange(tensor=flat, offset=0, global_numel=numel)
    read_ranges(step, read_range_index(step, manifest), ranges)
    return tensors


def stored(folder: Path, scenario: Scenario, part: str) -> dict[str, torch.Tensor]:
    """Return the whole tensors of a scenario's checkpoint."""
    return stored_tensors(step_folder(folder / scenario.name, scenario.steps), part)


@named(FULL)
@pytest.mark.case("N6", "no hang, every gradient equal to the dense reference")
def test_gradient_of_every_parameter_equals_the_single_process(
    scenario, results, reference, folder
) -> None:
    """Adam's first moment after one step is the clipped gradient times (1 - beta1)."""
    moments = stored_tensors(step_folder(folder / scenario.name, 1), "exp_avg")
    errors = {}
    for name, expected in reference.first_moments.items():
        scale = expected.norm().clamp(min=1e-9)
        errors[name] = float((moments[name] - expected).norm() / scale)
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    assert errors[worst] <= 1e-4, f"largest relative error {errors[worst]} in {worst}; mean {mean}"


@named(FULL)
def test_weights_after_training_equal_the_single_process(
    scenario, results, reference, folder
) -> None:
    """Tiny gradient differences may move a weight by a part of lr.

    Adam divides by the root of the second moment.
    """
    weights = stored(folder, scenario, "master")
    moved = STEPS * SETTINGS["lr"]
    for name, expected in reference.weights.items():
        difference = (weights[name] - expected).abs()
        assert float(difference.mean()) <= 0.01 * moved, (
            f"{name}: mean {difference.mean()}, max {difference.max()}"
        )


def test_every_expert_tensor_and_sink_is_trained(results, reference, folder) -> None:
    scenario = FULL[3]
    before = dict(reference_model().named_parameters())
    after = stored(folder, scenario, "master")
    unchanged = [n for n in reference.names if torch.equal(before[n].detach(), after[n])]
    assert unchanged == []


def test_every_part_of_the_state_is_in_the_checkpoint(results, reference, folder) -> None:
    for scenario in FULL:
        for part in PARTS:
            for name, tensor in stored(folder, scenario, part).items():
                assert tensor.isfinite().all(), (scenario.name, part, name)


def first_like(**wanted: object) -> Scenario:
    """Return the first scenario that has some settings."""
    for scenario in [*FULL, *VARIANTS]:
        if all(getattr(scenario, name) == value for name, value in wanted.items()):
            return scenario
    raise LookupError(f"no scenario has {wanted}")


def test_bytes_are_counted_for_the_exchanges_that_happen(results) -> None:
    def sent(sp: int, ep: int, world_size: int, exchange: str = "auto") -> dict[str, int]:
        scenario = first_like(world_size=world_size, sp=sp, ep=ep, exchange=exchange)
        return results[key_of(scenario)][0]["bytes_sent"]

    assert sent(1, 1, 1) == {"ulysses": 0, "halo": 0, "experts": 0}
    # per layer q, k, v out and o back, forward and backward; half of each goes to the other of two
    # ranks; 8 heads and 2 + 2 key/value heads of 16 fp32 values
    layer_bytes = ROWS * SEQ_LEN * (8 + 2 + 2 + 8) * 16 * 4 * 2 // 2
    # per window layer the keys and values of one window less the query itself, to the right and
    # back
    halo_bytes = ROWS * (WINDOW - 1) * (2 + 2) * 16 * 4 * 2
    whole = {"ulysses": NUM_LAYERS * layer_bytes, "halo": 0, "experts": 0}
    assert sent(2, 1, 2, "ulysses") == whole
    windows = model_config().layer_types.count("sliding_attention")
    full = NUM_LAYERS - windows
    assert windows > full > 0
    halved = {"ulysses": full * layer_bytes, "halo": windows * halo_bytes, "experts": 0}
    assert sent(2, 1, 2) == halved
    assert sent(1, 2, 2)["ulysses"] == 0 and sent(1, 2, 2)["experts"] > 0


@named([*FULL, *VARIANTS])
def test_planned_bytes_are_those_that_the_run_counted(scenario, results, folder) -> None:
    """Attention's exchanges are planned to the byte.

    How many rows leave for other experts is up to the router: a plan takes even loads, and a rank
    that has many tokens of one kind sends up to 8 % more or fewer.
    """
    planned = exchanges(config_of(scenario, folder), model_config(), ranks_per_node=8)
    kinds = ("ulysses", "halo", "experts")
    totals = {kind: planned[kind].total * scenario.world_size for kind in kinds}
    for step in results[key_of(scenario)]:
        counted = step["bytes_sent"]
        assert totals["ulysses"] == counted["ulysses"]
        assert totals["halo"] == counted["halo"]
        assert totals["experts"] == pytest.approx(counted["experts"], rel=0.08)


def test_layer_inputs_kept_on_the_host_change_no_bit(results, folder) -> None:
    on_device, on_host = VARIANTS[-2:]
    assert results[key_of(on_device)] == results[key_of(on_host)]
    for part in PARTS:
        assert_same_tensors(stored(folder, on_device, part), stored(folder, on_host, part))


def test_kept_rows_are_not_sent_again_when_layers_are_recomputed(results) -> None:
    """A recomputation that kept nothing sends a layer's rows a fifth time.

    A layer sends its rows out and back, and the gradients of both: four times the same rows.
    """

    def sent(**wanted: object) -> int:
        shape = {"world_size": 2, "sp": 1, "ep": 2, "stage": 3, "exchange": "auto"}
        scenario = first_like(**shape, **wanted)
        return results[key_of(scenario)][0]["bytes_sent"]["experts"]

    plain = sent(checkpointing=False)
    # micro batches of another size put rows on other ranks, so that others leave
    kept = sent(checkpointing=True, expert_recompute="keep")
    assert kept == pytest.approx(plain, rel=0.05)
    row_bytes = model_config().hidden_size * 4
    outward_bytes = row_bytes + ALIGNMENT_BYTES
    layer_bytes = 2 * outward_bytes + 2 * row_bytes
    recomputed = sent(checkpointing=True, expert_recompute="recompute")
    assert recomputed * layer_bytes == kept * (layer_bytes + outward_bytes)

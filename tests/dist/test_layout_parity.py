"""Every layout gives the numbers of one process with Hugging Face's eager code and plain AdamW.

Tolerances: fp32 sums are taken in another order by every layout (2e-5 in loss, 1e-4 relative in
    norm); bf16 rounds
activations at other places (2e-2).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cpt.checkpoint.flat_planner import FlatRange
from cpt.checkpoint.manifest import read_manifest, verify_files
from cpt.checkpoint.metadata import PARTS
from cpt.checkpoint.reader import read_ranges, step_folder
from cpt.model.freezing import freeze
from cpt.planning.traffic import exchanges
from cpt.training.optimizer import parameter_groups
from data_pipeline.dataset import PackedRow
from tests.dist.cases import (
    CLIPPING,
    KL_WEIGHT,
    ROWS,
    SEQ_LEN,
    SETTINGS,
    STEPS,
    WINDOW,
    Scenario,
    model_config,
    parameter_file,
    reference_model,
    rows_of_step,
    targets_of_step,
    write_targets,
)
from tests.dist.worker import config_of
from tests.support.launcher import ROOT, launch

pytestmark = pytest.mark.dist

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
FULL = [Scenario(world_size=w, sp=s, ep=e, stage=z, saves_first=True) for w, s, e, z in LAYOUTS]
VARIANTS = [
    Scenario(world_size=2, sp=2, ep=1, stage=3, exchange="ulysses"),
    Scenario(world_size=4, sp=4, ep=1, stage=3, exchange="ulysses"),
    Scenario(world_size=1, sp=1, ep=1, stage=3, micro_batch_size=8),
    Scenario(world_size=4, sp=2, ep=2, stage=3, micro_batch_size=2, checkpointing=True),
    Scenario(
        world_size=2,
        sp=1,
        ep=2,
        stage=3,
        micro_batch_size=4,
        checkpointing=True,
        expert_recompute="keep",
    ),
    Scenario(world_size=2, sp=1, ep=2, stage=3, micro_batch_size=4, checkpointing=True),
    Scenario(
        world_size=2,
        sp=1,
        ep=2,
        stage=3,
        micro_batch_size=4,
        checkpointing=True,
        offload_checkpoints=True,
    ),
]
PENALIZED = [
    Scenario(world_size=1, sp=1, ep=1, stage=3, router_penalties=True),
    Scenario(world_size=2, sp=2, ep=1, stage=3, micro_batch_size=2, router_penalties=True),
    Scenario(
        world_size=4,
        sp=2,
        ep=2,
        stage=3,
        micro_batch_size=2,
        checkpointing=True,
        router_penalties=True,
    ),
]
WITH_KL = [
    Scenario(world_size=1, sp=1, ep=1, stage=3, steps=2, kl=True),
    Scenario(world_size=2, sp=2, ep=1, stage=3, micro_batch_size=2, steps=2, kl=True),
    Scenario(
        world_size=4, sp=2, ep=2, stage=3, micro_batch_size=2, steps=2, checkpointing=True, kl=True
    ),
]
BF16 = [
    Scenario(world_size=w, sp=s, ep=e, stage=z, dtype="bf16", steps=3) for w, s, e, z in LAYOUTS
]


class Reference:
    """Losses, gradient norms and Adam's first moments of the single process."""

    def __init__(
        self, folder: Path, *, frozen: tuple[str, ...] = (), num_steps: int = STEPS
    ) -> None:
        torch.set_num_threads(1)  # the other pytest worker needs the other core
        model = reference_model()
        freeze(model, frozen)
        model.save_pretrained(str(folder / "model"))
        self.names = [name for name, _ in model.named_parameters()]
        groups = parameter_groups(model, SETTINGS["weight_decay"])
        optimizer = torch.optim.AdamW(
            groups,
            lr=SETTINGS["lr"],
            betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
            eps=SETTINGS["eps"],
        )
        self.losses, self.norms, self.nll_by_source = [], [], []
        for step in range(num_steps):
            loss, by_source = self._backward(model, step)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
            optimizer.step()
            self.losses.append(loss)
            self.nll_by_source.append(by_source)
            self.norms.append(float(norm))
            if step == 0:
                trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
                self.first_moments = {
                    name: optimizer.state[p]["exp_avg"].clone() for name, p in trained.items()
                }
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def _backward(self, model: torch.nn.Module, step: int) -> tuple[float, list[float]]:
        model.zero_grad()
        rows = rows_of_step(step)
        tokens = sum(int((row.labels >= 0).sum()) for row in rows)
        total, by_source = 0.0, [0.0, 0.0]
        for index, row in enumerate(rows):
            logits = eager_logits(model, row)
            nll = F.cross_entropy(
                logits, torch.from_numpy(row.labels), reduction="sum", ignore_index=-100
            )
            (nll / tokens).backward()
            total += nll.item()
            by_source[index % 2] += nll.item()
        return total / tokens, by_source


def eager_logits(model: torch.nn.Module, row: PackedRow) -> torch.Tensor:
    """(T, V) of Hugging Face's own code."""
    logits: torch.Tensor = model(
        input_ids=torch.from_numpy(row.input_ids)[None],
        position_ids=torch.from_numpy(row.position_ids)[None],
        attention_mask=explicit_masks(row.bounds),
        use_cache=False,
    ).logits[0]
    return logits


def explicit_masks(bounds: list[int]) -> dict[str, torch.Tensor]:
    """Additive 4-D masks for both layer kinds; transformers does not isolate packed documents by
    itself.
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
def results(folder: Path, reference: Reference) -> dict[str, list[dict]]:  # type: ignore[type-arg]
    """All scenarios, one launch per world size: starting up takes longer than running."""
    found = {}
    write_targets(folder / "targets")
    for world_size in (1, 2, 4):
        scenarios = [
            s for s in [*FULL, *VARIANTS, *PENALIZED, *WITH_KL, *BF16] if s.world_size == world_size
        ]
        arguments = [str(folder), *(s.dump() for s in scenarios)]
        codes = launch(
            ROOT / "tests" / "dist" / "worker.py", world_size, arguments, timeout_seconds=400
        )
        assert codes == [0] * world_size, codes
        found |= {
            s.name + str(s.steps): json.loads(parameter_file(folder, s).read_text())
            for s in scenarios
        }
    return found


def named(scenarios: list[Scenario]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scenario", scenarios, ids=lambda s: s.name)


@named([*FULL, *VARIANTS])
@pytest.mark.case("N5", "finite, equal to one process in ten layouts")
def test_loss_and_grad_norm_equal_the_single_process_at_every_step(
    scenario, results, reference
) -> None:
    steps = results[scenario.name + str(scenario.steps)]
    losses = [
        abs(step["loss"] - expected) for step, expected in zip(steps, reference.losses, strict=True)
    ]
    norms = [
        abs(step["grad_norm"] / expected - 1)
        for step, expected in zip(steps, reference.norms, strict=True)
    ]
    assert max(losses) <= 2e-5 and max(norms) <= 1e-4, (
        f"loss differences {losses}, relative norm differences {norms}"
    )


@named(PENALIZED[1:])
def test_router_penalties_train_alike_in_every_layout(scenario, results, reference) -> None:
    """Their gradients as such are compared with the formula in tests/model/test_router_watch.py."""
    expected, found = (results[s.name + str(s.steps)] for s in (PENALIZED[0], scenario))
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(expected, found, strict=True)]
    norms = [abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(expected, found, strict=True)]
    assert max(losses) <= 2e-5 and max(norms) <= 1e-4, (
        f"loss differences {losses}, relative norm differences {norms}"
    )
    without = [abs(a["grad_norm"] / b - 1) for a, b in zip(expected, reference.norms, strict=True)]
    assert min(without) > 1e-3, f"the penalties did nothing: {without}"


@pytest.fixture(scope="module")
def first_step_with_kl() -> tuple[float, float]:
    """Sum of nats of the divergence, and the gradient norm of the first step, from all logits of
    the eager model.
    """
    model, rows, total = reference_model(), rows_of_step(0), 0.0
    tokens = sum(int((row.labels >= 0).sum()) for row in rows)
    for index, row in enumerate(rows):
        log_q = eager_logits(model, row).log_softmax(1)
        loss = F.nll_loss(log_q, torch.from_numpy(row.labels), reduction="sum", ignore_index=-100)
        if index % 2 == 0:
            ids, log_p = targets_of_step(0)[index // 2]
            q = log_q[: len(ids)].exp().gather(1, ids)
            log_parts = torch.cat([q, 1 - q.sum(1, keepdim=True)], 1).log()
            kl = F.kl_div(log_parts, log_p, reduction="sum", log_target=True)
            loss, total = loss + KL_WEIGHT * kl, total + kl.item()
        (loss / tokens).backward()
    return total, float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING))


@named(WITH_KL)
def test_divergence_from_targets_trains_alike_in_every_layout(
    scenario, results, reference, first_step_with_kl
) -> None:
    expected, found = (results[s.name + str(s.steps)] for s in (WITH_KL[0], scenario))
    for key, tolerance in (("loss", 2e-5), ("grad_norm", 1e-4), ("kl_by_source", 2e-5)):
        for a, b in zip(expected, found, strict=True):
            assert b[key] == pytest.approx(
                a[key], rel=tolerance if key != "loss" else 0, abs=tolerance
            ), key
    (nats, others), norm = found[0]["kl_by_source"], found[0]["grad_norm"]
    assert nats == pytest.approx(first_step_with_kl[0], rel=2e-5) and others == 0
    assert norm == pytest.approx(first_step_with_kl[1], rel=1e-4)
    assert found[0]["loss"] == pytest.approx(reference.losses[0], abs=2e-5), (
        "the divergence is in the loss that is told"
    )
    assert abs(norm / reference.norms[0] - 1) > 1e-3, "the divergence did nothing"


@named(FULL)
def test_loss_of_each_source_equals_the_single_process(scenario, results, reference) -> None:
    for step, expected in zip(
        results[scenario.name + str(scenario.steps)], reference.nll_by_source, strict=True
    ):
        assert step["nll_by_source"] == pytest.approx(expected, rel=1e-5)


@named(BF16)
def test_bf16_stays_within_its_rounding(scenario, results, reference) -> None:
    steps = results[scenario.name + str(scenario.steps)]
    losses = [
        abs(step["loss"] - expected)
        for step, expected in zip(steps, reference.losses, strict=False)
    ]
    norms = [
        abs(step["grad_norm"] / expected - 1)
        for step, expected in zip(steps, reference.norms, strict=False)
    ]
    assert max(losses) <= 2e-2 and max(norms) <= 2e-2, (
        f"loss differences {losses}, relative norm differences {norms}"
    )


def stored_tensors(step: Path, part: str) -> dict[str, torch.Tensor]:
    """Whole tensors of one part of a checkpoint; frozen ones have no moments."""
    manifest = read_manifest(step)
    verify_files(step, manifest)
    records = {
        name: record
        for name, record in manifest.tensors.items()
        if record.trained or part == "master"
    }
    numels = {name: torch.Size(record.shape).numel() for name, record in records.items()}
    flat = {name: torch.full((numel,), float("nan")) for name, numel in numels.items()}
    ranges = {
        f"{part}/{n}": FlatRange(tensor=t, offset=0, global_numel=t.numel())
        for n, t in flat.items()
    }
    read_ranges(step, ranges)
    return {name: tensor.view(manifest.tensors[name].shape) for name, tensor in flat.items()}


def stored(folder: Path, scenario: Scenario, part: str) -> dict[str, torch.Tensor]:
    """Whole tensors of a scenario's checkpoint."""
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
    assert errors[worst] <= 1e-4, (
        f"largest relative error {errors[worst]} in {worst}; mean {sum(errors.values()) / len(errors)}"
    )


@named(FULL)
def test_weights_after_training_equal_the_single_process(
    scenario, results, reference, folder
) -> None:
    """Adam divides by the root of the second moment, so tiny gradient differences may move a weight
    by part of lr.
    """
    weights = stored(folder, scenario, "master")
    for name, expected in reference.weights.items():
        moved = STEPS * SETTINGS["lr"]
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
            assert all(t.isfinite().all() for t in stored(folder, scenario, part).values())


def test_bytes_are_counted_for_the_exchanges_that_happen(results) -> None:
    def sent(sp: int, ep: int, world_size: int, exchange: str = "auto") -> dict[str, int]:
        wanted = (world_size, sp, ep, exchange)
        scenario = next(
            s for s in [*FULL, *VARIANTS] if (s.world_size, s.sp, s.ep, s.exchange) == wanted
        )
        return results[scenario.name + str(scenario.steps)][0]["bytes_sent"]

    assert sent(1, 1, 1) == {"ulysses": 0, "halo": 0, "experts": 0}
    # per layer q, k, v out and o back, forward and backward; half of each goes to the other of two
    # ranks; 8 heads and 2 + 2 key/value heads of 16 fp32 values
    layer_bytes = ROWS * SEQ_LEN * (8 + 2 + 2 + 8) * 16 * 4 * 2 // 2
    # per window layer the keys and values of one window less the query itself, to the right and
    # back
    halo_bytes = ROWS * (WINDOW - 1) * (2 + 2) * 16 * 4 * 2
    assert sent(2, 1, 2, "ulysses") == {"ulysses": 4 * layer_bytes, "halo": 0, "experts": 0}
    assert sent(2, 1, 2) == {"ulysses": 2 * layer_bytes, "halo": 2 * halo_bytes, "experts": 0}
    assert sent(1, 2, 2)["ulysses"] == 0 and sent(1, 2, 2)["experts"] > 0


@named([*FULL, *VARIANTS])
def test_planned_bytes_are_those_that_the_run_counted(scenario, results, folder) -> None:
    """Attention's exchanges to the byte; how many rows leave for other experts is up to the
    router.
    """
    planned = exchanges(config_of(scenario, folder), model_config(), ranks_per_node=8)
    for step in results[scenario.name + str(scenario.steps)]:
        counted = step["bytes_sent"]
        assert {
            kind: planned[kind].total * scenario.world_size for kind in ("ulysses", "halo")
        } == {kind: counted[kind] for kind in ("ulysses", "halo")}
        assert planned["experts"].total * scenario.world_size == pytest.approx(
            counted["experts"], rel=0.05
        )


def test_layer_inputs_kept_on_the_host_change_no_bit(results, folder) -> None:
    on_device, on_host = VARIANTS[-2:]
    assert (
        results[on_device.name + str(on_device.steps)] == results[on_host.name + str(on_host.steps)]
    )
    for part in PARTS:
        expected, got = (stored(folder, scenario, part) for scenario in (on_device, on_host))
        assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_kept_rows_are_not_sent_again_when_layers_are_recomputed(results) -> None:
    """A layer sends its rows out and back, and the gradients of both: four times the same rows; a
    recomputation that kept nothing sends the rows out a fifth time."""

    def sent(**wanted: object) -> list[int]:
        fields = {"world_size": 2, "sp": 1, "ep": 2, "stage": 3, "exchange": "auto", **wanted}
        scenario = next(
            s for s in [*FULL, *VARIANTS] if all(getattr(s, k) == v for k, v in fields.items())
        )
        return [
            step["bytes_sent"]["experts"] for step in results[scenario.name + str(scenario.steps)]
        ]

    plain = sent(checkpointing=False)[0]
    assert sent(checkpointing=True, expert_recompute="keep")[0] == plain
    assert sent(checkpointing=True, expert_recompute="recompute")[0] > 1.2 * plain

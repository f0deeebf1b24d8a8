"""The proof of MXFP4 counts what it says it counts, trains as it says, and goes on after a kill."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "bench" / "prove")]

from guard_parts.text import evenly  # noqa: E402
from mxfp4_parts import cells, outcome, product, releases, texts  # noqa: E402
from mxfp4_parts.drawing import draw  # noqa: E402
from mxfp4_parts.kept import against_base  # noqa: E402
from mxfp4_parts.page import BEGIN, END, write_page  # noqa: E402
from mxfp4_parts.scale import QUICK, REAL  # noqa: E402
from mxfp4_parts.training import (  # noqa: E402
    State,
    Trainer,
    _Masters,
    rounded_experts,
)

from cpt.model.weights.hf_layout import is_expert_matrix  # noqa: E402
from cpt.model.weights.mxfp4 import EXPONENT_RULES, rounded  # noqa: E402
from cpt.offline.ranks import single_process  # noqa: E402
from cpt.parallel.topology import Topology  # noqa: E402
from cpt.training.loader import MicroBatch, make_micro_batch  # noqa: E402
from data_pipeline.dataset import PackedRow  # noqa: E402

GATE = "model.layers.0.mlp.experts.gate_up_proj"


def _result(arm: str = "short, floor", lr: float = 1e-4, seed: int = 0, **scores: float) -> Any:
    """Return a cell's result whose exports lie between base experts (2.0) and trained (1.0)."""
    numbers = {"trained": 1.0, "base_experts": 2.0, "plain": 1.5, "aware": 1.25, **scores}
    figures = {"kept": 0.5, "noise": 0.4, "changed": 0.3, "error": 0.05}
    result: dict[str, Any] = {"arm": arm, "seed": seed, "lr": lr, "moved": lr * 100}
    result["cpu_seconds"] = 1.0
    for name in ("trained", "base_experts"):
        result[name] = {"japanese": numbers[name], "english": 3.0}
    result["released"] = {"japanese": 2.5, "english": 2.5}
    for method in cells.METHODS:
        held_out = {"japanese": numbers[method], "english": 3.125}
        result[method] = {rule: {"held_out": held_out, **figures} for rule in EXPONENT_RULES}
    return result


def test_an_interval_over_three_seeds_is_that_of_student() -> None:
    found = outcome.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.3026527 / math.sqrt(3))
    assert found.text(".1f") == "2.0 \u00b1 2.5"


def test_a_single_seed_has_no_interval() -> None:
    assert outcome.interval([1.5]).text("+.1f") == "+1.5"


def test_survived_is_the_share_of_what_the_experts_learned() -> None:
    assert outcome.survived(_result(), "plain", "ceil") == 0.5
    assert outcome.survived(_result(), "aware", "ceil") == 0.75
    assert outcome.survived(_result(plain=1.0), "plain", "floor") == 1.0
    assert outcome.survived(_result(plain=2.0), "plain", "floor") == 0.0
    assert outcome.saved(_result(), "least") == 0.25


def test_no_share_is_told_of_what_is_hardly_learned() -> None:
    noise = _result(trained=2.0 - outcome.LEAST_WORTH / 2, seed=1)
    assert math.isnan(outcome.survived(noise, "plain", "floor"))
    rows = outcome.summary([_result(), noise])
    json.dumps(rows, allow_nan=False)
    assert {row["seeds"] for row in rows} == {2}
    assert all(row["survived"][0] in (0.5, 0.75) for row in rows)


def test_tables_have_a_line_for_every_release_and_rate() -> None:
    results = [_result(lr=lr, seed=seed) for lr in (3e-4, 1e-4) for seed in (0, 1)]
    results += [_result("converged, ceil", lr=1e-4)]
    lines = outcome.table(results).splitlines()
    assert [line.split(" | ")[0:2] for line in lines[2:]] == [
        ["| short, floor", "1e-4"],
        ["| short, floor", "3e-4"],
        ["| converged, ceil", "1e-4"],
    ]
    assert "| 50 \u00b1 0 |" in lines[2]
    assert "| 50 |" in lines[4]
    english = outcome.english_table(results).splitlines()
    assert len(english) == len(lines)
    assert "| +500.0 | +125.0 |" in english[4]


def test_page_gets_the_tables_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    facts = {"arm": "short, floor", "seed": 0, "steps": 490, "tokens": 501_760}
    report = {"date": "2026-11-27", "machine": "x", "cells_run": 1, "cells_planned": 27}
    report |= {"cells": [_result()], "releases": [{**facts, "held_out": _result()["trained"]}]}
    write_page(page, report)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "1 of 27 cells" in text
    assert "| short, floor | 0 | 490 | 501,760 | 3.000 | 1.000 |" in text
    assert "| short, floor | 1e-4 | 0.50 | 0.50 | 0.50 | 5.0 | 5.0 | 5.0 |" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no"):
        write_page(page, report)


def test_verdict_counts_the_cells_in_which_a_rule_is_best() -> None:
    result = _result()
    result["plain"]["least"] = {"held_out": {"japanese": 1.1, "english": 3.0}}
    told = outcome.verdict([result])
    assert "plain: lowest loss of Japanese by floor 0, ceil 0, least 1 of 1 cells" in told
    assert "ceil: MXFP4-aware training helped in 1 of 1 cells" in told
    assert "least: MXFP4-aware training helped in 0 of 1 cells" in told


def test_figure_shows_every_release_and_rule() -> None:
    results = [_result(lr=lr, seed=seed) for lr in (1e-4, 3e-4) for seed in (0, 1)]
    results += [_result("converged, ceil", trained=2.0), _result("converged, ceil", lr=3e-4)]
    svg = draw(results, "three seeds")
    for text in ("short, floor", "converged, ceil", "three seeds", "least, aware", *EXPONENT_RULES):
        assert text in svg


def test_a_series_has_converged_when_it_hardly_falls() -> None:
    assert not releases.has_converged([3.0, 2.0, 1.5])
    assert not releases.has_converged([3.0, 2.0, 1.5, 1.4, 1.3, 1.25])
    assert not releases.has_converged([3.0, 2.0, 2.1, 2.05, 1.9])
    assert releases.has_converged([3.0, 2.0, 2.1, 2.05, 1.995])


def test_documents_are_taken_evenly() -> None:
    documents = [f"{number:04d}" for number in range(100)]
    chosen = evenly(documents, 40)
    assert [int(text) for text in chosen] == list(range(9, 100, 10))
    assert evenly(documents, 10_000) == documents


def _weights(seed: int, size: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        GATE: torch.randn(2, 64, 8, generator=generator) * size,
        "lm_head.weight": torch.randn(4, 4, generator=generator) * size,
    }


def test_kept_is_the_projection_on_the_step_of_the_experts_alone() -> None:
    base = rounded_experts(_weights(0, 1.0), "floor")
    trained = {name: values + _weights(1, 0.1)[name] for name, values in base.items()}
    exported = rounded_experts(trained, "ceil")
    w = base[GATE].numpy().astype(np.float64)
    step = trained[GATE].bfloat16().float().numpy().astype(np.float64) - w
    left = exported[GATE].numpy().astype(np.float64) - w
    found = against_base(exported, trained, base)
    assert found["kept"] == pytest.approx((left * step).sum() / (step**2).sum())
    rest = np.linalg.norm(left - step)
    assert found["noise"] == pytest.approx(rest / np.linalg.norm(step))
    assert found["changed"] == (left != 0).mean()
    assert found["moved"] == pytest.approx(np.linalg.norm(step) / np.linalg.norm(w))


def test_an_untouched_release_is_its_own_export() -> None:
    release = rounded_experts(_weights(0, 1.0), "ceil")
    for rule in EXPONENT_RULES:
        assert torch.equal(rounded_experts(release, rule)[GATE], release[GATE])


class _Rows:
    """Rows of random tokens, a function of the step alone."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def of_step(self, step: int) -> MicroBatch:
        tokens = np.random.default_rng(step).integers(0, 100, size=33)
        row = PackedRow(
            input_ids=tokens[:-1],
            labels=tokens[1:].copy(),
            position_ids=np.arange(32),
            bounds=[0, 32],
            documents=np.empty(0, dtype=np.int64),
        )
        return make_micro_batch([row], [0], self._topology)


@pytest.fixture(scope="module")
def learner() -> Iterator[tuple[Trainer, Any]]:
    """A trainer of the quick scale, and its rows."""
    with single_process() as topology:
        yield Trainer(QUICK, topology), _Rows(topology)


@pytest.mark.parametrize("rule", [None, "ceil"])
def test_training_from_a_stored_state_is_training_without_a_break(
    learner: tuple[Trainer, Any], rule: Any, tmp_path: Path
) -> None:
    trainer, rows = learner
    section = cells.finetuning(QUICK, 1e-3)
    whole = trainer.train(trainer.initial(1), rows, section, 4, rule)
    half = trainer.train(trainer.initial(1), rows, section, 2, rule)
    half.save(tmp_path / "half.pt")
    # another training in between leaves nothing behind
    trainer.train(trainer.initial(2), rows, section, 1)
    resumed = trainer.train(State.load(tmp_path / "half.pt"), rows, section, 4, rule)
    assert resumed.step == whole.step == 4
    for name, values in whole.weights.items():
        assert torch.equal(resumed.weights[name], values), name


def test_a_fork_leaves_the_state_that_it_began_with(learner: tuple[Trainer, Any]) -> None:
    trainer, rows = learner
    section = cells.finetuning(QUICK, 1e-3)
    fork = trainer.train(trainer.initial(1), rows, section, 2)
    first = trainer.train(fork, rows, section, 4)
    trainer.train(fork, rows, section, 4, "floor")
    again = trainer.train(fork, rows, section, 4)
    for name, values in first.weights.items():
        assert torch.equal(again.weights[name], values), name


def test_aware_training_sees_the_export_and_moves_the_masters(
    learner: tuple[Trainer, Any],
) -> None:
    trainer, rows = learner
    start = trainer.initial(1)
    # the same step of a model that holds the rounded weights, whose update is then applied to
    # the masters: Adam's first update does not depend on the weights, its decay does
    without_decay = replace(cells.finetuning(QUICK, 1e-3), weight_decay=0.0)
    aware = trainer.train(start, rows, without_decay, 1, "ceil")
    on_grid = State(step=0, weights=rounded_experts(start.weights, "ceil"), optimizer={})
    plain = trainer.train(on_grid, rows, without_decay, 1)
    for name, values in aware.weights.items():
        update = plain.weights[name] - on_grid.weights[name]
        # differences of fp32 numbers of size 0.1 round at 1e-8
        assert torch.allclose(values - start.weights[name], update, rtol=0, atol=3e-8), name
    assert not torch.equal(aware.weights[GATE], rounded(aware.weights[GATE], "ceil"))


def test_masters_come_back_bit_for_bit(learner: tuple[Trainer, Any]) -> None:
    trainer, _ = learner
    before = trainer.initial(3).weights
    model = trainer._model
    masters = _Masters(model, "floor")
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        is_rounded = is_expert_matrix(name, parameter.shape)
        wanted = rounded(before[name], "floor") if is_rounded else before[name]
        assert torch.equal(parameter, wanted), name
    masters.restore()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name]), name


class _CountingTrainer:
    """Stands in for a trainer: notes what it is asked for, and may be killed."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.calls: list[tuple[int, int, str | None]] = []
        self._kill_at = kill_at

    def initial(self, seed: int) -> State:
        return State(step=0, weights=_weights(seed, 1.0), optimizer={})

    def train(
        self, state: State, rows: Any, section: Any, stop: int, rule: str | None = None
    ) -> State:
        if stop == self._kill_at:
            raise KeyboardInterrupt
        self.calls.append((state.step, stop, rule))
        moved = {name: values + 0.1 for name, values in state.weights.items()}
        return State(step=stop, weights=moved, optimizer={})

    def bits_per_byte(self, weights: Any, sets: Any) -> dict[str, float]:
        total = float(weights[GATE].sum())
        return {"japanese": total, "english": total}


def test_a_cell_trains_two_thirds_once_and_every_third_from_there(tmp_path: Path) -> None:
    trainer: Any = _CountingTrainer()
    cell = cells.Cell(arm="short, floor", seed=0, lr=1e-3)
    assert cells.finished(tmp_path, cell) is None
    release = rounded_experts(_weights(0, 1.0), "floor")
    rows: Any = None
    result = cells.run_cell(tmp_path, QUICK, trainer, rows, [], cell, release)
    assert trainer.calls == [(0, 4, None), (4, 6, None)] + [(4, 6, r) for r in EXPONENT_RULES]
    assert cells.finished(tmp_path, cell) == json.loads(json.dumps(result))
    assert set(result["aware"]) == set(result["plain"]) == set(EXPONENT_RULES)


def test_a_second_run_goes_on_from_the_trained_model_with_later_rows(tmp_path: Path) -> None:
    trainer: Any = _CountingTrainer()
    cell = cells.Cell(arm="long, ceil", seed=0, lr=1e-3, is_second_run=True)
    release = rounded_experts(_weights(0, 1.0), "floor")
    later: list[int] = []

    class _LaterRows:
        def after(self, steps: int) -> _LaterRows:
            later.append(steps)
            return self

    rows: Any = _LaterRows()
    result = cells.run_cell(tmp_path, QUICK, trainer, rows, [], cell, release)
    first = [(0, 4, None), (4, 6, None)]
    assert trainer.calls == first + [(0, 6, None)] + [(0, 6, rule) for rule in EXPONENT_RULES]
    assert later == [QUICK.steps]
    assert result["arm"] == "long, ceil, second run"
    # three trainings of the counting trainer lie behind the plain one, each of 0.1
    moved = _weights(0, 1.0)[GATE] * 0 + 0.3
    assert result["moved"] == pytest.approx(float(moved.norm() / release[GATE].norm()), rel=0.02)


def test_every_cell_has_a_file_of_its_own() -> None:
    names = []
    for seed in range(REAL.num_seeds):
        for _, found in releases.cells_of_seed(REAL, seed):
            names += [cell.file_name for cell in found]
    assert len(names) == len(set(names)) == 3 * (3 + 4) + 2 * 3


def test_a_killed_release_goes_on_from_the_last_state_that_was_kept(tmp_path: Path) -> None:
    arm = releases.Arm("long", "floor", 3)
    killed: Any = _CountingTrainer(kill_at=8)
    arguments: Any = (None, [], arm, 0)
    with pytest.raises(KeyboardInterrupt):
        releases.make_release(tmp_path, QUICK, killed, *arguments)
    assert killed.calls == [(0, 4, None)]
    again: Any = _CountingTrainer()
    weights = releases.make_release(tmp_path, QUICK, again, *arguments)
    assert again.calls == [(4, 8, None), (8, 11, None), (11, 12, "floor")]
    assert torch.equal(weights[GATE], rounded(weights[GATE], "floor"))
    third: Any = _CountingTrainer()
    same = releases.make_release(tmp_path, QUICK, third, *arguments)
    assert third.calls == []
    assert torch.equal(same[GATE], weights[GATE])
    assert [facts["steady_steps"] for facts in releases.all_facts(tmp_path, 1)] == [8]


def test_a_longer_release_goes_on_from_a_shorter_one(tmp_path: Path) -> None:
    trainer: Any = _CountingTrainer()
    steps = {"short": [(0, 4)], "long": [(4, 8)], "converged": [(8, 12)]}
    for length, steady in steps.items():
        trainer.calls.clear()
        arm = releases.Arm(length, "ceil", 1)  # type: ignore[arg-type]
        releases.make_release(tmp_path, QUICK, trainer, None, [], arm, 0)  # type: ignore[arg-type]
        assert [call[:2] for call in trainer.calls[:-2]] == steady
        assert trainer.calls[-1][2] == "ceil"


def test_the_product_is_compared_figure_by_figure() -> None:
    cell = _result()
    domains = {"japanese": 1.0, "english": 3.0}
    held_out = []
    for domain in texts.DOMAINS:
        one = {"domain": domain, "bits_per_byte_exported": 1.5, "bits_per_byte_base_experts": 2.25}
        held_out.append(one)
    found = {"all_expert_matrices": {"kept": 0.25}, "held_out": held_out}
    rules = {"rules": dict.fromkeys(EXPONENT_RULES, found)}
    comparison = product.compared(cell, domains, domains, domains, rules)
    figures = comparison["figures"]
    assert figures["trained, japanese"]["difference"] == 0
    assert figures["base experts, japanese"]["difference"] == 0.25
    assert figures["kept, ceil"]["difference"] == -0.25
    assert "base experts 8e-01" in product.told(comparison)
    assert product.told(comparison).endswith("in kept by 2e-01.")


def test_a_killed_release_of_the_product_is_written_anew_and_one_of_another_scale_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = _weights(0, 1.0)

    def killed(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(product, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            product.write_release(tmp_path, QUICK, weights)
    for _ in range(2):
        out = product.write_release(tmp_path, QUICK, weights)
        assert torch.equal(load_file(out / "model.safetensors")[GATE], weights[GATE])
    with pytest.raises(ValueError, match=r"release was made with another scale \(num_merges, "):
        product.write_release(tmp_path, REAL, weights)


def test_a_comparison_of_another_scale_is_refused(tmp_path: Path) -> None:
    assert product.finished(tmp_path, QUICK) is None
    comparison = {"cell": {}, "figures": {}, "scale": product.scale_json(QUICK)}
    (tmp_path / "product.json").write_text(json.dumps(comparison))
    assert product.finished(tmp_path, QUICK) == comparison
    with pytest.raises(ValueError, match=r"product\.json was made with another scale"):
        product.finished(tmp_path, REAL)

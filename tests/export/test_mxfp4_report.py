"""An MXFP4 export has the bytes of the release where nothing was trained, and says what it kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpt.checkpoint.adapter_state import AdapterBase
from cpt.checkpoint.manifest import read_manifest
from cpt.commands.export import EXPONENTS
from cpt.config.precision_sections import ExponentRule
from cpt.errors import CheckpointError, ConfigError
from cpt.export import huggingface
from cpt.export.expert_rounding import ExpertRounder
from cpt.export.exponent_choice import ExponentChoice, choose_exponent
from cpt.export.export_base import BaseExpert
from cpt.export.huggingface import export_checkpoint
from cpt.export.mxfp4_report import (
    AGAINST_ROUNDED_BASE,
    BYTES_MAY_DIFFER,
    FROZEN_VALUES,
    OTHER_RULE,
    REPORT_FILE,
    TRAINED_VALUES,
    report_text,
    with_held_out,
)
from cpt.export.rounding_sums import RoundingSums, merged_sums
from cpt.export.run_export import MASTERS, format_of_training, warnings_of_masters
from cpt.model.weights import mxfp4
from cpt.model.weights.hf_layout import BLOCKS, SCALES, SINGLE_FILE, is_expert_matrix
from cpt.model.weights.mxfp4 import EXPONENT_RULES
from tests.support.mxfp4_blocks import as_matrices, hard_blocks
from tests.support.mxfp4_exports import (
    moved,
    release,
    save_checkpoint,
    save_model,
    tiny_config,
)

DOWN = "model.layers.0.mlp.experts.down_proj"
UP = "model.layers.0.mlp.experts.gate_up_proj"
QUANTIZE = {"experts": "mxfp4", "start_step": 2, "exponent": "ceil"}


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer takes longer to write than the weights, and is not looked at here."""
    monkeypatch.setattr(huggingface, "save_tokenizer", lambda *arguments: None)


def export(
    folder: Path, out: Path, rule: ExponentRule | None = None, base: Path | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Export a checkpoint and return its tensors and its report."""
    choice = None if rule is None else ExponentChoice(rule=rule)
    export_checkpoint(folder, out, "mxfp4", base=base, choice=choice)
    return load_file(out / SINGLE_FILE), json.loads((out / REPORT_FILE).read_text())


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Return whether two directories hold the same bytes."""
    if found.keys() != expected.keys():
        return False
    return all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("made_by", EXPONENT_RULES)
@pytest.mark.parametrize("rule", EXPONENT_RULES)
def test_an_untouched_release_comes_out_byte_for_byte(
    tmp_path: Path, made_by: ExponentRule, rule: ExponentRule
) -> None:
    stored, values = release(made_by)
    step = save_checkpoint(tmp_path / "run", values, save_model(tmp_path / "base", stored))
    found, report = export(step, tmp_path / "out", rule)
    assert same(found, stored)
    assert report["exponent"] == rule and report["base"] == {"name": "base", "format": "mxfp4"}
    figures = report["all_expert_matrices"]
    assert figures["relative_l2_error"] == figures["changed_codes"] == figures["movement"] == 0
    assert figures["kept"] is None and figures["noise"] is None and report["warnings"] == []


def test_without_the_base_the_values_are_the_same_and_bytes_may_differ(tmp_path: Path) -> None:
    stored, values = release("ceil")
    step = save_checkpoint(tmp_path / "run", values, tmp_path / "gone" / "gpt-oss-20b")
    found, report = export(step, tmp_path / "out")
    assert not same(found, stored)
    blocks = found[DOWN + BLOCKS]
    decoded = mxfp4.decode(blocks, found[DOWN + SCALES])
    assert torch.equal(decoded.view(torch.int16), values[DOWN].view(torch.int16))
    assert "kept" not in report["all_expert_matrices"] and "base" not in report
    (why, bytes_differ) = report["notes"]
    assert "gpt-oss-20b, is not where it was" in why and "--base" in why
    assert str(tmp_path) not in why, "no path of the training machine"
    assert bytes_differ == BYTES_MAY_DIFFER
    again, told = export(step, tmp_path / "again", base=save_model(tmp_path / "base", stored))
    assert same(again, stored) and told["base"]["name"] == "base"


@pytest.mark.parametrize("rule", EXPONENT_RULES)
def test_the_base_never_changes_a_value(rule: ExponentRule) -> None:
    """A trained 0 that was -0 in the release keeps its own sign; equal as numbers is not enough."""
    stored, values = release("floor")
    trained = values[DOWN][:1].clone()
    trained[trained == 0] = 0.0
    trained[:, :, 1::2] *= 1.01
    base = BaseExpert(
        values_1CR=values[DOWN][:1], codes=(stored[DOWN + BLOCKS][:1], stored[DOWN + SCALES][:1])
    )
    alone = mxfp4.decode(*ExpertRounder(rule).round(DOWN, trained, None))
    beside = mxfp4.decode(*ExpertRounder(rule).round(DOWN, trained, base))
    assert torch.equal(alone.view(torch.int16), beside.view(torch.int16))


@pytest.mark.parametrize("rule", EXPONENT_RULES)
def test_an_export_of_an_export_has_the_same_bytes(tmp_path: Path, rule: ExponentRule) -> None:
    stored, values = release("ceil")
    base = save_model(tmp_path / "base", stored)
    step = save_checkpoint(tmp_path / "run", moved(values, 0.05), base)
    first, _ = export(step, tmp_path / "first", rule)
    loaded = {}
    for name, value in values.items():
        loaded[name] = first.get(name, value)
        if is_expert_matrix(name, value.shape):
            loaded[name] = mxfp4.decode(first[name + BLOCKS], first[name + SCALES])
    for number, start in enumerate((base, tmp_path / "first")):
        again = save_checkpoint(tmp_path / f"again-{number}", loaded, start)
        second, _ = export(again, tmp_path / f"second-{number}", rule)
        assert same(second, first)


@pytest.mark.parametrize("rule", EXPONENT_RULES)
def test_codes_of_rounded_values_never_change_any_more(rule: ExponentRule) -> None:
    """Also without a base, and where all values of a block are rounded to 0."""
    matrices = as_matrices(hard_blocks(20), 96).bfloat16()
    exact = torch.where(matrices.isfinite(), matrices, 1.0)
    for matrix in exact.unsqueeze(1):
        codes = ExpertRounder(rule).round(DOWN, matrix, None)
        values = mxfp4.decode(*codes)
        expected = mxfp4.rounded(matrix, rule)
        assert torch.equal(values.view(torch.int16), expected.view(torch.int16))
        again = ExpertRounder(rule).round(DOWN, values, None)
        assert torch.equal(again[0], codes[0]) and torch.equal(again[1], codes[1])


def naive(trained: torch.Tensor, base: torch.Tensor, rule: ExponentRule) -> dict[str, float]:
    """Return the figures of a tensor, computed in float64 as they are defined."""
    exact = trained.bfloat16()
    q = mxfp4.decode(*mxfp4.encode(exact, rule), torch.float64)
    w = base.double()
    step = exact.double() - w
    return {
        "relative_l2_error": float((q - exact.double()).norm() / exact.double().norm()),
        "largest_absolute_error": float((q - exact.double()).abs().max()),
        "changed_codes": float((q != w).double().mean()),
        "movement": float(step.norm() / w.norm()),
        "kept": float(((q - w) * step).sum() / step.square().sum()),
        "noise": float((q - w - step).norm() / step.norm()),
    }


@pytest.mark.parametrize("rule", EXPONENT_RULES)
@pytest.mark.parametrize("size", [0.01, 0.1])
def test_figures_are_those_of_a_naive_computation_in_float64(
    tmp_path: Path, rule: ExponentRule, size: float
) -> None:
    stored, values = release("ceil")
    trained = moved(values, size)
    step = save_checkpoint(tmp_path / "run", trained, save_model(tmp_path / "base", stored))
    _, report = export(step, tmp_path / "out", rule)
    assert sorted(report["tensors"]) == [DOWN, UP]
    for name, figures in report["tensors"].items():
        # differences of bf16 values are exact in fp32, and sums are taken in float64
        assert figures == pytest.approx(naive(trained[name], values[name], rule), rel=1e-6), name


def test_a_base_in_bf16_is_compared_with_its_own_rounding(tmp_path: Path) -> None:
    _, values = release("ceil")
    plain = {name: value + 0.01 for name, value in values.items()}
    base = save_model(tmp_path / "base", {name: value.bfloat16() for name, value in plain.items()})
    step = save_checkpoint(tmp_path / "run", plain, base)
    _, report = export(step, tmp_path / "out", "ceil")
    assert report["base"]["format"] == "other" and AGAINST_ROUNDED_BASE in report["notes"]
    figures = report["all_expert_matrices"]
    assert figures["changed_codes"] == 0 and figures["movement"] == 0
    assert figures["relative_l2_error"] > 0.01
    further = save_checkpoint(tmp_path / "further", moved(plain, 0.3), base)
    _, report = export(further, tmp_path / "out-2", "ceil")
    assert 0.2 < report["all_expert_matrices"]["changed_codes"] < 1


def test_a_checkpoint_of_another_run_is_a_base(tmp_path: Path) -> None:
    _, values = release("ceil")
    first = save_checkpoint(tmp_path / "first", values, None)
    second = save_checkpoint(tmp_path / "second", moved(values, 0.2), first)
    _, report = export(second, tmp_path / "out")
    assert report["base"]["name"] == "first (step-00000004)"
    assert report["all_expert_matrices"]["movement"] == pytest.approx(0.2, rel=0.1)


def test_a_run_from_random_weights_says_that_there_is_no_base(tmp_path: Path) -> None:
    _, values = release("ceil")
    _, report = export(save_checkpoint(tmp_path / "run", values, None), tmp_path / "out")
    assert "names no model that its weights came from" in report["notes"][0]
    assert "relative l2 error" in report_text(report) and "kept  noise" not in report_text(report)


def test_a_base_of_another_architecture_is_refused_if_it_was_named_and_else_told(
    tmp_path: Path,
) -> None:
    _, values = release("ceil")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    step = save_checkpoint(tmp_path / "run", values, tmp_path / "other")
    _, report = export(step, tmp_path / "out")
    assert "other, cannot be read any more, or has another architecture" in report["notes"][0]
    with pytest.raises(ConfigError, match=r"other: neither .* is there"):
        export(step, tmp_path / "out-2", base=tmp_path / "other")
    assert not (tmp_path / "out-2").exists()


def broken_bases(folder: Path) -> list[Path]:
    """Return bases with a value that is not finite: in floating point, in MXFP4, a checkpoint."""
    stored, values = release("ceil")
    broken = {name: value.clone() for name, value in values.items()}
    broken[DOWN].view(-1)[3] = float("inf")
    stored[DOWN + SCALES][1, 0, 0] = 255
    return [
        save_model(folder / "plain", broken),
        save_model(folder / "codes", stored),
        save_checkpoint(folder / "run-before", broken, None),
    ]


def test_a_base_whose_values_are_not_finite_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, values = release("ceil")
    step = save_checkpoint(tmp_path / "run", values, None)
    monkeypatch.setattr(huggingface, "published", None)
    for number, base in enumerate(broken_bases(tmp_path)):
        with pytest.raises(ConfigError, match=f"{base.name}.*: tensor '{DOWN}' holds (inf|nan)"):
            export(step, tmp_path / f"out-{number}", base=base)


def test_a_base_that_nobody_named_and_that_is_not_finite_costs_no_export(tmp_path: Path) -> None:
    _, values = release("ceil")
    for number, base in enumerate(broken_bases(tmp_path)):
        step = save_checkpoint(tmp_path / f"run-{number}", values, base)
        _, report = export(step, tmp_path / f"out-{number}")
        assert "kept" not in report["all_expert_matrices"] and "base" not in report
        assert f"{base.name}, holds values now that cannot be weights" in report["notes"][0]


def test_a_base_that_is_another_model_than_at_the_start_is_not_compared_with(
    tmp_path: Path,
) -> None:
    stored, values = release("ceil")
    base = save_model(tmp_path / "base", stored)
    known = AdapterBase.of(base, 0, tiny_config())
    began_with = {"hash": known.hash, "sums": known.sums}
    runs = []
    for name, recorded in (("run", began_with), ("older", None), ("odd", ["hash"])):
        runs.append(save_checkpoint(tmp_path / name, values, base, starting_model=recorded))
    _, report = export(runs[0], tmp_path / "same")
    assert report["base"]["name"] == "base"
    shutil.rmtree(base)
    trained = {name: value.bfloat16() for name, value in moved(values, 0.1).items()}
    save_model(base, trained)
    _, report = export(runs[0], tmp_path / "other")
    assert "base, is another one now than it was then" in report["notes"][0]
    assert "kept" not in report["all_expert_matrices"] and "base" not in report
    _, report = export(runs[0], tmp_path / "named", base=base)
    assert report["base"]["name"] == "base", "who names a base wants that one"
    _, report = export(runs[1], tmp_path / "unknown")
    assert report["base"]["name"] == "base", "runs of older versions have recorded nothing"
    _, report = export(runs[2], tmp_path / "unreadable")
    assert "base" not in report


def test_little_that_is_kept_warns_with_the_cures(tmp_path: Path) -> None:
    stored, values = release("ceil")
    base = save_model(tmp_path / "base", stored)
    step = save_checkpoint(tmp_path / "run", moved(values, 0.01), base)
    _, report = export(step, tmp_path / "least", "least")
    assert report["all_expert_matrices"]["kept"] < 0.2
    (warning,) = report["warnings"]
    for cure in ("--score_rules", "train.quantize", "adapter"):
        assert cure in warning
    _, report = export(step, tmp_path / "ceil", "ceil")
    assert report["all_expert_matrices"]["kept"] > 0.5 and report["warnings"] == []


def warnings(kept: float, learned_percent: float | None = None, **report: Any) -> int:
    """Return how many warnings a report gets of which a tenth survived on one domain, if scored."""
    held_out = []
    if learned_percent is not None:
        survived = {"share": 0.1, "ci_low": 0.0, "ci_high": 0.2}
        held_out = [{"domain": "a", "survived": survived, "learned_percent": learned_percent}]
    report = {"exponent": "ceil", "all_expert_matrices": {"kept": kept}, **report}
    return len(with_held_out(report, held_out)["warnings"])


def test_text_is_the_judge_where_the_experts_learned_something_and_else_the_values() -> None:
    assert warnings(0.1) == 1 and warnings(0.9) == 0
    assert warnings(0.9, learned_percent=1.0) == 1
    # a harm of which little is left is no loss
    assert warnings(0.9, learned_percent=-1.0) == 0 and warnings(0.1, learned_percent=-1.0) == 1


def test_values_that_were_trained_are_not_warned_of() -> None:
    assert warnings(0.1, quantized_training={"from_step": 2, "rule": "ceil"}) == 0
    assert warnings(0.1, quantized_training={"from_step": 2, "rule": "floor"}) == 1


def test_values_that_are_not_finite_are_refused_with_tensors_and_counts(tmp_path: Path) -> None:
    _, values = release("ceil")
    broken = {name: value.float() for name, value in values.items()}
    broken[DOWN].view(-1)[5:8] = float("nan")
    broken[DOWN].view(-1)[9] = -float("inf")
    broken["model.norm.weight"][0] = 3.4e38  # finite in fp32, infinite in bf16
    step = save_checkpoint(tmp_path / "run", broken, None)
    with pytest.raises(CheckpointError) as caught:
        export(step, tmp_path / "out")
    assert f"tensor '{DOWN}' holds 3 NaN and 1 infinite" in str(caught.value)
    assert "tensor 'model.norm.weight' holds 0 NaN and 1 infinite" in str(caught.value)
    assert "--step" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("asked", [None, "ceil"])
def test_a_run_that_rounded_in_training_is_exported_by_its_rule_and_says_so(
    tmp_path: Path, asked: ExponentRule | None
) -> None:
    _, values = release("floor")
    step = save_checkpoint(tmp_path / "run", moved(values, 0.01), None, QUANTIZE)
    choice = choose_exponent(read_manifest(step), asked)
    assert choice == ExponentChoice(rule="ceil", trained="ceil", from_step=2)
    export_checkpoint(step, tmp_path / "out", "mxfp4")  # finds the rule by itself
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report["quantized_training"] == {"from_step": 2, "rule": "ceil"}
    assert report["exponent"] == "ceil" and TRAINED_VALUES in report["notes"]


def test_a_frozen_matrix_that_rounding_changes_is_not_called_what_was_trained(
    tmp_path: Path,
) -> None:
    """Training rounds what it trains, and computes with frozen matrices as they are."""
    _, values = release("floor")
    for number, (start, expected) in enumerate(
        ((values, TRAINED_VALUES), (moved(values, 0.05), FROZEN_VALUES.format(frozen=1)))
    ):
        step = save_checkpoint(tmp_path / f"run-{number}", start, None, QUANTIZE, frozen=[UP])
        _, report = export(step, tmp_path / f"out-{number}")
        assert report["notes"][0] == expected


def test_only_an_unrounded_export_of_a_run_that_rounded_is_warned_of(tmp_path: Path) -> None:
    _, values = release("floor")
    rounded_run = read_manifest(save_checkpoint(tmp_path / "run", values, None, QUANTIZE))
    plain_run = read_manifest(save_checkpoint(tmp_path / "plain", values, None))
    assert (format_of_training(rounded_run), format_of_training(plain_run)) == ("mxfp4", "bf16")
    assert warnings_of_masters(rounded_run, "bf16") == [MASTERS]
    assert warnings_of_masters(rounded_run, "mxfp4") == []
    assert warnings_of_masters(plain_run, "fp32") == []


def test_another_rule_than_that_of_training_must_be_accepted(tmp_path: Path) -> None:
    _, values = release("floor")
    step = save_checkpoint(tmp_path / "run", values, None, QUANTIZE)
    manifest = read_manifest(step)
    with pytest.raises(ConfigError, match=r"rule ceil \(train.quantize\) since step 2.*--accept_"):
        choose_exponent(manifest, "floor")
    choice = choose_exponent(manifest, "floor", is_change_accepted=True)
    export_checkpoint(step, tmp_path / "out", "mxfp4", choice=choice)
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert TRAINED_VALUES not in report["notes"]
    assert OTHER_RULE.format(trained="ceil") in report["notes"]


def test_a_plain_run_is_exported_by_floor_unless_asked(tmp_path: Path) -> None:
    _, values = release("floor")
    manifest = read_manifest(save_checkpoint(tmp_path / "run", values, None))
    assert choose_exponent(manifest, None) == ExponentChoice(rule="floor")
    assert choose_exponent(manifest, "least").rule == "least"
    assert EXPONENTS == EXPONENT_RULES, "the command line has a copy"


def test_sums_of_tensors_add_up() -> None:
    parts = [RoundingSums(), RoundingSums()]
    whole = RoundingSums()
    for part in parts:
        exact = torch.randn(1, 32, 4).bfloat16()
        pieces = (exact, mxfp4.rounded(exact), exact - 0.1, mxfp4.rounded(exact - 0.1))
        for sums in (part, whole):
            sums.add(*pieces[:2])
            sums.compare(*pieces)
    assert merged_sums(parts).figures() == pytest.approx(whole.figures(), rel=1e-12)
    assert RoundingSums(**whole.plain()) == whole

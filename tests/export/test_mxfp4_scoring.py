"""Held-out text tells how much of what the experts learned an MXFP4 export still has."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

from cpt.cli import main
from cpt.commands.export import how_to_export
from cpt.errors import ConfigError
from cpt.export import huggingface, mxfp4_scoring
from cpt.export.mxfp4_cost import COST_FILE
from cpt.export.mxfp4_report import REPORT_FILE
from cpt.export.rule_table import RULES_FILE
from cpt.export.run_export import ExportForm, export_run
from cpt.export.survived import survived_by_domain
from cpt.guard.score import DomainScore, ScoredSet
from cpt.model.weights import mxfp4
from cpt.model.weights.hf_layout import SINGLE_FILE, is_expert_matrix
from cpt.offline import ranks
from cpt.offline.model import OfflineModel
from cpt.offline.scored_sets import SetScorer
from tests.support.mxfp4_exports import (
    STEP,
    Tensors,
    held_out_text,
    release,
    save_checkpoint,
    save_model,
    tiny_config,
)

TEXTS = [held_out_text("japanese", seed=5), held_out_text("english", seed=6)]
QUANTIZE = {"experts": "mxfp4", "start_step": 2, "exponent": "least"}
DOWN = "model.layers.0.mlp.experts.down_proj"
UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(autouse=True)
def no_build_and_no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mxfp4_scoring, "held_out_sets", lambda *arguments: TEXTS)
    monkeypatch.setattr(huggingface, "save_tokenizer", lambda *arguments: None)


def gradients(values: Tensors, text: ScoredSet) -> Tensors:
    """Return the gradient of every expert matrix for the loss on a domain."""
    model = GptOssForCausalLM(tiny_config())
    model.load_state_dict({name: value.float() for name, value in values.items()})
    for row in map(text.read_row, range(text.num_rows)):
        logits = model(input_ids=torch.from_numpy(row.input_ids)[None]).logits[0]
        functional.cross_entropy(logits, torch.from_numpy(row.labels)).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if is_expert_matrix(name, parameter.shape):
            assert parameter.grad is not None
            found[name] = parameter.grad
    return found


def learned(values: Tensors, size: float, *, on_the_grid: bool = False) -> Tensors:
    """Return a model whose experts learned Japanese, each weight by the same small step."""
    found = {name: value.float() for name, value in values.items()}
    for name, gradient in gradients(values, TEXTS[0]).items():
        found[name] -= size * gradient.sign()
        if on_the_grid:
            found[name] = mxfp4.rounded(found[name], "ceil")
    return found


@pytest.fixture(scope="module")
def small_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose experts moved by much less than the distance of two codes, with its base."""
    folder = tmp_path_factory.mktemp("small")
    stored, values = release("ceil", idle=False)
    base = save_model(folder / "base", stored)
    save_checkpoint(folder / "run", learned(values, 0.006), base)
    return folder


def exported(folder: Path, out: Path, **form: Any) -> dict[str, Any]:
    """Export the run of a folder with scores and return the report."""
    step = folder / "run" / "checkpoints" / "step-00000004"
    form = {"format_name": "mxfp4", **form}
    export_run(folder / "run", step, out, ExportForm(**form), "always")
    return dict(json.loads((out / REPORT_FILE).read_text()))


def test_experts_that_learned_and_are_rounded_back_survive_by_nothing_and_warn(
    small_steps: Path, tmp_path: Path
) -> None:
    report = exported(small_steps, tmp_path / "out", exponent="least")
    japanese, english = report["held_out"]
    assert japanese["learned_ci_low"] > 0
    # the exported matrices are those of the base, so the scores are equal bit for bit
    assert japanese["bits_per_byte_exported"] == japanese["bits_per_byte_base_experts"]
    assert japanese["survived"] == {"share": 0.0, "ci_low": 0.0, "ci_high": 0.0}
    assert english["learned_percent"] < japanese["learned_percent"]
    (warning,) = report["warnings"]
    assert ": 0 % on japanese" in warning and "--score_rules" in warning
    card = (tmp_path / "out" / "README.md").read_text()
    assert warning in card and "| japanese | " in card
    costs = json.loads((tmp_path / "out" / COST_FILE).read_text())["domains"]
    assert costs[0]["bits_per_byte_bf16"] == japanese["bits_per_byte_trained"]
    assert costs[0]["bits_per_byte_mxfp4"] == japanese["bits_per_byte_exported"]


def test_experts_on_the_grid_survive_whole_without_a_warning(tmp_path: Path) -> None:
    stored, values = release("ceil", idle=False)
    base = save_model(tmp_path / "base", stored)
    save_checkpoint(tmp_path / "run", learned(values, 0.2, on_the_grid=True), base)
    report = exported(tmp_path, tmp_path / "out", exponent="ceil")
    japanese = report["held_out"][0]
    assert japanese["learned_ci_low"] > 0
    assert japanese["survived"] == {"share": 1.0, "ci_low": 1.0, "ci_high": 1.0}
    assert report["warnings"] == [] and report["all_expert_matrices"]["kept"] == 1.0


def test_nothing_is_divided_where_the_experts_learned_nothing(tmp_path: Path) -> None:
    stored, values = release("ceil", idle=False)
    trained = {name: value.float() for name, value in values.items()}
    trained["model.layers.0.mlp.experts.down_proj_bias"] += 0.5  # never rounded
    save_checkpoint(tmp_path / "run", trained, save_model(tmp_path / "base", stored))
    report = exported(tmp_path, tmp_path / "out")
    assert [one["survived"] for one in report["held_out"]] == [None, None]
    for one in report["held_out"]:
        assert one["bits_per_byte_trained"] == one["bits_per_byte_base_experts"]
    assert report["warnings"] == []
    assert "not resolved" in (tmp_path / "out" / "README.md").read_text()


def test_without_a_base_there_is_the_cost_alone(small_steps: Path, tmp_path: Path) -> None:
    _, values = release("ceil", idle=False)
    save_checkpoint(tmp_path / "run", values, None)
    report = exported(tmp_path, tmp_path / "out")
    assert "held_out" not in report and (tmp_path / "out" / COST_FILE).is_file()
    report = exported(tmp_path, tmp_path / "again", base=small_steps / "base")
    assert len(report["held_out"]) == 2


def test_a_run_that_rounded_in_training_is_judged_by_the_rounded_model(tmp_path: Path) -> None:
    stored, values = release("ceil", idle=False)
    base = save_model(tmp_path / "base", stored)
    save_checkpoint(tmp_path / "run", learned(values, 0.05), base, QUANTIZE)
    report = exported(tmp_path, tmp_path / "out")
    assert report["exponent"] == "least" and report["warnings"] == []
    for one in report["held_out"]:
        assert one["bits_per_byte_trained"] == one["bits_per_byte_exported"]


def test_frozen_experts_are_judged_as_training_computed_with_them(tmp_path: Path) -> None:
    """Training rounds what it trains; the export rounds frozen matrices, too, and that counts."""
    stored, values = release("ceil", idle=False)
    base = save_model(tmp_path / "base", stored)
    trained = learned(values, 0.05)
    save_checkpoint(tmp_path / "run", trained, base, QUANTIZE, frozen=[UP])
    report = exported(tmp_path, tmp_path / "out")
    computed = {**trained, DOWN: mxfp4.rounded(trained[DOWN], "least")}
    save_checkpoint(tmp_path / "plain" / "run", computed, base)
    plain = exported(tmp_path / "plain", tmp_path / "plain-out")
    for one, other in zip(report["held_out"], plain["held_out"], strict=True):
        assert one["bits_per_byte_trained"] == other["bits_per_byte_trained"]
        assert one["bits_per_byte_trained"] != one["bits_per_byte_exported"]


def beside_one_that_found_step_9(value: Any, group: Any) -> list[Any]:
    """Gather from two ranks, of which the other one looks at a newer checkpoint."""
    return [value, "step-00000009"] if isinstance(value, str) else [value]


def test_ranks_that_found_different_checkpoints_score_nothing(
    small_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "gather_json", beside_one_that_found_step_9)
    with pytest.raises(ConfigError, match=r"checkpoints: step-00000004, step-00000009.*--step"):
        exported(small_steps, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def scores(nats: Any) -> list[DomainScore]:
    nats = np.asarray(nats, dtype=np.float64)
    size = np.full(len(nats), 100.0)
    return [DomainScore(name="a", language="en", nats=nats, bytes=size)]


def test_share_and_interval_are_those_of_paired_documents() -> None:
    generator = np.random.default_rng(0)
    hard = generator.uniform(50, 500, 200)  # how hard a document is cancels out in pairs
    learned_nats = generator.uniform(4, 6, 200)
    before = hard + learned_nats
    after = hard + 0.4 * learned_nats
    (found,) = survived_by_domain(scores(hard), scores(before), scores(after))
    assert found["survived"]["share"] == pytest.approx(0.6)
    assert found["survived"]["ci_high"] - found["survived"]["ci_low"] < 1e-9
    noisy = after + generator.normal(0, 3, 200)
    (found,) = survived_by_domain(scores(hard), scores(before), scores(noisy))
    survived = found["survived"]
    assert survived["ci_low"] < 0.6 < survived["ci_high"]
    assert 0.05 < survived["ci_high"] - survived["ci_low"] < 0.5
    # experts that made a domain worse: the share of the harm that is left, and no warning of it
    (found,) = survived_by_domain(scores(before), scores(hard), scores(after))
    assert found["learned_percent"] < 0 and found["survived"]["share"] == pytest.approx(0.4)


@pytest.mark.parametrize("nats", [[10.0, 20.0], [10.0]])
def test_one_or_two_documents_resolve_nothing(nats: list[float]) -> None:
    trained = np.asarray(nats)
    (found,) = survived_by_domain(scores(trained), scores(1.1 * trained), scores(trained))
    assert found["learned_percent"] == pytest.approx(10) and found["survived"] is None


def command(folder: Path, out: Path, *options: str) -> list[str]:
    fixed = ["export", "--run_dir", str(folder / "run"), "--format", "mxfp4", "--out", str(out)]
    return [*fixed, *options]


def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the names of models are added as they are scored."""
    loaded: list[str] = []
    plain = SetScorer.scores

    def counted(scorer: SetScorer, name: str, weights: Any) -> list[DomainScore]:
        load = OfflineModel.load

        def note(model: OfflineModel, source: Any) -> None:
            loaded.append(name)
            load(model, source)

        with monkeypatch.context() as patch:
            patch.setattr(OfflineModel, "load", note)
            return plain(scorer, name, weights)

    monkeypatch.setattr(SetScorer, "scores", counted)
    return loaded


def test_rules_are_compared_without_an_export_and_one_of_them_follows_without_scoring_again(
    small_steps: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    loaded = loads(monkeypatch)
    assert main(command(small_steps, out, "--score_rules")) == 0
    printed = capsys.readouterr().out
    first_words = [line.split(" ")[0] for line in printed.splitlines()]
    assert first_words[:4] == ["rule", "floor", "ceil", "least"]
    assert first_words[6:9] == ["domain", "japanese", "english"]
    assert "Nothing is exported yet" in printed and "--exponent RULE --score always" in printed
    assert f"--step {STEP} " in printed, "the run may save newer ones"
    assert not out.exists() and out.with_name("out.partial").is_dir()
    models = ["bf16", "mxfp4-floor", "base-experts", "mxfp4-ceil", "mxfp4-least"]
    assert loaded == models
    assert main(command(small_steps, out, "--score_rules", "--exponent", "ceil")) == 0
    assert loaded == models, "nothing was scored twice"
    assert not out.with_name("out.partial").exists()
    report = json.loads((out / REPORT_FILE).read_text())
    rules = json.loads((out / RULES_FILE).read_text())["rules"]
    assert rules["ceil"]["all_expert_matrices"] == report["all_expert_matrices"]
    assert rules["ceil"]["held_out"] == report["held_out"]
    assert rules["least"]["held_out"][0]["survived"]["share"] == 0
    shares = [rules[rule]["held_out"][0]["survived"]["share"] for rule in ("floor", "ceil")]
    assert all(share != 0 for share in shares)


def test_killed_scoring_goes_on_where_it_was_and_ends_with_the_same_files(
    small_steps: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--score", "always", "--exponent", "floor")
    assert main(command(small_steps, tmp_path / "whole", *options)) == 0
    out = tmp_path / "out"
    loaded = loads(monkeypatch)

    def fault_point(point: str, number: int) -> None:
        if (point, number) == ("offline_pass", 4):  # the second domain of the second model
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cpt.offline.pieces.fault_point", fault_point)
        assert main(command(small_steps, out, *options)) == 130
    assert not out.exists() and loaded == ["bf16", "mxfp4-floor"]
    capsys.readouterr()
    _, values = release("floor")
    other = save_model(tmp_path / "other", {k: v.bfloat16() for k, v in values.items()})
    assert main(command(small_steps, out, *options, "--base", str(other))) == 78
    assert "base was " in capsys.readouterr().err
    assert main(command(small_steps, out, *options)) == 0
    assert loaded == ["bf16", "mxfp4-floor", "mxfp4-floor", "base-experts"]
    for file in (REPORT_FILE, COST_FILE, SINGLE_FILE):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_scores_kept_before_the_domains_of_the_mix_changed_places_are_of_other_work(
    small_steps: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A piece is named by the place of its domain: Japanese scores would be told as English."""
    out = tmp_path / "out"
    assert main(command(small_steps, out, "--score_rules")) == 0
    capsys.readouterr()
    monkeypatch.setattr(mxfp4_scoring, "held_out_sets", lambda *arguments: TEXTS[::-1])
    export = command(small_steps, out, "--score", "always", "--exponent", "ceil")
    assert main(export) == 78
    assert 'sets was [["japanese", ' in capsys.readouterr().err
    assert not out.exists()


def test_weights_that_are_not_finite_are_refused_before_they_are_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, values = release("ceil")
    broken = {name: value.float() for name, value in values.items()}
    broken["model.layers.0.mlp.experts.down_proj"].view(-1)[7] = float("nan")
    save_checkpoint(tmp_path / "run", broken, None)
    assert main(command(tmp_path, tmp_path / "out", "--score", "always")) == 74
    assert "experts.down_proj' holds 1 NaN and 0 infinite" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_warning_is_told_on_stderr_and_the_tables_on_stdout(
    small_steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(small_steps, tmp_path / "out", "--exponent", "least", "--score", "never")
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert "warning: The rounding to MXFP4 kept 0 % of the change" in told.err
    assert "MXFP4, exponents by the rule least, compared with base" in told.out
    assert "all expert matrices" in told.out and "kept  noise" in told.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--exponent", "ceil"), "--exponent is for --format mxfp4"),
        (("--score_rules",), "--score_rules is for --format mxfp4"),
        (("--format", "mxfp4", "--accept_rule_change"), "--accept_rule_change needs --exponent"),
        (("--format", "mxfp4", "--score_rules", "--score", "never"), "--score never does not"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    fixed = ["export", "--run_dir", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*fixed, *options]) == 78
    assert message in capsys.readouterr().err


def test_another_rule_than_that_of_training_is_refused_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, values = release("ceil")
    folder = save_checkpoint(tmp_path / "run", values, None, QUANTIZE)
    comparing = Namespace(run_dir=tmp_path / "run", base=None, out=tmp_path / "out")
    assert "Any rule but least needs --accept_rule_change" in how_to_export(comparing, folder)
    arguments = command(tmp_path, tmp_path / "out", "--exponent", "floor", "--score", "never")
    assert main(arguments) == 78
    assert "rounded by the rule least (train.quantize)" in capsys.readouterr().err
    assert main([*arguments, "--accept_rule_change"]) == 0
    assert "not those that were trained" in (tmp_path / "out" / "README.md").read_text()

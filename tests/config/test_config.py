"""Run YAML, DeepSpeed JSON and world size become one configuration, or one message with everything
that is wrong.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GptOssConfig

from cpt.config import OWN_KEYS, REFUSED_KEYS, LaunchInfo, RunConfig, load, resolve
from cpt.config.engine_json import REFUSED_ZERO_KEYS
from cpt.errors import ConfigError
from cpt.model.configuration import PRESETS

ROOT = Path(__file__).resolve().parents[2]

YAML = """\
model:
  init: tiny
data:
  mix: mixes/sample.yaml
train:
  seq_len: 1024
  global_batch_size: 16
  total_steps: 40
  lr: 1e-5
"""
JSON: dict[str, Any] = {"zero_optimization": {"stage": 3}}


def preset(name: str, **changes: Any) -> GptOssConfig:
    return GptOssConfig(**{**PRESETS[name], **changes})


class Files:
    """A run YAML and a DeepSpeed JSON in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.yaml, self.json = folder / "run.yaml", folder / "ds.json"
        self.write(YAML)
        self.write_json()

    def write(self, text: str) -> Files:
        self.yaml.write_text(text, encoding="utf-8")
        return self

    def write_train(self, **keys: Any) -> Files:
        """The YAML above with other values in `train`."""
        content = yaml.safe_load(YAML)
        content["train"] |= {"lr": 1e-5, **keys}
        return self.write(yaml.safe_dump(content))

    def write_json(self, **keys: Any) -> Files:
        """The JSON above with other top-level keys."""
        self.json.write_text(json.dumps({**JSON, **keys}, indent=2), encoding="utf-8")
        return self

    def config(
        self,
        world: int = 1,
        *,
        local: int | None = None,
        model: Any = None,
        overrides: dict[str, str] | None = None,
    ) -> RunConfig:
        run, located = load(self.yaml, self.json, overrides or {})
        model = model if model is not None else preset("tiny")
        return resolve(
            run, located, model, LaunchInfo(world_size=world, local_world_size=local or world)
        )

    def problems(self, world: int = 1, **arguments: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self.config(world, **arguments)
        return caught.value.problems


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


# the run YAML alone


@pytest.mark.case("G1", "lr: 1e-5 is a number")
def test_float_with_exponent_and_no_point_is_a_number(files: Files) -> None:
    assert files.config().train.lr == 1e-5


@pytest.mark.case("G1", "unknown key refused with file, line and suggestion")
def test_unknown_key_is_refused_with_file_line_and_suggestion(files: Files) -> None:
    problem = only(files.write(YAML + "  warmup_step: 3\n").problems())
    assert f"{files.yaml}:10: train.warmup_step" in problem and "'warmup_steps'" in problem


@pytest.mark.case("G1", "duplicate key refused with both lines")
def test_duplicate_key_is_refused_with_both_lines(files: Files) -> None:
    problem = only(files.write(YAML + "  lr: 1e-4\n").problems())
    assert f"{files.yaml}:10: train.lr" in problem and "line 9" in problem


@pytest.mark.case("X6", "!!python/object refused, exit 78")
def test_python_object_in_yaml_is_refused(files: Files) -> None:
    assert "not valid YAML" in only(
        files.write(YAML + "  seed: !!python/object/apply:os.getpid []\n").problems()
    )


@pytest.mark.case("X3", "trust_remote_code is no key and cannot be set")
def test_code_from_the_model_directory_cannot_be_switched_on(files: Files) -> None:
    text = YAML.replace("init: tiny", "init: tiny\n  trust_remote_code: true")
    assert "model.trust_remote_code is not a known key" in only(files.write(text).problems())


def test_missing_required_key_is_refused(files: Files) -> None:
    assert "train.lr is missing" in only(files.write(YAML.replace("  lr: 1e-5\n", "")).problems())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seq_len", "1024"),
        ("seq_len", 1024.5),
        ("seq_len", True),
        ("lr", "fast"),
        ("lr", float("nan")),
        ("schedule", "linear"),
        ("dtype", "fp16"),
        ("micro_batch_size", "many"),
        ("stop_at_step", "end"),
    ],
)
def test_value_of_another_type_is_refused_by_name(files: Files, key: str, value: Any) -> None:
    assert f"train.{key} is " in only(files.write_train(**{key: value}).problems())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seq_len", 1),
        ("global_batch_size", 0),
        ("total_steps", -1),
        ("warmup_steps", -1),
        ("decay_steps", -1),
        ("seed", -1),
        ("lr", 0),
        ("eps", 0),
        ("weight_decay", -0.1),
        ("gradient_clipping", -1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("min_lr_ratio", 1.5),
        ("micro_batch_size", 0),
        ("stop_at_step", 41),
        ("warmup_steps", 41),
        ("decay_steps", 4),
        ("threads", 0),
        ("threads", -1),
    ],
)
def test_value_out_of_range_is_refused_by_name(files: Files, key: str, value: Any) -> None:
    assert any(
        f"train.{key} " in problem for problem in files.write_train(**{key: value}).problems()
    )


def test_warmup_and_decay_longer_than_the_run_are_refused(files: Files) -> None:
    problem = only(files.write_train(schedule="wsd", warmup_steps=20, decay_steps=21).problems())
    assert "41, more than total_steps (40)" in problem


def test_run_of_no_steps_is_refused_unless_it_exports(files: Files) -> None:
    problem = only(files.write_train(total_steps=0).problems())
    assert "train.total_steps is 0, so nothing would be trained" in problem
    exporting = {"telemetry.export_at_end": "true"}
    assert files.config(overrides=exporting).train.total_steps == 0


def test_learning_rate_that_lost_its_exponent_is_refused(files: Files) -> None:
    problem = only(files.write_train(lr=3).problems())
    assert "train.lr is 3, must be <= 0.1" in problem and "1e-5" in problem
    assert files.write_train(lr=0.1).config().train.lr == 0.1


@pytest.mark.parametrize("text", ["", "[1, 2]", "word"])
def test_run_yaml_without_keys_is_refused_and_the_other_file_is_read_all_the_same(
    files: Files, text: str
) -> None:
    files.write(text).json.unlink()
    problems = files.problems()
    assert problems[-1] == f"{files.json}: no such file."
    assert len(problems) > 1 and all(str(files.yaml) in told for told in problems[:-1])


def test_both_missing_files_are_named(files: Files) -> None:
    files.yaml.unlink()
    files.json.unlink()
    assert files.problems() == [f"{file}: no such file." for file in (files.yaml, files.json)]


@pytest.mark.parametrize("model", ["{init: tiny, path: weights}", "{}"])
def test_model_needs_exactly_one_origin(files: Files, model: str) -> None:
    problem = only(files.write(YAML.replace("model:\n  init: tiny", f"model: {model}")).problems())
    assert "exactly one" in problem


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("guard", "interval_steps", -1),
        ("guard", "max_rows", 0),
        ("checkpoint", "interval_steps", -1),
        ("checkpoint", "keep_last", 1),
        ("telemetry", "wandb", "on"),
    ],
)
def test_setting_of_another_section_out_of_range_is_refused(
    files: Files, section: str, key: str, value: Any
) -> None:
    assert f"{section}.{key} is " in only(
        files.write(f"{YAML}{section}: {{{key}: {value}}}\n").problems()
    )


def test_problems_of_both_files_come_in_one_message(files: Files) -> None:
    files.write(YAML.replace("lr: 1e-5", "lr: -1").replace("seq_len:", "seqlen:")).write_json(
        fp16={"enabled": True}
    )
    problems = files.problems()
    assert any("seqlen" in p for p in problems) and any("fp16" in p for p in problems), problems
    assert all(str(files.yaml) in p or str(files.json) in p for p in problems)


def test_missing_file_is_named(files: Files) -> None:
    files.yaml.unlink()
    assert only(files.problems()) == f"{files.yaml}: no such file."


def test_relative_paths_are_relative_to_the_yaml(files: Files) -> None:
    config = files.write(
        YAML.replace("mixes/sample.yaml", "a/mix.yaml\n  build_dir: ../built")
    ).config()
    assert config.data.mix == (files.yaml.parent / "a" / "mix.yaml").resolve()
    assert config.data.build_dir == (files.yaml.parent.parent / "built").resolve()


def test_absolute_path_stays(files: Files, tmp_path: Path) -> None:
    assert (
        files.config(overrides={"data.mix": str(tmp_path / "x.yaml")}).data.mix
        == (tmp_path / "x.yaml").resolve()
    )


# --set


def test_override_replaces_a_value_of_the_file(files: Files) -> None:
    assert files.config(overrides={"train.lr": "3e-4"}).train.lr == 3e-4


def test_override_can_add_a_section(files: Files) -> None:
    assert files.config(overrides={"checkpoint.keep_last": "5"}).checkpoint.keep_last == 5


def test_override_can_empty_a_value(files: Files, tmp_path: Path) -> None:
    config = files.config(overrides={"model.init": "null", "model.path": str(tmp_path)})
    assert config.model.init is None and config.model.path == tmp_path


def test_unknown_key_in_an_override_is_refused_with_a_suggestion(files: Files) -> None:
    problem = only(files.problems(overrides={"train.sed": "1"}))
    assert "--set" in problem and "train.sed" in problem and "'seed'" in problem


def test_override_below_a_value_is_refused(files: Files) -> None:
    assert "'train.lr' is not a section" in only(files.problems(overrides={"train.lr.peak": "1"}))


# the DeepSpeed JSON alone


@pytest.mark.case("G3", "top-level typo refused with line and suggestion")
def test_misspelt_top_level_json_key_is_refused_with_line_and_suggestion(files: Files) -> None:
    problem = only(files.write_json(gradient_acumulation_steps=2).problems())
    assert (
        f"{files.json}:5: gradient_acumulation_steps" in problem
        and "'gradient_accumulation_steps'" in problem
    )


@pytest.mark.case("G3", "top-level typo refused with line and suggestion")
def test_misspelt_zero_optimization_is_refused_with_a_suggestion(files: Files) -> None:
    files.json.write_text('{"zero_optimisation": {"stage": 3}}', encoding="utf-8")
    assert any("'zero_optimization'" in problem for problem in files.problems())


@pytest.mark.parametrize("value", ["one", True, -1, None])
def test_gradient_clipping_that_is_no_number_is_refused(files: Files, value: Any) -> None:
    assert "gradient_clipping is " in only(files.write_json(gradient_clipping=value).problems())


@pytest.mark.parametrize(
    "key",
    [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "sequence_parallel_size",
    ],
)
@pytest.mark.parametrize("value", [0, 1.5, "two", True, None])
def test_count_that_is_no_positive_whole_number_is_refused(
    files: Files, key: str, value: Any
) -> None:
    assert f"{key} is {value!r}" in only(files.write_json(**{key: value}).problems())


@pytest.mark.parametrize("zero", [{"stage": 0}, {"stage": 4}, {"stage": "3"}, {}, None, 3])
@pytest.mark.case("G3", "stage other than 1, 2, 3 refused")
def test_zero_stage_other_than_1_2_3_is_refused(files: Files, zero: Any) -> None:
    assert "zero_optimization.stage" in only(files.write_json(zero_optimization=zero).problems())


@pytest.mark.case("G3", "fp16 refused with the reason")
def test_fp16_is_refused_with_the_reason(files: Files) -> None:
    problem = only(files.write_json(fp16={"enabled": True}, bf16={"enabled": "auto"}).problems())
    assert "fp16" in problem and "overflows" in problem and "bf16" in problem


def test_fp16_that_is_off_is_accepted_and_not_handed_on(files: Files) -> None:
    assert "fp16" not in files.write_json(fp16={"enabled": False}).config().engine_json


@pytest.mark.parametrize("key", sorted(REFUSED_KEYS))
def test_json_key_with_another_home_is_refused(files: Files, key: str) -> None:
    assert f":5: {key}:" in only(files.write_json(**{key: {"enabled": True}}).problems())


def test_json_with_a_syntax_error_is_refused_with_its_line(files: Files) -> None:
    files.json.write_text('{\n  "bf16": {"enabled": true},\n}', encoding="utf-8")
    assert f"{files.json}:3: not valid JSON" in only(files.problems())


def test_duplicate_json_key_is_refused(files: Files) -> None:
    files.json.write_text('{"zero_optimization": {"stage": 3, "stage": 2}}', encoding="utf-8")
    assert "zero_optimization.stage is given twice" in only(files.problems())


def test_json_that_is_a_list_is_refused(files: Files) -> None:
    files.json.write_text("[]", encoding="utf-8")
    assert "must be a JSON object" in only(files.problems())


@pytest.mark.parametrize(
    "block",
    [
        {"enabled": "yes"},
        {"enabled": True, "autoep_size": "some"},
        {"enabled": True, "preset_model": "mixtral"},
        {"enabled": True, "auto_ep_size": 2},
        {"enabled": True, "autoep_size": 0},
        {"enabled": True, "autoep_size": -1},
        "on",
    ],
    ids=str,
)
def test_malformed_expert_parallel_block_is_refused_by_name(files: Files, block: Any) -> None:
    assert "expert_parallel" in only(files.write_json(expert_parallel=block).problems())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_parallel", None),
        ("bf16", True),
        ("bf16", None),
        ("optimizer", {"type": "AdamW", "params": "auto"}),
        ("optimizer", {"type": "AdamW", "params": [1]}),
        ("zero_optimization", {"stage": 3, "offload_optimizer": "cpu"}),
        ("zero_optimization", {"stage": 3, "offload_param": None}),
    ],
    ids=str,
)
def test_json_block_that_is_no_mapping_is_refused_by_name(
    files: Files, key: str, value: Any
) -> None:
    """Any other exception would reach the user as an internal error, exit code 70."""
    assert any(key in problem for problem in files.write_json(**{key: value}).problems())


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_state_on_nvme_needs_a_folder_and_takes_no_setting_of_deepspeeds_swapper(
    files: Files, name: str
) -> None:
    def written(stage: int = 3, aio: bool = False, **block: Any) -> Files:
        zero = {"stage": stage, name: {"device": "nvme", **block}}
        return files.write_json(zero_optimization=zero, **({"aio": {}} if aio else {}))

    def problems(*arguments: Any, **block: Any) -> list[str]:
        return written(*arguments, **block).problems()

    key = f"zero_optimization.{name}"
    assert (
        written(nvme_path="/local").config().engine_json["zero_optimization"][name]["device"]
        == "nvme"
    )
    assert f"{key}.nvme_path is null, must be a folder" in only(problems())
    assert f"{key}.pin_memory has no effect on state on NVMe" in only(
        problems(nvme_path="/local", pin_memory=True)
    )
    assert f'{key}.nvme_path is "", must be a folder' in only(problems(nvme_path=""))
    assert "in ZeRO stage 2. Use stage 3" in only(problems(2, nvme_path="/local"))
    assert "aio has no effect" in only(problems(aio=True, nvme_path="/local"))
    assert len(problems(2, aio=True, buffer_count=4)) == 4, "all in one message"


@pytest.mark.parametrize(
    "block", [{}, {"device": "disk"}, {"device": "NVME", "nvme_path": "/local"}], ids=str
)
def test_place_that_deepspeed_does_not_know_is_refused(files: Files, block: dict[str, str]) -> None:
    files.write_json(zero_optimization={"stage": 3, "offload_optimizer": block})
    assert "zero_optimization.offload_optimizer.device is " in only(files.problems())


def test_weights_on_the_host_need_stage_3(files: Files) -> None:
    """DeepSpeed would keep them on the device without a word."""
    files.write_json(zero_optimization={"stage": 2, "offload_param": {"device": "cpu"}})
    assert "keeps weights whole on every GPU in ZeRO stage 2" in only(files.problems())


@pytest.mark.parametrize("word", ["deepep", "comm"])
def test_choice_of_an_exchange_is_an_unknown_key(files: Files, word: str) -> None:
    """There is one exchange, which repeats its bits; DeepEP's order depends on timing."""
    files.write_json(expert_parallel={"enabled": True, "comm_backend": word})
    assert "expert_parallel.comm_backend is not a known key" in only(files.problems())


@pytest.mark.parametrize(("key", "value"), [("path", "/none"), ("init", "gpt-oss-20b")])
def test_override_of_path_or_init_replaces_the_other(files: Files, key: str, value: str) -> None:
    files.write(YAML.replace("init: tiny", "path: there" if key == "init" else "init: tiny"))
    run, _ = load(files.yaml, files.json, {f"model.{key}": value})
    assert str(getattr(run.model, key)) == value
    assert (run.model.path is None) != (run.model.init is None)


def test_override_of_both_path_and_init_is_refused(files: Files) -> None:
    overrides = {"model.path": "there", "model.init": "tiny"}
    assert "give exactly one of them" in only(files.problems(overrides=overrides))


def test_optimizer_that_deepspeed_would_have_to_compile_is_refused(files: Files) -> None:
    problem = only(files.write_json(zero_force_ds_cpu_optimizer=True).problems())
    assert "zero_force_ds_cpu_optimizer is true, but torch's fused AdamW" in problem


def test_check_for_updates_that_are_not_finite_cannot_be_switched_off(files: Files) -> None:
    files.write_json(bf16={"check_grad_overflow": False})
    assert "bf16.check_grad_overflow is false: updates that are not finite" in only(
        files.problems()
    )


def test_buffers_in_low_precision_are_refused(files: Files) -> None:
    """DeepSpeed would round the rotary frequencies to bf16: up to 0.4 % off, at every position."""
    assert "buffer_dtype" in only(files.write_json(data_types={"buffer_dtype": "bf16"}).problems())


# both files, the model and the world size together


@pytest.mark.parametrize("name", ["tiny", "gpt-oss-20b", "gpt-oss-120b"])
@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_auto_picks_the_largest_size_on_the_node(files: Files, name: str, world: int) -> None:
    files.write_json(sequence_parallel_size="auto", expert_parallel={"enabled": True})
    config = files.config(world, model=preset(name))
    largest = 8 if name == "tiny" else 64  # tiny has 8 query heads and 8 experts
    assert (config.sp_size, config.ep_size) == (min(world, largest), min(world, largest, 32))


def test_auto_stays_within_the_node(files: Files) -> None:
    files.write_json(sequence_parallel_size="auto", expert_parallel={"enabled": True})
    config = files.config(16, local=4, model=preset("gpt-oss-20b"))
    assert (config.sp_size, config.ep_size) == (4, 4)


def test_auto_takes_what_divides_the_row(files: Files) -> None:
    files.write_train(seq_len=1022).write_json(sequence_parallel_size="auto")
    assert files.config(8).sp_size == 2


def test_auto_falls_to_one_where_nothing_else_divides(files: Files) -> None:
    files.write_json(sequence_parallel_size="auto", expert_parallel={"enabled": True})
    config = files.write_train(global_batch_size=7).config(7)
    assert (config.sp_size, config.ep_size) == (1, 1)


def test_sizes_left_out_mean_one(files: Files) -> None:
    config = files.config(4)
    assert (config.sp_size, config.ep_size) == (1, 1)


def test_experts_stay_together_when_the_block_is_off(files: Files) -> None:
    assert (
        files.write_json(expert_parallel={"enabled": False, "autoep_size": 4}).config(4).ep_size
        == 1
    )


def test_more_sequence_ranks_than_key_value_heads_are_allowed(files: Files) -> None:
    config = files.write_json(sequence_parallel_size=16).config(16, model=preset("gpt-oss-20b"))
    assert config.sp_size == 16


@pytest.mark.case("G4", "more sequence ranks than key/value heads only in even parts")
def test_sequence_size_that_splits_key_value_heads_unevenly_is_refused(files: Files) -> None:
    model = preset("tiny", num_attention_heads=12, num_key_value_heads=4)
    files.write_train(seq_len=1200, global_batch_size=18).write_json(sequence_parallel_size=6)
    problem = only(files.problems(6, model=model))
    assert "4 key/value heads" in problem and "query heads" not in problem


@pytest.mark.case("G4", "one message with all problems and the nearest sizes")
def test_sizes_that_do_not_divide_are_refused_together_with_the_nearest(files: Files) -> None:
    files.write_train(global_batch_size=18)
    files.write_json(sequence_parallel_size=4, expert_parallel={"enabled": True, "autoep_size": 16})
    sequence, experts = files.problems(6)
    assert (
        "sequence_parallel_size is 4, which does not divide the world size 6. "
        "Nearest sizes that fit: 1, 2." in sequence
    )
    assert (
        "expert_parallel.autoep_size is 16, which does not divide the world size 6 and "
        "does not divide the 8 experts" in experts
    )
    assert "Nearest sizes that fit: 1, 2." in experts


def test_refused_size_leads_to_no_second_complaint_about_the_batch(files: Files) -> None:
    """How many data-parallel ranks there are is unknown then; advice for another size would be
    wrong.
    """
    problem = only(files.write_json(sequence_parallel_size=4).problems(6))
    assert "sequence_parallel_size" in problem


@pytest.mark.case("G4", "every broken rule named")
def test_every_rule_that_a_sequence_size_breaks_is_named(files: Files) -> None:
    files.write_train(seq_len=1000).write_json(sequence_parallel_size=24)
    message = "\n".join(files.problems(16, model=preset("gpt-oss-20b")))
    for rule in ("world size 16", "64 query heads", "train.seq_len"):
        assert rule in message
    assert "key/value" not in message  # 24 is a multiple of 8


@pytest.mark.case("G4", "seq_len that cannot be cut: nearest that can")
def test_row_that_cannot_be_cut_is_refused_with_the_neighbors_on_both_sides(files: Files) -> None:
    files.write_train(seq_len=1002).write_json(sequence_parallel_size=4)
    assert "Nearest that can: 1000 or 1004" in only(files.problems(4))


def test_row_longer_than_the_models_positions_is_refused(files: Files) -> None:
    assert "131072 positions" in only(files.write_train(seq_len=131_074).problems())


@pytest.mark.parametrize(("seq_len", "halo"), [(508, True), (504, False)])
def test_auto_takes_the_halo_where_one_neighbor_holds_the_window(
    files: Files, seq_len: int, halo: bool
) -> None:
    """128 keys are the query itself and 127 before it: 508 / 4 = 127 is just enough."""
    config = files.write_train(seq_len=seq_len).write_json(sequence_parallel_size=4).config(4)
    assert config.use_halo == halo


def test_one_rank_needs_no_halo(files: Files) -> None:
    assert not files.config(2, overrides={"model.window_exchange": "halo"}).use_halo


def test_ulysses_in_window_layers_can_be_asked_for(files: Files) -> None:
    files.write_json(sequence_parallel_size=2)
    assert not files.config(2, overrides={"model.window_exchange": "ulysses"}).use_halo


HALVES = {"model.expert_overlap": "halves"}


def test_experts_in_halves_need_ranks_that_exchange(files: Files) -> None:
    problem = only(files.problems(2, overrides=HALVES))
    assert "model.expert_overlap=halves" in problem and "Use none" in problem


def test_experts_in_halves_need_two_experts_on_each_rank(files: Files) -> None:
    """The model has 8 experts."""
    files.write_train(global_batch_size=8)
    files.write_json(expert_parallel={"enabled": True, "autoep_size": 8})
    problem = only(files.problems(8, overrides=HALVES))
    assert "at least two experts on each rank" in problem and "at most 4" in problem
    files.write_json(expert_parallel={"enabled": True, "autoep_size": 4})
    assert files.config(8, overrides=HALVES).model.expert_overlap == "halves"


GROUPS = {"model.ulysses_groups": "2"}


def test_heads_in_groups_need_ranks_that_exchange(files: Files) -> None:
    problem = only(files.problems(2, overrides=GROUPS))
    assert "model.ulysses_groups=2" in problem and "Use 1" in problem


def test_groups_of_heads_divide_the_key_value_heads_of_a_rank(files: Files) -> None:
    """The model has 2 key/value heads."""
    files.write_json(sequence_parallel_size=2)
    problem = only(files.problems(2, overrides=GROUPS))
    assert (
        "does not divide the 1 key/value heads of a rank (2 / sequence_parallel_size 2" in problem
    )
    assert only(files.problems(2, overrides={"model.ulysses_groups": "0"})).endswith("1 or more.")


def test_halo_that_needs_more_than_one_neighbor_is_refused(files: Files) -> None:
    files.write_train(seq_len=504).write_json(sequence_parallel_size=4)
    problem = only(files.problems(4, overrides={"model.window_exchange": "halo"}))
    assert "127 tokens" in problem and "126" in problem


def test_model_without_a_window_has_no_edges_to_exchange(files: Files) -> None:
    files.write_json(sequence_parallel_size=2)
    model = preset("tiny")
    model.sliding_window = None
    model.layer_types = ["full_attention"] * model.num_hidden_layers
    assert not files.config(2, model=model).use_halo
    problem = only(files.problems(2, overrides={"model.window_exchange": "halo"}, model=model))
    assert "this model has no window of two keys" in problem and "Use auto or ulysses" in problem


def test_batch_that_does_not_divide_is_refused_with_the_neighbors_on_both_sides(
    files: Files,
) -> None:
    problem = only(files.write_train(global_batch_size=6).problems(4))
    assert "global_batch_size=6" in problem and "Nearest that can: 4 or 8." in problem


def test_batch_smaller_than_one_pass_is_refused_with_the_least(files: Files) -> None:
    assert "Nearest that can: 8." in only(
        files.write_train(global_batch_size=2, micro_batch_size=2).problems(4)
    )


@pytest.mark.parametrize(
    "world, sp, micro, accumulation", [(1, 1, 1, 16), (4, 2, 2, 4), (8, 4, 8, 1), (4, 4, 2, 8)]
)
def test_batch_arithmetic_counts_data_parallel_ranks_only(
    files: Files, world: int, sp: int, micro: int, accumulation: int
) -> None:
    config = (
        files.write_train(micro_batch_size=micro)
        .write_json(sequence_parallel_size=sp)
        .config(world)
    )
    assert (config.micro_batch_size, config.gradient_accumulation_steps) == (micro, accumulation)


def test_engine_sees_every_rank_as_data_parallel(files: Files) -> None:
    config = files.write_train(micro_batch_size=2).write_json(sequence_parallel_size=2).config(4)
    engine = config.engine_json
    assert (
        engine["train_micro_batch_size_per_gpu"] == 2 and engine["gradient_accumulation_steps"] == 4
    )
    assert engine["train_batch_size"] == 2 * 4 * 4


def test_micro_batch_size_of_the_json_is_taken_when_the_yaml_leaves_it_open(files: Files) -> None:
    assert files.write_json(train_micro_batch_size_per_gpu=4).config().micro_batch_size == 4


def test_two_files_that_disagree_about_the_micro_batch_are_refused(files: Files) -> None:
    files.write_train(micro_batch_size=2).write_json(train_micro_batch_size_per_gpu=4)
    assert "train_micro_batch_size_per_gpu is 4" in only(files.problems())


@pytest.mark.parametrize(
    "key, right, wrong", [("train_batch_size", 16, 8), ("gradient_accumulation_steps", 4, 2)]
)
@pytest.mark.case("G3", "batch arithmetic that does not fit refused")
def test_batch_number_of_the_json_is_accepted_only_if_it_is_right(
    files: Files, key: str, right: int, wrong: int
) -> None:
    assert files.write_json(**{key: right}).config(4).gradient_accumulation_steps == 4
    assert f"{key} is {wrong}" in only(files.write_json(**{key: wrong}).problems(4))


@pytest.mark.parametrize("enabled, dtype", [(True, "fp32"), (False, "bf16")])
def test_two_files_that_disagree_about_bf16_are_refused(
    files: Files, enabled: bool, dtype: str
) -> None:
    files.write_train(dtype=dtype).write_json(bf16={"enabled": enabled})
    assert f"bf16 has enabled={enabled}" in only(files.problems())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_engine_computes_in_the_dtype_of_the_yaml(files: Files, dtype: str) -> None:
    assert files.write_train(dtype=dtype).config().engine_json["bf16"]["enabled"] == (
        dtype == "bf16"
    )


def test_two_files_that_disagree_about_clipping_are_refused(files: Files) -> None:
    assert "gradient_clipping is 0.5" in only(files.write_json(gradient_clipping=0.5).problems())


def test_engine_clips_as_the_yaml_says(files: Files) -> None:
    config = files.write_train(gradient_clipping=0.3).write_json(gradient_clipping="auto").config()
    assert config.engine_json["gradient_clipping"] == 0.3


AGREEING = {
    "lr": 1e-5,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": "auto",
    "torch_adam": True,
}


def test_optimizer_block_that_agrees_is_accepted(files: Files) -> None:
    assert (
        files.write_json(optimizer={"type": "AdamW", "params": AGREEING}).config().train.lr == 1e-5
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 1e-4), ("betas", [0.9, 0.999]), ("eps", 1e-6), ("weight_decay", 0.0), ("lamda", 1)],
)
def test_optimizer_block_that_disagrees_is_refused_by_parameter(
    files: Files, name: str, value: Any
) -> None:
    files.write_json(optimizer={"type": "AdamW", "params": {**AGREEING, name: value}})
    assert f"params.{name}" in only(files.problems())


@pytest.mark.parametrize("optimizer", [{"type": "Lion"}, {}], ids=str)
def test_another_optimizer_is_refused(files: Files, optimizer: Any) -> None:
    assert "must have type AdamW" in only(files.write_json(optimizer=optimizer).problems())


def test_keys_of_this_project_never_reach_the_engine(files: Files) -> None:
    files.write_json(
        sequence_parallel_size="auto",
        expert_parallel={"enabled": True},
        optimizer={"type": "AdamW", "params": {}},
        tensorboard={"enabled": False},
    )
    engine = files.config(2).engine_json
    assert not engine.keys() & {*OWN_KEYS, *REFUSED_KEYS, "optimizer"}


def test_no_auto_is_left_for_the_engine(files: Files) -> None:
    shipped = json.loads((ROOT / "ds_configs" / "z3_ulysses.json").read_text(encoding="utf-8"))
    files.json.write_text(json.dumps(shipped), encoding="utf-8")
    assert "auto" in json.dumps(shipped) and '"auto"' not in json.dumps(files.config(2).engine_json)


def test_resolving_leaves_the_parsed_json_as_it_is(files: Files) -> None:
    files.write_json(
        zero_optimization={
            "stage": 3,
            "reduce_bucket_size": "auto",
            "offload_param": {"device": "none"},
        }
    )
    run, located = load(files.yaml, files.json, {})
    before = copy.deepcopy(located.value)
    resolve(run, located, preset("tiny"), LaunchInfo(world_size=1, local_world_size=1))
    assert located.value == before


def test_resolved_configuration_survives_yaml(files: Files) -> None:
    plain = files.config().to_plain()
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain


# what ships

RUN_YAMLS = sorted((ROOT / "configs").glob("*.yaml"))
DS_JSONS = sorted((ROOT / "ds_configs").glob("*.json"))


def resolve_shipped(run_yaml: Path, ds_json: Path, world: int) -> RunConfig:
    run, located = load(run_yaml, ds_json, {})
    name = run.model.init or next(
        name for name in PRESETS if run_yaml.stem.startswith(name)
    )  # no weights ship
    return resolve(run, located, preset(name), LaunchInfo(world_size=world, local_world_size=world))


@pytest.mark.parametrize("ds_json", DS_JSONS, ids=lambda path: path.name)
@pytest.mark.parametrize("run_yaml", RUN_YAMLS, ids=lambda path: path.name)
def test_any_two_shipped_files_fit_together_on_a_node_of_eight_or_say_why_not(
    run_yaml: Path, ds_json: Path
) -> None:
    run, located = load(run_yaml, ds_json, {})
    if located.value["sequence_parallel_size"] == 1 and run.train.global_batch_size < 8:
        with pytest.raises(ConfigError, match="cannot be divided among 8 data-parallel ranks"):
            resolve_shipped(run_yaml, ds_json, 8)
        return
    config = resolve_shipped(run_yaml, ds_json, 8)
    assert config.data.mix.is_file() and config.zero_stage in (1, 2, 3)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_default_files_fit_together_on_small_machines(world: int) -> None:
    run_yaml, ds_json = ROOT / "configs" / "tiny.yaml", ROOT / "ds_configs" / "z3_ulysses.json"
    assert resolve_shipped(run_yaml, ds_json, world).sp_size == world


@pytest.mark.parametrize("key", sorted(REFUSED_ZERO_KEYS))
def test_zero_key_that_would_train_or_save_wrongly_is_refused_with_the_reason(
    files: Files, key: str
) -> None:
    problem = only(files.write_json(zero_optimization={"stage": 2, key: 8}).problems())
    assert f"zero_optimization.{key} is refused: {REFUSED_ZERO_KEYS[key]}" in problem
    assert "Did you mean" not in problem


@pytest.mark.parametrize("key", ["mics_shard_size", "stage4"])
def test_unknown_zero_key_is_refused(files: Files, key: str) -> None:
    problems = files.write_json(zero_optimization={"stage": 2, key: True}).problems()
    assert f"zero_optimization.{key} is not a key that this project runs with" in only(problems)


def test_bf16_stage_1_with_fp32_accumulation_is_refused(files: Files) -> None:
    files.write_json(zero_optimization={"stage": 1}, data_types={"grad_accum_dtype": "fp32"})
    assert "cannot be saved" in only(files.problems())


def refused(files: Files, guard: dict[str, Any], **sections: Any) -> str:
    """Return what is said of a run YAML with these sections."""
    content = yaml.safe_load(YAML)
    content["train"]["lr"] = 1e-5
    content["guard"] = guard
    for name, keys in sections.items():
        content[name] = {**content.get(name, {}), **keys}
    files.write(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as refusal:
        load(files.yaml, files.json, {})
    return str(refusal.value)


def test_levers_of_the_guard_that_lack_what_they_move_are_refused_together(tmp_path: Path) -> None:
    files = Files(tmp_path)
    levers = {"kl_lever": "before", "router_lever": "freeze"}
    told = refused(files, levers, telemetry={"router_interval_steps": 0})
    assert "guard.kl_lever is before" in told and "Give train.kl_targets" in told
    assert "guard.router_lever is freeze" in told
    targets = {"kl_targets": "targets", "kl_weight": 2.0}
    told = refused(files, {"kl_lever": "beside"}, train=targets)
    assert "guard.max_kl_weight is 1, below train.kl_weight (2)" in told


def test_what_adapters_freeze_by_themselves_is_refused_with_everything_else(
    tmp_path: Path,
) -> None:
    adapter = {"kind": "lora", "rank": 8}
    train = {"freeze": ["router"]}
    told = refused(Files(tmp_path), {"router_lever": "freeze"}, adapter=adapter, train=train)
    assert "train.freeze is given, but with adapter.kind: lora everything below" in told
    assert "guard.router_lever is freeze, but with adapter.kind: lora the routers" in told
    told = refused(Files(tmp_path), {}, adapter={"kind": "lora", "expert_rank": 12, "alpha": 0})
    assert "adapter.expert_rank is 12, must be a multiple of 8" in told
    assert "Nearest: 8 or 16." in told and "adapter.alpha is 0, must be above 0" in told


def test_levers_that_only_the_two_way_controller_has_are_refused_for_the_ladder(
    tmp_path: Path,
) -> None:
    levers = {"controller": "ladder", "kl_lever": "before", "router_lever": "raise_replay"}
    told = refused(Files(tmp_path), levers, train={"kl_targets": "targets", "kl_weight": 0.1})
    assert "guard.kl_lever is before, which needs guard.controller: two_way" in told
    assert "guard.router_lever is raise_replay, which needs" in told


def test_section_that_cannot_be_read_hides_no_other_problem(tmp_path: Path) -> None:
    told = refused(Files(tmp_path), {"kl_lever": "sometimes"}, telemetry={"unknown": 1})
    assert "guard.kl_lever" in told and "telemetry.unknown" in told


# paths


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("model.path", lambda config: config.model.path),
        ("data.mix", lambda config: config.data.mix),
        ("data.build_dir", lambda config: config.data.build_dir),
        ("train.kl_targets", lambda config: config.train.kl_targets),
    ],
)
def test_path_of_the_command_line_is_relative_to_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, field: Callable[[RunConfig], Path]
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "own"))
    files = Files(tmp_path / "configs")
    section, _, name = key.partition(".")
    more = {"train.kl_weight": "0.1"} if section == "train" else {}
    assert field(files.config(overrides={key: "there", **more})) == tmp_path / "there"
    assert field(files.config(overrides={key: "not/there", **more})) == tmp_path / "not" / "there"
    assert field(files.config(overrides={key: "'~/x'", **more})) == tmp_path / "own" / "x"
    assert field(files.config(overrides={key: str(tmp_path / "x"), **more})) == tmp_path / "x"
    content = yaml.safe_load(YAML)
    content["train"]["lr"] = 1e-5
    content[section] = {**content[section], name: "there"}
    if section == "train":
        content[section]["kl_weight"] = 0.1
    if key == "model.path":
        del content["model"]["init"]
    files.write(yaml.safe_dump(content))
    assert field(files.config()) == tmp_path / "configs" / "there"


def test_whole_section_of_the_command_line_has_paths_of_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    config = Files(tmp_path / "configs").config(overrides={"data": "{mix: m.yaml}"})
    assert config.data.mix == tmp_path / "m.yaml"


def test_path_that_exists_beside_the_file_only_is_refused_with_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixes = tmp_path / "configs" / "mixes"
    mixes.mkdir(parents=True)
    (mixes / "mine.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    files = Files(tmp_path / "configs")
    told = only(files.problems(overrides={"data.mix": "mixes/mine.yaml"}))
    assert told.startswith(
        f"--set data.mix=mixes/mine.yaml: {tmp_path / 'mixes/mine.yaml'} does not exist, but "
        f"{mixes / 'mine.yaml'} does. Paths of --set are relative to the working directory"
    )

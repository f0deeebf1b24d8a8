"""Everything that can be known before weights are read is refused in one message.

The same faults are told by `--dry_run` and by a run, and each of them alone is refused, too.
"""

from __future__ import annotations

import getpass
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from cpt.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    TensorRecord,
    read_manifest,
    write_manifest,
)
from cpt.checkpoint.reader import step_folder
from cpt.errors import CheckpointError, ConfigError, DataError, InternalError, StorageError
from cpt.job.caches import check_caches
from cpt.job.findings import Findings, joined
from cpt.job.gate import pass_gate
from cpt.job.progress import Progress
from cpt.job.resume_order import note_carried_out
from cpt.model.configuration import PRESETS, load_config
from cpt.model.parameters import parameter_shapes
from cpt.resilience.stop import StopRequest
from cpt.run import main, parse_arguments
from cpt.training.kl_targets import SIDECAR
from data_pipeline.build.build import build
from data_pipeline.build.self_replay import weights_hash, write_sidecar
from data_pipeline.config import mix_checks
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.ledger import Ledger
from data_pipeline.store.ownership import SHARED_VARIABLE
from tests.support.checkpoints import write_checkpoint
from tests.support.launcher import ROOT, free_port, rank_environment

DS_CONFIG = ROOT / "ds_configs" / "z3_ulysses.json"
SMALL = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
SIZES = {**SMALL, "num_experts_per_tok": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
WRONG_TENSOR = "model.layers.0.self_attn.sinks"
PARAGRAPH = "The quick brown fox jumps over the lazy dog and looks at document number "


def write_weights(folder: Path, seed: int = 0) -> Path:
    """A whole Hugging Face directory of a very small gpt-oss."""
    torch.manual_seed(seed)
    layers = {"layer_types": ["sliding_attention"]}
    model = GptOssForCausalLM(GptOssConfig(**{**PRESETS["tiny"], **SIZES, **layers}))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_mix(folder: Path) -> Path:
    texts = [f"{PARAGRAPH}{number}." for number in range(24)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = {"name": "web", "language": "en", "domain": "web", "path": "text.jsonl", "weight": 1.0}
    source |= {"held_out_share": 0.25, "max_epochs": 4}
    mix = {"seq_len": 64, "seed": 1, "near_duplicates": 0, "decontaminate_tokens": 0}
    mix |= {"guard": {"min_documents": 1, "min_tokens": 1}, "sources": [source]}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix), encoding="utf-8")
    return folder / "mix.yaml"


def write_run(folder: Path) -> Path:
    train = {"seq_len": 64, "global_batch_size": 1, "total_steps": 2, "lr": 1e-3, "dtype": "fp32"}
    run = {
        "model": {"path": "weights"},
        "data": {"mix": "mix.yaml", "build_dir": "built"},
        "train": train,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, a built mix, and a run YAML that fit together."""
    folder = tmp_path_factory.mktemp("gate")
    write_weights(folder / "weights")
    build(load_mix(write_mix(folder)), folder / "built")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def damaged_weights(workplace: Path) -> Path:
    """The weights with one tensor of another shape."""
    folder = workplace / "damaged"
    folder.mkdir()
    for file in (workplace / "weights").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[WRONG_TENSOR] = torch.zeros(7)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def missing_targets(workplace: Path) -> Path:
    """A folder of KL targets whose file is gone."""
    folder = workplace / "targets"
    folder.mkdir()
    source = {"rows": 1, "tokens": 1, "row_hash": "", "xxh3": ""}
    sidecar = {"format_version": 1, "base_model": "", "computed_in": "fp32", "build": ""}
    sidecar |= {"top_k": 1, "sources": {"web": source}}
    (folder / SIDECAR).write_text(json.dumps(sidecar), encoding="utf-8")
    return folder


@pytest.fixture
def faults(damaged_weights: Path, missing_targets: Path) -> dict[str, tuple[str, str]]:
    """Settings that cannot be right, and words of the refusal, by name of the fault."""
    return {
        "domain": ("guard.domains={wev: {tolerance_percent: 2}}", "guard.domains.wev"),
        "tensor": (f"model.path={damaged_weights}", f"tensor '{WRONG_TENSOR}' has shape (7,)"),
        "targets": (
            f"train.kl_targets={missing_targets}",
            f"{missing_targets / 'web.safetensors'}",
        ),
        "weight": ("train.kl_weight=0.1", ""),
        "dry": ("train.total_steps=1000", "the data cannot feed this run"),
    }


DryRun = Callable[..., int]


@pytest.fixture
def dry_run(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> DryRun:
    """`dry_run(setting, ...)`: the exit code of a dry run of the workplace with these settings."""
    monkeypatch.chdir(workplace)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in rank_environment(0, 1, 1).items():
        monkeypatch.setenv(name, value)

    def run(*settings: str) -> int:
        return main([*arguments_of(workplace, *settings), "--dry_run"], StopRequest())

    return run


def arguments_of(workplace: Path, *settings: str) -> list[str]:
    arguments = ["--ds_config", str(DS_CONFIG), "--config", str(workplace / "run.yaml")]
    arguments += ["--run_dir", str(workplace / "run")]
    for setting in settings:
        arguments += ["--set", setting]
    return arguments


def test_files_that_fit_pass_the_gate_and_show_the_plan(dry_run: DryRun, capsys: Any) -> None:
    assert dry_run() == 0
    printed = capsys.readouterr().out
    assert "resolved configuration" in printed and "drawn tokens" in printed


def test_what_a_person_should_know_of_the_guard_is_told_at_the_start(
    dry_run: DryRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def look(settings: Any, mix: Any, manifest: Any) -> list[str]:
        return [f"guard of {settings.policy}: {mix.sources[0].name}, {len(manifest.sources)}"]

    monkeypatch.setattr("cpt.job.gate.guard_warnings", look)
    assert dry_run() == 0
    assert "guard of act: web, 1" in caplog.text


def test_adapters_that_the_model_cannot_have_are_refused_and_others_are_told(
    dry_run: DryRun, capsys: Any
) -> None:
    wrong = "adapter={kind: dora, targets: [lm_head, attention], layers: [7]}"
    assert dry_run(wrong) == 78
    told = capsys.readouterr().err
    assert "adapter.targets[0] is 'lm_head', which names the lm_head: no server" in told
    assert "adapter.layers[0] is 7, but the model has the layers 0 to 0" in told
    assert dry_run("adapter={kind: lora, rank: 4}", "train.weight_decay=0") == 0
    assert "lora beside 4 attention matrices (rank 4) and 2 stacks" in capsys.readouterr().out


def test_8_bit_products_that_the_model_cannot_have_are_refused(
    dry_run: DryRun, capsys: Any
) -> None:
    assert dry_run("train.products={experts: fp8, scaling: blocks}") == 78
    told = capsys.readouterr().err
    assert "bf16_layers is [1, 1], but the model has 1 layers: no product would be in" in told
    assert "blocks have 32 values, but gate_up_proj has 8 inputs and 64 outputs" in told


def test_run_does_not_start_from_a_checkpoint_of_its_own(
    dry_run: DryRun, workplace: Path, capsys: Any
) -> None:
    write_checkpoint(workplace / "run", 10)
    try:
        assert dry_run(f"model.path={workplace / 'run'}") == 78
    finally:
        shutil.rmtree(workplace / "run")
    told = capsys.readouterr().err
    folder = step_folder(workplace / "run", 10)
    assert f"model.path: {folder} is a checkpoint of this run itself" in told


@pytest.mark.parametrize(("name", "code"), [("domain", 78), ("tensor", 78), ("dry", 65)])
def test_each_fault_alone_is_refused_by_the_dry_run(
    dry_run: DryRun, faults: dict[str, tuple[str, str]], capsys: Any, name: str, code: int
) -> None:
    setting, words = faults[name]
    assert dry_run(setting) == code
    assert words in capsys.readouterr().err


def test_dry_run_refuses_all_faults_in_one_message(
    dry_run: DryRun, faults: dict[str, tuple[str, str]], capsys: Any
) -> None:
    assert dry_run(*(setting for setting, _ in faults.values())) == 78
    message = capsys.readouterr().err
    assert [words for _, words in faults.values() if words not in message] == []


def test_wrong_values_hide_no_missing_file(
    dry_run: DryRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    absent = tmp_path / "ds.json"
    monkeypatch.setattr("tests.job.test_gate.DS_CONFIG", absent)
    settings = ["train.lr=-1", "train.beta1=2", "data.mix=absent.yaml", "model.path=nowhere"]
    assert dry_run(*settings) == 78
    told = capsys.readouterr().err
    assert "train.lr is -1.0, must be > 0" in told and "train.beta1 is 2.0" in told
    assert f"{absent}: no such file." in told
    assert "absent.yaml: no such file." in told
    assert "nowhere does not exist" in told


def test_row_length_that_differs_is_told_with_wrong_values(dry_run: DryRun, capsys: Any) -> None:
    assert dry_run("train.lr=-1", "train.seq_len=128") == 78
    told = capsys.readouterr().err
    assert "train.lr is -1.0" in told and "train.seq_len is 128, but rows of" in told
    assert dry_run("train.seq_len=128") == 78
    refused = capsys.readouterr()
    assert "train.seq_len is 128, but rows of" in refused.err
    assert "resolved configuration" not in refused.out


def test_prompts_are_judged_with_everything_else(
    workplace: Path, dry_run: DryRun, capsys: Any
) -> None:
    mix = yaml.safe_load((workplace / "mix.yaml").read_text(encoding="utf-8"))
    mix["guard"]["generation"] = [{"name": "maths", "language": "en", "path": "maths.jsonl"}]
    (workplace / "asked.yaml").write_text(yaml.safe_dump(mix), encoding="utf-8")
    prompts = workplace / "maths.jsonl"
    prompts.write_text('{"prompt": "1 + 1?", "answer": 2}\n', encoding="utf-8")
    looks = "guard={interval_steps: 1, generation_interval_steps: 1, domains: {wev: {}}}"
    assert dry_run("data.mix=asked.yaml", looks) == 78
    message = capsys.readouterr().err
    assert "'maths': 1 prompts a look cannot show" in message
    assert "guard.domains.wev" in message
    assert dry_run("data.mix=asked.yaml") == 0
    prompts.write_text('{"prompt": "1 + 1?"}\n{"answer": 2}\n', encoding="utf-8")
    assert dry_run("data.mix=asked.yaml") == 78
    assert f"{prompts}:2: 'prompt' is missing" in capsys.readouterr().err
    assert dry_run("guard={interval_steps: 1, generation_interval_steps: 1}") == 78
    assert "the mix has no guard.generation" in capsys.readouterr().err


def test_run_refuses_all_faults_in_the_same_message(
    workplace: Path, faults: dict[str, tuple[str, str]], dry_run: DryRun, capsys: Any
) -> None:
    settings = [setting for setting, _ in faults.values()]
    dry_run(*settings)
    told_by_dry_run = capsys.readouterr().err.strip()
    command = [sys.executable, str(ROOT / "cpt" / "run.py"), *arguments_of(workplace, *settings)]
    environment = rank_environment(0, 1, free_port())
    run = subprocess.run(command, env=environment, cwd=workplace, capture_output=True, text=True)
    assert run.returncode == 78
    assert told_by_dry_run in run.stderr
    assert not (workplace / "run").exists()


def test_values_of_the_deepspeed_json_are_judged_by_the_dry_run(
    dry_run: DryRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    file = tmp_path / "ds.json"
    zero = {"stage": 3, "reduce_bucket_size": 3686.4, "overlap_comm": "maybe"}
    content = {"zero_optimization": zero, "steps_per_print": 0, "communication_data_type": "fp16"}
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    monkeypatch.setattr("tests.job.test_gate.DS_CONFIG", file)
    assert dry_run() == 78
    told = capfd.readouterr().err.strip().splitlines()
    assert len(told) == 4 and all(line.startswith(f"{file}:") for line in told)


def test_mix_that_is_too_large_to_be_built_at_the_start_is_refused(
    dry_run: DryRun, workplace: Path, capsys: Any
) -> None:
    settings = [f"data.build_dir={workplace / 'nowhere'}", "data.auto_build_limit_bytes=1"]
    assert dry_run(*settings) == 78
    assert "Build it first: python -m data_pipeline build" in capsys.readouterr().err
    assert dry_run(settings[0]) == 0
    assert "is not built yet" in capsys.readouterr().out


@pytest.fixture
def own_copy(workplace: Path, tmp_path: Path) -> Path:
    """Return a copy of the mix, its text and its build that a test may change."""
    for name in ("mix.yaml", "text.jsonl"):
        shutil.copy2(workplace / name, tmp_path)
    shutil.copytree(workplace / "built", tmp_path / "built")
    return tmp_path


def settings_of(folder: Path, *more: str) -> list[str]:
    return [f"data.mix={folder / 'mix.yaml'}", f"data.build_dir={folder / 'built'}", *more]


def set_rule(folder: Path, key: str, value: Any) -> None:
    mix = yaml.safe_load((folder / "mix.yaml").read_text())
    mix[key] = value
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))


def test_schedule_that_the_run_cannot_follow_is_refused_with_the_phase_that_is_not_there(
    dry_run: DryRun, own_copy: Path, capsys: Any
) -> None:
    phases = [{"name": "main", "until_step": 1}, {"name": "anneal", "share": "rest"}]
    set_rule(own_copy, "schedule", phases)
    tied = settings_of(own_copy, "train.schedule=wsd", "train.decay_phase=anneal")
    assert dry_run(*tied) == 0
    output = capsys.readouterr().out
    assert re.search(r"anneal +2 to 2 +web +100.00%", output)
    assert dry_run(*tied, "train.total_steps=1", "train.decay_phase=main2") == 78
    message = capsys.readouterr().err
    assert message.count("phase 'anneal' has no step in a run of 1 steps") == 1
    assert dry_run(*tied, "train.decay_phase=main2") == 78
    assert "train.decay_phase is 'main2', which is no phase of the mix" in capsys.readouterr().err


def test_epochs_and_factors_of_phases_are_shown_and_what_they_break_is_refused(
    dry_run: DryRun, own_copy: Path, workplace: Path, capsys: Any
) -> None:
    source = yaml.safe_load((own_copy / "mix.yaml").read_text())["sources"][0]
    del source["weight"], source["max_epochs"]
    set_rule(own_copy, "sources", [{**source, "epochs": 3}])
    phases = [{"name": "main", "until_step": 1}, {"name": "low", "share": "rest", "lr_factor": 0.5}]
    set_rule(own_copy, "schedule", phases)
    assert dry_run(*settings_of(own_copy)) == 0
    output = capsys.readouterr().out
    assert re.search(r"asked epochs +weight from them", output)
    assert re.search(r"low +2 to 2 +web +100.00%.* 0.5$", output, re.MULTILINE)
    assert "warning: epochs: 2 steps read web" in output
    set_rule(own_copy, "languages", {"ja": {"min_share": 0.1}})
    assert dry_run(*settings_of(own_copy, "train.lr=0.1")) == 78
    message = capsys.readouterr().err
    assert "languages.ja.min_share is 0.1, but the epochs (none) give ja 0.00%" in message
    phases[1]["lr_factor"] = 2
    set_rule(own_copy, "schedule", phases)
    assert dry_run(*settings_of(own_copy, "train.lr=0.1")) == 78
    message = capsys.readouterr().err
    assert "schedule[low] of the mix has a factor of 2 on the learning rate" in message
    assert "languages.ja.min_share" in message


def test_build_of_other_rules_or_files_is_refused_with_what_differs(
    dry_run: DryRun, own_copy: Path, capsys: Any
) -> None:
    assert dry_run(*settings_of(own_copy)) == 0
    set_rule(own_copy, "near_duplicates", 0.7)
    text = own_copy / "text.jsonl"
    text.write_bytes(text.read_bytes() * 3)
    capsys.readouterr()
    assert dry_run(*settings_of(own_copy)) == 65
    message = capsys.readouterr().err
    assert "is not a build of" in message and "accept_stale_build=true" in message
    assert "near_duplicates: 0.0 in the build, 0.7 in the mix" in message
    assert "sources[web].path: text.jsonl has" in message
    assert dry_run(*settings_of(own_copy, "data.accept_stale_build=true")) == 0


def test_contents_are_compared_where_there_is_little_input_and_sizes_where_there_is_much(
    dry_run: DryRun, own_copy: Path, capsys: Any
) -> None:
    text = own_copy / "text.jsonl"
    text.write_bytes(text.read_bytes().replace(b"brown", b"green"))
    assert dry_run(*settings_of(own_copy)) == 65
    assert "text.jsonl has other content than in the build" in capsys.readouterr().err
    large = "data.auto_build_limit_bytes=1"
    assert dry_run(*settings_of(own_copy, large)) == 0
    text.write_bytes(text.read_bytes() + b'{"text": "one more"}\n')
    assert dry_run(*settings_of(own_copy, large)) == 65


def test_replay_of_another_model_than_the_untouched_one_is_refused_by_the_dry_run(
    dry_run: DryRun, own_copy: Path, workplace: Path, capsys: Any
) -> None:
    writer = workplace / "weights"
    write_sidecar(own_copy, weights_hash([writer / "model.safetensors"]), {}, ["text.jsonl"])
    mix = yaml.safe_load((own_copy / "mix.yaml").read_text(encoding="utf-8"))
    mix["sources"][0]["kind"] = "self_replay"
    (own_copy / "mix.yaml").write_text(yaml.safe_dump(mix), encoding="utf-8")
    build(load_mix(own_copy / "mix.yaml"), own_copy / "replayed", progress=False)
    settings = settings_of(own_copy, f"data.build_dir={own_copy / 'replayed'}")
    assert dry_run(*settings) == 0
    trained = write_weights(own_copy / "trained", seed=1)
    assert dry_run(*settings, f"model.path={trained}") == 78
    told = capsys.readouterr().err
    assert "source 'web' was written by the model" in told
    assert f"the untouched model of this run is {trained}" in told
    assert dry_run(*settings, f"model.path={trained}", f"guard.baseline_model={writer}") == 0


def test_whole_build_needs_no_raw_files(
    dry_run: DryRun, own_copy: Path, capsys: Any, caplog: Any
) -> None:
    (own_copy / "text.jsonl").unlink()
    with caplog.at_level("INFO", "cpt.job.data"):
        assert dry_run(*settings_of(own_copy)) == 0
    assert "files of web are not here; what is here was compared" in caplog.text
    set_rule(own_copy, "decontaminate_tokens", 60)
    assert dry_run(*settings_of(own_copy)) == 65
    assert "decontaminate_tokens: 0 in the build, 60 in the mix" in capsys.readouterr().err
    set_rule(own_copy, "seed", "one")
    assert dry_run(*settings_of(own_copy)) == 78
    message = capsys.readouterr().err
    assert "seed" in message and "matches no file" in message
    shutil.rmtree(own_copy / "built")
    assert dry_run(*settings_of(own_copy)) == 78
    assert "matches no file" in capsys.readouterr().err


def test_default_build_of_much_input_is_found_without_reading_it(
    dry_run: DryRun, own_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(own_copy)
    default = [f"data.mix={own_copy / 'mix.yaml'}", "data.build_dir=null"]
    large = [*default, "data.auto_build_limit_bytes=1"]
    assert dry_run(*large) == 78
    assert "is not built" in capsys.readouterr().err
    (own_copy / "data").mkdir()
    built = own_copy / "data" / "named-by-a-person"
    (own_copy / "built").rename(built)
    # what is small enough to be built at the start is not built again
    assert dry_run(*default) == 0
    assert "drawn tokens" in capsys.readouterr().out
    text = own_copy / "text.jsonl"
    content = text.read_bytes()
    text.write_bytes(content.replace(b"brown", b"green"))
    build(load_mix(own_copy / "mix.yaml"), own_copy / "other", progress=False)
    text.write_bytes(content)
    monkeypatch.setattr("data_pipeline.reading.input_files.file_hash", None)
    assert dry_run(*large) == 0
    text.unlink()
    assert dry_run(*default) == 0
    # the same build twice is one build; another of files of the same names and sizes is not
    shutil.copytree(built, own_copy / "data" / "mix-copy")
    assert dry_run(*default) == 0
    (own_copy / "other").rename(own_copy / "data" / "other")
    assert dry_run(*default) == 78
    assert "Name one of them with data.build_dir" in capsys.readouterr().err


def test_weights_of_another_tokenizer_are_refused(
    dry_run: DryRun, workplace: Path, capsys: Any
) -> None:
    tokenizer = {"added_tokens": [{"content": "<|return|>", "id": 5}]}
    file = workplace / "weights" / "tokenizer.json"
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    try:
        assert dry_run() == 78
    finally:
        file.unlink()
    message = capsys.readouterr().err
    assert f"{file}: token '<|return|>' has id 5, token shards use 200002" in message


def test_checkpoint_that_does_not_fit_is_refused(
    dry_run: DryRun, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    assert dry_run() == 74
    told = capsys.readouterr()
    assert "a checkpoint needs" in told.err and "later saves will fail" not in told.err


def test_run_directory_that_is_a_file_is_refused(
    dry_run: DryRun, workplace: Path, capsys: Any
) -> None:
    (workplace / "run").write_text("a file", encoding="utf-8")
    try:
        assert dry_run() == 74
    finally:
        (workplace / "run").unlink()
    assert f"{workplace / 'run'} is not a directory" in capsys.readouterr().err


def test_run_directory_that_cannot_be_read_hides_no_other_refusal(
    dry_run: DryRun, workplace: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(workplace / "run" / "checkpoints")

    def closed(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied", place)

    monkeypatch.setattr("cpt.job.gate.expected_checkpoint", closed)
    monkeypatch.setattr("cpt.job.gate.list_steps", closed)
    assert dry_run() == 74
    refusal = f"{place}: Permission denied. Change the permissions, or choose another place."
    assert capsys.readouterr().err.count(refusal) == 1
    assert dry_run("guard.domains={wev: {tolerance_percent: 2}}") == 78
    told = capsys.readouterr().err
    assert told.count(refusal) == 1 and "guard.domains.wev" in told


def test_directories_that_others_may_change_are_refused_unread_in_one_message(
    dry_run: DryRun,
    own_copy: Path,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    run_dir = trained.parents[1]
    cache = own_copy / "triton"
    cache.mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    # a checkpoint that nobody can read shows whether it is read
    (trained / MANIFEST).write_text("no manifest", encoding="utf-8")
    for folder in (run_dir, own_copy / "built", cache):
        folder.chmod(0o777)
    settings = settings_of(own_copy)
    try:
        assert dry_run(*settings) == 78
        told = capsys.readouterr().err
        assert f"run directory {run_dir} may be written to by everybody" in told
        assert f"build {own_copy / 'built'} may be written to by everybody" in told
        assert f"cache TRITON_CACHE_DIR {cache} may be written to by everybody" in told
        assert MANIFEST not in told
        monkeypatch.setenv(SHARED_VARIABLE, f"{own_copy}:{run_dir}:relative")
        assert dry_run(*settings) == 78
        assert "CPT_SHARED_DIRS names 'relative'" in capsys.readouterr().err
    finally:
        run_dir.chmod(0o700)


def test_directories_that_are_named_as_shared_pass_the_gate(
    dry_run: DryRun, own_copy: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = trained.parents[1]
    for folder in (run_dir, own_copy / "built"):
        folder.chmod(0o777)
    monkeypatch.setenv(SHARED_VARIABLE, f"{own_copy}:{run_dir}")
    try:
        assert dry_run(*settings_of(own_copy)) == 0
    finally:
        run_dir.chmod(0o700)


def test_cache_that_is_not_there_is_made_for_its_user_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(getpass, "getuser", lambda: "taro")
    check_caches({"TORCH_EXTENSIONS_DIR": str(tmp_path / "deep" / "extensions")})
    for name in ("deep/extensions", "torchinductor_taro"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700


def test_default_cache_that_others_may_write_to_ends_no_run_and_is_not_compiled_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(getpass, "getuser", lambda: "taro")
    default = tmp_path / "torchinductor_taro"
    default.mkdir()
    default.chmod(0o775)
    variables: dict[str, str] = {}
    check_caches(variables)
    private = Path(variables["TORCHINDUCTOR_CACHE_DIR"])
    assert private.parent == tmp_path and private != default
    assert private.stat().st_mode & 0o777 == 0o700
    check_caches(variables)
    assert variables == {"TORCHINDUCTOR_CACHE_DIR": str(private)}
    default.chmod(0o755)
    good: dict[str, str] = {}
    check_caches(good)
    assert good == {}


def test_default_cache_is_the_one_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(getpass, "getuser", lambda: "lab/taro")
    check_caches({})
    assert [str(path) for path in tmp_path.iterdir()] == [default_cache_dir()]


def test_dry_run_makes_no_cache_and_judges_those_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(getpass, "getuser", lambda: "taro")
    variables = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    check_caches(variables, is_dry_run=True)
    assert list(tmp_path.iterdir()) == [] and list(variables) == ["TORCH_EXTENSIONS_DIR"]
    (tmp_path / "extensions").mkdir()
    (tmp_path / "extensions").chmod(0o777)
    with pytest.raises(ConfigError, match=r"written to by everybody.*\n.*CPT_JOB_CACHES=1"):
        check_caches(variables, is_dry_run=True)


def test_home_of_triton_may_hold_what_others_may_change_beside_its_cache(tmp_path: Path) -> None:
    variables = {"TRITON_HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "own")}
    tmp_path.chmod(0o775)
    check_caches(variables)
    assert (tmp_path / ".triton").stat().st_mode & 0o777 == 0o700
    (tmp_path / ".triton").chmod(0o770)
    with pytest.raises(ConfigError, match=r"cache TRITON_HOME .*/\.triton may be written to"):
        check_caches(variables)


def test_room_for_checkpoints_is_told(dry_run: DryRun, capsys: Any) -> None:
    assert dry_run("checkpoint.interval_steps=1", "telemetry.export_at_end=true") == 0
    told = capsys.readouterr().out
    assert re.search(r"checkpoints +2 x [0-9.]+ MB \+ export [0-9.]+ MB; [0-9.,]+ [MG]B free", told)


LARGE = ["model.path=null", "model.init=gpt-oss-20b"]


@pytest.fixture
def dry_run_on(workplace: Path, dry_run: DryRun) -> Callable[..., int]:
    """`dry_run_on(gpu, setting, ...)`: the exit code of a dry run for a GPU, by its name."""

    def run(gpu: str, *settings: str) -> int:
        arguments = [*arguments_of(workplace, *settings), "--dry_run", "--gpu", gpu]
        return main(arguments, StopRequest())

    return run


@pytest.mark.usefixtures("large_disk")
def test_layout_that_no_such_gpu_holds_is_refused_with_cures(
    dry_run_on: Callable[..., int], capsys: Any
) -> None:
    assert dry_run_on("h100", *LARGE, "train.seed=5") == 78
    told = capsys.readouterr()
    assert "H100 SXM 80 GB has 74.5 GiB" in told.err and "offload_optimizer" in told.err
    assert dry_run_on("any", *LARGE) == 0
    assert dry_run_on("h100") == 0
    assert dry_run_on("x100") == 78
    assert "--gpu x100 is not known" in capsys.readouterr().err


@pytest.mark.usefixtures("large_disk")
def test_dry_run_without_a_gpu_names_those_that_fit(dry_run: DryRun, capsys: Any) -> None:
    assert dry_run() == 0
    assert "fits on h100" in capsys.readouterr().out
    assert dry_run(*LARGE) == 0
    assert "fits on none of h100" in capsys.readouterr().out


def test_gpu_of_the_machine_is_taken_unless_another_is_named(
    dry_run: DryRun, dry_run_on: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("cpt.job.gate.memory_of_gpu", lambda rank: ("Some GPU", 2**20))
    assert dry_run() == 78
    assert "Some GPU has 0.0 GiB" in capsys.readouterr().err
    assert dry_run_on("h100") == 0


@pytest.mark.parametrize(("local_rank", "is_refused"), [(0, True), (1, False)])
def test_state_that_a_node_cannot_hold_is_refused_by_the_first_rank_of_that_node(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, local_rank: int, is_refused: bool
) -> None:
    """The second of two nodes with two ranks each."""
    own = {"RANK": 2 + local_rank, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**rank_environment(2, 4, 1), **own}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("cpt.job.gate.available_bytes", lambda: 1)
    on_host = ("model.activation_checkpointing=true", "model.offload_checkpoints=true")
    options = parse_arguments(arguments_of(workplace, *on_host, "train.global_batch_size=4"))
    refusal = str(pass_gate(options).refusal)
    assert ("the 2 ranks of this node keep" in refusal) == is_refused
    options.dry_run = True
    assert pass_gate(options).refusal is None, "a dry run may be elsewhere"


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_looks_at_the_files_of_the_mix(
    workplace: Path, own_copy: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    for name, value in {**rank_environment(rank, 2, 1), "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    looked_for: list[str] = []
    original = mix_checks.expand

    def expand(pattern: str) -> list[Path]:
        looked_for.append(pattern)
        return original(pattern)

    monkeypatch.setattr(mix_checks, "expand", expand)
    settings = [f"data.mix={own_copy / 'mix.yaml'}", f"data.build_dir={own_copy / 'nowhere'}"]
    options = parse_arguments(arguments_of(workplace, *settings, "train.global_batch_size=2"))
    passed = pass_gate(options)
    assert passed.mix.sources and bool(looked_for) == (rank == 0)
    (own_copy / "text.jsonl").unlink()
    refusal = pass_gate(options).refusal
    assert (refusal is not None) == (rank == 0), "a run tells all ranks what the first one found"
    if refusal is not None:
        assert isinstance(refusal, ConfigError)
        assert "text.jsonl" in str(refusal) and "is not built" not in str(refusal)
    wrong = [*arguments_of(workplace, *settings, "train.lr=-1")]
    looked_for.clear()
    with pytest.raises(ConfigError, match=r"train\.lr is -1") as refused:
        pass_gate(parse_arguments(wrong))
    assert ("text.jsonl" in str(refused.value)) == bool(looked_for) == (rank == 0)


def test_trackers_that_cannot_work_are_told_with_everything_else(
    dry_run: DryRun, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def problems(run: Any) -> list[str]:
        return [f"no login for {run.telemetry.wandb_project}"]

    monkeypatch.setattr("cpt.job.gate.tracker_problems", problems)
    assert dry_run("telemetry.wandb_project=kana", "train.total_steps=1000") == 78
    message = capsys.readouterr().err
    assert "no login for kana" in message and "the data cannot feed this run" in message


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (folder / "model.safetensors.incomplete").touch()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(lambda folder: (folder / "model.safetensors").unlink(), "neither", id="none"),
        pytest.param(cut_weights, "a download is going on or was cut off", id="cut-off"),
    ],
)
def test_weights_that_are_not_there_whole_are_refused_by_the_dry_run(
    dry_run: DryRun,
    workplace: Path,
    tmp_path: Path,
    capsys: Any,
    spoil: Callable[[Path], None],
    words: str,
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(workplace / "weights", folder)
    spoil(folder)
    assert dry_run(f"model.path={folder}") == 78
    assert words in capsys.readouterr().err


@pytest.fixture
def trained(workplace: Path) -> Iterator[Path]:
    """A run directory whose newest checkpoint has a manifest; its tensors are never looked at."""
    mix = load_mix(workplace / "mix.yaml")
    data = BuiltData.open(workplace / "built", verify=False, mix=mix)
    ledger = Ledger.start(mix, data.manifest.row_hashes())
    state = {
        "model_config": {},
        "identity": {"seed": 1234, "seq_len": 64, "global_batch_size": 1},
        "progress": Progress(step=1, updates=1).to_json(),
        "ledger": ledger.to_json(),
    }
    tensors = {}
    for name, shape in parameter_shapes(load_config(workplace / "weights", None)).items():
        tensors[name] = TensorRecord(shape=shape, dtype="float32")
    folder = workplace / "run" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    manifest = Manifest(step=1, files=(), tensors=tensors, layout={}, versions={}, state=state)
    write_manifest(folder, manifest)
    baseline = workplace / "run" / "guard" / "baseline.json"
    baseline.parent.mkdir()
    baseline.write_text("{}", encoding="utf-8")
    yield folder
    shutil.rmtree(workplace / "run")


@pytest.fixture
def trained_with(trained: Path) -> Callable[..., None]:
    """`trained_with(lr=...)`: let the checkpoint tell this schedule."""

    def write(**train: Any) -> None:
        manifest = read_manifest(trained)
        schedule = {"lr": 1e-3, "min_lr_ratio": 0.1, "schedule": "cosine", "total_steps": 2}
        schedule |= {"warmup_steps": 0, "decay_steps": 0, **train}
        manifest.state["config"] = {"train": schedule}
        write_manifest(trained, manifest)

    return write


def test_another_schedule_is_refused_before_weights_are_read_unless_it_is_accepted(
    dry_run: DryRun, trained_with: Callable[..., None], capsys: Any
) -> None:
    trained_with(total_steps=4)
    assert dry_run() == 78
    assert "train.total_steps 4 -> 2" in capsys.readouterr().err
    assert dry_run("train.accept_schedule_change=true") == 0
    printed = capsys.readouterr().out
    assert "train.total_steps: 4 -> 2" in printed and "step 1 had 0.001, step 2 has" in printed


def test_other_settings_than_those_of_the_checkpoint_are_told(
    dry_run: DryRun, trained_with: Callable[..., None], capsys: Any
) -> None:
    trained_with(dtype="bf16", weight_decay=0.5)
    assert dry_run() == 0
    told = capsys.readouterr().out
    assert "train.dtype: 'bf16' -> 'fp32'" in told and "train.weight_decay: 0.5 -> 0.1" in told


def test_checkpoint_beyond_the_last_step_is_told(
    dry_run: DryRun, trained_with: Callable[..., None], capsys: Any
) -> None:
    trained_with(total_steps=4)
    assert dry_run("train.total_steps=1") == 0
    assert "train.total_steps is 1: nothing is left to do" in capsys.readouterr().out


def test_checkpoint_that_tells_no_configuration_is_taken_with_one_line(
    dry_run: DryRun, trained: Path, capsys: Any
) -> None:
    assert dry_run() == 0
    assert "nothing can be compared" in capsys.readouterr().out


def test_resumed_run_passes_the_gate(dry_run: DryRun, trained: Path, capsys: Any) -> None:
    assert dry_run() == 0
    assert "step 1" in capsys.readouterr().out


def test_run_that_is_another_one_is_refused_before_weights_are_read(
    dry_run: DryRun, trained: Path, capsys: Any
) -> None:
    assert dry_run("train.seed=5") == 78
    message = capsys.readouterr().err
    assert f"{trained.name} was trained with seed 1234, now it is 5." in message


def edit_manifest(folder: Path, edit: Callable[[Manifest], None]) -> None:
    manifest = read_manifest(folder)
    edit(manifest)
    write_manifest(folder, manifest)


def test_everything_that_differs_from_the_checkpoint_is_refused_in_one_message(
    dry_run: DryRun, trained: Path, workplace: Path, capsys: Any
) -> None:
    text = (workplace / "mix.yaml").read_text(encoding="utf-8")
    edited = workplace / "edited.yaml"
    edited.write_text(text.replace("max_epochs: 4", "max_epochs: 8"), encoding="utf-8")
    edit_manifest(trained, lambda manifest: manifest.state["model_config"].update(swiglu_limit=9.0))
    settings = ["train.seed=5", "train.global_batch_size=2", f"data.mix={edited}"]
    assert dry_run(*settings) == 78
    message = capsys.readouterr().err
    assert f"{trained.name} was trained with seed 1234, now it is 5." in message
    assert f"{trained.name} was trained with global_batch_size 1, now it is 2." in message
    assert "was trained with swiglu_limit 9.0 of the model's config.json, now it is 7.0" in message
    assert "The data mix was edited since step 0" in message


def test_checkpoint_is_compared_before_the_mix_is_built(
    dry_run: DryRun, trained: Path, workplace: Path, capsys: Any
) -> None:
    assert dry_run("train.seed=5", f"data.build_dir={workplace / 'nowhere'}") == 78
    assert "was trained with seed 1234, now it is 5." in capsys.readouterr().err


def test_checkpoint_of_another_model_is_refused_before_weights_are_read(
    dry_run: DryRun, trained: Path, capsys: Any
) -> None:
    def shorten(manifest: Manifest) -> None:
        manifest.tensors[WRONG_TENSOR] = TensorRecord(shape=(7,), dtype="float32")

    edit_manifest(trained, shorten)
    assert dry_run() == 74
    message = capsys.readouterr().err
    assert f"{trained.name} is of another model: key '{WRONG_TENSOR}' is float32 (7,)" in message


def test_step_that_does_not_exist_is_refused_with_those_that_do(
    workplace: Path, dry_run: DryRun, trained: Path, capsys: Any
) -> None:
    shutil.copytree(trained, trained.with_name("step-00000004"))
    arguments = [*arguments_of(workplace), "--dry_run", "--resume"]
    assert main([*arguments, "999"], StopRequest()) == 78
    message = capsys.readouterr().err
    assert "has no checkpoint of step 999, only of steps 4 and 1. Give one of them" in message
    assert "never" not in message
    assert main([*arguments, "1"], StopRequest()) == 0
    assert "resumes from" in capsys.readouterr().out


def test_job_that_is_queued_again_takes_the_step_until_it_was_loaded(
    workplace: Path, dry_run: DryRun, trained: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = trained.with_name("step-00000004")
    shutil.copytree(trained, newer)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    arguments = [*arguments_of(workplace), "--dry_run", "--resume", "1"]
    assert main(arguments, StopRequest()) == 0
    assert newer.name not in capsys.readouterr().out
    note_carried_out(workplace / "run", "1")
    assert main(arguments, StopRequest()) == 0
    assert newer.name in capsys.readouterr().out, "looked at first"


def test_step_that_was_asked_for_is_compared_as_the_newest_is(
    workplace: Path, dry_run: DryRun, trained: Path, capsys: Any
) -> None:
    arguments = [*arguments_of(workplace, "train.seed=5"), "--dry_run", "--resume", "1"]
    assert main(arguments, StopRequest()) == 78
    assert "was trained with seed 1234" in capsys.readouterr().err


def test_run_without_a_usable_checkpoint_is_refused_before_weights_are_read(
    dry_run: DryRun, trained: Path, capsys: Any
) -> None:
    (trained / "half-a-file").write_bytes(b"")
    assert dry_run() == 74
    message = capsys.readouterr().err
    assert f"no usable checkpoint:\n    {trained.name}/half-a-file: not in the manifest." in message


def test_checkpoint_with_files_of_wrong_sizes_is_passed_over_and_told(
    dry_run: DryRun, trained: Path, capsys: Any
) -> None:
    newer = trained.with_name("step-00000004")
    shutil.copytree(trained, newer)
    (newer / "half-a-file").write_bytes(b"")
    assert dry_run() == 0
    told = capsys.readouterr().out
    assert f"step 1 (passed over: {newer.name}/half-a-file: not in the manifest.)" in told


def test_run_that_goes_on_without_its_baseline_is_refused_before_weights_are_read(
    dry_run: DryRun, trained: Path, workplace: Path, capsys: Any
) -> None:
    (workplace / "run" / "guard" / "baseline.json").unlink()
    assert dry_run() == 78
    message = capsys.readouterr().err
    assert "baseline.json is missing, and at step 1 the untouched model is gone" in message
    assert dry_run("guard.enabled=false") == 0


def test_mix_edited_since_the_checkpoint_is_refused_before_weights_are_read(
    dry_run: DryRun, trained: Path, workplace: Path, capsys: Any
) -> None:
    text = (workplace / "mix.yaml").read_text(encoding="utf-8")
    edited = workplace / "edited.yaml"
    edited.write_text(text.replace("max_epochs: 4", "max_epochs: 8"), encoding="utf-8")
    assert dry_run(f"data.mix={edited}") == 78
    assert "The data mix was edited since step 0" in capsys.readouterr().err
    assert dry_run(f"data.mix={edited}", "data.accept_mix_change=true") == 0


def test_refusals_of_several_kinds_end_with_the_code_of_the_first_cure() -> None:
    def refusing(error: Exception) -> Callable[[], None]:
        def check() -> None:
            raise error

        return check

    found = Findings()
    found.attempt(refusing(StorageError("no room")))
    assert isinstance(joined(found), StorageError)
    found.attempt(refusing(DataError("runs dry")))
    assert isinstance(joined(found), DataError)
    found.add(["no such key"])
    error = joined(found)
    assert isinstance(error, ConfigError)
    assert str(error) == "no room\nruns dry\nno such key"


def test_refusal_that_stands_alone_stays_what_it_is() -> None:
    def check() -> None:
        raise CheckpointError("damaged")

    found = Findings()
    assert found.attempt(check) is None
    assert isinstance(joined(found, Findings()), CheckpointError)


def test_refusal_of_the_operating_system_keeps_its_cause_and_code() -> None:
    def unreachable() -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    def full() -> None:
        raise OSError(28, "No space left on device", "runs")

    found = Findings()
    assert found.attempt(unreachable) is None
    error = joined(found)
    assert isinstance(error, InternalError)
    assert isinstance(error.__cause__, ConnectionRefusedError)
    assert found.attempt(full) is None
    assert isinstance(found.errors[1], StorageError)
    assert (
        str(found.errors[1])
        == "runs: No space left on device. Free space, or choose another place."
    )


def test_nothing_found_is_no_error() -> None:
    found = Findings()
    assert found.attempt(lambda: 3) == 3
    found.add([])
    assert joined(found) is None

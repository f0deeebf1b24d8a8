"""The product as users start it, with the real tokenizer and vocabulary on two processes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config

from cpt.checkpoint.manifest import PARTS, read_manifest
from cpt.checkpoint.reader import find_checkpoint, list_steps, step_folder
from cpt.cli import main
from cpt.errors import CheckpointError
from cpt.export.huggingface import export_checkpoint
from cpt.export.run_export import ExportForm, export_run
from cpt.model.weights import mxfp4
from cpt.telemetry.metrics import read_events
from cpt.training.sampling import Sampling
from data_pipeline.text.harmony import CHANNEL, END, MESSAGE, RETURN
from data_pipeline.text.tokenizer import encode
from tests.dist.test_layout_parity import assert_same_tensors, stored_tensors
from tests.support.launcher import ROOT, Launch, free_port, rank_environment
from tests.support.launcher import start as start_ranks
from tests.support.service import SMALL_GUARD

pytestmark = pytest.mark.dist
STEPS = 6
HALF = 3
SAVED = (6, 4)
"""Checkpoints of a finished run, the newest first: `keep_last` is 2."""
EXPORTED = f"step-{STEPS:08d}"
RUN = ROOT / "cpt" / "run.py"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mix with short rows, a run YAML and a DeepSpeed JSON; built data is shared by all tests."""
    folder = tmp_path_factory.mktemp("run")
    sample = ROOT / "data_pipeline" / "sample"
    names = {"ja_essay": ("ja", 0.5), "en_web": ("en", 0.3), "en_math": ("math", 0.2)}
    sources = []
    for name, (language, weight) in names.items():
        source = {
            "name": name,
            "language": language,
            "domain": name,
            "path": str(sample / f"{name}.jsonl"),
            "weight": weight,
            "held_out_share": 0.1,
        }
        sources.append(source)
    mix = {"seq_len": 256, "seed": 1, "guard": SMALL_GUARD, "sources": sources}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    run = {
        "model": {"init": "tiny", "router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.01},
        "data": {"mix": "mix.yaml"},
        "train": {
            "seq_len": 256,
            "global_batch_size": 2,
            "total_steps": STEPS,
            "lr": 1e-3,
            "warmup_steps": 2,
            "dtype": "bf16",
        },
        "guard": {"max_documents": 1},
        "checkpoint": {"interval_steps": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    zero = {"stage": 3, "stage3_param_persistence_threshold": "auto", "reduce_bucket_size": "auto"}
    ds = {
        "zero_optimization": zero,
        "sequence_parallel_size": 2,
        "expert_parallel": {"enabled": True, "autoep_size": 2},
    }
    (folder / "ds.json").write_text(json.dumps(ds))
    return folder


def arguments_of(run_dir: str, *arguments: str) -> list[str]:
    """Return the command line of a run in the workplace."""
    return ["--ds_config", "ds.json", "--config", "run.yaml", "--run_dir", run_dir, *arguments]


def environments(world_size: int = 2) -> list[dict[str, str]]:
    """Return the environment of each rank of one run."""
    port = free_port()
    return [rank_environment(rank, world_size, port) for rank in range(world_size)]


def start(workplace: Path, run_dir: str, *arguments: str) -> Launch:
    """Start two ranks of a run in the workplace, forked from a process with all imports."""
    return start_ranks(RUN, arguments_of(run_dir, *arguments), environments(), workplace)


def set_options(*settings: str) -> list[str]:
    """Return `--set` arguments."""
    arguments = []
    for text in settings:
        arguments += ["--set", text]
    return arguments


def finish(workplace: Path, run_dir: str, *arguments: str) -> tuple[list[int], str]:
    """Do a run; return exit codes and rank 0's output."""
    codes, outputs = start(workplace, run_dir, *arguments).wait()
    return codes, outputs[0]


def finish_new_processes(workplace: Path, run_dir: str, *arguments: str) -> tuple[list[int], str]:
    """Do a run as `finish` does, on processes that import everything themselves."""
    command = [sys.executable, str(RUN), *arguments_of(run_dir, *arguments)]
    processes = []
    for environment in environments():
        process = subprocess.Popen(
            command,
            cwd=workplace,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
    outputs = [process.communicate(timeout=480)[0] for process in processes]
    return [process.returncode for process in processes], outputs[0]


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir / "metrics.jsonl") if event["event"] == kind]


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return events_of(run_dir, "step")


@pytest.fixture(scope="module")
def whole(workplace: Path) -> Path:
    """An undisturbed run."""
    arguments = set_options(
        "telemetry.wandb=offline",
        "telemetry.export_at_end=true",
        f"telemetry.sample_interval_steps={HALF}",
        "telemetry.sample_tokens=3",
        "telemetry.memory_report=true",
    )
    codes, output = finish_new_processes(workplace, "whole", *arguments)
    assert codes == [0, 0], output
    (workplace / "whole.log").write_text(output, encoding="utf-8")
    return workplace / "whole"


def test_undisturbed_run_writes_what_the_contract_says(whole: Path) -> None:
    steps = steps_of(whole)
    keys = {"event", "step", "loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second"}
    keys |= {"slots"}
    keys |= {"loss_by_source", "loss_by_language", "tokens_by_source", "bytes_sent"}
    keys |= {"time", "peak_memory_bytes", "total_tokens"}
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert all(step.keys() == keys for step in steps)
    assert all(step["tokens"] == sum(step["tokens_by_source"].values()) for step in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    guard = events_of(whole, "guard")
    assert {event["step"] for event in guard} == {0, STEPS}
    assert {event["language"] for event in guard} == {"ja", "en", "math"}
    assert all(event["delta_percent"] < 0 for event in guard if event["step"] == STEPS)
    resolved = yaml.safe_load((whole / "config.resolved.yaml").read_text())
    assert (resolved["sp_size"], resolved["ep_size"]) == (2, 2)
    assert tuple(list_steps(whole)) == SAVED
    assert list((whole / "wandb").glob("offline-run-*/*.wandb"))


def test_job_log_tells_steps_saves_looks_samples_and_export_line_by_line(whole: Path) -> None:
    text = whole.with_suffix(".log").read_bytes().decode()
    assert "\r" not in text
    found = re.findall(r"^\d{4}-\d\d-\d\d \S+ rank 0 \S+ INFO (.*)$", text, re.MULTILINE)
    steps = [line for line in found if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == [f"step 1/{STEPS}", f"step {STEPS}/{STEPS}"]
    for figure in ("loss ", " tokens/s", " left", "peak memory ", "goodput "):
        assert all(figure in line for line in steps), figure
    begun = [line.split(":")[0] for line in found if line.startswith("checkpoint of step")]
    assert begun.count("checkpoint of step 4 begun") == 1
    assert begun.count("checkpoint of step 4 finished") == 1
    looks = [line for line in found if line.startswith("guard at step")]
    assert len(looks) == 2 and "; action: none; " in looks[1]
    assert len([line for line in found if line.startswith(f"sample at step {HALF}: ")]) == 2
    assert f"export of {EXPORTED} begun" in found


def test_libraries_say_nothing_on_the_terminal(whole: Path) -> None:
    text = whole.with_suffix(".log").read_text(encoding="utf-8")
    for noise in ("Setting accelerator", "it/s", "Writing model shards", "deprecated"):
        assert noise not in text, noise


def test_memory_of_every_rank_is_the_predicted_one_within_15_percent(whole: Path) -> None:
    """Each part of the state is, and so is the sum of all.

    The peak alone is tested in tests/dist/test_memory.py.  Here it is the reduction of a table's
    gradient, of which gloo reduces a copy.  Whether gloo's thread lets go of the copy before or
    after the fp32 part is made is up to the machine.
    """
    (event,) = events_of(whole, "memory")
    predicted = event["predicted"]
    assert event["step"] == 2 and len(event["measured_by_rank"]) == 2
    assert predicted.keys() == {"weights", "gradients", "optimizer", "peak of a step"}
    for rank in event["measured_by_rank"]:
        assert rank.keys() == predicted.keys()
        for part in ("weights", "gradients", "optimizer"):
            assert rank[part] == pytest.approx(predicted[part], rel=0.15), part
        assert sum(rank.values()) == pytest.approx(sum(predicted.values()), rel=0.15)


def test_export_at_the_end_and_its_checkpoint_continue_text_as_plain_transformers_does(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = whole / "export" / EXPORTED
    prompt = "\u3080\u304b\u3057\u3001"
    command = ["sample", "--prompt", prompt, "--max_new_tokens", "4"]
    assert main([*command, "--model", str(out)]) == 0
    from_export = capsys.readouterr().out
    assert main([*command, "--run_dir", str(whole)]) == 0
    assert capsys.readouterr().out == from_export
    model = AutoModelForCausalLM.from_pretrained(str(out))
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert from_export == f"--- {prompt}\n{tokenizer.decode(tokens)}\n"


def test_question_is_put_in_the_harmony_format_of_the_exported_chat_template(
    whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def reply(model: Any, prompt: list[int], sampling: Sampling) -> list[int]:
        asked.append(prompt)
        return [*harmony_reply("analysis", "hm"), END, *harmony_reply("final", "42"), RETURN]

    monkeypatch.setattr("cpt.offline.sampling.generate", reply)
    out = whole / "export" / EXPORTED
    command = ["sample", "--model", str(out), "--chat", "--effort", "low"]
    command += ["--developer", "Be brief.", "--prompt", "Q?"]
    assert main(command) == 0
    assert capsys.readouterr().out == "--- Q?\n[analysis]\nhm\n[final]\n42\n"
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Q?"}]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, reasoning_effort="low"
    )
    assert asked == [expected["input_ids"]]


def harmony_reply(channel: str, text: str) -> list[int]:
    return [CHANNEL, *encode(channel).tolist(), MESSAGE, *encode(text).tolist()]


def test_samples_are_drawn_with_their_seed(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", "--model", str(whole / "export" / EXPORTED)]
    command += ["--prompt", "a", "--max_new_tokens", "6", "--temperature", "5", "--top_p", "0.99"]
    printed = []
    for seed in ("1", "1", "2"):
        assert main([*command, "--seed", seed]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_fixed_prompts_are_continued_during_training(whole: Path) -> None:
    samples = events_of(whole, "sample")
    drawn = [(event["step"], event["number"]) for event in samples]
    assert drawn == [(HALF, 0), (HALF, 1), (STEPS, 0), (STEPS, 1)]
    japanese = "\u6614\u3005\u3001\u3042\u308b\u3068\u3053\u308d\u306b"
    assert {event["prompt"] for event in samples} == {japanese, "Once upon a time"}
    for event in samples:
        assert 1 <= len(event["tokens"]) <= 3
        assert isinstance(event["text"], str)


def test_model_card_says_what_was_trained_on_what_and_nothing_about_the_machine(
    whole: Path,
) -> None:
    card = (whole / "export" / EXPORTED / "README.md").read_text()
    tokens = sum(step["tokens_by_source"]["ja_essay"] for step in steps_of(whole))
    assert f"| ja_essay | ja | ja_essay | 0.5 | {tokens:,} |" in card
    assert f"Started from `random weights (tiny)`. {STEPS} optimizer steps" in card
    assert "Held-out text" in card
    assert str(whole.parent) not in card and str(ROOT) not in card


@pytest.mark.slow
def test_ranks_of_the_launcher_compare_the_rules_of_mxfp4_as_one_process_does(
    whole: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = export_checkpoint(step_folder(whole, STEPS), tmp_path / "base", "mxfp4")
    arguments = ["export", "--run_dir", str(whole), "--format", "mxfp4", "--base", str(base)]
    arguments += ["--score_rules", "--exponent", "ceil"]
    command = [str(Path(sys.executable).parent / "deepspeed"), "--master_port", str(free_port())]
    command += ["--num_gpus", "2", str(ROOT / "cpt" / "cli.py"), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "ranks"), "--ep_size", "2"],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"-> {tmp_path / 'ranks'}") == 1, "told once"
    monkeypatch.chdir(workplace)
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    files = ("mxfp4_cost.json", "mxfp4_report.json", "mxfp4_rules.json")
    for name in (*files, "model.safetensors", "README.md"):
        assert (tmp_path / "ranks" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one", "ranks"]


def test_mxfp4_export_is_read_by_transformers_as_the_rounded_weights_and_says_what_it_costs(
    whole: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = step_folder(whole, STEPS)
    monkeypatch.chdir(workplace)  # where the run found its built data
    form = ExportForm(format_name="mxfp4")
    exported = export_run(whole, checkpoint, tmp_path / "mxfp4", form, "always")
    written = json.loads((exported / "mxfp4_cost.json").read_text())["domains"]
    costs = {cost["domain"]: cost for cost in written}
    # the last event of a domain counts: that of the final weights, computed in bf16
    measured = {event["domain"]: event for event in events_of(whole, "guard")}
    assert costs.keys() == measured.keys()
    for domain, event in measured.items():
        in_bf16 = costs[domain]["bits_per_byte_bf16"]
        assert in_bf16 == pytest.approx(event["bits_per_byte"], rel=1e-3)
        assert costs[domain]["bits_per_byte_mxfp4"] != in_bf16
    assert "Cost of MXFP4" in (exported / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(
        str(exported), quantization_config=Mxfp4Config(dequantize=True)
    )
    plain = export_checkpoint(checkpoint, tmp_path / "bf16", "bf16")
    weights = load_file(plain / "model.safetensors")
    values = dict(model.named_parameters())
    assert values.keys() == weights.keys()
    for name, value in weights.items():
        expected = value
        if ".experts." in name and value.ndim == 3:
            expected = mxfp4.decode(*mxfp4.encode(value))
        assert torch.equal(values[name].detach().cpu(), expected), name


@pytest.mark.case(
    "R1", "weights, moments, losses, lr, tokens: bit-identical, across an asynchronous save"
)
def test_two_halves_of_a_run_equal_the_whole_bit_for_bit(workplace: Path, whole: Path) -> None:
    codes, output = finish(workplace, "halves", "--set", f"train.stop_at_step={HALF}")
    assert codes == [0, 0], output
    codes, output = finish(workplace, "halves")
    assert codes == [0, 0] and "resuming from" in output, output
    halves = workplace / "halves"
    first = step_folder(whole, STEPS)
    second = step_folder(halves, STEPS)
    for part in PARTS:
        assert_same_tensors(stored_tensors(first, part), stored_tensors(second, part))
    for step, expected in zip(steps_of(halves), steps_of(whole), strict=True):
        for key in ("step", "loss", "grad_norm", "lr", "tokens_by_source", "bytes_sent"):
            assert step[key] == expected[key], key
    # the balancing loss is on, and its gradient needs the load of the step before, which only the
    # checkpoint knows
    folders = (step_folder(halves, HALF), first, second)
    halfway, once, resumed = (read_manifest(path).state["router_load"] for path in folders)
    assert len(set(itertools.chain.from_iterable(halfway))) > 1
    assert once == resumed != halfway


def test_finished_run_started_again_does_nothing(workplace: Path, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    codes, output = finish(workplace, "whole", "--set", "telemetry.export_at_end=true")
    assert codes == [0, 0], output
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_sampling_and_measuring_on_all_ranks_gives_what_training_gave_at_that_step(
    workplace: Path, whole: Path
) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    prompt = "Once upon a time"
    arguments = ["--measure", *set_options("telemetry.sample_tokens=3")]
    codes, output = finish(workplace, "whole", "--sample", prompt, *arguments)
    at_the_end = [event for event in events_of(whole, "sample") if event["step"] == STEPS]
    (expected,) = [event["text"] for event in at_the_end if event["prompt"] == prompt]
    assert codes == [0, 0] and f"{prompt}|{expected}\n" in output, output
    assert (whole / "metrics.jsonl").read_bytes() == before
    measured = json.loads((whole / "guard" / f"measured-{STEPS:08d}.json").read_text())["domains"]
    found = {domain: figures["bits_per_byte"] for domain, figures in measured.items()}
    logged = [event for event in events_of(whole, "guard") if event["step"] == STEPS]
    assert found == {event["domain"]: event["bits_per_byte"] for event in logged}
    assert main(["guard", "audit", "--run_dir", str(whole)]) == 0


def test_stop_before_the_first_step_leaves_with_75_and_nothing_to_save(
    workplace: Path, whole: Path
) -> None:
    run_dir = workplace / "stopped"
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    codes, output = finish(workplace, "stopped")
    assert codes == [75, 75] and "STOP file (rank 0). There was nothing to save" in output, output
    assert list_steps(run_dir) == [] and not (run_dir / "STOP").exists()


def test_signal_to_one_rank_stops_all_at_the_same_step(workplace: Path) -> None:
    started = start(workplace, "signalled")
    deadline = time.monotonic() + 120
    metrics = workplace / "signalled" / "metrics.jsonl"
    while time.monotonic() < deadline:
        if metrics.exists() and '"event": "step"' in metrics.read_text():
            break
        time.sleep(0.1)
    os.kill(started.pids[1], signal.SIGUSR1)
    codes, (output, _) = started.wait()
    assert codes == [75, 75] and "SIGUSR1 (rank 1). Saved; start again to go on." in output, output
    assert list_steps(workplace / "signalled") == [steps_of(workplace / "signalled")[-1]["step"]]


@pytest.mark.case("R5", "exit 78 naming the field")
def test_changed_seed_or_mix_is_refused_on_resume(workplace: Path, whole: Path) -> None:
    codes, output = finish(workplace, "whole", "--set", "train.seed=99")
    assert codes == [78, 78] and "seed 1234, now it is 99" in output, output


@pytest.mark.case("R4", "refused with a diff; accepted as a new segment")
def test_edited_mix_is_refused_with_the_change_and_accepted_as_a_new_segment(
    workplace: Path, whole: Path
) -> None:
    shutil.copytree(whole, workplace / "edited")
    shutil.rmtree(step_folder(workplace / "edited", STEPS))
    original = (workplace / "mix.yaml").read_text()
    mix = yaml.safe_load(original)
    mix["sources"][0]["weight"] = 0.4
    mix["sources"][1]["weight"] = 0.4
    (workplace / "mix.yaml").write_text(yaml.safe_dump(mix))
    try:
        codes, output = finish(workplace, "edited")
        assert codes == [78, 78], output
        assert "ja_essay" in output and "data.accept_mix_change=true" in output, output
        codes, output = finish(workplace, "edited", "--set", "data.accept_mix_change=true")
        assert codes == [0, 0], output
    finally:
        (workplace / "mix.yaml").write_text(original)
    state = read_manifest(step_folder(workplace / "edited", STEPS)).state
    assert [segment["start_step"] for segment in state["ledger"]["segments"]] == [0, SAVED[1]]


@pytest.mark.slow
@pytest.mark.case("C6", "full launch: file named, previous one used, same final weights")
def test_damaged_newest_checkpoint_is_named_and_the_previous_one_is_used(
    workplace: Path, whole: Path
) -> None:
    run_dir = workplace / "damaged"
    shutil.copytree(whole, run_dir)
    victim = step_folder(run_dir, STEPS) / "__1_0.distcp"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    step, rejected = find_checkpoint(run_dir, "auto")
    assert step == SAVED[1] and f"{EXPORTED}/__1_0.distcp" in rejected[0]
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp"):
        find_checkpoint(run_dir, str(STEPS))
    codes, output = finish(workplace, "damaged")
    assert codes == [0, 0] and f"checkpoint rejected: {EXPORTED}/__1_0.distcp" in output, output
    assert f"{EXPORTED} is set aside as .rejected-{EXPORTED}" in output
    assert tuple(list_steps(run_dir)) == SAVED
    assert not list((run_dir / "checkpoints").glob(".*")), (
        "the damaged one goes once a newer one is complete"
    )
    expected = stored_tensors(step_folder(whole, STEPS), "master")
    assert_same_tensors(expected, stored_tensors(step_folder(run_dir, STEPS), "master"))


@pytest.mark.slow
def test_going_back_to_an_older_step_sets_the_newer_ones_aside(
    workplace: Path, whole: Path
) -> None:
    shutil.copytree(whole, workplace / "back")
    codes, output = finish(workplace, "back", "--resume", str(SAVED[1]))
    assert codes == [0, 0], output
    names = {entry.name for entry in (workplace / "back" / "checkpoints").iterdir()}
    assert names == {step_folder(whole, step).name for step in SAVED}, (
        "the abandoned one goes once the run has come to its step again"
    )


@pytest.mark.slow
@pytest.mark.case("E2", "there and back is byte-equal")
def test_zero_steps_round_trip_is_byte_equal(workplace: Path, whole: Path) -> None:
    """The weights go from Hugging Face's format to the project's and back."""
    source = whole / "export" / EXPORTED
    arguments = set_options(
        "model.init=null",
        f"model.path={source}",
        "train.total_steps=0",
        "train.warmup_steps=0",
        "telemetry.export_at_end=true",
    )
    codes, output = finish(workplace, "round-trip", *arguments)
    assert codes == [0, 0], output
    before = load_file(source / "model.safetensors")
    after = load_file(workplace / "round-trip" / "export" / "step-00000000" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value.view(torch.int16), after[name].view(torch.int16)), name


def test_launcher_passes_the_exit_code_of_a_bad_configuration(workplace: Path) -> None:
    """The run is started by `deepspeed` itself."""
    (workplace / "typo.json").write_text('{"zero_optimisation": {"stage": 3}}')
    bin_dir = Path(sys.executable).parent
    command = [str(bin_dir / "deepspeed"), "--master_port", str(free_port()), "--num_gpus", "2"]
    command += [str(ROOT / "cpt/run.py"), "--ds_config", "typo.json", "--config", "run.yaml"]
    done = subprocess.run(
        command,
        cwd=workplace,
        env={**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 78, done.stdout + done.stderr
    assert "zero_optimisation is not a known key. Did you mean 'zero_optimization'?" in done.stderr

"""Offline commands give the files of one process on any ranks, also after they were killed."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GptOssConfig, GptOssForCausalLM

from cpt.cli import main
from cpt.offline.pieces import Pieces
from cpt.resilience.faults import InjectedFault
from data_pipeline.build.build import build
from data_pipeline.config.mix_file import load_mix
from data_pipeline.text.tokenizer import VOCAB_SIZE
from tests.support.launcher import ROOT, launch
from tests.support.records import write_jsonl

CLI = ROOT / "cpt" / "cli.py"
SEQ_LEN = 16
TEXTS = [f"Lamp {n} along the river was lit before dusk, on day {n * n}." for n in range(14)]
TASKS = [
    {"name": "text", "kind": "perplexity", "path": "texts.jsonl"},
    {"name": "choice", "kind": "multiple_choice", "path": "choices.jsonl"},
    {"name": "reply", "kind": "exact_match", "path": "questions.jsonl", "max_new_tokens": 3},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with four experts, and inputs of every command."""
    place = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    for name in ("base", "tuned"):
        config = GptOssConfig(vocab_size=VOCAB_SIZE, initializer_range=0.3, **sizes, **heads)
        GptOssForCausalLM(config).save_pretrained(place / name)
    write_jsonl(place / "texts.jsonl", [{"text": text} for text in TEXTS])
    choices = []
    questions = []
    for number, text in enumerate(TEXTS[:5]):
        choices.append({"question": text, "choices": ["one", "two", "three"], "answer": number % 3})
        questions.append({"prompt": text, "answer": "yes"})
    write_jsonl(place / "choices.jsonl", choices)
    write_jsonl(place / "questions.jsonl", questions)
    tasks = [{"language": "en", "max_drop": 50.0, **task} for task in TASKS]
    (place / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    kind = {"language": "en", "domain": "web", "path": "texts.jsonl", "weight": 1.0}
    mix = {
        "seq_len": SEQ_LEN,
        "seed": 1,
        "near_duplicates": 0,
        "guard": {"min_documents": 1, "min_tokens": 1},
        "sources": [{"name": "english", "held_out_share": 0.4, **kind}],
    }
    (place / "mix.yaml").write_text(yaml.safe_dump(mix))
    build(load_mix(place / "mix.yaml"), place / "build", progress=False)
    return place


def kl_targets(folder: Path, out: Path) -> list[str]:
    model = ("--model", str(folder / "base"), "--build", str(folder / "build"))
    return ["kl_targets", *model, "--source", "english", "--top_k", "5", "--out", str(out)]


def evaluate(folder: Path, out: Path) -> list[str]:
    model = ("--model", str(folder / "base"), "--tasks", str(folder / "tasks.yaml"))
    return ["evaluate", *model, "--no_baseline", "--out", str(out)]


def replay(folder: Path, out: Path) -> list[str]:
    prompts = ("--prefixes", str(folder / "texts.jsonl"), "--prefix_tokens", "3")
    model = ("--model", str(folder / "base"), "--max_new_tokens", "5")
    return ["replay", *model, *prompts, "--out", str(out)]


def merge(folder: Path, out: Path) -> list[str]:
    models = ("--base", str(folder / "base"), "--tuned", str(folder / "tuned"))
    mix = ("--mix", str(folder / "mix.yaml"), "--build_dir", str(folder / "build"))
    return ["merge", *models, *mix, "--alpha", "0,0.5", "--score_only", "--out", str(out)]


COMMANDS = (kl_targets, evaluate, replay, merge)
Command = Callable[[Path, Path], list[str]]


def files_of(out: Path) -> dict[str, bytes]:
    """Return the content of every file of a result."""
    if out.is_file():
        return {"": out.read_bytes()}
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, bytes]]:
    """The files that one process writes, by command."""
    found = {}
    for command in COMMANDS:
        out = folder / "one" / command.__name__
        assert main(command(folder, out)) == 0
        found[command.__name__] = files_of(out)
        assert sorted(path.name for path in out.parent.iterdir()).count(f"{out.name}.partial") == 0
    return found


def start(world_size: int, arguments: list[str], *options: str) -> list[int]:
    """Start a command on ranks, with a save after every second item of a rank."""
    return launch(CLI, world_size, [*arguments, "--save_every", "2", *options])


@pytest.mark.parametrize(
    ("command", "world_size", "ep_size"),
    [(kl_targets, 4, 2), (evaluate, 2, 2), (replay, 2, 2), (merge, 2, 2)],
)
def test_ranks_write_the_files_of_one_process(
    folder: Path,
    results: dict[str, dict[str, bytes]],
    command: Command,
    world_size: int,
    ep_size: int,
) -> None:
    out = folder / f"ranks-{world_size}-{ep_size}" / command.__name__
    codes = start(world_size, command(folder, out), "--ep_size", str(ep_size))
    assert codes == [0] * world_size
    assert files_of(out) == results[command.__name__]
    assert not out.with_name(f"{out.name}.partial").exists()


@pytest.mark.parametrize(
    ("command", "fault", "then"),
    [
        (kl_targets, "offline_pass:1:4:kill", 1),
        (evaluate, "offline_piece:*:3:killgroup", 1),
        (replay, "offline_pass:*:2:killgroup", 1),
        (merge, "offline_piece:*:3:killgroup", 1),
    ],
)
def test_killed_command_goes_on_with_another_number_of_ranks(
    folder: Path,
    results: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
    fault: str,
    then: int,
) -> None:
    out = folder / f"killed-{fault.replace(':', '-').replace('*', 'all')}" / command.__name__
    monkeypatch.setenv("CPT_ALLOW_FAULTS", "1")
    monkeypatch.setenv("CPT_FAULT", fault)
    codes = start(2, command(folder, out))
    assert any(codes) and not out.exists()
    partial = out.with_name(f"{out.name}.partial")
    kept = {path.name for path in partial.iterdir() if path.name.count(".") > 2}
    assert kept, "nothing was kept"
    monkeypatch.delenv("CPT_FAULT")
    if then == 1:
        assert main([*command(folder, out), "--save_every", "3"]) == 0
    else:
        assert start(then, command(folder, out)) == [0] * then
    assert files_of(out) == results[command.__name__]
    assert not partial.exists()


@pytest.mark.parametrize(("command", "seed"), [(kl_targets, 1), (replay, 3)])
def test_command_killed_at_random_moments_ends_with_the_same_files(
    folder: Path,
    results: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
    seed: int,
) -> None:
    out = folder / f"random-{seed}" / command.__name__
    generator = random.Random(seed)
    monkeypatch.setenv("CPT_ALLOW_FAULTS", "1")
    for _ in range(2):
        world_size = generator.choice([1, 2])
        point = generator.choice(["offline_pass", "offline_piece"])
        moment = generator.randint(1, 4)
        monkeypatch.setenv("CPT_FAULT", f"{point}:*:{moment}:killgroup")
        start(world_size, command(folder, out))
        if out.exists():
            break
    monkeypatch.delenv("CPT_FAULT")
    if not out.exists():
        assert start(2, command(folder, out)) == [0, 0]
    assert files_of(out) == results[command.__name__]


def test_stop_request_to_one_rank_ends_all_with_75_and_what_is_done_stays(
    folder: Path, results: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "stopped" / "kl_targets"
    monkeypatch.setenv("CPT_ALLOW_FAULTS", "1")
    monkeypatch.setenv("CPT_FAULT", "offline_pass:1:3:term")
    assert start(2, kl_targets(folder, out)) == [75, 75]
    pieces = sorted(path.name for path in out.with_name("kl_targets.partial").glob("english.*"))
    # the pass in progress is finished, and both ranks keep what they have of their second span
    assert [name.split(".")[1].split("-")[0] for name in pieces] == [
        "000000000",
        "000000002",
        "000000004",
        "000000006",
    ]
    monkeypatch.delenv("CPT_FAULT")
    assert main(kl_targets(folder, out)) == 0
    assert files_of(out) == results["kl_targets"]


@pytest.mark.parametrize(("command", "series"), [(replay, "texts"), (evaluate, "replies-0")])
def test_stop_request_does_not_wait_for_long_replies(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: Command, series: str
) -> None:
    tasks = [{"language": "en", "max_drop": 50.0, **TASKS[2], "max_new_tokens": 40}]
    (folder / "long.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    longer = {evaluate: ("--tasks", str(folder / "long.yaml")), replay: ("--max_new_tokens", "40")}
    out = folder / "long" / command.__name__
    arguments = [*command(folder, out), *longer[command], "--save_every", "2"]
    report = Pieces._report

    def report_and_stop(pieces: Pieces, bar: Any, num_finished: int, num_tokens: int) -> None:
        report(pieces, bar, num_finished, num_tokens)
        if pieces._num_rounds == 2 and num_tokens:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Pieces, "_report", report_and_stop)
        assert main(arguments) == 75
    pieces = sorted(out.with_name(f"{out.name}.partial").glob(f"{series}.*"))
    assert [path.name.split(".")[1] for path in pieces] == ["000000000-000000002"]
    assert main(arguments) == 0
    undisturbed = folder / "undisturbed" / command.__name__
    assert main([*command(folder, undisturbed), *longer[command]]) == 0
    assert files_of(out) == files_of(undisturbed)


def test_stop_file_ends_a_command_in_one_process(folder: Path) -> None:
    out = folder / "file" / "kl_targets"
    partial = out.with_name("kl_targets.partial")
    partial.mkdir(parents=True)
    (partial / "STOP").touch()
    assert main(kl_targets(folder, out)) == 75
    assert not partial.exists(), "nothing was done, so nothing stays"


def break_at(point: str, step: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command in this process until an error strikes."""

    def fault_point(reached: str, number: int) -> None:
        if (reached, number) == (point, step):
            raise InjectedFault("planned")

    with monkeypatch.context() as patch:
        patch.setattr("cpt.offline.pieces.fault_point", fault_point)
        patch.setattr("cpt.offline.kl_target_writer.fault_point", fault_point)
        patch.setattr("tempfile.tempdir", str(Path(arguments[-1]).parents[1]))  # for the trace
        assert main([*arguments, "--save_every", "2"]) == 70


def test_pieces_of_other_settings_or_another_model_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "other" / "kl_targets"
    break_at("offline_pass", 3, kl_targets(folder, out), monkeypatch)
    capsys.readouterr()
    arguments = kl_targets(folder, out)
    arguments[arguments.index("--top_k") + 1] = "6"
    assert main(arguments) == 78
    assert "top_k was 5, is now 6" in capsys.readouterr().err
    arguments = kl_targets(folder, out)
    arguments[arguments.index("--model") + 1] = str(folder / "tuned")
    assert main(arguments) == 78
    assert "model was " in capsys.readouterr().err
    config = folder / "base" / "config.json"
    before = config.read_text()
    try:
        config.write_text(before.replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1'))
        assert config.read_text() != before
        assert main(kl_targets(folder, out)) == 78
    finally:
        config.write_text(before)
    assert "model was " in capsys.readouterr().err


def test_result_is_not_written_over_the_tasks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = folder / "tasks.yaml"
    before = tasks.read_bytes()
    assert main(evaluate(folder, folder / "one" / ".." / "tasks.yaml")) == 78
    assert "is the file of --tasks" in capsys.readouterr().err
    assert tasks.read_bytes() == before


def test_damaged_piece_is_named_and_only_its_items_are_computed_anew(
    folder: Path,
    results: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = folder / "damaged" / "kl_targets"
    break_at("offline_publish", 0, kl_targets(folder, out), monkeypatch)
    pieces = sorted(out.with_name("kl_targets.partial").glob("english.*"))
    assert len(pieces) == 4
    content = bytearray(pieces[1].read_bytes())
    content[-1] ^= 1
    pieces[1].write_bytes(content)
    capsys.readouterr()
    assert main(kl_targets(folder, out)) == 65
    assert f"{pieces[1]}: damaged" in capsys.readouterr().err
    pieces[1].unlink()
    assert main(kl_targets(folder, out)) == 0
    assert files_of(out) == results["kl_targets"]

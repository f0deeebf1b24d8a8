"""`cpt evaluate`: tasks are scored right, drops are refused, and so is what chance would decide."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import GptOssConfig, GptOssForCausalLM

from cpt.checkpoint.reader import step_folder
from cpt.cli import main
from cpt.config.adapter_section import AdapterSection
from cpt.errors import ConfigError, DataError, EvaluationFailed
from cpt.export.huggingface import export_checkpoint
from cpt.export.tokenizer import save_tokenizer
from cpt.model.configuration import load_config
from cpt.offline import ranks
from cpt.offline.evaluation import harness
from cpt.offline.evaluation.comparison import evaluate
from cpt.offline.evaluation.harness import REQUESTS
from cpt.offline.evaluation.local import local_contents
from cpt.offline.evaluation.local_scoring import ScoredText
from cpt.offline.evaluation.scored_model import ExportedModel
from cpt.offline.evaluation.scores import Result, Score, read_result, write_result
from cpt.offline.evaluation.tasks import load_tasks
from cpt.offline.plain_model import load_export
from data_pipeline.text.tokenizer import END_OF_TEXT, VOCAB_SIZE, encode
from tests.support.adapters import write_adapter
from tests.support.lm_eval import require_lm_eval
from tests.support.records import write_jsonl

ROOT = Path(__file__).parents[2]
TEXTS = [f"Line {n}: the river and the lamp, number {n * n}." for n in range(12)]
CHOICES = [
    {"question": f"{n} is", "choices": [" one", " two", " three"], "answer": n % 3}
    for n in range(12)
]
TEXT_TASK = {
    "name": "text",
    "language": "en",
    "kind": "perplexity",
    "path": "text.jsonl",
    "max_drop": 5.0,
}
CHOICE_TASK = {
    "name": "choice",
    "language": "en",
    "kind": "multiple_choice",
    "path": "choice.jsonl",
    "max_drop": 90.0,
}
REPLY_TASK = {
    "name": "reply",
    "language": "en",
    "kind": "exact_match",
    "path": "reply.jsonl",
    "max_drop": 90.0,
    "max_new_tokens": 2,
}
TASKS = [TEXT_TASK, CHOICE_TASK, REPLY_TASK]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model, and the same one with a head that is far too sure of itself."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    model = GptOssForCausalLM(GptOssConfig(vocab_size=VOCAB_SIZE, **sizes, **heads))
    model.save_pretrained(folder / "good")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder / "bad")
    return {"good": folder / "good", "bad": folder / "bad"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records: dict[str, list[Any]] = {"text": [{"text": text} for text in TEXTS], "choice": CHOICES}
    records["reply"] = [{"prompt": text, "answer": ["yes", "no"]} for text in TEXTS]
    for name, listed in records.items():
        write_jsonl(tmp_path / f"{name}.jsonl", listed)
    write_tasks(tmp_path, TASKS)
    return tmp_path


def write_tasks(folder: Path, tasks: list[dict[str, Any]]) -> None:
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}))


def run(folder: Path, model: Path, *options: str) -> int:
    return main(
        ["evaluate", "--model", str(model), "--tasks", str(folder / "tasks.yaml"), *options]
    )


def nats_of_transformers(model: Any, tokens: list[int], start: int) -> float:
    """Return the nats of tokens[start:], given those before, from all logits at once."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    log_p = logits.log_softmax(-1)
    return -float(log_p[range(start - 1, len(tokens) - 1), tokens[start:]].sum())


def test_only_the_tokens_from_the_start_on_are_labels() -> None:
    row = ScoredText(tokens=(5, 6, 7, 8), start=2).row()
    assert row.input_ids.tolist() == [5, 6, 7, 8] and row.labels.tolist() == [-100, 7, 8, -100]
    assert ScoredText(tokens=(5,), start=1).row().labels.tolist() == [-100]


def test_a_model_passes_against_itself_and_fails_once_it_has_lost_more_than_it_may(
    models: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(folder / "base.json")
    now = str(folder / "now.json")
    assert run(folder, models["good"], "--no_baseline", "--out", base) == 0
    scores = json.loads(Path(base).read_text())["tasks"]
    model = load_export(models["good"])
    nats = [nats_of_transformers(model, [*encode(text).tolist(), END_OF_TEXT], 1) for text in TEXTS]
    expected = sum(nats) / math.log(2) / sum(map(len, TEXTS))
    # fp32 against fp64
    assert scores["text"]["value"] == pytest.approx(expected, rel=1e-5)
    assert scores["text"]["documents"] == 12
    assert scores["choice"]["value"] == pytest.approx(
        100 * np.mean(scores["choice"]["per_document"])
    )
    assert scores["reply"]["value"] == 0

    assert run(folder, models["good"], "--baseline", base, "--out", now) == 0
    verdicts = json.loads(Path(now).read_text())["verdicts"]
    assert [verdict["drop"] for verdict in verdicts] == [0, 0, 0]
    assert [verdict["state"] for verdict in verdicts] == ["kept"] * 3
    capsys.readouterr()

    assert run(folder, models["bad"], "--baseline", base, "--out", now) == 65
    printed = capsys.readouterr()
    assert "task 'text' dropped by" in printed.err
    assert "max_drop is 5" in printed.err
    assert "'choice'" not in printed.err
    assert printed.out.splitlines()[1].endswith("dropped")
    states = {v["name"]: v["state"] for v in json.loads(Path(now).read_text())["verdicts"]}
    assert states == {"text": "dropped", "choice": "kept", "reply": "kept"}


def test_a_run_with_an_adapter_is_scored_as_its_merged_export(
    models: dict[str, Path], folder: Path
) -> None:
    write_tasks(folder, [TEXT_TASK])
    config = load_config(models["good"], None, option="--model")
    section = AdapterSection(kind="lora", rank=8, expert_rank=8, alpha=32)
    write_adapter(folder / "run", models["good"], section, config)
    step = step_folder(folder / "run", 3)
    export_checkpoint(step, folder / "merged", "bf16", base=models["good"])
    assert run(folder, folder / "merged", "--no_baseline", "--out", str(folder / "a.json")) == 0
    moved = models["good"].rename(models["good"].with_name("moved"))
    asked = ["--run_dir", str(folder / "run"), "--step", "3"]
    files = ["--tasks", str(folder / "tasks.yaml"), "--out", str(folder / "b.json")]
    try:
        assert main(["evaluate", *asked, *files, "--no_baseline"]) == 78, "the base is gone"
        assert not (folder / "b.json").exists()
        asked += ["--base", str(moved)]
        assert main(["evaluate", *asked, *files, "--no_baseline"]) == 0
    finally:
        moved.rename(models["good"])
    merged = read_result(folder / "a.json")
    scored = read_result(folder / "b.json")
    assert scored.scores == merged.scores
    assert scored.model == str(step)
    assert run(folder, models["good"], "--no_baseline", "--out", str(folder / "c.json")) == 0
    assert read_result(folder / "c.json").scores != merged.scores


def beside_one_that_found_step_9(value: Any, group: Any) -> list[Any]:
    """Gather from two ranks, of which the other one looks at a newer checkpoint."""
    return [value, "step-00000009"] if isinstance(value, str) else [value]


def test_ranks_that_found_different_checkpoints_are_refused(
    models: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tasks(folder, [TEXT_TASK])
    monkeypatch.setattr(ranks, "gather_json", beside_one_that_found_step_9)
    with pytest.raises(ConfigError, match=r"different checkpoints: good, step-00000009.*--step"):
        evaluate(ExportedModel(models["good"]), folder / "tasks.yaml", folder / "a.json", None)


def test_step_and_base_without_a_run_are_refused(
    models: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--no_baseline", "--out", str(folder / "a.json"), "--step", "3"]
    assert run(folder, models["good"], *options) == 78
    assert "--step and --base are for the checkpoint of a run" in capsys.readouterr().err


def test_a_likelier_choice_is_the_answer(models: dict[str, Path], folder: Path) -> None:
    out = folder / "out.json"
    evaluate(ExportedModel(models["good"]), folder / "tasks.yaml", out, None)
    model = load_export(models["good"])
    right = []
    for record in CHOICES:
        start = len(encode(record["question"]))
        nats = []
        for choice in record["choices"]:
            tokens = encode(f"{record['question']} {choice}").tolist()
            nats.append(nats_of_transformers(model, tokens, start) / len(choice))
        right.append(float(int(np.argmin(nats)) == record["answer"]))
    assert json.loads(out.read_text())["tasks"]["choice"]["per_document"] == right


def baseline(folder: Path) -> Path:
    """Write a baseline as if measured, without a model."""
    tasks = load_tasks(folder / "tasks.yaml")
    contents = local_contents(tasks)
    scores = {}
    for task in tasks:
        scores[task.name] = Score(
            kind=task.kind,
            language="en",
            value=50.0,
            documents=12,
            content=contents[task.name],
        )
    path = folder / "base.json"
    write_result(path, Result(model="base", scores=scores))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"max_drop": 9.0},
            r"task 'choice': 12 documents show a drop of max_drop 9 with a probability of 3 %, at "
            r"least 80 % are needed. Raise max_drop, or give about 620 documents",
        ),
        (
            {"separator": "-"},
            "task 'choice': its documents or settings are not those of the baseline",
        ),
        ({"name": "other"}, "task 'other': the baseline has no score of it"),
    ],
)
def test_what_the_baseline_cannot_decide_is_refused_before_a_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    base = baseline(folder)
    out = folder / "out.json"
    write_tasks(folder, [CHOICE_TASK | change])
    code = run(folder, folder / "no model", "--baseline", str(base), "--out", str(out))
    assert code == 78
    with pytest.raises(ConfigError, match=message):
        evaluate(ExportedModel(folder), folder / "tasks.yaml", folder / "out.json", base)


def test_a_missing_baseline_is_refused_with_the_command_that_makes_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, folder, "--out", "x.json") == 78
    assert "--baseline is missing" in capsys.readouterr().err
    assert run(folder, folder, "--baseline", str(folder / "none.json"), "--out", "x.json") == 78
    assert "--no_baseline --out FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "multiple"}, "tasks.yaml:"),
        ({"max_drop": 0.0}, "must be above 0"),
        ({"path": "none.jsonl"}, "which is no file"),
        ({"kind": "harness"}, "task is missing"),
        ({"chat": True}, "only kind: exact_match asks"),
        ({"include_path": "."}, "only kind: harness has one"),
        ({"limt": 3}, "Did you mean 'limit'"),
        ({"name": "text"}, "which the list already has"),
    ],
)
def test_a_wrong_task_is_refused_with_file_line_and_key(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    write_tasks(folder, [TEXT_TASK, CHOICE_TASK | change])
    with pytest.raises(ConfigError, match=message):
        load_tasks(folder / "tasks.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"question": "q", "choices": ["a", "b"], "answer": 2}',
            r"choice.jsonl:1: 'answer' is missing or wrong",
        ),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "'choices' is missing or wrong"),
        ("[1]", "not a JSON object"),
        ("", "holds no record"),
    ],
)
def test_a_wrong_record_is_refused_with_file_and_line(
    folder: Path, line: str, message: str
) -> None:
    (folder / "choice.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        evaluate(ExportedModel(folder), folder / "tasks.yaml", folder / "out.json", None)


HARNESS = {
    "name": "hs",
    "language": "en",
    "kind": "harness",
    "task": "hellaswag",
    "metric": "acc",
    "max_drop": 5.0,
}


def stand_in(monkeypatch: pytest.MonkeyPatch, right: int) -> list[dict[str, Any]]:
    """Install modules with the names and shapes of lm-eval 0.4.13, and return the calls.

    Of 1,000 documents the first `right` are answered right.
    """
    calls: list[dict[str, Any]] = []

    def simple_evaluate(model: Any, tasks: list[str], **keys: Any) -> dict[str, Any]:
        calls.append({"tasks": tasks, **keys})
        found = {
            "alias": "hellaswag",
            "acc,none": right / 1000,
            "acc_stderr,none": 0.01,
            "acc_norm,none": 0.9,
        }
        samples = []
        for number in range(1000):
            hashes = {"doc_hash": f"{number:x}", "target_hash": f"{number:x}"}
            answer = {"acc": float(number < right), "acc_norm": 0.0}
            samples.append({"doc_id": number, "filter": "none", **hashes, **answer})
        return {
            "results": {"hellaswag": found},
            "n-samples": {"hellaswag": {"original": 1000, "effective": keys["limit"] or 1000}},
            "versions": {"hellaswag": 1.0},
            "samples": {"hellaswag": samples},
        }

    def task_manager() -> Any:
        return types.SimpleNamespace(all_tasks=["hellaswag", "arc"])

    contents: dict[str, dict[str, Any]] = {
        "lm_eval": {"simple_evaluate": simple_evaluate, "__spec__": types.SimpleNamespace()},
        "lm_eval.tasks": {"TaskManager": task_manager},
        "lm_eval.models.huggingface": {
            "HFLM": lambda **_: types.SimpleNamespace(**dict.fromkeys(REQUESTS, print))
        },
    }
    for name, attributes in contents.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("cpt.offline.evaluation.harness.harness_tokenizer", lambda _: None)
    monkeypatch.setattr(
        "cpt.offline.evaluation.scored_model.load_export", lambda *_: torch.nn.Identity()
    )
    return calls


def test_harness_tasks_are_scored_judged_and_refused_like_local_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tasks(folder, [HARNESS])
    base = folder / "base.json"
    now = folder / "now.json"
    calls = stand_in(monkeypatch, 600)
    evaluate(ExportedModel(folder), folder / "tasks.yaml", base, None)
    assert calls[0]["tasks"] == ["hellaswag"]
    score = json.loads(base.read_text())["tasks"]["hs"]
    assert score["value"] == 60 and score["per_document"] == [1.0] * 600 + [0.0] * 400
    stand_in(monkeypatch, 540)
    with pytest.raises(
        EvaluationFailed,
        match=r"task 'hs' dropped by 6.00, perhaps by 7.\d\d \(from 60.000 to 54.000; 60 answers "
        r"lost, 0 won, p = 4.3e-19\), max_drop is 5",
    ):
        evaluate(ExportedModel(folder), folder / "tasks.yaml", now, base)
    (verdict,) = json.loads(now.read_text())["verdicts"]
    assert (verdict["lost"], verdict["won"], verdict["method"]) == (60, 0, "mcnemar")


def test_a_harness_metric_that_is_no_share_is_refused_with_its_value(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tasks(folder, [HARNESS])
    stand_in(monkeypatch, 2340)
    with pytest.raises(DataError, match=r"task 'hs': 'acc,none' is 2.34, .* Choose a metric that"):
        evaluate(ExportedModel(folder), folder / "tasks.yaml", folder / "base.json", None)


OWN_TASK = """
task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def test_the_real_harness_scores_a_task_of_ones_own_document_by_document(
    models: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_lm_eval()
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "own").mkdir()
    data = json.dumps(str(folder / "choice.jsonl"))
    (folder / "own" / "own_choice.yaml").write_text(OWN_TASK.replace("DATA", data))
    if not (models["good"] / "tokenizer.json").exists():
        save_tokenizer(models["good"], 4096)
    task = HARNESS | {"task": "own_choice", "include_path": "own", "max_drop": 90.0}
    write_tasks(folder, [task])
    evaluate(ExportedModel(models["good"]), folder / "tasks.yaml", folder / "base.json", None)
    score = read_result(folder / "base.json").scores["hs"]
    assert score.documents == 12 and score.is_right_or_wrong
    assert score.value == pytest.approx(100 * np.mean(score.per_document))
    # the likeliest choice by its sum of log-likelihoods, as the harness takes it
    model = load_export(models["good"])
    right = []
    for record in CHOICES:
        start = len(encode(record["question"]))
        nats = []
        for choice in record["choices"]:
            tokens = encode(record["question"] + choice).tolist()
            nats.append(nats_of_transformers(model, tokens, start))
        right.append(float(int(np.argmin(nats)) == record["answer"]))
    assert score.per_document == tuple(right)


def test_unknown_harness_tasks_and_metrics_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, 600)
    write_tasks(folder, [HARNESS | {"task": "helaswag"}])
    with pytest.raises(ConfigError, match=r"no task 'helaswag'. Did you mean 'hellaswag'"):
        evaluate(ExportedModel(folder), folder / "tasks.yaml", folder / "out.json", None)
    write_tasks(folder, [HARNESS | {"metric": "f1"}])
    with pytest.raises(DataError, match=r"no metric 'f1'. It has: acc, acc_norm"):
        evaluate(ExportedModel(folder), folder / "tasks.yaml", folder / "out.json", None)


def test_without_the_harness_its_tasks_are_refused_with_the_cure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    write_tasks(folder, [HARNESS])
    with pytest.raises(ConfigError, match=r"pip install 'gpt-oss-cpt\[evaluate\]'"):
        evaluate(ExportedModel(folder), folder / "tasks.yaml", folder / "out.json", None)


def test_shipped_task_files_can_be_read() -> None:
    for name in ("sample", "harness"):
        tasks = load_tasks(ROOT / "configs" / "tasks" / f"{name}.yaml")
        assert {task.language for task in tasks} == {"en", "ja"}

"""`cpt suite`: tools are asked as gpt-oss wants to be asked, and their results are read right."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
import yaml

from cpt.cli import main
from cpt.errors import ConfigError, DataError, InternalError
from cpt.model.weights.checksums import model_hash, sampled_hash
from cpt.offline.evaluation.benchmark_commands import Programs, ServedModel, command_of
from cpt.offline.evaluation.scores import Result, Score, read_result, write_result
from cpt.offline.evaluation.suite import Suite, load_suite
from cpt.offline.evaluation.suite_plot import checkpoint_figure, read_results
from cpt.offline.evaluation.suite_results import collect
from cpt.offline.evaluation.suite_run import environment_of, find_model, is_done, run_suite
from cpt.offline.evaluation.verdict import check_baseline
from tests.support.served_model import write_python_program

ROOT = Path(__file__).parents[2]
DATE = "2026-11-26T21-00-00.000001"
BENCHMARK = {
    "name": "gpqa",
    "language": "en",
    "tool": "lighteval",
    "task": "swallow|gpqa:diamond",
    "metric": "extractive_match",
}
HARNESS = {
    "name": "gsm8k",
    "language": "en",
    "tool": "lm_eval",
    "task": "gsm8k",
    "metric": "exact_match,flexible-extract",
    "num_fewshot": 0,
}
MODEL = ServedModel(
    url="http://127.0.0.1:8000", name="step-40", context_tokens=40960, directory=Path("export")
)


def suite_of(folder: Path, *benchmarks: dict[str, Any], **asking: Any) -> Suite:
    content = {"asking": asking, "benchmarks": list(benchmarks)}
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    return load_suite(folder / "suite.yaml")


def words_of(suite: Suite, out: Path) -> list[str]:
    return command_of(
        suite.benchmarks[0], suite, MODEL, Programs(lighteval="uv run lighteval"), out
    )


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_the_harness_is_told_sampling_and_effort_and_no_stop_words(tmp_path: Path) -> None:
    words = words_of(suite_of(tmp_path, HARNESS, reasoning_effort="high"), Path("out"))
    assert words[:2] == ["lm_eval", "run"]
    assert json.loads(option(words, "--model_args")) == {
        "model": "step-40",
        "base_url": "http://127.0.0.1:8000/v1/chat/completions",
        "num_concurrent": 64,
        "timeout": 7200,
        "max_length": 40960,
        "seed": 1234,
    }
    assert json.loads(option(words, "--gen_kwargs")) == {
        "temperature": 1.0,
        "top_p": 1.0,
        "max_gen_toks": 32768,
        "reasoning_effort": "high",
        "do_sample": True,
        "until": [],
    }
    assert option(words, "--num_fewshot") == "0"
    assert {"--apply_chat_template", "--log_samples"} <= set(words)


def test_continuations_are_scored_by_the_server_with_the_tokenizer_of_the_model(
    tmp_path: Path,
) -> None:
    words = words_of(suite_of(tmp_path, HARNESS | {"api": "completions"}), Path("out"))
    assert option(words, "--model") == "local-completions"
    arguments = json.loads(option(words, "--model_args"))
    assert arguments["base_url"] == "http://127.0.0.1:8000/v1/completions"
    assert (arguments["tokenizer_backend"], arguments["tokenizer"]) == ("huggingface", "export")
    assert "--gen_kwargs" not in words and "--apply_chat_template" not in words


def test_lighteval_is_told_model_server_and_sampling_in_its_own_words(tmp_path: Path) -> None:
    words = words_of(suite_of(tmp_path, BENCHMARK | {"limit": 9}), Path("out"))
    assert shlex.join(words) == (
        "uv run lighteval endpoint litellm "
        "'model=hosted_vllm/step-40,base_url=http://127.0.0.1:8000/v1,"
        "generation_parameters={temperature:1.0,top_p:1.0,max_new_tokens:32768}' "
        "'swallow|gpqa:diamond|0|0' --use-chat-template --output-dir out --save-details "
        "--max-samples 9"
    )


def test_a_tool_sees_only_the_keys_that_its_benchmark_needs(tmp_path: Path) -> None:
    judged = BENCHMARK | {"name": "judged", "needs": ["OPENAI_API_KEY"]}
    suite = suite_of(tmp_path, BENCHMARK, judged)
    given = {"OPENAI_API_KEY": "k", "HF_TOKEN": "t", "NO_PROXY": "site", "CPT_JOB_SECRET": "s"}
    plain, with_key = (environment_of(item, suite, given) for item in suite.benchmarks)
    assert "OPENAI_API_KEY" not in plain and with_key["OPENAI_API_KEY"] == "k"
    assert "CPT_JOB_SECRET" not in plain and "CPT_JOB_SECRET" not in with_key
    assert plain["HF_TOKEN"] == "t" and plain["NO_PROXY"] == "site,127.0.0.1,localhost"
    assert plain["LITELLM_CONCURRENT_CALLS"] == "64"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_drop": 0.0}, "must be above 0: no measurement is exact"),
        ({"num_fewshot": 5}, "num_fewshot is given, but only tool: lm_eval has it"),
        ({"task": "gpqa"}, r"must be suite\|task"),
        ({"name": "../x"}, "must be of letters, digits"),
        ({"metrics": "x"}, "Did you mean 'metric'"),
        ({"name": "gsm8k"}, "which the list already has"),
    ],
)
def test_a_wrong_suite_is_refused_with_file_line_and_key(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"suite.yaml:\d+: benchmarks\[1\].*{message}"):
        suite_of(tmp_path, HARNESS, BENCHMARK | change)


def test_lighteval_with_another_effort_is_refused_since_it_cannot_pass_it_on(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="cannot tell a vLLM server an effort other than medium"):
        suite_of(tmp_path, BENCHMARK, reasoning_effort="low")
    assert suite_of(tmp_path, HARNESS, reasoning_effort="low").asking.reasoning_effort == "low"


def test_only_names_benchmarks_that_exist(tmp_path: Path) -> None:
    suite_of(tmp_path, HARNESS, BENCHMARK)
    assert load_suite(tmp_path / "suite.yaml", ["gpqa"]).limits == {"gpqa": None}
    with pytest.raises(ConfigError, match=r"no benchmark 'gpq'. Did you mean 'gpqa'"):
        load_suite(tmp_path / "suite.yaml", ["gpq"])


def write_details(folder: Path, task: str, rows: list[dict[str, Any]], date: str = DATE) -> None:
    """Write the tree of a lighteval run, as v0.8.0 does."""
    results = folder / "results" / "hosted_vllm" / "m"
    details = folder / "details" / "hosted_vllm" / "m" / date
    for path in (results, details):
        path.mkdir(parents=True, exist_ok=True)
    content = {"config_general": {"lighteval_sha": "79cd3a8"}, "results": {"all": {}}}
    (results / f"results_{date}.json").write_text(json.dumps(content))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, details / f"details_{task}|0_{date}.parquet")


def row(number: int, metrics: dict[str, Any], reply: str = "The answer is B.") -> dict[str, Any]:
    return {
        "example": f"question {number}",
        "gold": ["B"],
        "metrics": metrics,
        "predictions": [[reply]],
    }


def done(folder: Path, suite: Suite) -> None:
    (benchmark,) = suite.benchmarks
    content = {
        "model": model_hash(served_directory(folder.parent)),
        "task": benchmark.task,
        "settings": suite.settings_of(benchmark),
    }
    (folder / "done.json").write_text(json.dumps(content))


WEIGHTS = safetensors.torch.save({"norm": torch.ones(8)})
OTHER_WEIGHTS = safetensors.torch.save({"norm": torch.zeros(8)})


def served_directory(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def collected(tmp_path: Path, suite: Suite) -> Score:
    model = tmp_path / "served"
    if not model.exists():
        served_directory(tmp_path)
    return collect(suite, tmp_path, model, 40).scores[suite.benchmarks[0].name]


def test_details_of_lighteval_become_answers_of_the_newest_run_and_of_all_subsets(
    tmp_path: Path,
) -> None:
    suite = suite_of(tmp_path, BENCHMARK | {"task": "swallow|mmlu"})
    folder = tmp_path / "gpqa"
    old = "2026-11-25T21-00-00.000001"
    write_details(folder, "swallow|mmlu:law", [row(1, {"extractive_match": 0})], old)
    write_details(folder, "swallow|mmlu:law", [row(1, {"extractive_match": 1})])
    rows = [row(2, {"extractive_match": 1}), row(3, {"extractive_match": 0})]
    write_details(folder, "swallow|mmlu:art", rows)
    write_details(folder, "swallow|mmlu_pro:art", rows)
    done(folder, suite)
    score = collected(tmp_path, suite)
    assert score.per_document == (1.0, 0.0, 1.0)
    assert score.value == pytest.approx(200 / 3) and score.is_right_or_wrong

    write_details(folder, "swallow|mmlu:art", [row(2, {"extractive_match": 1}), rows[0]])
    assert collected(tmp_path, suite).content != score.content


def test_marks_of_judges_and_lists_of_attempts_become_shares(tmp_path: Path) -> None:
    both = BENCHMARK | {"metric": "turn_1+turn_2", "highest": 10, "task": "swallow|mt_bench"}
    suite = suite_of(tmp_path, both)
    metrics = {"turn_1": [8.0, 10.0], "turn_2": [6.0, 6.0], "judgement": ["good"]}
    write_details(tmp_path / "gpqa", "swallow|mt_bench", [row(1, metrics)])
    done(tmp_path / "gpqa", suite)
    score = collected(tmp_path, suite)
    assert score.per_document == (0.75,) and score.value == 75
    assert not score.is_right_or_wrong


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1, {"acc": 1, "f1": 0.5})], "no metric 'extractive_match'. It has: acc, f1"),
        ([row(1, {"extractive_match": 7})], "is 7, must be between 0 and 1. Set highest"),
        (
            [row(1, {"extractive_match": 0}, ""), row(2, {"extractive_match": 1})],
            "1 of 2 replies are empty: lighteval counts a request that failed as a wrong answer",
        ),
    ],
)
def test_details_that_cannot_be_believed_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    suite = suite_of(tmp_path, BENCHMARK)
    write_details(tmp_path / "gpqa", "swallow|gpqa:diamond", rows)
    done(tmp_path / "gpqa", suite)
    with pytest.raises(DataError, match=message):
        collected(tmp_path, suite)


def harness_sample(number: int, right: bool, filter_name: str) -> dict[str, Any]:
    return {
        "doc_id": number,
        "filter": filter_name,
        "exact_match": float(right),
        "doc_hash": f"d{number}",
        "target_hash": f"t{number}",
    }


def test_samples_of_a_group_of_the_harness_become_its_answers(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, HARNESS | {"task": "pro"})
    folder = tmp_path / "gsm8k" / "m"
    folder.mkdir(parents=True)
    found = {
        "results": {
            "pro": {"alias": "pro", "exact_match,flexible-extract": 0.75},
            "pro_law": {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0},
            "pro_art": {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 0.5},
        },
        "group_subtasks": {"pro": ["pro_law", "pro_art"], "pro_law": []},
        "n-samples": {"pro_law": {"effective": 2}, "pro_art": {"effective": 2}},
        "versions": {"pro": 2.0},
        "lm_eval_version": "0.4.13",
    }
    (folder / f"results_{DATE}.json").write_text(json.dumps(found))
    answers = {"pro_law": [True, True], "pro_art": [False, True]}
    for task, right in answers.items():
        lines = []
        # later documents come first, and each has a line for every filter
        for number in (1, 0):
            lines.append(json.dumps(harness_sample(number, right[number], "flexible-extract")))
            lines.append(json.dumps(harness_sample(number, False, "strict-match")))
        (folder / f"samples_{task}_{DATE}.jsonl").write_text("\n".join(lines) + "\n")
    done(tmp_path / "gsm8k", suite)
    score = collected(tmp_path, suite)
    assert (score.value, score.documents) == (75, 4)
    assert score.per_document == (1.0, 1.0, 0.0, 1.0)

    # an aggregate that is no mean over documents
    found["results"]["pro"]["exact_match,flexible-extract"] = 0.7
    (folder / f"results_{DATE}.json").write_text(json.dumps(found))
    assert collected(tmp_path, suite).per_document == ()
    (folder / f"samples_pro_art_{DATE}.jsonl").unlink()
    with pytest.raises(DataError, match="lm_eval writes it with --log_samples"):
        collected(tmp_path, suite)


def write_harness(folder: Path, metric: str, value: float, marks: list[float]) -> None:
    """Write the tree of a run of lm-evaluation-harness whose task is gsm8k."""
    folder.mkdir(parents=True, exist_ok=True)
    key = f"{metric},none"
    found = {
        "results": {"gsm8k": {key: value}},
        "n-samples": {"gsm8k": {"effective": 4}},
    }
    (folder / f"results_{DATE}.json").write_text(json.dumps(found))
    lines = []
    for number, mark in enumerate(marks):
        sample = harness_sample(number, True, "none") | {metric: mark}
        lines.append(json.dumps(sample) + "\n")
    (folder / f"samples_gsm8k_{DATE}.jsonl").write_text("".join(lines))


def test_marks_of_the_harness_are_divided_by_the_highest_too(tmp_path: Path) -> None:
    marks = HARNESS | {"metric": "score"}
    suite = suite_of(tmp_path, marks | {"highest": 100})
    write_harness(tmp_path / "gsm8k" / "m", "score", 62.5, [100, 50, 75, 25])
    done(tmp_path / "gsm8k", suite)
    score = collected(tmp_path, suite)
    assert score.value == 62.5 and score.per_document == (1.0, 0.5, 0.75, 0.25)
    assert score.stderr is not None


@pytest.mark.parametrize(
    ("value", "marks", "told"),
    [
        (62.5, [100, 50, 75, 25], "62.5"),  # marks of up to 100
        (23.4, [], "23.4"),  # BLEU or a perplexity, which have no value for a document
        (0.5, [2, 0, 0, 0], "2"),
    ],
)
def test_a_metric_of_the_harness_that_is_no_share_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, marks: list[float], told: str
) -> None:
    suite = suite_of(tmp_path, HARNESS | {"metric": "score"})
    write_harness(tmp_path / "gsm8k" / "m", "score", value, marks)
    done(tmp_path / "gsm8k", suite)
    served_directory(tmp_path)
    files = ("--suite", tmp_path / "suite.yaml", "--results", tmp_path)
    model = ("--model", tmp_path / "served", "--out", tmp_path / "result.json")
    assert main(["suite", "collect", *map(str, (*files, *model))]) == 65
    error = capsys.readouterr().err
    assert f"'score,none' is {told}, must be between 0 and 1. Set highest" in error
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("tool", ["lm_eval", "lighteval"])
def test_marks_of_another_highest_are_not_compared_and_need_no_other_run(
    tmp_path: Path, tool: str
) -> None:
    benchmark = HARNESS | {"metric": "score"}
    write_harness(tmp_path / "gsm8k" / "m", "score", 0.5, [1, 0, 1, 0])
    if tool == "lighteval":
        benchmark = BENCHMARK
        write_details(tmp_path / "gpqa", "swallow|gpqa:diamond", [row(1, {"extractive_match": 1})])
    contents = []
    for highest in (1, 10):
        suite = suite_of(tmp_path, benchmark | {"highest": highest})
        if highest == 1:
            done(tmp_path / benchmark["name"], suite)
        contents.append(collected(tmp_path, suite).content)
    assert contents[0] != contents[1]


def test_what_was_run_with_other_settings_is_neither_kept_nor_collected(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, BENCHMARK)
    folder = tmp_path / "gpqa"
    folder.mkdir()
    with pytest.raises(ConfigError, match="benchmark 'gpqa' is not done"):
        collected(tmp_path, suite)
    done(folder, suite)
    model = model_hash(tmp_path / "served")
    assert is_done(folder, suite, suite.benchmarks[0], model)
    warmer = suite_of(tmp_path, BENCHMARK, temperature=0.6)
    with pytest.raises(ConfigError, match="settings was "):
        is_done(folder, warmer, warmer.benchmarks[0], model)
    other_task = suite_of(tmp_path, BENCHMARK | {"task": "swallow|gpqa:main"})
    with pytest.raises(ConfigError, match=r"task was swallow\|gpqa:diamond, is now"):
        is_done(folder, other_task, other_task.benchmarks[0], model)


@pytest.mark.parametrize(
    ("file", "content"),
    [("model.safetensors", OTHER_WEIGHTS), ("config.json", b'{"num_experts_per_tok": 2}')],
    ids=["weights", "configuration"],
)
def test_scores_of_one_model_are_not_taken_for_those_of_another(
    tmp_path: Path, file: str, content: bytes
) -> None:
    suite = suite_of(tmp_path, BENCHMARK)
    write_details(tmp_path / "gpqa", "swallow|gpqa:diamond", [row(1, {"extractive_match": 1})])
    done(tmp_path / "gpqa", suite)
    model = replace(MODEL, directory=tmp_path / "served")
    run_suite(suite, model, Programs(), tmp_path)  # done before: no server is asked
    assert collected(tmp_path, suite).value == 100
    (tmp_path / "served" / file).write_bytes(content)
    with pytest.raises(ConfigError, match="model was "):
        run_suite(suite, model, Programs(), tmp_path)
    with pytest.raises(ConfigError, match="model was "):
        collected(tmp_path, suite)


def test_results_that_state_the_hash_of_before_stay_those_of_their_model(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, BENCHMARK)
    served = served_directory(tmp_path)
    (tmp_path / "gpqa").mkdir()
    done(tmp_path / "gpqa", suite)
    model = model_hash(served)
    path = tmp_path / "gpqa" / "done.json"
    content = json.loads(path.read_text())
    content["model"] = sampled_hash(sorted(served.iterdir()))
    path.write_text(json.dumps(content))
    assert is_done(tmp_path / "gpqa", suite, suite.benchmarks[0], model)
    content["model"] = content["model"][::-1]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="model was "):
        is_done(tmp_path / "gpqa", suite, suite.benchmarks[0], model)


def test_a_model_without_weights_has_no_identity(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has no config\.json"):
        model_hash(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"it has no \*.safetensors"):
        model_hash(tmp_path)


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9: /v1/models names no model"):
        find_model("http://127.0.0.1:9/", Path("export"))


@pytest.fixture
def models(tmp_path: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a server, and what it lists in /v1/models."""
    listed: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": listed}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", listed
    server.shutdown()
    server.server_close()


def test_the_model_that_is_asked_for_is_taken_of_those_that_a_server_lists(
    models: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    url, listed = models
    (tmp_path / "step-40").mkdir()
    # one in a container with mounts of its own, one by its path, as vllm serve names it by default
    for entry in (
        {"id": "step-40", "root": "/in/the/container"},
        {"id": str(tmp_path / "step-40")},
    ):
        listed[:] = [{"id": "other"}, {**entry, "max_model_len": 800}]
        found = find_model(f"{url}/", tmp_path / "step-40")
        assert (found.url, found.name, found.context_tokens) == (url, entry["id"], 800)


def test_a_server_of_another_model_is_refused_also_under_the_same_name(
    models: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    url, listed = models
    for run in ("one", "two"):
        (tmp_path / run / "step-40").mkdir(parents=True)
    asked = tmp_path / "one" / "step-40"
    for entry in ({"id": "step-80"}, {"id": "step-40", "root": str(tmp_path / "two" / "step-40")}):
        listed[:] = [entry]
        with pytest.raises(ConfigError, match=f"serves '{entry['id']}', not --model {asked}"):
            find_model(url, asked)


@pytest.mark.parametrize("listed_now", [[], [{"name": "step-40"}], ["step-40"]])
def test_an_answer_that_names_no_model_is_refused(
    models: tuple[str, list[Any]], tmp_path: Path, listed_now: list[Any]
) -> None:
    url, listed = models
    listed[:] = listed_now
    with pytest.raises(ConfigError, match="/v1/models names no model"):
        find_model(url, tmp_path)


TOOL = """
import sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--output-dir") + 1])
(out / "results").mkdir(parents=True)
(out / "results" / "results_1.json").write_text("{}")
Path(sys.argv[0]).with_name("dead").touch()
"""


def test_a_benchmark_is_not_done_if_the_server_died_meanwhile(tmp_path: Path) -> None:
    program = write_python_program(tmp_path / "lighteval", TOOL)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(500 if (tmp_path / "dead").exists() else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        model = replace(MODEL, url=url, directory=served_directory(tmp_path))
        suite = suite_of(tmp_path, BENCHMARK)
        with pytest.raises(InternalError, match="the server does not answer"):
            run_suite(suite, model, Programs(lighteval=program), tmp_path)
    finally:
        server.shutdown()
    assert list((tmp_path / "gpqa").rglob("results_*.json"))
    assert not (tmp_path / "gpqa" / "done.json").exists()


def result(step: int | None, right: int, bits: float) -> Result:
    answers = tuple([1.0] * right + [0.0] * (400 - right))
    scores = {
        "jamc_qa": Score(
            kind="lighteval",
            language="ja",
            value=right / 4,
            documents=400,
            content="a",
            per_document=answers,
        ),
        "text": Score(
            kind="perplexity", language="en", value=bits, documents=9, content="b", per_document=()
        ),
    }
    return Result(model="m", scores=scores, step=step)


def test_checkpoints_are_drawn_by_step_with_the_level_before_training(tmp_path: Path) -> None:
    files = []
    for step, right in ((200, 260), (100, 250), (300, 280)):
        files.append(tmp_path / f"{step}.json")
        write_result(files[-1], result(step, right, 0.7))
    results = read_results(files)
    assert [one.step for one in results] == [100, 200, 300]
    svg = checkpoint_figure(results, result(None, 240, 0.75))
    for text in ("jamc_qa (ja)", "text (en)", "70.0", "0.700", "bits per byte"):
        assert text in svg
    assert checkpoint_figure(results, None) != svg


def test_results_without_a_step_or_of_one_step_cannot_be_drawn(tmp_path: Path) -> None:
    for name, step in (("a", None), ("b", 5), ("c", 5)):
        write_result(tmp_path / f"{name}.json", result(step, 250, 0.7))
    files = [tmp_path / f"{name}.json" for name in "abc"]
    with pytest.raises(ConfigError, match=r"a.json: has no step"):
        read_results(files)
    with pytest.raises(ConfigError, match=r"c.json: is of step 5, like"):
        read_results(files[1:])


def test_compare_writes_verdicts_and_ends_with_65_and_plot_writes_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite_of(tmp_path, BENCHMARK | {"name": "jamc_qa", "max_drop": 9.0})
    for name, step, right in (("base", 0, 300), ("now", 100, 240)):
        write_result(tmp_path / f"{name}.json", result(step, right, 0.7))
    base, now = str(tmp_path / "base.json"), str(tmp_path / "now.json")
    suite = ["--suite", str(tmp_path / "suite.yaml")]
    assert main(["suite", "compare", *suite, "--result", now, "--baseline", base]) == 65
    assert "task 'jamc_qa' dropped by 15.00" in capsys.readouterr().err
    (verdict,) = json.loads(Path(now).read_text())["verdicts"]
    assert (verdict["lost"], verdict["won"], verdict["state"]) == (60, 0, "dropped")
    assert read_result(Path(now)).step == 100
    before = Path(base).read_bytes()
    assert main(["suite", "compare", *suite, "--result", base, "--baseline", base]) == 78
    assert "is the file of --baseline" in capsys.readouterr().err
    results = ["--results", str(tmp_path), "--model", str(tmp_path), "--out", suite[1]]
    assert main(["suite", "collect", *suite, *results]) == 78
    assert "is the file of --suite" in capsys.readouterr().err
    assert Path(base).read_bytes() == before
    again = str(tmp_path / "again.json")
    Path(again).write_bytes(before)
    assert main(["suite", "compare", *suite, "--result", again, "--baseline", base]) == 0
    figure = tmp_path / "figures" / "scores.svg"
    assert main(["suite", "plot", base, now, "--out", str(figure)]) == 0
    assert figure.read_text().startswith("<?xml")
    for over, role in ((now, "result 2"), (again, "--baseline")):
        files = [base, now, "--baseline", again, "--out", over]
        assert main(["suite", "plot", *files]) == 78
        assert f"is the file of {role}" in capsys.readouterr().err
    assert Path(again).read_bytes() != b"" and read_result(Path(now)).step == 100


DOCUMENTS = {"mmlu_prox_en": 11_759, "mmlu_prox_ja": 11_759, "gsm8k": 1_319, "jamc_qa": 2_309}


def test_shipped_suite_has_limits_only_where_its_documents_can_show_them() -> None:
    suite = load_suite(ROOT / "configs" / "suites" / "gpt-oss.yaml")
    assert suite.asking.context_tokens == 40_960
    limited = {name for name, limit in suite.limits.items() if limit is not None}
    assert limited == set(DOCUMENTS)
    base = {}
    for name in suite.limits:
        count = DOCUMENTS.get(name, 10)
        answers = (1.0,) * count
        base[name] = Score(
            kind="lighteval",
            language="en",
            value=100.0,
            documents=count,
            content="",
            per_document=answers,
        )
    check_baseline(suite.limits, {}, base)

"""The results of a suite's benchmarks, collected into one file.

    <out>/<benchmark>/   lm_eval:   <model>/results_<date>.json, <model>/samples_<task>_<date>.jsonl
                         lighteval: results/<model>/results_<date>.json,
                                    details/<model>/<date>/details_<suite>|<task>|<n>_<date>.parquet
        -> a score with its documents one by one -> evaluation.json

The newest results count, and of the documents those of the same date.  lighteval's details have a
row for each document, with `metrics`: name -> number, or list of numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpt.errors import ConfigError, DataError
from cpt.model.weights.checksums import model_hash
from cpt.offline.evaluation.harness_results import leaf_tasks, score_of_results
from cpt.offline.evaluation.scores import Result, Score
from cpt.offline.evaluation.suite import Benchmark, Suite
from cpt.offline.evaluation.suite_run import is_done
from data_pipeline.bounded.json_text import LARGE_BYTES, parse_json, read_json

Json = dict[str, Any]

COLUMNS = ("example", "gold", "predictions", "metrics")
"""Columns of a details file that are read."""
MAX_EMPTY_SHARE = 0.01
"""Largest share of empty replies that is believed."""


def collect(suite: Suite, out: Path, model: Path, step: int | None) -> Result:
    """Return the scores of all benchmarks of a suite.

    Args:
        suite: The suite.
        out: Folder of the benchmarks' folders.
        model: Directory of the model that the results must be of.
        step: Step of its checkpoint, if it is known.

    Raises:
        ConfigError: a benchmark is not done, or was run with another model, task or settings.
        DataError: the results of a benchmark cannot be read.
    """
    identity = model_hash(model)
    problems = []
    for benchmark in suite.benchmarks:
        if not is_done(out / benchmark.name, suite, benchmark, identity):
            problems.append(
                f"benchmark '{benchmark.name}' is not done in {out}. Run it: cpt suite run --out "
                f"{out}; or collect the others (--only)."
            )
    if problems:
        raise ConfigError(problems)
    scores: dict[str, Score] = {}
    versions: dict[str, str] = {}
    for benchmark in suite.benchmarks:
        folder = out / benchmark.name
        settings = suite.content_settings_of(benchmark)
        if benchmark.tool == "lm_eval":
            score, version = _lm_eval_score(benchmark, folder, settings)
        else:
            score, version = _lighteval_score(benchmark, folder, settings)
        scores[benchmark.name] = score
        versions[benchmark.tool] = version
    return Result(
        model=str(model),
        scores=scores,
        step=step,
        settings={"asking": asdict(suite.asking), "versions": versions},
    )


def _newest_results(benchmark: Benchmark, folder: Path) -> tuple[Path, str, Json]:
    """Return the newest results file, its date, and its content.

    Raises:
        DataError: there is none, or it is no JSON object.
    """
    found = sorted(folder.rglob("results_*.json"), key=_date)
    if not found:
        raise DataError(f"benchmark '{benchmark.name}': {folder} holds no results_*.json.")
    path = found[-1]
    try:
        content = read_json(path, LARGE_BYTES)
        content["results"].items()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not the results of {benchmark.tool} ({error}).") from error
    return path, _date(path), content


def _date(path: Path) -> str:
    """Return the date in `results_<date>.json`, which sorts as time goes."""
    return path.stem.removeprefix("results_")


def _lm_eval_score(benchmark: Benchmark, folder: Path, settings: list[Any]) -> tuple[Score, str]:
    """Return the score of a benchmark of lm-evaluation-harness, and the harness's version."""
    path, date, found = _newest_results(benchmark, folder)
    samples: dict[str, list[Json]] = {}
    for task in leaf_tasks(benchmark.task, found.get("group_subtasks", {})):
        file = path.parent / f"samples_{task}_{date}.jsonl"
        if not file.exists():
            raise DataError(
                f"{file}: no such file. lm_eval writes it with --log_samples; delete {folder} and "
                "run the benchmark again."
            )
        samples[task] = _json_lines(file)
    score = score_of_results(
        benchmark.name,
        benchmark.task,
        benchmark.metric,
        benchmark.language,
        found,
        samples,
        settings,
        benchmark.highest,
    )
    return score, str(found.get("lm_eval_version", "unknown"))


def _json_lines(path: Path) -> list[Json]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(parse_json(line))
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON ({error}).") from error
    return rows


def _lighteval_score(benchmark: Benchmark, folder: Path, settings: list[Any]) -> tuple[Score, str]:
    """Return the score of a benchmark of lighteval, and the commit of lighteval."""
    _, date, found = _newest_results(benchmark, folder)
    values: list[float] = []
    hashes: list[str] = []
    for file in _details(benchmark, folder, date):
        for row in _parquet_rows(file):
            values.append(_value(benchmark, file, row["metrics"]))
            text = json.dumps([row.get("example"), row.get("gold")], default=str)
            hashes.append(hashlib.sha256(text.encode()).hexdigest())
    if not values:
        raise DataError(
            f"benchmark '{benchmark.name}': no details of '{benchmark.task}' of {date} below "
            f"{folder}. lighteval writes them with --save-details."
        )
    content = [benchmark.task, benchmark.metric, hashes, *settings]
    score = Score(
        kind="lighteval",
        language=benchmark.language,
        value=100 * math.fsum(values) / len(values),
        documents=len(values),
        content=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        per_document=tuple(values),
    )
    return score, str(found.get("config_general", {}).get("lighteval_sha", "unknown"))


def _details(benchmark: Benchmark, folder: Path, date: str) -> list[Path]:
    """Return the files of a task, or of all its subsets, in the order of their names."""
    files = []
    for file in folder.rglob(f"details_*_{date}.parquet"):
        # suite|task|examples, or suite|task:subset|examples
        task = file.stem.removeprefix("details_").removesuffix(f"_{date}").rpartition("|")[0]
        if task == benchmark.task or task.startswith(f"{benchmark.task}:"):
            files.append(file)
    return sorted(files)


def _parquet_rows(path: Path) -> list[Json]:
    """Return the documents of a details file.

    Raises:
        DataError: it is none, or too many replies are empty.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        rows: list[Json] = file.read(columns=columns).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    if "metrics" not in columns:
        raise DataError(f"{path}: has no column 'metrics'. It is not a details file of lighteval.")
    empty = 0
    for row in rows:
        empty += not _has_text(row.get("predictions", "-"))
    if empty > MAX_EMPTY_SHARE * len(rows):
        raise DataError(
            f"{path}: {empty} of {len(rows)} replies are empty: lighteval counts a request that "
            "failed as a wrong answer. Delete the benchmark's folder and run it again."
        )
    return rows


def _has_text(predictions: Any) -> bool:
    """Return whether a reply, or one of several, has any text."""
    if isinstance(predictions, list):
        return any(map(_has_text, predictions))
    return bool(str(predictions or "").strip())


def _value(benchmark: Benchmark, path: Path, metrics: Json) -> float:
    """Return the share of the highest mark that a document got, between 0 and 1."""
    marks: list[Any] = []
    for name in benchmark.metric.split("+"):
        value = metrics.get(name)
        marks += value if isinstance(value, list) and value else [value]
    if not all(isinstance(mark, bool | int | float) for mark in marks):
        known = ", ".join(sorted(name for name, one in metrics.items() if one is not None))
        raise DataError(
            f"{path}: benchmark '{benchmark.name}' has no metric '{benchmark.metric}'. It has: "
            f"{known}. Set metric."
        )
    share = math.fsum(marks) / len(marks) / benchmark.highest
    if not 0 <= share <= 1:
        raise DataError(
            f"{path}: '{benchmark.metric}' of benchmark '{benchmark.name}' is "
            f"{share * benchmark.highest:g}, must be between 0 and {benchmark.highest:g}. "
            "Set highest."
        )
    return share

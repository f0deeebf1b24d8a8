"""The suite YAML: benchmarks that are run against a served model, and how the model is asked.

The defaults are what openai/gpt-oss asks for: its README recommends temperature 1 and top_p 1, and
its evaluations (gpt_oss/evals) use these, 32,768 new tokens, and an effort of low, medium or high.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cpt.errors import ConfigError
from cpt.offline.evaluation.tasks import existing_path
from data_pipeline.config.strict_yaml import Reader, load_yaml, nearest

Effort = Literal["low", "medium", "high"]
DEFAULT_EFFORT: Effort = "medium"
"""Effort that the Harmony format and vLLM take where none is asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How the model is asked, in all benchmarks alike."""

    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Share of the probability that tokens are drawn from."""
    max_new_tokens: int = 32768
    """Tokens of a reply at most, its thinking included."""
    reasoning_effort: Effort = DEFAULT_EFFORT
    """How long the model is to think."""
    prompt_tokens: int = 8192
    """Room for the longest prompt: the server needs a context of this and `max_new_tokens`."""
    seed: int = 1234
    """Seed of lm-evaluation-harness, for the order of its examples and the draws of the server."""

    @property
    def context_tokens(self) -> int:
        """Context that the server needs, in tokens."""
        return self.prompt_tokens + self.max_new_tokens

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each broken rule."""
        if not self.temperature >= 0:
            yield "temperature", f"is {self.temperature:g}, must be at least 0."
        if not 0 < self.top_p <= 1:
            yield "top_p", f"is {self.top_p:g}, must be above 0 and at most 1."
        for key in ("max_new_tokens", "prompt_tokens"):
            if getattr(self, key) < 1:
                yield key, f"is {getattr(self, key)}, must be at least 1."


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A benchmark of the suite."""

    name: str
    """Unique name of the benchmark in results; also the name of its folder."""
    language: str
    """Language of the benchmark: en, ja."""
    tool: Literal["lm_eval", "lighteval"]
    """The program that runs it: `lm_eval` is lm-evaluation-harness, `lighteval` that of
    swallow-evaluation-instruct.
    """
    task: str
    """Its name there, such as `gsm8k` or `swallow|jamcqa`."""
    metric: str
    """Its metric there, such as `exact_match,flexible-extract` or `extractive_match`.

    With lighteval `a+b` is the mean of two.
    """
    max_drop: float | None = None
    """Largest loss that passes, in points; default: none, and only a proven loss fails."""
    api: Literal["chat", "completions"] = "chat"
    """With lm_eval: ask in the chat format, or let the server score continuations of plain text."""
    num_fewshot: int | None = None
    """With lm_eval: examples in the prompt; default: the task's own."""
    include_path: Path | None = None
    """With lm_eval: folder of task files of your own, relative to the YAML file."""
    highest: float = 1.0
    """Value of the metric if all is right: 1 for shares, 10 for the marks of some judges."""
    limit: int | None = None
    """Documents at most, from the first; default: all."""
    needs: tuple[str, ...] = ()
    """Environment variables that it needs, such as OPENAI_API_KEY for a judge; only their names."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each broken rule within the benchmark."""
        if not self.name or not set(self.name) <= _NAME_CHARACTERS:
            yield "name", f"is '{self.name}', must be of letters, digits, '_', '-' and '.'."
        if self.max_drop is not None and not self.max_drop > 0:
            yield "max_drop", f"is {self.max_drop:g}, must be above 0: no measurement is exact."
        if not self.highest > 0:
            yield "highest", f"is {self.highest:g}, must be above 0."
        if self.limit is not None and self.limit < 1:
            yield "limit", f"is {self.limit}, must be at least 1."
        if self.tool == "lighteval":
            for key, default in (("api", "chat"), ("num_fewshot", None), ("include_path", None)):
                if getattr(self, key) != default:
                    yield key, "is given, but only tool: lm_eval has it. Remove it."
            if self.task.count("|") != 1:
                yield "task", f"is '{self.task}', must be suite|task, such as swallow|jamcqa."


_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """The whole YAML."""

    benchmarks: tuple[Benchmark, ...]
    """At least one benchmark."""
    asking: Asking = field(default_factory=Asking)
    """How the model is asked."""
    concurrency: int = 64
    """Requests that are open at once."""
    request_timeout_seconds: int = 7200
    """Time after which a request is given up."""

    @property
    def limits(self) -> dict[str, float | None]:
        """`max_drop` by benchmark."""
        return {benchmark.name: benchmark.max_drop for benchmark in self.benchmarks}

    def settings_of(self, benchmark: Benchmark) -> list[Any]:
        """Return all that decides what a benchmark finds, besides the model and the documents."""
        asking = asdict(self.asking)
        del asking["prompt_tokens"]
        return [benchmark.tool, benchmark.api, benchmark.num_fewshot, benchmark.limit, asking]

    def content_settings_of(self, benchmark: Benchmark) -> list[Any]:
        """Return what must be equal, besides the documents, where two scores are compared.

        Marks are divided by `highest` when they are collected, so another one needs no other run.
        Where it is 1 it is left out, and results of before there was this rule stay comparable.
        """
        settings = self.settings_of(benchmark)
        return settings if benchmark.highest == 1 else [*settings, benchmark.highest]

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each broken rule across benchmarks."""
        if not self.benchmarks:
            yield "benchmarks", "is an empty list. Name at least one benchmark."
        for key in ("concurrency", "request_timeout_seconds"):
            if getattr(self, key) < 1:
                yield key, f"is {getattr(self, key)}, must be at least 1."
        seen = set()
        for index, benchmark in enumerate(self.benchmarks):
            if benchmark.name in seen:
                yield (
                    f"benchmarks[{index}].name",
                    f"is '{benchmark.name}', which the list already has. Give each its own name.",
                )
            seen.add(benchmark.name)
            if benchmark.tool == "lighteval" and self.asking.reasoning_effort != DEFAULT_EFFORT:
                yield (
                    f"benchmarks[{index}].tool",
                    f"is lighteval, which cannot tell a vLLM server an effort other than "
                    f"{DEFAULT_EFFORT}, and asking.reasoning_effort is "
                    f"{self.asking.reasoning_effort}. Use {DEFAULT_EFFORT}, or a suite of its own.",
                )


def load_suite(path: Path, only: Sequence[str] = ()) -> Suite:
    """Read and check a suite YAML.

    Args:
        path: The file.
        only: Names of the benchmarks to keep; default: all.

    Raises:
        ConfigError: the file is missing or breaks a rule, or it has no benchmark of a name.
    """
    if not path.is_file():
        raise ConfigError(f"--suite {path}: no such file. Start from configs/suites/gpt-oss.yaml.")
    reader = Reader(load_yaml(path))
    suite = reader.read(Suite)
    base = path.resolve().parent
    benchmarks = []
    for index, benchmark in enumerate(suite.benchmarks if suite else ()):
        if benchmark.include_path is not None:
            key = ("benchmarks", index, "include_path")
            found = existing_path(reader, key, base, benchmark.include_path, is_folder=True)
            benchmark = replace(benchmark, include_path=found)
        benchmarks.append(benchmark)
    reader.finish()
    assert suite is not None
    return _select(replace(suite, benchmarks=tuple(benchmarks)), only)


def _select(suite: Suite, only: Sequence[str]) -> Suite:
    """Return the suite with the benchmarks of some names.

    Raises:
        ConfigError: there is no benchmark of a name.
    """
    if not only:
        return suite
    known = [benchmark.name for benchmark in suite.benchmarks]
    problems = []
    for name in only:
        if name not in known:
            problems.append(f"--only: the suite has no benchmark '{name}'.{nearest(name, known)}")
    if problems:
        raise ConfigError(problems)
    return replace(
        suite, benchmarks=tuple([item for item in suite.benchmarks if item.name in set(only)])
    )

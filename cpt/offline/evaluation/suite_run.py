"""Run the benchmarks of a suite, one after another, against a served model.

Each benchmark has a folder of its own: `log.txt`, the results of its tool, and `done.json`, written
last, which says of which model, task and settings the results are.  A restart goes on with the
first benchmark that is not done.  One that fails does not keep the others from running; the run
then ends with an error that names it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpt.errors import ConfigError, InternalError
from cpt.model.weights.checksums import is_identity, model_hash
from cpt.offline.evaluation.benchmark_commands import Programs, ServedModel, command_of
from cpt.offline.evaluation.suite import Benchmark, Suite
from cpt.resilience.environment import JOB_SECRET
from data_pipeline.bounded.json_text import read_json
from data_pipeline.console.say import say
from data_pipeline.store.files import make_folder, no_links, write_json

DONE_FILE = "done.json"
LOG_FILE = "log.txt"
ANSWER_SECONDS = 30
"""Time within which a living server answers a question about itself."""
LARGEST_ANSWER_BYTES = 2**20
"""Bytes that are read of an answer: a list of models takes a thousand."""
KEYS_OF_OTHERS = ("OPENAI_API_KEY",)
"""Variables that only a benchmark that names them in `needs` may see."""
_LOCAL_HOSTS = "127.0.0.1,localhost"


def find_model(url: str, directory: Path) -> ServedModel:
    """Ask a server whether it serves a model, and under which name.

    Args:
        url: Its address without a path.
        directory: Directory of the model, for its tokenizer.

    Raises:
        ConfigError: it does not answer, or serves no model or another one.
    """
    url = url.rstrip("/")
    try:
        listed = json.loads(_get(f"{url}/v1/models"))["data"]
        names = [str(model["id"]) for model in listed]
        found = [model for model in listed if _is_served_from(model, directory)]
        if not names:
            raise LookupError("an empty list")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--server {url}: /v1/models names no model ({error}). Start one with vllm serve, "
            "or submit slurm/evaluate.sbatch, which does."
        ) from error
    if not found:
        raise ConfigError(
            f"--server {url} serves {', '.join(map(repr, names))}, not --model {directory}. "
            f"Start it with vllm serve {directory} --served-model-name {directory.resolve().name}."
        )
    return ServedModel(
        url=url,
        name=str(found[0]["id"]),
        context_tokens=found[0].get("max_model_len"),
        directory=directory,
    )


def _is_served_from(model: dict[str, Any], directory: Path) -> bool:
    """Return whether an entry of /v1/models is of a directory.

    vLLM says in `root` what it loads.  That is no path of this machine if the server runs in a
    container with mounts of its own; then the names must be equal.
    """
    root = str(model.get("root"))
    if os.path.isdir(root):
        return os.path.samefile(root, directory)
    return Path(str(model["id"])).name == directory.resolve().name


def _get(url: str) -> bytes:
    """Return what a server answers, around any proxy of the site."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=ANSWER_SECONDS) as answer:
        return bytes(answer.read(LARGEST_ANSWER_BYTES))


def check_suite(suite: Suite, model: ServedModel, programs: Programs) -> None:
    """Refuse, before a request is sent, a suite that cannot run here.

    Raises:
        ConfigError: the server's context is too short, a program is missing, or a variable that a
            benchmark needs is not set.
    """
    problems = []
    needed = suite.asking.context_tokens
    if model.context_tokens is not None and model.context_tokens < needed:
        problems.append(
            f"the server has a context of {model.context_tokens:,} tokens, the suite needs "
            f"{needed:,} (asking.prompt_tokens + asking.max_new_tokens). Start it with "
            f"--max-model-len {needed}."
        )
    problems += missing_for(suite, programs)
    if problems:
        raise ConfigError(problems)


def missing_for(suite: Suite, programs: Programs) -> list[str]:
    """Return the programs and variables that a suite needs and that are not here."""
    problems = []
    for tool in sorted({benchmark.tool for benchmark in suite.benchmarks}):
        words = getattr(programs, tool)
        program = words.split()[0] if words.split() else ""
        if not program or shutil.which(program) is None:
            problems.append(
                f"--{tool} '{words}': no such program. docs/evaluate.md says how to install it; or "
                f"choose benchmarks without it (--only)."
            )
    for benchmark in suite.benchmarks:
        missing = [name for name in benchmark.needs if not os.environ.get(name)]
        if missing:
            problems.append(
                f"benchmark '{benchmark.name}' needs {', '.join(missing)} in the environment, "
                "which is not set. Set it, or choose benchmarks without it (--only)."
            )
    return problems


def run_suite(suite: Suite, model: ServedModel, programs: Programs, out: Path) -> None:
    """Run all benchmarks that are not done.

    Args:
        suite: What to run.
        model: The served model.
        programs: How the tools are started.
        out: Folder of the benchmarks' folders.

    Raises:
        ConfigError: a benchmark is done, of another model or task or with other settings.
        InternalError: a benchmark failed, or the server is gone; what is done is kept.
    """
    identity = model_hash(model.directory)
    waiting = []
    for benchmark in suite.benchmarks:
        if not is_done(out / benchmark.name, suite, benchmark, identity):
            waiting.append(benchmark)
    failed = []
    for benchmark in suite.benchmarks:
        folder = out / benchmark.name
        if benchmark not in waiting:
            say(f"{benchmark.name}: done before", flush=True)
            continue
        _check_health(model)
        code, seconds = _run(benchmark, suite, model, programs, folder)
        # a tool may count requests to a dead server as wrong answers, and end with 0
        _check_health(model)
        if code == 0 and any(folder.rglob("results_*.json")):
            done = _identity(suite, benchmark, identity) | {"seconds": seconds}
            write_json(folder / DONE_FILE, done, indent=1)
            say(f"{benchmark.name}: done after {seconds:.0f} s", flush=True)
        else:
            reason = f"ended with {code}" if code else "wrote no results_*.json"
            failed.append(
                f"benchmark '{benchmark.name}': {benchmark.tool} {reason}. See {folder / LOG_FILE}."
            )
            say(f"{benchmark.name}: failed after {seconds:.0f} s", flush=True)
    if failed:
        raise InternalError("\n".join([*failed, "The same command runs what is not done."]))


def is_done(folder: Path, suite: Suite, benchmark: Benchmark, model: str) -> bool:
    """Return whether a benchmark is done.

    Args:
        folder: Folder of the benchmark.
        suite: The suite.
        benchmark: The benchmark.
        model: `model_hash` of the model.

    Raises:
        ConfigError: it is, of another model or task, or with other settings.
    """
    path = folder / DONE_FILE
    if not path.exists():
        return False
    done = read_json(path)
    differences = []
    for key, wanted in json.loads(json.dumps(_identity(suite, benchmark, model))).items():
        if not is_identity(done.get(key), wanted):
            differences.append(f"{key} was {done.get(key)}, is now {wanted}")
    if differences:
        raise ConfigError(
            f"{path}: these are results of another model, of another task or with other settings: "
            f"{'; '.join(differences)}. Take the same again, give another --out, or delete "
            f"{folder} to run the benchmark again."
        )
    return True


def _identity(suite: Suite, benchmark: Benchmark, model: str) -> dict[str, Any]:
    """Return what the results of a benchmark are of, besides the documents."""
    return {
        "model": model,
        "task": benchmark.task,
        "settings": suite.settings_of(benchmark),
    }


def _check_health(model: ServedModel) -> None:
    try:
        _get(f"{model.url}/health")
    except (OSError, urllib.error.URLError) as error:
        raise InternalError(
            f"{model.url}: the server does not answer ({error}). Its log says why; the same "
            "command runs what is not done."
        ) from error


def _run(
    benchmark: Benchmark, suite: Suite, model: ServedModel, programs: Programs, folder: Path
) -> tuple[int, float]:
    """Run one benchmark, and return its exit code and the seconds it took."""
    make_folder(folder)
    command = command_of(benchmark, suite, model, programs, folder)
    started = time.monotonic()
    with open(folder / LOG_FILE, "ab", opener=no_links) as log:
        log.write(f"{json.dumps(command)}\n".encode())
        log.flush()
        environment = environment_of(benchmark, suite, os.environ)
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        )
    return done.returncode, time.monotonic() - started


def environment_of(
    benchmark: Benchmark, suite: Suite, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of a tool: without foreign keys, and around proxies."""
    chosen: dict[str, Any] = dict(environment)
    for name in KEYS_OF_OTHERS:
        if name not in benchmark.needs:
            chosen.pop(name, None)
    chosen.pop(JOB_SECRET, None)
    for name in ("NO_PROXY", "no_proxy"):
        chosen[name] = ",".join([*filter(None, [chosen.get(name)]), _LOCAL_HOSTS])
    chosen["LITELLM_CONCURRENT_CALLS"] = str(suite.concurrency)
    return chosen

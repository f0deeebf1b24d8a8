"""The commands that run a benchmark against a served model, with the words of each tool.

lm-evaluation-harness 0.4.13 (`lm_eval run`, its models `local-chat-completions` and
`local-completions`) and lighteval as swallow-evaluation-instruct v202508 has it (`lighteval
endpoint litellm`).  No word of a command is a secret: keys come from the environment.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from cpt.offline.evaluation.suite import Benchmark, Suite


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A model behind an OpenAI-compatible server."""

    url: str
    """Address without a path, such as http://127.0.0.1:8000."""
    name: str
    """Name under which it is served."""
    context_tokens: int | None
    """Longest prompt and reply together; None if the server does not tell."""
    directory: Path
    """Directory of the model, for its tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Programs:
    """How the tools are started: words of a shell, such as `uv run --extra lighteval lighteval`."""

    lm_eval: str = "lm_eval"
    """lm-evaluation-harness."""
    lighteval: str = "lighteval"
    """lighteval of swallow-evaluation-instruct."""


def command_of(
    benchmark: Benchmark, suite: Suite, model: ServedModel, programs: Programs, out: Path
) -> list[str]:
    """Return the words that run one benchmark and write its results below `out`."""
    if benchmark.tool == "lighteval":
        return _lighteval(benchmark, suite, model, programs, out)
    return _lm_eval(benchmark, suite, model, programs, out)


def _lm_eval(
    benchmark: Benchmark, suite: Suite, model: ServedModel, programs: Programs, out: Path
) -> list[str]:
    asking = suite.asking
    chat = benchmark.api == "chat"
    model_arguments = {
        "model": model.name,
        "base_url": f"{model.url}/v1/{'chat/' if chat else ''}completions",
        "num_concurrent": suite.concurrency,
        "timeout": suite.request_timeout_seconds,
        "max_length": asking.context_tokens,
        "seed": asking.seed,
    }
    if not chat:
        model_arguments |= {
            "tokenizer_backend": "huggingface",
            "tokenizer": str(model.directory),
            "trust_remote_code": False,
        }
    words = [*shlex.split(programs.lm_eval), "run"]
    words += ["--model", "local-chat-completions" if chat else "local-completions"]
    words += ["--model_args", json.dumps(model_arguments)]
    words += ["--tasks", benchmark.task]
    words += ["--output_path", str(out), "--log_samples", "--seed", str(asking.seed)]
    if chat:
        words += ["--apply_chat_template", "--gen_kwargs", json.dumps(_generation(suite))]
    if benchmark.num_fewshot is not None:
        words += ["--num_fewshot", str(benchmark.num_fewshot)]
    if benchmark.include_path is not None:
        words += ["--include_path", str(benchmark.include_path)]
    if benchmark.limit is not None:
        words += ["--limit", str(benchmark.limit)]
    return words


def _generation(suite: Suite) -> dict[str, object]:
    """Return what lm-evaluation-harness puts into each request for a reply.

    The stop words of the tasks are removed: a server looks for them in the thinking as well, and
    a reply that thinks about a "Question:" would end there.
    """
    asking = suite.asking
    return {
        "temperature": asking.temperature,
        "top_p": asking.top_p,
        "max_gen_toks": asking.max_new_tokens,
        "reasoning_effort": asking.reasoning_effort,
        "do_sample": asking.temperature > 0,
        "until": [],
    }


def _lighteval(
    benchmark: Benchmark, suite: Suite, model: ServedModel, programs: Programs, out: Path
) -> list[str]:
    asking = suite.asking
    generation = (
        f"temperature:{asking.temperature},top_p:{asking.top_p},"
        f"max_new_tokens:{asking.max_new_tokens}"
    )
    arguments = (
        f"model=hosted_vllm/{model.name},base_url={model.url}/v1,"
        f"generation_parameters={{{generation}}}"
    )
    words = [*shlex.split(programs.lighteval), "endpoint", "litellm", arguments]
    # the 0 after the task is the number of examples; the last one keeps the prompt as it is
    words += [f"{benchmark.task}|0|0", "--use-chat-template"]
    words += ["--output-dir", str(out), "--save-details"]
    if benchmark.limit is not None:
        words += ["--max-samples", str(benchmark.limit)]
    return words

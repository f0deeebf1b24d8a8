"""`cpt plan`: one point in full (as configured beside the best layout), or a table over many."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

from transformers import GptOssConfig

from cpt.config import LaunchInfo, RunYaml, load, resolve
from cpt.errors import ConfigError
from cpt.model.configuration import load_config
from cpt.planning.estimate import Estimate, estimate
from cpt.planning.figure import PlannedPoint, draw
from cpt.planning.hardware import GPUS, Assumptions, Gpu
from cpt.planning.memory import ParameterCounts, count_parameters
from cpt.planning.search import Layout, search
from cpt.planning.table import HEADER, comparison, line
from data_pipeline.config.strict_yaml import Located

PRESETS = ("gpt-oss-20b", "gpt-oss-120b")


def plan(options: argparse.Namespace) -> None:
    """Print a plan.

    Args:
        options: `config`, `ds_config`, `set`, `gpus`, `model`, `seq_len`, `batch_tokens`, `gpu`,
            `mfu`, `imbalance`, `overlap` and `plot` of the command line.

    Raises:
        ConfigError: the files or options cannot be right.
    """
    gpu, assumed = GPUS[options.gpu], assumptions(options)
    run, ds_json = load(
        options.config, options.ds_config, dict(_pair(item) for item in options.set)
    )
    models, seq_lens = options.model or [None], options.seq_len or [run.train.seq_len]
    points = list(itertools.product(models, seq_lens, options.gpus))
    if len(points) == 1:
        print(_in_full(run, ds_json, points[0], options.batch_tokens, gpu, assumed))
    else:
        print(_over_many(run, points, options, gpu, assumed))
    print("\n".join(["assumptions", *(f"  {text}" for text in assumed.describe(gpu))]))


def assumptions(options: argparse.Namespace) -> Assumptions:
    """The assumptions of the command line.

    Raises:
        ConfigError: one of them makes no sense.
    """
    problems = (
        [f"--mfu is {options.mfu}, must be above 0 and at most 1."]
        if not 0 < options.mfu <= 1
        else []
    )
    problems += (
        [f"--overlap is {options.overlap}, must be between 0 and 1."]
        if not 0 <= options.overlap <= 1
        else []
    )
    problems += (
        [f"--imbalance is {options.imbalance}, must be >= 1."] if not options.imbalance >= 1 else []
    )
    problems += [
        f"--{name} must be >= 1."
        for name in ("gpus", "seq_len")
        if min(getattr(options, name) or [1]) < 1
    ]
    if problems:
        raise ConfigError(problems)
    return Assumptions(mfu=options.mfu, imbalance=options.imbalance, overlap=options.overlap)


def _pair(item: str) -> tuple[str, str]:
    if "=" not in item:
        raise ConfigError(f"--set {item} has no '='. Write --set section.key=value.")
    key, value = item.split("=", 1)
    return key, value


def _model(run: RunYaml, name: str | None) -> tuple[str, GptOssConfig]:
    """Architecture to plan for; the weights need not be there."""
    if name is not None:
        return name, load_config(None, name)
    if run.model.path is not None and not run.model.path.exists():
        raise ConfigError(
            f"model.path {run.model.path} does not exist here. Name its architecture: --model {PRESETS[0]}"
        )
    return str(run.model.path or run.model.init), load_config(run.model.path, run.model.init)


def _with_rows(run: RunYaml, seq_len: int, batch_tokens: int | None) -> RunYaml:
    """The run with rows of another length and about as many tokens in a step."""
    tokens = batch_tokens or run.train.global_batch_size * run.train.seq_len
    if tokens % seq_len:
        raise ConfigError(
            f"{tokens} tokens of a step are no multiple of rows of {seq_len}. Give --batch_tokens."
        )
    train = dataclasses.replace(run.train, seq_len=seq_len, global_batch_size=tokens // seq_len)
    return dataclasses.replace(run, train=train)


def _in_full(
    run: RunYaml,
    ds_json: Located,
    point: tuple[str | None, int, int],
    batch_tokens: int | None,
    gpu: Gpu,
    assumed: Assumptions,
) -> str:
    name, seq_len, gpus = point
    title, model = _model(run, name)
    run = _with_rows(run, seq_len, batch_tokens)
    counts = count_parameters(model, run.train.freeze)
    columns: dict[str, Estimate] = {}
    notes: list[str] = []
    try:
        info = LaunchInfo(world_size=gpus, local_world_size=min(gpus, assumed.ranks_per_node))
        columns["as configured"] = estimate(
            resolve(run, ds_json, model, info), model, counts, gpu, assumed
        )
    except ConfigError as error:
        notes.append(f"as configured it does not start on {gpus} GPUs:\n{error}")
    found = search(run, model, counts, gpus, gpu, assumed)
    if found is None:
        notes.append(
            f"no layout of these rows fits on {gpus} x {gpu.name}. Take more GPUs, or another --batch_tokens."
        )
    else:
        columns["best found"] = found[1]
        notes.append(_recipe(found[0]))
    rows = run.train.global_batch_size
    head = f"{title} on {gpus} x {gpu.name}, {rows:,} rows x {seq_len:,} = {rows * seq_len:,} tokens per step"
    return "\n".join([head, *([comparison(columns, gpu, assumed)] if columns else []), *notes])


def _recipe(layout: Layout) -> str:
    """What to write to get a layout."""
    checkpointing, offload = (
        str(x).lower() for x in (layout.activation_checkpointing, layout.offload_checkpoints)
    )
    settings = (
        f"model.activation_checkpointing={checkpointing} model.offload_checkpoints={offload} "
        f"train.micro_batch_size={layout.micro_batch_size}"
    )
    return (
        f"best found, DeepSpeed JSON: {json.dumps(layout.json())}\nbest found, run YAML: {settings}"
    )


def _over_many(
    run: RunYaml,
    points: list[tuple[str | None, int, int]],
    options: argparse.Namespace,
    gpu: Gpu,
    assumed: Assumptions,
) -> str:
    lines, drawn = [f"best layouts on {gpu.name}", HEADER], []
    models: dict[str | None, tuple[str, GptOssConfig, ParameterCounts]] = {}
    for name, seq_len, gpus in points:
        if name not in models:
            title, model = _model(run, name)
            models[name] = title, model, count_parameters(model, run.train.freeze)
        title, model, counts = models[name]
        found = search(
            _with_rows(run, seq_len, options.batch_tokens), model, counts, gpus, gpu, assumed
        )
        best = found[1] if found else None
        short = Path(title).name
        lines.append(line(short, seq_len, gpus, best, gpu))
        drawn.append(PlannedPoint(model=short, seq_len=seq_len, gpus=gpus, best=best))
    if options.plot:
        options.plot.write_text(draw(drawn, gpu, assumed), encoding="utf-8")
        lines.append(f"-> {options.plot}")
    return "\n".join(lines)

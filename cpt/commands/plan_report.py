"""The text of `cpt plan`: one point in full, or a table over many.

A point is an architecture, a row length and a number of GPUs. In full, the run as configured stands
beside the best layout that the search finds.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import GptOssConfig

from cpt.checkpoint.starting_model import located, starting_config
from cpt.commands.plan_mix import describe_mix
from cpt.commands.shared_options import overrides_of
from cpt.config import LaunchInfo, RunYaml, files_of_stage, load, resolve
from cpt.errors import ConfigError
from cpt.model.configuration import load_config
from cpt.planning.estimate import Estimate, estimate
from cpt.planning.figure import PlannedPoint, draw
from cpt.planning.hardware import CLUSTERS, GPUS, Assumptions, Gpu, with_fabric
from cpt.planning.low_precision import assumption_lines, emulation_problem, products_problem
from cpt.planning.memory import ParameterCounts, counts_of
from cpt.planning.routing import read_routing
from cpt.planning.search import Layout, search
from cpt.planning.table import HEADER, comparison, line
from data_pipeline.config.strict_yaml import Located
from data_pipeline.console.say import say

EXAMPLE_PRESET = "gpt-oss-20b"
DEFAULT_GPU = "h100"
NODE_NUMBERS = ("ranks_per_node", "fabric_gbit", "host_gb", "nvme_gb", "nvme_gb_per_second")
"""Options that describe a node by a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One point of a plan."""

    architecture: str | None
    """Name of a preset; None for the model of the run YAML."""
    seq_len: int
    """Tokens of a packed row."""
    gpus: int
    """Number of GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A model without weights."""

    title: str
    """Name for people."""
    config: GptOssConfig
    """Sizes of the model."""
    counts: ParameterCounts
    """Its parameters by kind."""


def plan(options: argparse.Namespace) -> None:
    """Print a plan.

    Args:
        options: `config`, `ds_config`, `set`, `gpus`, `model`, `seq_len`, `batch_tokens`, `gpu`,
            `cluster`, `ranks_per_node`, `fabric_gbit`, `host_gb`, `nvme_gb`, `nvme_gb_per_second`,
            `mfu`, `imbalance`, `routing_of`, `overlap` and `plot` of the command line.

    Raises:
        ConfigError: a file or an option makes no sense.
    """
    assumed = assumptions(options)
    gpu = gpu_in_node(options)
    assumed = replace(assumed, ranks_per_node=gpu.ranks_per_node)
    run, ds_json = load(options.config, options.ds_config, overrides_of(options))
    for find in (products_problem, emulation_problem):
        problem = find(run.train.products, gpu)
        if problem is not None:
            raise ConfigError(problem)
    if not run.stages or options.seq_len:
        _plan_rows(_Planner(run, ds_json, options.batch_tokens, gpu, assumed), options)
    elif options.plot:
        raise ConfigError("--plot draws one kind of rows, and the run has stages. Give --seq_len.")
    else:
        for number, stage in enumerate(run.stages):
            of_run, of_json = files_of_stage(run, ds_json, number)
            say(f"stage {number + 1} of {len(run.stages)}: rows of {stage.seq_len:,} tokens")
            _plan_rows(_Planner(of_run, of_json, options.batch_tokens, gpu, assumed), options)
    of_mix = describe_mix(run.data)
    if of_mix:
        say(of_mix)
    say("assumptions")
    for text in [*assumed.describe(gpu), *assumption_lines(run.train, gpu)]:
        say(f"  {text}")


def _plan_rows(planner: _Planner, options: argparse.Namespace) -> None:
    """Print the plan of rows of one or several lengths; arguments as for `plan`."""
    points = []
    for architecture, seq_len, gpus in itertools.product(
        options.model or [None], options.seq_len or [planner.seq_len], options.gpus
    ):
        points.append(Point(architecture=architecture, seq_len=seq_len, gpus=gpus))
    if len(points) == 1:
        say(planner.in_full(points[0]))
    else:
        say(planner.over_many(points, options.plot))


def assumptions(options: argparse.Namespace) -> Assumptions:
    """Return the assumptions of the command line.

    Raises:
        ConfigError: one of them makes no sense.
    """
    problems = []
    if options.mfu is not None and not 0 < options.mfu <= 1:
        problems.append(f"--mfu is {options.mfu}, must be above 0 and at most 1.")
    if not 0 <= options.overlap <= 1:
        problems.append(f"--overlap is {options.overlap}, must be between 0 and 1.")
    if not options.imbalance >= 1:
        problems.append(f"--imbalance is {options.imbalance}, must be >= 1.")
    if min(options.gpus) < 1:
        problems.append("--gpus must be >= 1.")
    if options.seq_len and min(options.seq_len) < 1:
        problems.append("--seq_len must be >= 1.")
    for name in NODE_NUMBERS:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            problems.append(f"--{name} is {value}, must be above 0.")
    if problems:
        raise ConfigError(problems)
    routing = read_routing(options.routing_of) if options.routing_of else None
    return Assumptions(
        mfu=options.mfu,
        imbalance=options.imbalance,
        overlap=options.overlap,
        routing=routing,
    )


def gpu_in_node(options: argparse.Namespace) -> Gpu:
    """Return the GPU of the command line with its shares of its node.

    What is not given comes from the cluster, if one is named, or else from what is usual for the
    GPU.
    """
    gpu = GPUS[options.gpu or DEFAULT_GPU]
    if options.cluster is not None:
        shape = CLUSTERS[options.cluster]
        if options.gpu is not None:
            shape = replace(shape, gpu=options.gpu)
        gpu = shape.in_gpu()
    ranks = options.ranks_per_node or gpu.ranks_per_node
    node_gbit = options.fabric_gbit
    if node_gbit is None:
        node_gbit = ranks * gpu.network_bytes_per_second * 8 / 1e9
    gpu = with_fabric(gpu, ranks, node_gbit)
    shares = {
        "host_memory_bytes": options.host_gb,
        "nvme_bytes": options.nvme_gb,
        "nvme_bytes_per_second": options.nvme_gb_per_second,
    }
    for name, of_node in shares.items():
        if of_node is not None:
            gpu = replace(gpu, **{name: of_node * 1e9 / ranks})
    return gpu


class _Planner:
    """Plans points of one run on one kind of GPU."""

    def __init__(
        self,
        run: RunYaml,
        ds_json: Located,
        batch_tokens: int | None,
        gpu: Gpu,
        assumed: Assumptions,
    ) -> None:
        self._run = run
        self._ds_json = ds_json
        self._batch_tokens = batch_tokens
        self._gpu = gpu
        self._assumed = assumed
        self._architectures: dict[str | None, Architecture] = {}

    @property
    def seq_len(self) -> int:
        """Tokens of a packed row, as configured."""
        return self._run.train.seq_len

    def in_full(self, point: Point) -> str:
        """Return the run as configured beside the best layout."""
        architecture = self._architecture(point.architecture)
        run = self._with_rows(point.seq_len)
        num_rows = run.train.global_batch_size
        head = (
            f"{architecture.title} on {point.gpus} x {self._gpu.name}, {num_rows:,} rows x "
            f"{point.seq_len:,} = {num_rows * point.seq_len:,} tokens per step"
        )
        columns: dict[str, Estimate] = {}
        notes: list[str] = []
        try:
            columns["as configured"] = self._as_configured(run, architecture, point.gpus)
        except ConfigError as error:
            notes.append(f"as configured it does not start on {point.gpus} GPUs:\n{error}")
        found = self._search(run, architecture, point.gpus)
        if found is None:
            notes.append(
                f"no layout of these rows fits on {point.gpus} x {self._gpu.name}. Take more GPUs, "
                "or another --batch_tokens."
            )
        else:
            layout, columns["best found"] = found
            notes.append(_recipe(layout))
        lines = [head]
        if columns:
            lines.append(comparison(columns, self._gpu, self._assumed))
        return "\n".join(lines + notes)

    def over_many(self, points: list[Point], plot: Path | None) -> str:
        """Return a table of the best layouts, and draw them if `plot` is given."""
        lines = [f"best layouts on {self._gpu.name}", HEADER]
        planned = []
        for point in points:
            architecture = self._architecture(point.architecture)
            found = self._search(self._with_rows(point.seq_len), architecture, point.gpus)
            best = found[1] if found else None
            name = Path(architecture.title).name
            lines.append(line(name, point.seq_len, point.gpus, best, self._gpu))
            planned.append(
                PlannedPoint(model=name, seq_len=point.seq_len, gpus=point.gpus, best=best)
            )
        if plot:
            plot.write_text(draw(planned, self._gpu, self._assumed), encoding="utf-8")
            lines.append(f"-> {plot}")
        return "\n".join(lines)

    def _architecture(self, name: str | None) -> Architecture:
        if name not in self._architectures:
            title, config = self._load_config(name)
            counts = counts_of(self._run, config)
            self._architectures[name] = Architecture(title=title, config=config, counts=counts)
        return self._architectures[name]

    def _load_config(self, name: str | None) -> tuple[str, GptOssConfig]:
        """Return title and sizes of a preset, or of the run's model; weights need not be there."""
        if name is not None:
            return name, load_config(None, name)
        model = self._run.model
        path = None if model.path is None else located(model.path)
        if path is not None and not path.exists():
            raise ConfigError(
                f"model.path {model.path} does not exist here. Name its architecture: "
                f"--model {EXAMPLE_PRESET}"
            )
        return str(path or model.init), starting_config(path, model.init)

    def _with_rows(self, seq_len: int) -> RunYaml:
        """Return the run with rows of another length and as many tokens in a step."""
        train = self._run.train
        batch_tokens = self._batch_tokens or train.global_batch_size * train.seq_len
        if batch_tokens % seq_len:
            raise ConfigError(
                f"{batch_tokens} tokens of a step are no multiple of rows of {seq_len}. "
                "Give --batch_tokens."
            )
        train = replace(train, seq_len=seq_len, global_batch_size=batch_tokens // seq_len)
        return replace(self._run, train=train)

    def _as_configured(self, run: RunYaml, architecture: Architecture, gpus: int) -> Estimate:
        local_world_size = min(gpus, self._assumed.ranks_per_node)
        info = LaunchInfo(world_size=gpus, local_world_size=local_world_size)
        config = resolve(run, self._ds_json, architecture.config, info)
        return estimate(config, architecture.config, architecture.counts, self._gpu, self._assumed)

    def _search(
        self, run: RunYaml, architecture: Architecture, gpus: int
    ) -> tuple[Layout, Estimate] | None:
        return search(run, architecture.config, architecture.counts, gpus, self._gpu, self._assumed)


def _recipe(layout: Layout) -> str:
    """Return the settings that give a layout."""
    settings: dict[str, object] = {
        "model.activation_checkpointing": layout.activation_checkpointing,
        "model.offload_checkpoints": layout.offload_checkpoints,
        "train.micro_batch_size": layout.micro_batch_size,
    }
    if layout.optimizer_state is not None:
        settings["train.optimizer_state"] = layout.optimizer_state
    text = " ".join(f"{key}={value}".lower() for key, value in settings.items())
    return f"best found, DeepSpeed JSON: {json.dumps(layout.json())}\nbest found, run YAML: {text}"

"""From command-line options to a finished run: validate before anything is loaded, then build,
train, tell.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import GptOssConfig

from cpt.checkpoint.reader import list_steps, step_folder
from cpt.config import LaunchInfo, RunConfig, load, resolve
from cpt.deepspeed_adapter.groups import create_topology, init_distributed
from cpt.deepspeed_adapter.version import check_version
from cpt.errors import ConfigError
from cpt.export.run_export import export_run
from cpt.job.data import check_mix
from cpt.job.job import Job, assemble
from cpt.job.loop import train
from cpt.job.run_dir import held_run_dir
from cpt.job.samples import print_continuations
from cpt.model import attention
from cpt.model.configuration import load_config
from cpt.model.freezing import freeze_problems, frozen_names
from cpt.model.parameters import parameter_numels
from cpt.parallel.agreement import gather_json, on_first_rank
from cpt.parallel.topology import Topology
from cpt.planning.memory import memory_tables
from cpt.resilience import faults
from cpt.resilience.phase import PhaseClock
from cpt.resilience.stop import StopRequest, watch_launcher
from cpt.resilience.watchdog import watching
from cpt.telemetry.mailbox import EventMailbox
from cpt.telemetry.report.page import write_report
from data_pipeline.build.build import input_bytes, resolve_build_dir
from data_pipeline.config.strict_yaml import nearest
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.data_plan import make_data_plan

log = logging.getLogger("cpt")


def launch(options: argparse.Namespace, stop: StopRequest) -> None:
    """Do one run.

    Args:
        options: The command line.
        stop: Notes requests to stop since the process was started.

    Raises:
        CptError: with the exit code of the run.
    """
    config, model_config = validate(options)
    run_dir = options.run_dir or Path("runs") / options.config.stem
    if options.dry_run:
        if os.environ["RANK"] == "0":
            print(describe(config, model_config, run_dir, options.resume))
            print(memory_tables(config, model_config))
            print(describe_data(config))
        return
    device = this_device(config)
    init_distributed(device)
    topology = create_topology(sp_size=config.sp_size, ep_size=config.ep_size, device=device)
    check_same_everywhere(config, topology)
    clock = PhaseClock()
    mailbox = EventMailbox()
    resume = resume_of(options.resume)
    watch_launcher(stop, config.checkpoint.stop_budget_seconds)
    observe = bool(options.sample or options.measure)
    if topology.rank == 0:
        log.info("%s", describe(config, model_config, run_dir, resume))
    with (
        nullcontext() if observe else held_run_dir(run_dir, resume, config, model_config, topology),
        watching(run_dir, topology, config.watchdog, clock, mailbox.post),
    ):
        if topology.rank == 0 and not observe:
            stop.watch_run(run_dir, config.checkpoint.stop_margin_seconds)
        job = assemble(
            config,
            model_config,
            topology,
            clock,
            mailbox,
            run_dir,
            resume,
            stop,
            observe=observe,
        )
        try:
            if options.sample:
                print_continuations(job, options.sample)
            if options.measure:
                measure_once(job)
            if not observe:
                train(job)
                finish(job)
        finally:
            job.telemetry.close()
    dist.destroy_process_group()


def measure_once(job: Job) -> None:
    """Score the held-out text with the weights of a run, and leave the run as it is.

    Raises:
        ConfigError: the mix holds nothing out, or the untouched model was never measured.
    """
    if job.guard is None:
        raise ConfigError(
            "--measure: nothing is held out (held_out_share in the mix), or guard.enabled is false."
        )
    job.clock.enter("evaluate", job.progress.step)
    file = job.guard.measure_apart(job.progress.step, job.engine)
    if job.topology.rank == 0:
        print(
            f"\nweights after step {job.progress.step}\n{job.guard.table()}\n-> {file}", flush=True
        )


def resume_of(asked: str) -> str:
    """A requeued job goes on from its own newest checkpoint, whatever its first start was told."""
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    if requeued and asked != "auto":
        log.info("requeued: --resume %s held for the first start, now auto", asked)
    return "auto" if requeued else asked


def check_same_everywhere(config: RunConfig, topology: Topology) -> None:
    """Refuse to run on nodes that read other files or found another layout.

    Raises:
        ConfigError: the resolved configuration of some rank differs from rank 0's.
    """
    digest = hashlib.sha256(json.dumps(config.to_plain(), sort_keys=True).encode()).hexdigest()
    digests = gather_json(digest, topology.control_group)
    different = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if different:
        raise ConfigError(
            f"ranks {different} resolved another configuration than rank 0. Give every node the same files and the "
            "same number of ranks, or write sizes instead of 'auto' in the DeepSpeed JSON."
        )


def validate(options: argparse.Namespace) -> tuple[RunConfig, GptOssConfig]:
    """Files, command line and launcher -> configuration, or one ConfigError with everything that is
    wrong.
    """
    check_version()
    faults.check_environment()
    missing = [
        name
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    if missing:
        raise ConfigError(
            f"no launcher: {', '.join(missing)} not set. Start with  deepspeed cpt/run.py --ds_config "
            f"{options.ds_config}  (on a machine without GPU add --num_gpus N for N processes)."
        )
    problems = [
        f"--set {item} has no '='. Write --set section.key=value."
        for item in options.set
        if "=" not in item
    ]
    if options.resume not in ("auto", "never") and not (
        options.resume.isascii() and options.resume.isdigit()
    ):
        problems.append(f"--resume {options.resume} must be auto, never or a step.")
    if problems:
        raise ConfigError(problems)
    run_yaml, json_file = load(
        options.config, options.ds_config, dict(item.split("=", 1) for item in options.set)
    )
    model_config = load_config(run_yaml.model.path, run_yaml.model.init)
    world_size = int(os.environ["WORLD_SIZE"])
    problems = freeze_problems(run_yaml.train.freeze, parameter_numels(model_config))
    if run_yaml.model.attention not in attention.known_names():
        name = run_yaml.model.attention
        problems.append(
            f"model.attention is '{name}', which is no backend.{nearest(name, attention.known_names())}"
        )
    if problems:
        raise ConfigError(problems)
    info = LaunchInfo(world_size=world_size, local_world_size=local_world_size(world_size))
    return resolve(run_yaml, json_file, model_config, info), model_config


def local_world_size(world_size: int) -> int:
    """Ranks on this node: torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)


def this_device(config: RunConfig) -> torch.device:
    """This rank's device; CPU ranks share the cores of the node."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    share = (os.cpu_count() or 1) // local_world_size(config.world_size)
    torch.set_num_threads(config.train.threads or max(1, share))
    return torch.device("cpu")


def describe(config: RunConfig, model_config: GptOssConfig, run_dir: Path, resume: str) -> str:
    """What is about to happen, as a table for people."""
    train = config.train
    steps = list_steps(run_dir)
    found = (
        f"step {steps[0]}"
        if steps and resume == "auto"
        else "nothing"
        if resume == "auto"
        else resume
    )
    rows: dict[str, Any] = {
        "model": config.model.path or config.model.init,
        "architecture": f"{model_config.num_hidden_layers} layers, {model_config.num_local_experts} experts, "
        f"{model_config.num_attention_heads}/{model_config.num_key_value_heads} heads",
        "world size": config.world_size,
        "sequence parallel": f"{config.sp_size}, window layers by {'halo' if config.use_halo else 'all-to-all'}"
        if config.sp_size > 1
        else 1,
        "expert parallel": config.ep_size,
        "data parallel": config.world_size // config.sp_size,
        "ZeRO stage": config.zero_stage,
        "dtype": train.dtype,
        "frozen": describe_frozen(config, model_config),
        "tokens per step": f"{train.global_batch_size} rows x {train.seq_len} = "
        f"{train.global_batch_size * train.seq_len} slots",
        "accumulation": f"{config.gradient_accumulation_steps} x micro batch {config.micro_batch_size}",
        "steps": train.total_steps,
        "mix": config.data.mix,
        "run directory": run_dir,
        "resumes from": found,
    }
    width = max(map(len, rows))
    return "\n".join(
        ["resolved configuration", *(f"  {name:<{width}}  {value}" for name, value in rows.items())]
    )


def describe_frozen(config: RunConfig, model_config: GptOssConfig) -> str:
    """How much of the model is left as it is."""
    numels = parameter_numels(model_config)
    frozen = sum(numels[name] for name in frozen_names(config.train.freeze, numels))
    if not frozen:
        return "nothing"
    return f"{', '.join(config.train.freeze)}: {frozen:,} of {sum(numels.values()):,} parameters"


def describe_data(config: RunConfig) -> str:
    """The plan of the mix if it is built, with what does not add up; nothing is built here.

    Raises:
        ConfigError: the data-mix YAML cannot be right.
    """
    mix = check_mix(config)
    directory = resolve_build_dir(mix, config.data.build_dir)
    if not directory.exists():
        return f"data\n  {config.data.mix} is sound; not built yet ({input_bytes(mix) / 1e6:.1f} MB of input)."
    data = BuiltData.open(directory, verify=False, mix=mix)
    return make_data_plan(
        data, mix, max(1, config.train.total_steps), config.train.global_batch_size
    ).describe()


def finish(job: Job) -> None:
    """Export if asked, write the report, and tell people where everything is."""
    last = step_folder(job.run_dir, job.progress.step)
    where = {"metrics": job.run_dir / "metrics.jsonl", "checkpoint": last}
    job.clock.enter("export", job.progress.step)
    if job.config.telemetry.export_at_end:
        out = job.run_dir / "export" / last.name
        if not on_first_rank(job.topology.control_group, out.exists):
            on_first_rank(
                job.topology.control_group, lambda: str(export_run(job.run_dir, last, out, "bf16"))
            )
        where["export"] = out
    if job.topology.rank == 0:
        try:
            where["report"] = write_report(job.run_dir)
        except (
            Exception
        ) as error:  # the run is done and saved; its picture is not worth its exit code
            log.warning("report.html could not be written: %s", error)
        lines = [f"  {name:<12}{path}" for name, path in where.items()]
        if job.guard is not None and job.guard.latest:
            print(f"\n{job.guard.table()}", flush=True)
        print(
            "\n".join([f"\ndone: {job.progress.step} steps, {job.progress.tokens} tokens", *lines]),
            flush=True,
        )

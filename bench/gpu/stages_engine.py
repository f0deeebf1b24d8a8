"""Stages about the training engine: DeepSpeed ZeRO-3 with one rank, two layers of gpt-oss-20b."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GptOssConfig

from cpt.checkpoint.loading import load_checkpoint
from cpt.checkpoint.saver import Saver
from cpt.config import LaunchInfo, RunYaml, resolve
from cpt.config.sections import CheckpointSection
from cpt.deepspeed_adapter.groups import create_topology, init_distributed
from cpt.job.engine_setup import build_engine, fill_weights
from cpt.model.configuration import PRESETS
from cpt.parallel.topology import Topology
from cpt.planning.hardware import GPUS
from cpt.planning.one_gpu import estimate_on_one_gpu
from cpt.resilience.phase import PhaseClock
from cpt.training.engine import StepResult, TrainingEngine
from cpt.training.loader import MicroBatch, make_micro_batch
from data_pipeline.config.strict_yaml import parse_yaml, read_file
from data_pipeline.dataset import PackedRow
from gpu.stages import Options, Planned, synchronize

STATE_GROUP = "state"
"""Group whose stages save and load, with the tiny model: the two layers have 33 GB of state, and
writing and hashing that takes longer than there is time.
"""

LAYERS = 2
"""One window layer and one full layer: what fits one GPU of 80 GB with its optimizer state."""


class DeviceNormal:
    """A weight source that draws on the device, in a second instead of a minute."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(0)

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield pieces of 16 M values."""
        for first in range(start, stop, 2**24):
            numel = min(2**24, stop - first)
            if name.endswith("norm.weight"):
                yield first, torch.ones(numel)
                continue
            values = torch.empty(numel, device=self._generator.device)
            yield first, values.normal_(0.0, 0.02, generator=self._generator)


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What an engine has beside the settings of a plain one."""

    model: dict[str, Any] = field(default_factory=dict)
    """Keys of the section `model`."""
    train: dict[str, Any] = field(default_factory=dict)
    """Keys of the section `train`."""
    zero: dict[str, Any] = field(default_factory=dict)
    """Keys of the block `zero_optimization` of the DeepSpeed JSON."""
    tiny: bool = False
    """Whether the model is the tiny one, on a GPU, too."""


PLAIN = Changes()


class Slice:
    """An engine with one rank, its weights drawn from a seed."""

    def __init__(self, options: Options, changes: Changes = PLAIN) -> None:
        os.environ.update({**measuring.single_process(), "LOCAL_WORLD_SIZE": "1"})
        started = time.perf_counter()
        if not options.tiny:
            torch.cuda.set_device(options.device)
        init_distributed(options.device)
        is_small = options.tiny or changes.tiny or options.group == STATE_GROUP
        preset = PRESETS["tiny" if is_small else "gpt-oss-20b"]
        self.model_config = GptOssConfig(**{**preset, "num_hidden_layers": LAYERS})
        train = {
            "seq_len": options.size(4096, 128),
            "global_batch_size": 1,
            "total_steps": 1000,
            "schedule": "constant",
            "lr": 1e-5,
            "dtype": "bf16",
        }
        sections = {
            "model": {"init": "tiny", **changes.model},
            "data": {"mix": "unused.yaml"},
            "train": {**train, **changes.train},
        }
        zero = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, **changes.zero}
        engine_json = json.dumps({"zero_optimization": zero, "sequence_parallel_size": 1})
        config = resolve(
            read_file(RunYaml, parse_yaml(json.dumps(sections), "run.yaml")),
            parse_yaml(engine_json, "ds.json"),
            self.model_config,
            LaunchInfo(world_size=1, local_world_size=1),
        )
        self.topology: Topology = create_topology(sp_size=1, ep_size=1, device=options.device)
        self.engine: TrainingEngine = build_engine(
            config, self.model_config, self.topology, PhaseClock()
        )
        fill_weights(self.engine, DeviceNormal(options.device))
        synchronize(options)
        self.build_seconds = time.perf_counter() - started
        self.steps = 0

    def batch(self, tokens: int, documents: int = 1) -> MicroBatch:
        """Return one packed row of random tokens."""
        drawn = np.random.default_rng(tokens).integers(0, 190_000, size=tokens + 1)
        drawn %= self.model_config.vocab_size - 10
        bounds = [round(part * tokens / documents) for part in range(documents + 1)]
        positions = np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(bounds)])
        row = PackedRow(
            input_ids=drawn[:-1],
            labels=drawn[1:].copy(),
            position_ids=positions,
            bounds=bounds,
            documents=np.empty(0, dtype=np.int64),
        )
        return make_micro_batch([row], [0], self.topology)

    def step(self, batch: MicroBatch) -> StepResult:
        """Make one optimizer step."""
        self.steps += 1
        tokens = batch.labels.numel()
        self.engine._positions = tokens  # lengths differ from step to step here, unlike in a run
        return self.engine.step([batch], [tokens], step=self.steps)


_slice: list[Slice] = []


def the_slice(options: Options) -> Slice:
    """Return the engine, built at the first call."""
    if not _slice:
        _slice.append(Slice(options))
    return _slice[0]


def lengths(options: Options) -> tuple[int, ...]:
    """Return the rows that are measured."""
    return (128,) if options.tiny else (4096, 8192, 16384, 32768)


def training_steps(options: Options) -> dict[str, Any]:
    """Measure steps at several lengths: loss, norm, tokens per second, peak memory."""
    part = the_slice(options)
    found: dict[str, Any] = {"build_seconds": part.build_seconds}
    for tokens in lengths(options):
        if options.seconds_left < 30:
            found[str(tokens)] = "no time left"
            continue
        try:
            found[str(tokens)] = _steps_at(part, tokens, options)
        except torch.cuda.OutOfMemoryError as error:
            found[str(tokens)] = f"out of memory: {error}"[:300]
            torch.cuda.empty_cache()
        print(tokens, found[str(tokens)], flush=True)
    return found


def _steps_at(part: Slice, tokens: int, options: Options) -> dict[str, Any]:
    batch = part.batch(tokens)
    if not options.tiny:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    results: list[StepResult] = []
    for _ in range(5):
        taken = measuring.seconds(lambda: results.append(part.step(batch)), options.device, "wall")
        seconds.append(round(taken, 4))
    peak = 0.0 if options.tiny else torch.cuda.max_memory_allocated() / 1e9
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / min(seconds[1:]),
        "planned": _planned(part, tokens),
        "losses": [result.loss for result in results],
        "grad_norm": results[-1].grad_norm,
        "applied": results[-1].applied,
        "peak_GB": peak,
    }


def _planned(part: Slice, tokens: int) -> dict[str, Any]:
    """Return what `cpt plan` computes for such a step on an H100."""
    planned = estimate_on_one_gpu(part.model_config, LAYERS, tokens, GPUS["h100"])
    parts = {name: round(1e3 * seconds, 2) for name, seconds in planned.parts.items()}
    return {
        "ms": 1e3 * planned.step_seconds,
        "parts_ms": {**parts, "update": round(1e3 * planned.seconds["update"], 2)},
        "predicted_peak_GB": sum(planned.memory.values()) / 1e9,
    }


def profile_of_a_step(options: Options) -> dict[str, Any]:
    """Write the longest kernels at 4,096 and 32,768 tokens to profile_*.txt."""
    part = the_slice(options)
    found: dict[str, Any] = {}
    activities = [ProfilerActivity.CPU]
    if not options.tiny:
        activities.append(ProfilerActivity.CUDA)
    for tokens in (lengths(options)[0], lengths(options)[-1]):
        batch = part.batch(tokens)
        part.step(batch)
        with profile(activities=activities) as recorded:
            part.step(batch)
            synchronize(options)
        events = recorded.key_averages()
        by = "self_cpu_time_total" if options.tiny else "self_device_time_total"
        table = events.table(sort_by=by, row_limit=60, max_name_column_width=90)
        (options.out / f"profile_{tokens}.txt").write_text(table, encoding="utf-8")
        launches = sum(event.count for event in events if "LaunchKernel" in event.key)
        waits = {e.key: e.count for e in events if "Synchronize" in e.key or "Memcpy" in e.key}
        longest = sorted(events, key=lambda event: -getattr(event, by))[:14]
        found[str(tokens)] = {
            "launches": launches,
            "waits": waits,
            "longest_ms": {e.key[:60]: round(getattr(e, by) / 1e3, 2) for e in longest},
        }
    return found


def host_waits(options: Options) -> Any:
    """List the lines at which the host waits for the device, by torch's own debug mode."""
    if options.tiny:
        return "there is nothing to wait for on a CPU"
    part = the_slice(options)
    batch = part.batch(4096)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            part.step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places: Counter[str] = Counter()
    for warning in caught:
        # torch also warns once that the mode is a prototype
        if "synchronizing CUDA operation" in str(warning.message):
            path = Path(warning.filename)
            places[f"{path.parent.name}/{path.name}:{warning.lineno}"] += 1
    return dict(places.most_common(30))


def scores_are_repeatable(options: Options) -> dict[str, bool]:
    """Score one row twice, and compare the bits."""
    part = the_slice(options)
    batch = part.batch(lengths(options)[0], documents=3)
    first = part.engine.score(batch)
    return {"same bits": torch.equal(first, part.engine.score(batch))}


def resume_is_exact(options: Options) -> dict[str, Any]:
    """Save, make two steps, load, make the same two steps, and compare losses and scores."""
    part = the_slice(options)
    parent = Path("/dev/shm") if Path("/dev/shm").is_dir() and not options.tiny else options.out
    folder = parent / "acceptance_run"
    shutil.rmtree(folder, ignore_errors=True)
    batch = part.batch(lengths(options)[0], documents=3)
    engine = part.engine
    part.step(batch)
    saver = Saver(folder, engine.deepspeed, part.topology, CheckpointSection())
    try:
        started = time.perf_counter()
        saver.save_now(part.steps, {"model_config": part.model_config.to_dict()})
        saved = time.perf_counter() - started
        losses = [part.step(batch).loss for _ in range(2)]
        scores = engine.score(batch)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        started = time.perf_counter()
        load_checkpoint(folder, engine.deepspeed, part.topology, "auto")
        loaded = time.perf_counter() - started
        again = [part.step(batch).loss for _ in range(2)]
        return {
            "save_seconds": saved,
            "load_seconds": loaded,
            "GB": size / 1e9,
            "losses": losses,
            "losses after the load": again,
            "same losses after the load": losses == again,
            "same scores after the load": torch.equal(scores, engine.score(batch)),
        }
    finally:
        saver.close()
        shutil.rmtree(folder, ignore_errors=True)


STAGES = (
    Planned(training_steps, 60),
    Planned(profile_of_a_step, 25),
    Planned(host_waits, 10),
    Planned(scores_are_repeatable, 10),
    Planned(resume_is_exact, 60),
)

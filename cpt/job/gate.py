"""Check everything that can be known before weights are read, and refuse it in one message.

    command line, launcher -> run YAML, DeepSpeed JSON -> model configuration -> layout
                                    |
                         newest checkpoint -> model, schedule
                                    |
                                   mix -> guard domains -> build -> resumption -> data plan
                                    |
                                   weight directory, KL targets, free space

A run and `--dry_run` pass the same gate.  Every rank checks what it needs to know its
configuration, and the caches of its node.  The first rank alone checks what reads more than that;
a run agrees on its findings
once there is a process group (`PassedGate.refuse`).

Three checks come later, because they read whole files or need them to exist: the contents of weight
files and of KL targets are hashed, and a mix that is not built is built first and then checked by
the functions that this gate uses. After a dry run nothing comes, so it hashes the weight files
itself if a model wrote a part of the mix.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpt.checkpoint.reader import list_steps, step_folder
from cpt.checkpoint.staging import available_bytes
from cpt.checkpoint.starting_model import (
    check_starting_weights,
    located,
    masters_warning,
    own_checkpoint_problems,
    starting_config,
    unfinished_warning,
)
from cpt.config import (
    LaunchInfo,
    ModelSection,
    RunConfig,
    RunYaml,
    files_of_stage,
    load,
    readable_parts,
    resolve_stages,
)
from cpt.deepspeed_adapter.engine import check_internals
from cpt.deepspeed_adapter.json_values import block_problems
from cpt.deepspeed_adapter.version import check_version
from cpt.errors import ConfigError
from cpt.guard.generation.requirements import generation_problems
from cpt.guard.kept_files import missing_files
from cpt.guard.requirements import documents_by_domain, guard_problems
from cpt.guard.start_warnings import guard_warnings
from cpt.guard.traces.requirements import trace_problems
from cpt.job.adapter_advice import warn_of_settings
from cpt.job.caches import check_caches
from cpt.job.data import (
    build_folder,
    check_mix,
    check_plan,
    open_current_build,
    plan_of,
    warn_of_little_text,
)
from cpt.job.engine_setup import base_of
from cpt.job.findings import Findings, joined
from cpt.job.kept_config import kept_models
from cpt.job.packed_base import check_one_expert, packed_base_problems
from cpt.job.passed_gate import PassedGate
from cpt.job.replay_check import check_replay
from cpt.job.resume_order import resume_word
from cpt.job.resumption import (
    ExpectedCheckpoint,
    StartingPoint,
    expected_checkpoint,
    fresh_start,
    start_from,
)
from cpt.job.run_dir import RoomNeeded, check_place, room_needed, stored_numels
from cpt.job.seam import Seam
from cpt.job.start_options import check_start
from cpt.model import attention
from cpt.model.adapters.layout import adapter_problems
from cpt.model.configuration import differing_keys
from cpt.model.freezing import freeze_problems, muon_problems, rounding_problems
from cpt.model.parameters import parameter_numels, parameter_shapes
from cpt.model.products.layers import products_problems
from cpt.model.weights.tokenizer_check import tokenizer_problems
from cpt.planning.fit import Card, PlannedStart, fit_problem, fit_warning
from cpt.planning.hardware import ANY_GPU, GPUS
from cpt.planning.host_memory import host_problem
from cpt.planning.low_precision import products_problem
from cpt.resilience.devices import memory_of_gpu
from cpt.resilience.environment import LaunchEnvironment
from cpt.telemetry.trackers import tracker_problems
from cpt.training.kl_targets import presence_problems
from cpt.training.schedule import factors_of_run, with_decay_steps
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.strict_yaml import Located, nearest
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.data_plan import DataPlan
from data_pipeline.mixture.epochs import has_epochs, with_weights
from data_pipeline.mixture.phases import phase_problems
from data_pipeline.mixture.staged_plan import StagedPlan
from data_pipeline.store.ownership import RUN_FOLDERS, refuse_foreign

log = logging.getLogger("cpt.job.gate")


def pass_gate(options: argparse.Namespace) -> PassedGate:
    """Check a run.

    Args:
        options: The command line of cpt/run.py.

    Returns:
        The configuration.  In a run, all ranks call `refuse` on the first rank's together.

    Raises:
        CptError: there is no configuration to go on with; on the first rank the message tells
            everything else that is wrong, too.
    """
    found = Findings()
    found.attempt(check_version)
    environment = found.attempt(lambda: check_start(options))
    _raise_any(found)
    assert environment is not None
    overrides = dict(item.split("=", 1) for item in options.set)
    try:
        run_yaml, json_file = load(options.config, options.ds_config, overrides, block_problems)
    except ConfigError as error:
        found.errors.append(error)
        is_first = environment.rank == 0
        found.attempt(lambda: check_named_files(options.config, overrides, found, is_first))
        _raise_any(found)
    gate = _Gate(options, run_yaml, json_file, environment)
    return gate.result()


def check_named_files(
    run_yaml: Path, overrides: dict[str, str], found: Findings, need_input: bool = True
) -> None:
    """Check the model and the mix that a run YAML names although something else in it is wrong.

    Args:
        run_yaml: The run YAML.
        overrides: Values by key in place of those in the file.
        found: Takes what is wrong.
        need_input: Whether to look at the files that the mix names.

    Raises:
        ConfigError: the run YAML cannot be read.
    """
    parts = readable_parts(run_yaml, overrides)
    model = parts.model
    if model is not None:
        found.attempt(lambda: _located_config(model))
    data = parts.data
    if data is not None:
        found.attempt(lambda: check_mix(data, parts.seq_len, need_files=need_input))


class _Gate:
    """The checks of one start, and what they have found so far."""

    def __init__(
        self,
        options: argparse.Namespace,
        run_yaml: RunYaml,
        json_file: Located,
        environment: LaunchEnvironment,
    ) -> None:
        self.environment = environment
        self.json_file = json_file
        self.run_dir: Path = options.run_dir or Path("runs") / options.config.stem
        self.found = Findings()
        """Refusals of the checks that every rank makes."""
        self.trains = not (options.sample or options.measure)
        self.resume = self._resume_word(options.resume)
        self.run_yaml = self._with_models_located(run_yaml)
        self.found_by_one = Findings()
        """Refusals of the checks that only the first rank makes, and of those of its own node."""
        self.model_config: Any = None
        self.config: RunConfig | None = None
        """The configuration of the stage in which the run goes on."""
        self.configs: tuple[RunConfig, ...] = ()
        """The configurations of all stages; one for a run without stages."""
        self.mix: MixConfig | None = None
        self.has_input = True
        """Whether the files of the mix, or its build, are here, as far as this rank has looked."""
        self.plan: DataPlan | StagedPlan | None = None
        self.checkpoint: ExpectedCheckpoint | None = None
        self.starts_fresh = False
        self.room: RoomNeeded | None = None
        self.gpu: str | None = options.gpu
        self.card: Card | None = None
        self.seam: Seam | None = None
        self.is_dry_run: bool = options.dry_run

    def result(self) -> PassedGate:
        """Make all checks.

        Raises:
            CptError: see `pass_gate`.
        """
        self._check_model()
        self._check_mix()
        self._check_phases()
        self.found_by_one.attempt(lambda: check_caches(os.environ, is_dry_run=self.is_dry_run))
        if self.environment.local_rank == 0:
            self._check_host()
        if self.environment.rank == 0:
            warn_of_settings(self.run_yaml)
            self._check_fit()
            self._check_trackers()
            self._check_weights()
            self._check_kl_targets()
            if self._may_use_run_dir():
                self._check_checkpoint()
                self._check_run_dir()
            self._check_data()
        if self.found.errors:
            _raise_any(self.found, self.found_by_one)
        assert self.config is not None and self.mix is not None
        if self.plan is not None and not self.found_by_one.errors:
            warn_of_little_text(self.config, self.plan)
        return PassedGate(
            config=self.config,
            configs=self.configs,
            model_config=self.model_config,
            mix=self.mix,
            run_dir=self.run_dir,
            resume=self.resume,
            plan=self.plan,
            checkpoint=self.checkpoint,
            seam=self.seam,
            room=self.room,
            card=self.card,
            environment=self.environment,
            refusal=joined(self.found_by_one),
        )

    def _resume_word(self, asked: str) -> str:
        """Return what this start resumes from; a look at a run is no start of it."""
        if not self.trains:
            return asked
        restarts = self.environment.restarts
        word = self.found.attempt(lambda: resume_word(asked, restarts, self.run_dir))
        return asked if word is None else word

    def _with_models_located(self, run_yaml: RunYaml) -> RunYaml:
        """Return the run YAML with one checkpoint in place of each run that it names as a model."""
        kept = {} if self.resume == "never" else kept_models(self.run_dir)

        def found(key: str, path: Path | None) -> Path | None:
            if path is None:
                return None
            taken = self.found.attempt(lambda: located(path, key, kept.get(key))) or path
            self.found.add(own_checkpoint_problems(key, taken, self.run_dir))
            return taken

        model = replace(run_yaml.model, path=found("model.path", run_yaml.model.path))
        baseline = found("guard.baseline_model", run_yaml.guard.baseline_model)
        guard = replace(run_yaml.guard, baseline_model=baseline)
        return replace(run_yaml, model=model, guard=guard)

    def _check_model(self) -> None:
        """Read the architecture, and bring files, model and world size together."""
        model = self.run_yaml.model
        self.model_config = self.found.attempt(lambda: starting_config(model.path, model.init))
        known = attention.known_names()
        if model.attention not in known:
            self.found.add(
                [
                    f"model.attention is '{model.attention}', which is no backend."
                    f"{nearest(model.attention, known)}"
                ]
            )
        if self.model_config is None:
            return
        self.found.add(
            freeze_problems(self.run_yaml.train.freeze, parameter_numels(self.model_config))
        )
        self.found.add(
            rounding_problems(
                self.run_yaml.train.quantize,
                self.run_yaml.train.freeze,
                parameter_shapes(self.model_config),
            )
        )
        train = self.run_yaml.train
        names = parameter_numels(self.model_config)
        self.found.add(muon_problems(train.optimizer, train.freeze, names))
        self.found.add(adapter_problems(self.run_yaml.adapter, self.model_config))
        self.found.add(packed_base_problems(self.run_yaml, self.model_config))
        self.found.add(products_problems(self.run_yaml.train.products, self.model_config))
        configs = self.found.attempt(
            lambda: resolve_stages(self.run_yaml, self.json_file, self.model_config, self._launch())
        )
        self.configs = configs or ()
        for config in self.configs:
            self.found.attempt(functools.partial(check_internals, config.engine_json))
        if self.configs:
            self.config = self.configs[0]

    def _launch(self) -> LaunchInfo:
        return LaunchInfo(
            world_size=self.environment.world_size,
            local_world_size=self.environment.local_world_size,
        )

    def _check_mix(self) -> None:
        """Read the mix on every rank, and look at the files that it names on the first."""
        run = self.run_yaml
        lengths = [stage.seq_len for stage in run.stages]
        check = functools.partial(check_mix, run.data, run.train.seq_len, lengths)
        self.mix = self.found.attempt(lambda: check(need_files=False))
        if self.environment.rank == 0:
            mix = self.found_by_one.attempt(lambda: check(need_files=True))
            self.has_input = mix is not None

    def _check_phases(self) -> None:
        """Lay the schedule of the mix over the run, and tie the learning rate to it."""
        mix = self.mix
        if mix is None:
            return
        train = self.run_yaml.train
        problems = phase_problems(mix, train.total_steps) if train.total_steps else []
        if problems:
            self.found.add(problems)
            return
        tied = self.found.attempt(lambda: with_decay_steps(train, mix))
        factors = None
        if tied is not None:
            factors = self.found.attempt(lambda: factors_of_run(train, mix))
        if tied is None or factors is None or self.config is None:
            return
        configs = []
        for config in self.configs:
            of_stage = replace(config.train, decay_steps=tied.decay_steps)
            configs.append(replace(config, train=of_stage, lr_factors=factors))
        self.configs = tuple(configs)
        self.config = self.configs[0]

    def _check_fit(self) -> None:
        """Compare the memory of a rank with that of its GPU, in every stage."""
        if self.config is None or self.gpu == ANY_GPU:
            return
        self.card = self._card()
        if self.card is None:
            return
        if self.gpu in GPUS:
            problem = products_problem(self.run_yaml.train.products, GPUS[self.gpu])
            self.found_by_one.add([] if problem is None else [problem])
        if not self.run_yaml.stages:
            self._check_fit_of(self.run_yaml, self.json_file, self.card, "")
        for number, stage in enumerate(self.run_yaml.stages):
            run, json_file = files_of_stage(self.run_yaml, self.json_file, number)
            where = f"stages[{number}] (rows of {stage.seq_len}): "
            self._check_fit_of(run, json_file, self.card, where)

    def _check_fit_of(self, run: RunYaml, json_file: Located, card: Card, where: str) -> None:
        start = PlannedStart.of(run, json_file, self.model_config, self._launch())
        memory = start.memory()
        if memory is None:
            return
        problem = fit_problem(start, memory, card)
        if problem is not None:
            self.found_by_one.add([where + problem])
        warning = fit_warning(memory, card)
        if warning is not None:
            log.warning("%s%s", where, warning)

    def _check_host(self) -> None:
        """Refuse to keep more on the host than this node has, in any stage.

        A dry run may be elsewhere.
        """
        if self.config is None or self.is_dry_run or not self.trains:
            return
        ranks = self.environment.local_world_size
        available = available_bytes()
        for number, config in enumerate(self.configs):
            problem = host_problem(config, self.model_config, ranks, available)
            if problem is not None:
                where = f"stages[{number}]: " if len(self.configs) > 1 else ""
                self.found_by_one.add([where + problem])

    def _card(self) -> Card | None:
        """Return the GPU that was named, or that of this rank; None if there is neither."""
        if self.gpu is not None:
            return Card.named(self.gpu)
        found = memory_of_gpu(self.environment.local_rank)
        if found is None:
            return None
        name, memory_bytes = found
        return Card(name=name, memory_bytes=memory_bytes)

    def _check_trackers(self) -> None:
        if self.trains:
            self.found_by_one.add(tracker_problems(self.run_yaml))

    def _check_weights(self) -> None:
        if self.model_config is None:
            return
        path = self.run_yaml.model.path
        if path is not None:
            self._check_weights_in(path)
            self._warn(lambda: unfinished_warning(path))
            if not self.run_yaml.train.quantize.is_on:
                self._warn(lambda: masters_warning("model.path", path))
        baseline = self.run_yaml.guard.baseline_model
        if baseline is not None and self.run_yaml.guard.enabled:
            self.found_by_one.add(self._problems_of_baseline(baseline))
            self._check_weights_in(baseline)
            self._warn(lambda: masters_warning("guard.baseline_model", baseline))

    def _warn(self, look: Callable[[], str]) -> None:
        """Log what a person should know of a model before a run trains."""
        warning = self.found_by_one.attempt(look)
        if warning and self.trains:
            log.warning("%s", warning)

    def _check_weights_in(self, path: Path) -> None:
        """Compare the tensors and the tokenizer of a model that the run YAML names with the run."""
        found = self.found_by_one
        shapes = parameter_shapes(self.model_config)
        found.attempt(lambda: check_starting_weights(path, shapes))
        problems = found.attempt(lambda: tokenizer_problems(path, self.model_config.vocab_size))
        found.add(problems or [])
        is_packed = self.run_yaml.adapter.base == "mxfp4"
        if is_packed and not self.found.errors and not found.errors:
            found.attempt(lambda: check_one_expert(path, self.model_config))

    def _problems_of_baseline(self, path: Path) -> list[str]:
        """Return why a model cannot be measured with the architecture of the run."""
        config = self.found_by_one.attempt(lambda: starting_config(path, None))
        if config is None:
            return []
        differing = differing_keys(config, self.model_config)
        if not differing:
            return []
        return [
            f"guard.baseline_model {path} is of another architecture than model.path: "
            f"{', '.join(differing)} differ. Name the release that the model was trained from."
        ]

    def _check_kl_targets(self) -> None:
        folder = self.run_yaml.train.kl_targets
        if folder is not None:
            problems = self.found_by_one.attempt(lambda: presence_problems(folder))
            self.found_by_one.add(problems or [])

    def _may_use_run_dir(self) -> bool:
        """Return whether what lies in the run directory may be read, and something written there.

        Otherwise it is refused unread.
        """
        found = self.found_by_one
        num_before = len(found.errors)
        found.attempt(lambda: refuse_foreign(self.run_dir, "run directory", RUN_FOLDERS))
        return len(found.errors) == num_before

    def _check_run_dir(self) -> None:
        config = self.config
        if config is None:
            return
        found = self.found_by_one
        numels = stored_numels(config, self.model_config)
        num_before = len(found.errors)
        found.attempt(lambda: check_place(self.run_dir, config, numels))
        existing: list[int] | None = []
        if self.resume != "never":
            existing = found.attempt(lambda: list_steps(self.run_dir))
        if existing is None:
            return
        step = 0 if self.checkpoint is None else self.checkpoint.step
        room = room_needed(config, numels, step, existing)
        if len(found.errors) == num_before:
            found.attempt(lambda: room.warn_if_tight(self.run_dir, config.checkpoint.keep_last))
        self.room = room

    def _check_checkpoint(self) -> None:
        """Find the checkpoint to go on from and compare it with the model and the schedule."""
        found = self.found_by_one
        num_before = len(found.errors)
        checkpoint = found.attempt(lambda: expected_checkpoint(self.run_dir, self.resume))
        self.starts_fresh = checkpoint is None and len(found.errors) == num_before
        self.checkpoint = checkpoint
        if checkpoint is None or self.config is None:
            return
        first = self.config
        stage = found.attempt(lambda: checkpoint.stage(self.run_dir, first))
        self.config = self.configs[stage or 0]
        folder = step_folder(self.run_dir, checkpoint.step)
        found.attempt(lambda: refuse_foreign(folder, "checkpoint", in_run_dir=True))
        adapter, dtype = first.adapter, first.train.dtype
        found.attempt(lambda: checkpoint.check_model(self.model_config, adapter, dtype))
        if self.run_yaml.adapter.is_on:
            found.attempt(lambda: checkpoint.check_base(base_of(first, self.model_config)))
        if checkpoint.state.begins_a_run:
            return  # nothing was trained yet that a change could part from what comes
        seam = Seam.of(checkpoint.state, checkpoint.name, checkpoint.step, self.config)
        self.seam = seam
        if self.trains:
            found.attempt(seam.check)

    def _check_data(self) -> None:
        """Check the build, the guard's domains, and what a run would draw from the build."""
        mix = self.mix
        if mix is None or not self.has_input:
            return
        self.found_by_one.add(generation_problems(self.run_yaml.guard, mix))
        self.found_by_one.add(trace_problems(self.run_yaml.guard, mix, self.run_yaml.train))
        data = self._open_build(mix)
        guard = self.run_yaml.guard
        num_documents = documents_by_domain(mix, None if data is None else data.manifest)
        self.found_by_one.add(
            guard_problems(
                guard,
                self.run_yaml.train.total_steps,
                num_documents,
                num_domains=len(num_documents) + len(mix.guard.generation) + len(mix.guard.traces),
                # os.path: a folder that cannot be looked into is refused by `_check_run_dir`
                is_measured=os.path.exists(self.run_dir / "guard" / "baseline.json"),
            )
        )
        self._check_kept_files(mix, num_documents)
        self._check_replay(data)
        weighted = self._with_weights(mix, data)
        if weighted is not None and self.trains:
            manifest = None if data is None else data.manifest
            for warning in guard_warnings(guard, weighted, manifest):
                log.warning("%s", warning)
        start = None if weighted is None else self._start(weighted, data)
        if weighted is not None and start is not None and data is not None:
            self._check_plan(weighted, data, start)

    def _check_replay(self, data: BuiltData | None) -> None:
        """Check which model wrote the replay; only a dry run reads weight files for it."""
        config = self.config
        if config is None or data is None:
            return
        is_last_check = self.is_dry_run
        self.found_by_one.attempt(lambda: check_replay(config, data, reads_weights=is_last_check))

    def _with_weights(self, mix: MixConfig, data: BuiltData | None) -> MixConfig | None:
        """Return the mix with its weights; None if they are refused, or cannot be known yet."""
        if not has_epochs(mix):
            return mix
        if data is None:
            return None
        manifest = data.manifest
        return self.found_by_one.attempt(lambda: with_weights(mix, manifest))

    def _check_kept_files(self, mix: MixConfig, num_documents: Mapping[str, int | None]) -> None:
        """Check that a run that goes on still has what the guard kept of the untouched model."""
        seam = self.seam
        if seam is None or seam.is_done or not self.trains or not self.run_yaml.guard.enabled:
            return
        problems = missing_files(
            self.run_dir, mix, seam.step, has_held_out=any(num_documents.values())
        )
        self.found_by_one.add(problems)

    def _start(self, mix: MixConfig, data: BuiltData | None) -> StartingPoint | None:
        """Return where the run goes on; None if that is refused, or cannot be known yet."""
        config = self.config
        if config is None:
            return None
        checkpoint = self.checkpoint
        if checkpoint is not None:
            return self.found_by_one.attempt(
                lambda: start_from(checkpoint, self.run_dir, config, self.model_config, mix, data)
            )
        if data is None or not self.starts_fresh:
            return None
        return self.found_by_one.attempt(lambda: fresh_start(mix, data, config))

    def _open_build(self, mix: MixConfig) -> BuiltData | None:
        """Return the build of a mix; None if it is refused, or not built yet."""
        found = self.found_by_one
        settings = self.run_yaml.data
        folder = found.attempt(lambda: build_folder(settings, mix))
        if folder is None or not folder.exists():
            return None
        return found.attempt(lambda: open_current_build(settings, mix, folder))

    def _check_plan(self, mix: MixConfig, data: BuiltData, start: StartingPoint) -> None:
        config = self.config
        assert config is not None
        plan = self.found_by_one.attempt(lambda: plan_of(config, data, mix, start))
        if plan is not None:
            self.found_by_one.attempt(lambda: check_plan(config, plan))
        self.plan = plan


def _located_config(model: ModelSection) -> None:
    """Read the architecture that a `model` section names.

    Raises:
        CptError: there is none.
    """
    path = None if model.path is None else located(model.path)
    starting_config(path, model.init)


def _raise_any(*findings: Findings) -> None:
    error = joined(*findings)
    if error is not None:
        raise error

"""What a checkpoint of an adapter knows besides its tensors: which adapter, and on which base.

A checkpoint of a run with `adapter.kind` lora or dora holds the adapter alone.  The weights below
it stay in the files of the base, and a hash of these files tells whether a base that is given later
is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import GptOssConfig

from cpt.checkpoint.manifest import MANIFEST
from cpt.checkpoint.run_state import RunState
from cpt.checkpoint.starting_model import StartingCheckpoint, weight_files
from cpt.config.adapter_section import AdapterSection
from cpt.errors import CheckpointError, ConfigError
from cpt.model.adapters.layout import adapted_matrices, adapter_problems, expert_rank
from cpt.model.configuration import load_config
from cpt.model.configuration_keys import COMPUTING_KEYS
from cpt.model.missing_model import is_checkpoint, run_of
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.checksums import TENSOR_HASH_PREFIX, hash_of_sums, tensor_hash
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.random_init import RandomWeights
from cpt.model.weights.source import WeightSource
from data_pipeline.escaping import escaped_line
from data_pipeline.store.files import sha256_of

COMPARED = ("kind", "rank", "expert_rank", "alpha", "share_experts")
"""Keys of the section that may not change when a run goes on; targets and layers show in the names
of the tensors.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterBase:
    """The model below an adapter."""

    path: str | None
    """Its directory, or the checkpoint of another run; None for random weights."""
    seed: int | None
    """Seed of random weights; None for a directory."""
    hash: str
    """Hash of samples of its tensors and of what its config.json makes the model compute; of a
    checkpoint that of its manifest, and of random weights that of what they are drawn from.
    """
    sums: str | None = None
    """Hash of the SHA-256 of its weight files (`hash_of_sums`), where these are known."""

    @property
    def name(self) -> str:
        """Its name for people: that on the Hub if it lies in the Hub's cache, or the last part of
        the path.
        """
        if self.path is None:
            return f"random weights (seed {self.seed})"
        path = Path(self.path)
        run_dir = run_of(path)
        if run_dir is not None:
            return f"{run_dir.name} ({path.name})"
        cached = path.parent.parent.name
        if path.parent.name == "snapshots" and cached.startswith("models--"):
            return cached.removeprefix("models--").replace("--", "/")
        return path.name

    @property
    def in_checkpoint(self) -> bool:
        """Whether it is a checkpoint of this project, which other programs do not read."""
        if self.path is None:
            return False
        path = Path(self.path)
        return run_of(path) is not None or is_checkpoint(path)

    @classmethod
    def of(
        cls,
        path: Path | None,
        seed: int,
        config: GptOssConfig,
        *,
        option: str = "model.path",
    ) -> AdapterBase:
        """Describe a base; samples of its weight files are read.

        Args:
            path: A Hugging Face directory or a checkpoint (`starting_model.located`); None for
                random weights.
            seed: Seed of random weights.
            config: The model's configuration.
            option: What a person has named the directory with.

        Raises:
            ConfigError: the directory holds no weights or no configuration that can be read.
        """
        if path is not None:
            sums = None
            if is_checkpoint(path):
                found = sha256_of(path / MANIFEST)
            else:
                files = weight_files(path)
                found = _hash_of_directory(path, files, option)
                sums = hash_of_sums(path, files)
            return cls(path=str(path.absolute()), seed=None, hash=found, sums=sums)
        shapes = sorted(parameter_shapes(config).items())
        drawn = f"{seed}:{float(config.initializer_range)}:{shapes}"
        return cls(path=None, seed=seed, hash=hashlib.sha256(drawn.encode()).hexdigest())

    def is_known_as(self, other_hash: object, other_sums: object) -> bool:
        """Return whether `hash` and `sums` of another base say that it is this one.

        The sums tell every byte, and count where both are known.
        """
        if other_hash != self.hash:
            return False
        return self.sums is None or other_sums is None or other_sums == self.sums

    @property
    def told(self) -> str:
        """What it is known by, for messages."""
        return (
            self.hash if self.sums is None else f"{self.hash} (SHA-256 of its files: {self.sums})"
        )

    def open(self, config: GptOssConfig) -> WeightSource:
        """Return its weights.

        Raises:
            ConfigError: the directory is gone, or holds another model.
        """
        if self.path is None:
            assert self.seed is not None
            return RandomWeights(self.seed, float(config.initializer_range))
        path = Path(self.path)
        if is_checkpoint(path):
            return StartingCheckpoint(path, parameter_shapes(config))
        return DirectoryWeights(path, parameter_shapes(config))


def _hash_of_directory(path: Path, files: Iterable[Path], option: str) -> str:
    """Return a hash of the tensors of a directory and of what its config.json makes of them."""
    values = load_config(path, None, option=option).to_dict()
    computing = {key: values.get(key) for key in COMPUTING_KEYS}
    weights = tensor_hash(files)
    whole = json.dumps([weights, computing], sort_keys=True)
    return TENSOR_HASH_PREFIX + hashlib.sha256(whole.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterState:
    """The adapter of a checkpoint."""

    section: AdapterSection
    """The `adapter` section that it was made with."""
    base: AdapterBase
    """The model below it."""
    dtype: str
    """The dtype in which training held the weights of the base: `bf16` or `fp32`."""
    imported: bool = False
    """Whether it came from elsewhere and no run has trained it yet."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, for `RunState.adapter`."""
        return asdict(self)

    @classmethod
    def of(cls, state: RunState, checkpoint: str) -> AdapterState | None:
        """Return the adapter of a checkpoint; None if it holds a whole model.

        Raises:
            CheckpointError: what it says of its adapter cannot be used.
        """
        plain = state.adapter
        if plain is None:
            return None
        try:
            return cls(
                section=_section(plain["section"]),
                base=_base(plain["base"]),
                dtype=_one_of(plain["dtype"], ("bf16", "fp32")),
                imported=plain["imported"] is True,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint}: state.adapter of its manifest is not readable ({error!r})."
            ) from error

    def check(self, config: GptOssConfig, checkpoint: str) -> None:
        """Refuse an adapter that a model cannot have; anybody may have written the section.

        Raises:
            CheckpointError: with the first reason.
        """
        wrong = adapter_problems(self.section, config)
        if wrong:
            raise CheckpointError(
                f"{checkpoint}: state.adapter of its manifest is of no adapter of its model: "
                f"{escaped_line(wrong[0], 300)}"
            )

    def problems(
        self, now: AdapterSection, dtype: str, config: GptOssConfig, checkpoint: str
    ) -> list[str]:
        """Return what differs between this adapter and that of a run, with both values.

        Args:
            now: The `adapter` section of the run.
            dtype: `train.dtype` of the run.
            config: The model's configuration.
            checkpoint: Name of the checkpoint.

        Raises:
            CheckpointError: see `check`.
        """
        self.check(config, checkpoint)
        problems = []
        before = self.section
        for key in COMPARED:
            old = _value(before, key, config)
            new = _value(now, key, config)
            if old != new:
                problems.append(f"{checkpoint} has adapter.{key} {old}, now it is {new}.")
        # the base is read again in the new dtype, and the adapter would go on beside other weights
        if dtype != self.dtype and not self.imported:
            problems.append(
                f"{checkpoint} has train.dtype {self.dtype}, in which the weights below its "
                f"adapter were held, now it is {dtype}. Give train.dtype: {self.dtype}."
            )
        old_names = {matrix.name for matrix in adapted_matrices(before, config)}
        new_names = {matrix.name for matrix in adapted_matrices(now, config)}
        for names, told in (
            (old_names - new_names, "which this run does not adapt"),
            (new_names - old_names, "which it has no adapter of"),
        ):
            if names:
                problems.append(
                    f"{checkpoint}: adapter.targets or adapter.layers were changed: "
                    f"{len(names)} matrices, such as {min(names)}, {told}."
                )
        if problems:
            problems.append(
                "Change the adapter section back, or start another run with a new --run_dir."
            )
        return problems

    def base_problems(
        self, now: AdapterBase, checkpoint: str, *, given_as: str = "as model.path"
    ) -> list[str]:
        """Return a problem if a base is not the one below this adapter.

        Args:
            now: The base of the run, or of the command.
            checkpoint: Name of the checkpoint.
            given_as: How a person names another one, for the message.
        """
        if now.is_known_as(self.base.hash, self.base.sums):
            return []
        return [
            f"{checkpoint} is an adapter of another base: that of {self.base.name} has the hash "
            f"{self.base.told}, {now.name} has {now.told}. Give the base that it was trained on "
            f"{given_as}."
        ]


def whole_model_problem(checkpoint: str) -> str:
    """Return what to say of a run with an adapter and a checkpoint without one."""
    return (
        f"{checkpoint} holds a whole model, and the run has an adapter. Start the adapter with a "
        "new --run_dir, and model.path for the model below it."
    )


def no_adapter_problem(checkpoint: str) -> str:
    """Return what to say of a run without an adapter and a checkpoint with one."""
    return (
        f"{checkpoint} holds an adapter, and adapter.kind is none. Give the adapter section that "
        "it was trained with. To train the merged model, write it with cpt export and give it as "
        "model.path of a new --run_dir."
    )


def _value(section: AdapterSection, key: str, config: GptOssConfig) -> Any:
    if key == "expert_rank":
        return expert_rank(section, config)
    return getattr(section, key)


def _section(plain: Mapping[str, Any]) -> AdapterSection:
    """Read a section as a manifest holds it; a key that this version does not know is refused."""
    known = {field.name for field in fields(AdapterSection)}
    values: dict[str, Any] = {}
    for key, value in plain.items():
        if key not in known:
            raise ValueError(f"unknown key '{key}'")
        values[key] = tuple(value) if isinstance(value, list) else value
    section = AdapterSection(**values)
    _one_of(section.kind, ("lora", "dora"))
    wrong = [f"{key} {message}" for key, message in section.check()]
    if wrong:
        raise ValueError(wrong[0])
    return section


def _base(plain: Mapping[str, Any]) -> AdapterBase:
    base = AdapterBase(
        path=plain["path"], seed=plain["seed"], hash=plain["hash"], sums=plain.get("sums")
    )
    is_path = isinstance(base.path, str) and base.seed is None
    is_seed = base.path is None and type(base.seed) is int
    is_known = isinstance(base.hash, str) and isinstance(base.sums, str | None)
    if not (is_path or is_seed) or not is_known:
        raise ValueError("base is neither a directory nor random weights")
    return base


def _one_of(value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{value!r} is none of {', '.join(choices)}")
    return str(value)


def base_from(
    state: AdapterState, given: Path | None, config: GptOssConfig, where: str
) -> AdapterBase:
    """Return the base of an adapter: the one that is given, or the one that it was trained on.

    Args:
        state: The adapter.
        given: A directory given by the user (`--base`); None for the one in the checkpoint.
        config: The model's configuration.
        where: Name of the checkpoint.

    Raises:
        ConfigError: it is not there, or is another model.
    """
    told = state.base
    path = given
    if path is None and told.path is not None:
        path = Path(told.path)
        if not path.is_dir():
            raise ConfigError(
                f"{where} is an adapter, and the base that it was trained on is not there: {path}. "
                "Give its directory with --base."
            )
    base = AdapterBase.of(path, told.seed or 0, config, option="--base")
    problems = state.base_problems(base, where, given_as="with --base")
    if problems:
        raise ConfigError(problems)
    return base

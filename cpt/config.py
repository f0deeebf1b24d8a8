"""Run YAML + DeepSpeed JSON + command line -> one validated `RunConfig`.

Stages
    1. each file is parsed on its own (types, unknown keys, ranges), all problems gathered;
    2. `resolve` brings the two files, the model and the world size together: `auto` values get numbers, and what
       cannot be right (divisibility, batch arithmetic, two files that disagree) is refused, all in one message.

The DeepSpeed engine receives `RunConfig.engine_json`: the user's JSON without this project's own keys
(`sequence_parallel_size`, `expert_parallel`, `optimizer`) and with every `auto` resolved.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cpt.errors import ConfigError
from data_pipeline.strict_yaml import KeyPath, Located, Reader, load_json, load_yaml, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """What is trained."""

    path: Path | None = None
    """Hugging Face directory (safetensors); exclusive with `init`."""
    init: Literal["tiny", "gpt-oss-20b", "gpt-oss-120b"] | None = None
    """Random weights of a published configuration; exclusive with `path`."""
    attention: str = "auto"
    """Attention backend: auto picks the fastest one that is right here."""
    window_exchange: Literal["auto", "halo", "ulysses"] = "auto"
    """How window layers exchange tokens under sequence parallelism: with the left neighbour (halo) or as full layers
    do (ulysses); auto takes the halo where one neighbour holds the whole window."""
    activation_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of storing its activations."""

    def check(self) -> Iterator[tuple[str, str]]:
        if (self.path is None) == (self.init is None):
            yield "path", "and init: give exactly one of them (a directory of weights, or a preset to initialise)."


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """What it is trained on."""

    mix: Path
    """Data-mix YAML, relative to the run YAML."""
    build_dir: Path | None = None
    """Built shards; default: data/<mix>-<fingerprint>, built on the spot when the input is small."""
    auto_build_limit_bytes: int = 256 * 2**20
    """Largest input that training builds by itself."""
    accept_mix_change: bool = False
    """Go on with a mix that was edited since the last checkpoint, as a new segment of the ledger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    """How it is trained."""

    seq_len: int
    """Tokens of a packed row; must equal the mix's."""
    global_batch_size: int
    """Packed rows of one optimizer step, over all ranks."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Packed rows of one forward pass; auto: 1."""
    total_steps: int
    """Optimizer steps of the schedule; 0 loads, saves and leaves."""
    stop_at_step: int | None = None
    """Save and leave with exit code 0 after this step, the schedule unchanged."""
    lr: float
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Floor of the schedule as a share of `lr`."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """Cosine to the floor, constant, or warm-up / stable / linear decay to the floor."""
    warmup_steps: int = 0
    """Linear warm-up from 0."""
    decay_steps: int = 0
    """Length of the decay of `wsd`."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; biases, norms and sinks get none."""
    beta1: float = 0.9
    """Adam's first-moment decay."""
    beta2: float = 0.95
    """Adam's second-moment decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Working precision; master weights and Adam moments are fp32 in both."""
    seed: int = 1234
    """Seeds the weights of `init`; the order of the data follows the mix's own seed."""
    threads: int | None = None
    """CPU threads per process; default: cores / processes on this node."""

    def check(self) -> Iterator[tuple[str, str]]:
        at_least = {
            "seq_len": 2,
            "global_batch_size": 1,
            "total_steps": 0,
            "warmup_steps": 0,
            "decay_steps": 0,
            "seed": 0,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                yield name, f"is {getattr(self, name)}, must be >= {least}."
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                yield name, f"is {getattr(self, name)}, must be > 0."
        for name in ("weight_decay", "gradient_clipping"):
            if getattr(self, name) < 0:
                yield name, f"is {getattr(self, name)}, must be >= 0."
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield name, f"is {getattr(self, name)}, must be in [0, 1)."
        if not 0 <= self.min_lr_ratio <= 1:
            yield "min_lr_ratio", f"is {self.min_lr_ratio}, must be in [0, 1]."
        if isinstance(self.micro_batch_size, int) and self.micro_batch_size < 1:
            yield "micro_batch_size", f"is {self.micro_batch_size}, must be >= 1."
        if self.threads is not None and self.threads < 1:
            yield "threads", f"is {self.threads}, must be >= 1; leave it out for the default."
        if self.stop_at_step is not None and not 1 <= self.stop_at_step <= self.total_steps:
            yield "stop_at_step", f"is {self.stop_at_step}, must be between 1 and total_steps ({self.total_steps})."
        shaped_steps = self.warmup_steps + self.decay_steps
        if shaped_steps > self.total_steps > 0:
            yield "warmup_steps", f"+ decay_steps is {shaped_steps}, more than total_steps ({self.total_steps})."
        if self.decay_steps and self.schedule != "wsd":
            yield "decay_steps", f"is {self.decay_steps}, but only schedule: wsd has one; remove it."


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardSection:
    """Watching held-out text."""

    enabled: bool = True
    """Measure held-out bits per byte before step 0, every `interval_steps` and at the end."""
    interval_steps: int = 0
    """Steps between measurements; 0: only before step 0 and at the end."""
    tolerance_percent: float = 1.0
    """Rise of bits per byte over the untouched model that is worth a warning, per domain."""
    max_documents: int = 256
    """Documents scored per domain, each as a whole."""

    def check(self) -> Iterator[tuple[str, str]]:
        if self.interval_steps < 0:
            yield "interval_steps", f"is {self.interval_steps}, must be >= 0."
        if self.max_documents < 1:
            yield "max_documents", f"is {self.max_documents}, must be >= 1."


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSection:
    """What survives."""

    interval_steps: int = 0
    """Steps between periodic saves; 0: only at the end."""
    keep_last: int = 2
    """Complete checkpoints to keep."""

    def check(self) -> Iterator[tuple[str, str]]:
        if self.interval_steps < 0:
            yield "interval_steps", f"is {self.interval_steps}, must be >= 0."
        if self.keep_last < 2:
            yield "keep_last", f"is {self.keep_last}, must be >= 2: one may turn out to be damaged."


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetrySection:
    """What can be seen."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases mode; offline writes into the run directory."""
    wandb_project: str = "gpt-oss-cpt"
    """Weights & Biases project."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run directory."""
    export_at_end: bool = False
    """Write a Hugging Face directory (bf16) into the run directory when the run is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunYaml:
    """The run YAML as written."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    guard: GuardSection = field(default_factory=GuardSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    telemetry: TelemetrySection = field(default_factory=TelemetrySection)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertParallelJson:
    """The `expert_parallel` block of the DeepSpeed JSON."""

    enabled: bool = False
    """Spread the experts over ranks."""
    autoep_size: int | Literal["auto"] = "auto"
    """Ranks that together hold all experts of a layer."""
    preset_model: Literal["gpt_oss"] = "gpt_oss"
    """Layout of the experts."""

    def check(self) -> Iterator[tuple[str, str]]:
        if isinstance(self.autoep_size, int) and self.autoep_size < 1:
            yield "autoep_size", f"is {self.autoep_size}, must be 'auto' or >= 1."


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchInfo:
    """What the launcher decided."""

    world_size: int
    """Number of ranks."""
    local_world_size: int
    """Ranks on this node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything a run needs to know, with no `auto` left."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    guard: GuardSection
    checkpoint: CheckpointSection
    telemetry: TelemetrySection
    world_size: int
    """Number of ranks."""
    sp_size: int
    """Ranks that share one packed row."""
    ep_size: int
    """Ranks that together hold all experts of a layer."""
    use_halo: bool
    """Whether window layers exchange with their left neighbour only."""
    micro_batch_size: int
    """Packed rows of one forward pass."""
    gradient_accumulation_steps: int
    """Forward passes of one optimizer step."""
    engine_json: dict[str, Any]
    """Configuration of the DeepSpeed engine."""

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the engine."""
        return int(self.engine_json["zero_optimization"]["stage"])

    def to_plain(self) -> dict[str, Any]:
        """Nested dictionaries of plain values, for config.resolved.yaml and the manifest."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


OWN_KEYS = ("sequence_parallel_size", "expert_parallel")
KNOWN_KEYS = (
    *OWN_KEYS,
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "zero_optimization",
    "optimizer",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "aio",
    "torch_autocast",
    "compile",
    "disable_allgather",
    "seed",
)
"""Top-level keys of the DeepSpeed JSON that this project accepts: DeepSpeed itself ignores a misspelt one."""

OFFLOADS = ("offload_optimizer", "offload_param")
KNOWN_ZERO_KEYS = (
    "stage",
    *OFFLOADS,
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save",
)
"""Keys under zero_optimization that are known to train and save rightly.  Left out on purpose: round_robin_gradients
(DeepSpeed 0.19.8 then reports wrong offsets, and a checkpoint would mix up tensors), hpZ, MiCS and quantised
communication (refused by AutoEP)."""
BLOCKS = ("bf16", "expert_parallel", "optimizer", "data_types", "aio", "comms_logger", "flops_profiler")
"""Keys of the DeepSpeed JSON whose value is a mapping."""

REFUSED_KEYS = {
    "fp16": "gpt-oss overflows in fp16; use bf16 (train.dtype in the run YAML).",
    "scheduler": "the learning rate follows train.schedule in the run YAML; remove it.",
    "activation_checkpointing": "set model.activation_checkpointing in the run YAML; remove it.",
    "checkpoint": "checkpoints are this project's own (section checkpoint of the run YAML); remove it.",
    "tensorboard": "set telemetry.tensorboard in the run YAML; remove it.",
    "wandb": "set telemetry.wandb in the run YAML; remove it.",
    "tensor_parallel": "tensor parallelism is not supported; use expert and sequence parallelism.",
    "pipeline": "pipeline parallelism is not supported.",
    "data_parallel_size": "it follows from the world size; remove it.",
}


def load(run_yaml: Path, ds_json: Path, overrides: dict[str, str]) -> tuple[RunYaml, Located]:
    """Read both files.

    Returns:
        The run YAML, and the DeepSpeed JSON with the line of each key.

    Raises:
        ConfigError: everything that is wrong in either file alone.
    """
    reader, problems = Reader(load_yaml(run_yaml).with_values(overrides)), []
    parsed = reader.read(RunYaml)
    problems += reader.problems
    json_file = load_json(ds_json)
    problems += _json_problems(json_file)
    if problems:
        raise ConfigError(problems)
    assert parsed is not None
    return _with_paths_beside(parsed, run_yaml), json_file


def _with_paths_beside(parsed: RunYaml, run_yaml: Path) -> RunYaml:
    """Relative paths of the run YAML are relative to the file."""

    def beside(path: Path | None) -> Path | None:
        return None if path is None else (run_yaml.parent / path).resolve()

    data = dataclasses.replace(
        parsed.data, mix=(run_yaml.parent / parsed.data.mix).resolve(), build_dir=beside(parsed.data.build_dir)
    )
    return dataclasses.replace(
        parsed, model=dataclasses.replace(parsed.model, path=beside(parsed.model.path)), data=data
    )


def _json_problems(file: Located) -> list[str]:
    if not isinstance(file.value, dict):
        return [f"{file.source}: must be a JSON object."]
    problems = []
    for key, value in file.value.items():
        if key in REFUSED_KEYS and not (isinstance(value, dict) and value.get("enabled") is False):
            problems.append(f"{file.where((key,))}: {REFUSED_KEYS[key]}")
        elif key not in KNOWN_KEYS and key not in REFUSED_KEYS:
            problems.append(f"{file.where((key,))} is not a known key.{nearest(key, KNOWN_KEYS)}")
    numbers = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", OWN_KEYS[0])
    for key in numbers:
        value = file.value.get(key, "auto")
        if value != "auto" and (type(value) is not int or value < 1):
            problems.append(f"{file.where((key,))} is {value!r}, must be 'auto' or a whole number >= 1.")
    clipping = file.value.get("gradient_clipping", "auto")
    if clipping != "auto" and (isinstance(clipping, bool) or not isinstance(clipping, (int, float)) or clipping < 0):
        problems.append(f"{file.where(('gradient_clipping',))} is {clipping!r}, must be 'auto' or a number >= 0.")
    zero = file.value.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        problems.append(f"{file.where(('zero_optimization',))}.stage must be 1, 2 or 3 (optimizer state is sharded).")
    problems += _malformed_blocks(file, file.value, (), BLOCKS)
    if isinstance(zero, dict):
        problems += _malformed_blocks(file, zero, ("zero_optimization",), OFFLOADS)
        problems += [
            f"{file.where(('zero_optimization', key))} is not a key that this project runs with."
            f"{nearest(key, KNOWN_ZERO_KEYS)}"
            for key in zero
            if key not in KNOWN_ZERO_KEYS
        ]
        if "nvme" in [zero[name].get("device") for name in OFFLOADS if isinstance(zero.get(name), dict)]:
            problems.append(f"{file.where(('zero_optimization',))}: offload to nvme cannot be saved yet; use cpu.")
    if isinstance(file.value.get("optimizer"), dict):
        problems += _malformed_blocks(file, file.value["optimizer"], ("optimizer",), ("params",))
    if isinstance(file.value.get("data_types"), dict) and "buffer_dtype" in file.value["data_types"]:
        problems.append(
            f"{file.where(('data_types', 'buffer_dtype'))} would round the rotary frequencies, which must stay fp32; "
            "remove it."
        )
    reader = Reader(file)
    if isinstance(file.value.get("expert_parallel", {}), dict):
        reader.read(ExpertParallelJson, file.value.get("expert_parallel", {}), ("expert_parallel",))
    return problems + reader.problems


def _malformed_blocks(file: Located, block: dict[str, Any], path: KeyPath, names: Iterable[str]) -> list[str]:
    """Blocks that are there but are no mapping."""
    return [
        f"{file.where((*path, name))} is {json.dumps(block[name])}, must be a mapping."
        for name in names
        if name in block and not isinstance(block[name], dict)
    ]


def resolve(run: RunYaml, json_file: Located, model_config: Any, launch: LaunchInfo) -> RunConfig:
    """Bring files, model and world size together.

    Args:
        run: The run YAML.
        json_file: The DeepSpeed JSON.
        model_config: The model's GptOssConfig.
        launch: World size and ranks per node.

    Raises:
        ConfigError: everything that does not fit together, with the nearest valid values.
    """
    return _Resolver(run, json_file, model_config, launch).resolve()


class _Resolver:
    def __init__(self, run: RunYaml, file: Located, model_config: Any, launch: LaunchInfo) -> None:
        self.run, self.file, self.model, self.launch = run, file, model_config, launch
        self.json: dict[str, Any] = file.value
        self.problems: list[str] = []

    def resolve(self) -> RunConfig:
        sp_size, ep_size = self._sp_size(), self._ep_size()
        if self.problems:  # what follows from a refused size would only mislead
            raise ConfigError(self.problems)
        micro_batch_size, accumulation = self._batch_sizes(sp_size)
        use_halo = self._use_halo(sp_size)
        self._check_agreement()
        engine_json = self._engine_json(micro_batch_size, accumulation)
        if self.problems:
            raise ConfigError(self.problems)
        sections = {section.name: getattr(self.run, section.name) for section in dataclasses.fields(self.run)}
        return RunConfig(
            **sections,
            world_size=self.launch.world_size,
            sp_size=sp_size,
            ep_size=ep_size,
            use_halo=use_halo,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation,
            engine_json=engine_json,
        )

    def _problem(self, key: str, message: str) -> None:
        self.problems.append(f"{self.file.where((key,))} {message}")

    def _sp_size(self) -> int:
        """Refuse what does not divide; `auto`: the largest size within a node that divides all it must."""
        heads, kv_heads = self.model.num_attention_heads, self.model.num_key_value_heads
        wanted, seq_len = self.json.get("sequence_parallel_size", 1), self.run.train.seq_len
        rules = {
            f"the world size {self.launch.world_size}": lambda n: self.launch.world_size % n == 0,
            f"the {heads} query heads": lambda n: heads % n == 0,
            f"(nor is a multiple of) the {kv_heads} key/value heads": lambda n: kv_heads % n == 0 or n % kv_heads == 0,
        }
        if wanted == "auto":
            rules["seq_len"] = lambda n: seq_len % n == 0
        elif seq_len % wanted:
            below = seq_len - seq_len % wanted
            options = f"{below} or {below + wanted}" if below else str(wanted)
            self.problems.append(
                f"train.seq_len={seq_len} cannot be cut into {wanted} equal parts (sequence_parallel_size). "
                f"Nearest that can: {options}."
            )
        return self._choose("sequence_parallel_size", wanted, rules)

    def _ep_size(self) -> int:
        block = self.json.get("expert_parallel", {})
        if not block.get("enabled", False):
            return 1
        experts = self.model.num_local_experts
        rules = {
            f"the world size {self.launch.world_size}": lambda n: self.launch.world_size % n == 0,
            f"the {experts} experts": lambda n: experts % n == 0,
        }
        return self._choose("expert_parallel", block.get("autoep_size", "auto"), rules, name="autoep_size")

    def _choose(self, key: str, wanted: Any, rules: dict[str, Any], name: str | None = None) -> int:
        """A size that obeys all rules; `auto` also divides the ranks of this node."""
        limit = max(self.launch.world_size, self.model.num_attention_heads, self.model.num_local_experts)
        valid = [n for n in range(1, limit + 1) if all(rule(n) for rule in rules.values())]
        if wanted == "auto":
            return max(n for n in valid if self.launch.local_world_size % n == 0)
        broken = [text for text, rule in rules.items() if not rule(wanted)]
        if broken:
            options = ", ".join(map(str, sorted(sorted(valid, key=lambda n: abs(n - wanted))[:3])))
            label = f".{name}" if name else ""
            joined = " and ".join(broken)
            self._problem(key + label, f"= {wanted} does not divide {joined}. Nearest sizes that fit: {options}.")
            return 1
        return int(wanted)

    def _use_halo(self, sp_size: int) -> bool:
        wanted, local_tokens = self.run.model.window_exchange, self.run.train.seq_len // sp_size
        reach = (self.model.sliding_window or 1) - 1
        if wanted == "halo" and sp_size > 1 and local_tokens < reach:
            self.problems.append(
                f"model.window_exchange=halo needs {reach} tokens on each rank, but train.seq_len "
                f"{self.run.train.seq_len} / sequence_parallel_size {sp_size} is {local_tokens}. Use auto or ulysses."
            )
        return sp_size > 1 and wanted != "ulysses" and local_tokens >= reach

    def _batch_sizes(self, sp_size: int) -> tuple[int, int]:
        """(micro batch size, accumulation steps); nothing is ever rounded."""
        train, dp_size = self.run.train, self.launch.world_size // sp_size
        given = self.json.get("train_micro_batch_size_per_gpu", "auto")
        if given != "auto" and train.micro_batch_size not in ("auto", given):
            self._problem(
                "train_micro_batch_size_per_gpu",
                f"is {given}, but train.micro_batch_size in the run YAML is {train.micro_batch_size}. Keep one.",
            )
        micro = train.micro_batch_size if train.micro_batch_size != "auto" else given
        micro = 1 if micro == "auto" else int(micro)
        rows, per_pass = train.global_batch_size, micro * dp_size
        if rows % per_pass:
            below, above = rows - rows % per_pass, rows - rows % per_pass + per_pass
            nearest_valid = f"{below} or {above}" if below else str(above)
            self.problems.append(
                f"train.global_batch_size={rows} rows cannot be divided among {dp_size} data-parallel ranks x "
                f"micro_batch_size {micro} (world {self.launch.world_size} / sequence_parallel_size {sp_size}). "
                f"Nearest that can: {nearest_valid}."
            )
            return micro, 1
        accumulation = rows // per_pass
        for key, value in (("gradient_accumulation_steps", accumulation), ("train_batch_size", rows)):
            if self.json.get(key, "auto") not in ("auto", value):
                self._problem(
                    key,
                    f"is {self.json[key]}, but global_batch_size {rows} / (micro_batch_size {micro} x {dp_size} "
                    f"data-parallel ranks) gives {value}. Write 'auto'.",
                )
        return micro, accumulation

    def _check_agreement(self) -> None:
        train = self.run.train
        bf16 = self.json.get("bf16", {})
        enabled = bf16.get("enabled", "auto") if isinstance(bf16, dict) else None
        if enabled not in ("auto", train.dtype == "bf16"):
            self._problem("bf16", f"has enabled={enabled!r}, but train.dtype is {train.dtype}. Write 'auto'.")
        clipping = self.json.get("gradient_clipping", "auto")
        if clipping not in ("auto", train.gradient_clipping):
            self._problem(
                "gradient_clipping", f"is {clipping}, but train.gradient_clipping is {train.gradient_clipping}."
            )
        self._check_optimizer()
        if train.seq_len > self.model.max_position_embeddings:
            limit = self.model.max_position_embeddings
            self.problems.append(f"train.seq_len={train.seq_len} is more than the model's {limit} positions.")

    def _check_optimizer(self) -> None:
        """An `optimizer` block is welcome as long as it says what the run YAML says."""
        optimizer, train = self.json.get("optimizer"), self.run.train
        if optimizer is None:
            return
        if not isinstance(optimizer, dict) or optimizer.get("type") not in ("AdamW", "Adam"):
            self._problem("optimizer", "must have type AdamW.")
            return
        same = {"lr": train.lr, "eps": train.eps, "weight_decay": train.weight_decay}
        same_lists = {"betas": [train.beta1, train.beta2]}
        for name, value in optimizer.get("params", {}).items():
            expected = {**same, **same_lists, "torch_adam": value, "adam_w_mode": True}.get(name)
            if expected is None:
                self._problem("optimizer", f"has params.{name}, which is not a known key; train.* has the settings.")
            elif value != "auto" and value != expected:
                self._problem("optimizer", f"has params.{name}={value}, but train.{name} is {expected}. Write 'auto'.")

    def _engine_json(self, micro_batch_size: int, accumulation: int) -> dict[str, Any]:
        train = self.run.train
        engine = {key: copy.deepcopy(value) for key, value in self.json.items() if key not in (*OWN_KEYS, "optimizer")}
        engine = {key: value for key, value in engine.items() if key not in REFUSED_KEYS}
        engine["train_micro_batch_size_per_gpu"] = micro_batch_size
        engine["gradient_accumulation_steps"] = accumulation
        # DeepSpeed sees every rank as a data-parallel one, also those that share a row
        engine["train_batch_size"] = micro_batch_size * accumulation * self.launch.world_size
        engine["gradient_clipping"] = train.gradient_clipping
        engine["bf16"] = {**engine.get("bf16", {}), "enabled": train.dtype == "bf16"}
        engine["zero_allow_untested_optimizer"] = True
        engine.setdefault("steps_per_print", 10**12)
        zero = engine["zero_optimization"]
        self._fill_auto_sizes(zero)
        for name in ("offload_optimizer", "offload_param"):
            if zero.get(name, {}).get("device") == "none":
                del zero[name]
        if train.dtype == "bf16" and zero["stage"] == 1 and "data_types" in engine:
            self._problem("data_types", "with ZeRO stage 1 and bf16 selects an optimizer that cannot be saved; use 2.")
        if train.dtype == "bf16" and zero["stage"] != 1:
            engine["data_types"] = {"grad_accum_dtype": "fp32", **engine.get("data_types", {})}
        if not math.isfinite(train.gradient_clipping):
            self._problem("gradient_clipping", "must be finite.")
        return engine

    def _fill_auto_sizes(self, zero: dict[str, Any]) -> None:
        """The values that transformers' own integration gives these keys."""
        hidden = self.model.hidden_size
        sizes = {
            "reduce_bucket_size": hidden * hidden,
            "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": 10 * hidden,
        }
        for key, value in zero.items():
            if value == "auto":
                if key in sizes:
                    zero[key] = sizes[key]
                else:
                    self._problem(f"zero_optimization.{key}", f"is 'auto', which only {', '.join(sizes)} may be.")

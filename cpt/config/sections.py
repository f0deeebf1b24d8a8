"""The run YAML's sections, and the `RunConfig` that everything else works with: dataclasses and
their own checks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from cpt.config.adapter_section import AdapterSection
from cpt.config.guard_section import GuardSection
from cpt.config.muon_section import MuonSection
from cpt.config.precision_sections import ProductsSection, QuantizeSection
from cpt.storage.state_bytes import MomentForm
from data_pipeline.mixture.phases import RateFactor

MAX_STEPS = 10**8
"""Steps of the longest run that anybody has planned, many times over; checks go through them."""
LARGEST_LR = 0.1
"""Largest learning rate that is not taken for a slip of the pen: AdamW's first step is about as
long as `lr`, and weights of gpt-oss begin with a standard deviation of 0.02.
"""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Working precision by the word of `train.dtype`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """The `model` section: which model is trained, and how it computes."""

    path: Path | None = None
    """Hugging Face directory of safetensors, or a run of this project, relative to the run YAML;
    give either this or `init`. A run directory means its newest complete checkpoint,
    `RUN_DIR@STEP` that of a step."""
    init: Literal["tiny", "gpt-oss-20b", "gpt-oss-120b"] | None = None
    """Architecture to start from random weights; give either this or `path`."""
    attention: str = "auto"
    """Attention backend; auto takes the fastest one that is exact on this machine (`cpt doctor`
    lists all)."""
    window_exchange: Literal["auto", "halo", "ulysses"] = "auto"
    """How window layers exchange tokens under sequence parallelism: halo exchanges with the left
    neighbor only, ulysses works as full layers do, auto takes the halo where one neighbor holds the
    whole window."""
    verify_checksums: bool = True
    """Compare the weight files of `path` with their known SHA-256 before the first step. The hashes
    come from a SHA256SUMS file beside them or from the blob names of a Hugging Face Hub cache; a
    file without a known hash is read unverified."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of storing its activations."""
    offload_checkpoints: bool = False
    """Keep the layer inputs that activation checkpointing stores in host memory until their
    backward pass."""
    expert_recompute: Literal["keep", "recompute"] = "recompute"
    """What activation checkpointing does with rows that other ranks sent under expert parallelism:
    keep stores them (experts_per_token x hidden_size values per token and layer), recompute sends
    them again in the backward pass (a quarter more bytes)."""
    expert_overlap: Literal["halves", "none"] = "none"
    """Whether the exchange of one half of each rank's experts travels while the other half is
    computed under expert parallelism: halves does, at the price of more memory in the backward
    pass (cpt/model/experts/overlap.py), with the same numbers bit for bit."""
    ulysses_groups: int = 1
    """Groups that the heads of a rank are exchanged in under sequence parallelism: with 2, one half
    travels while attention computes the other, with the same numbers. It divides the key/value
    heads of a rank."""
    router_aux_loss_coef: float = 0.0
    """Weight of each layer's load-balancing loss, which is 1 at perfect balance
    (cpt/model/experts/router_watch.py); 0 turns it off. Published value: Switch Transformer 0.01.
    The released config.json sets 0.9, but the released code never uses it."""
    router_z_loss_coef: float = 0.0
    """Weight of each layer's router z-loss; 0 turns it off. Published value: ST-MoE 0.001."""

    def check(self) -> Iterator[tuple[str, str]]:
        if (self.path is None) == (self.init is None):
            yield (
                "path",
                "and init: give exactly one of them (a directory of weights, or a preset).",
            )
        if self.offload_checkpoints and not self.activation_checkpointing:
            yield (
                "offload_checkpoints",
                "needs model.activation_checkpointing: true; without it there are none.",
            )
        if self.ulysses_groups < 1:
            yield "ulysses_groups", f"is {self.ulysses_groups}, must be 1 or more."
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if not 0 <= getattr(self, name) < float("inf"):
                yield name, f"is {getattr(self, name)}, must be >= 0."


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """The `data` section: what the model is trained on."""

    mix: Path
    """Data-mix YAML, relative to the run YAML."""
    build_dir: Path | None = None
    """Folder of the built shards, relative to the run YAML. Without it the build is looked for in
    data/ of the current directory, whatever its folder is called; a small input that is not built
    is built in data/MIX-FINGERPRINT when the run starts."""
    auto_build_limit_bytes: int = 256 * 2**20
    """Largest input in bytes that a run builds by itself."""
    accept_stale_build: bool = False
    """Train on a build whose rules or files are not those of the mix as it is; what differs is
    logged."""
    accept_mix_change: bool = False
    """Continue with a mix that was edited since the last checkpoint, or whose phases another
    `train.total_steps` moves; it becomes a new segment of the ledger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    """The `train` section: length, schedule and optimizer of the run."""

    seq_len: int
    """Tokens of a packed row; must equal the mix's `seq_len`."""
    global_batch_size: int
    """Packed rows of one optimizer step, over all ranks."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Packed rows of one forward pass; auto is 1."""
    total_steps: int
    """Optimizer steps of the schedule; 0, with `telemetry.export_at_end`, only loads the model,
    saves it and exports it."""
    stop_at_step: int | None = None
    """Save and end with exit code 0 after this step; the schedule stays that of `total_steps`."""
    lr: float
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Lowest learning rate of the schedule as a share of `lr`."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """Course of the learning rate after the warm-up: a cosine down to the floor, constant, or wsd
    (stable, then a linear decay to the floor)."""
    warmup_steps: int = 0
    """Optimizer steps of the linear warm-up from 0."""
    decay_steps: int = 0
    """Optimizer steps of the decay of `schedule: wsd`."""
    decay_phase: str | None = None
    """Instead of `decay_steps`: the phase of the mix's `schedule` with whose first step the decay
    of `schedule: wsd` begins; it ends with the run."""
    accept_schedule_change: bool = False
    """Go on from a checkpoint although the steps to come have another learning rate than they had
    in its configuration; every start tells what differs."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """What updates the weights: adamw, or muon for the matrices of attention and experts and adamw
    for the rest, at the same rate. `train.muon` has its settings."""
    muon: MuonSection = field(default_factory=MuonSection)
    """Muon, the optimizer of matrices."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; biases, norms and sinks are not decayed."""
    beta1: float = 0.9
    """Decay rate of Adam's first moment."""
    beta2: float = 0.95
    """Decay rate of Adam's second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    optimizer_state: MomentForm = "fp32"
    """How each of Adam's two moments of a trained parameter is held in memory: in fp32 it takes 4
    bytes, in bf16 2, in int8 1 (8 bits in blocks of 64, for matrices but the routers'; what is
    small stays in fp32). Checkpoints hold fp32, so a resume may change it."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    max_rollbacks: int = 1
    """How often a run may return to a checkpoint because three updates in a row were not finite;
    the next time it ends with exit code 70."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Working precision; master weights are fp32 in both."""
    seed: int = 1234
    """Seed of the random weights of `model.init`; the order of the data follows the mix's own seed.
    """
    freeze: tuple[str, ...] = ()
    """Parameters to leave unchanged: name patterns such as `model.layers.0.*`, or the words router,
    experts, attention, sinks, norms, embeddings and lm_head."""
    kl_targets: Path | None = None
    """Folder that `cpt kl_targets` wrote, with the base model's distributions for the rows of
    some sources; relative to the run YAML."""
    kl_weight: float | None = None
    """Weight of the divergence from these distributions, in nats per predicted token. It must be
    given with `kl_targets`; 0 only measures the divergence."""
    gc_interval_steps: int = 0
    """Optimizer steps between Python garbage collections, which then happen on all ranks at once
    and at no other time; 0 leaves them to Python."""
    threads: int | None = None
    """CPU threads of each process; the default is the cores that the job may use on the node,
    divided by its processes there, or those to which a process is bound.
    """
    quantize: QuantizeSection = field(default_factory=QuantizeSection)
    """Training that is aware of the format in which the model will be served."""
    products: ProductsSection = field(default_factory=ProductsSection)
    """Products in 8 bits."""

    def check(self) -> Iterator[tuple[str, str]]:
        at_least = {
            "seq_len": 2,
            "global_batch_size": 1,
            "total_steps": 0,
            "warmup_steps": 0,
            "decay_steps": 0,
            "max_rollbacks": 0,
            "gc_interval_steps": 0,
            "seed": 0,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                yield name, f"is {getattr(self, name)}, must be >= {least}."
        if self.total_steps > MAX_STEPS:
            yield "total_steps", f"is {self.total_steps}, must be <= {MAX_STEPS}."
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                yield name, f"is {getattr(self, name)}, must be > 0."
        if self.lr > LARGEST_LR:
            yield (
                "lr",
                f"is {self.lr:g}, must be <= {LARGEST_LR:g}: AdamW moves every weight by about lr "
                "in a step. Write a number such as 1e-5.",
            )
        for name in ("weight_decay", "gradient_clipping"):
            if getattr(self, name) < 0:
                yield name, f"is {getattr(self, name)}, must be >= 0."
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield name, f"is {getattr(self, name)}, must be in [0, 1)."
        if self.optimizer != "muon":
            for key, message in self.muon.problems_without_use():
                yield f"muon.{key}", message
        elif self.optimizer_state != "fp32":
            yield (
                "optimizer_state",
                f"is {self.optimizer_state}, but with train.optimizer: muon matrices have one "
                "momentum, which is fp32, and the moments of the rest are small. Remove one of the "
                "two.",
            )
        if (self.kl_targets is None) != (self.kl_weight is None):
            yield "kl_targets", "and kl_weight go together: give both, or neither."
        if self.kl_weight is not None and not 0 <= self.kl_weight < float("inf"):
            yield "kl_weight", f"is {self.kl_weight}, must be >= 0."
        if not 0 <= self.min_lr_ratio <= 1:
            yield "min_lr_ratio", f"is {self.min_lr_ratio}, must be in [0, 1]."
        if isinstance(self.micro_batch_size, int) and self.micro_batch_size < 1:
            yield "micro_batch_size", f"is {self.micro_batch_size}, must be >= 1."
        if self.threads is not None and self.threads < 1:
            yield "threads", f"is {self.threads}, must be >= 1; leave it out for the default."
        if self.stop_at_step is not None and not 1 <= self.stop_at_step <= self.total_steps:
            yield (
                "stop_at_step",
                f"is {self.stop_at_step}, must be between 1 and total_steps ({self.total_steps}).",
            )
        shaped_steps = self.warmup_steps + self.decay_steps
        if shaped_steps > self.total_steps > 0:
            yield (
                "warmup_steps",
                f"+ decay_steps is {shaped_steps}, more than total_steps ({self.total_steps}).",
            )
        if self.decay_steps and self.schedule != "wsd":
            yield (
                "decay_steps",
                f"is {self.decay_steps}, but only schedule: wsd has one; remove it.",
            )
        if self.decay_phase is not None and self.schedule != "wsd":
            yield (
                "decay_phase",
                f"is '{self.decay_phase}', but only schedule: wsd has a decay; remove it.",
            )
        if self.decay_phase is not None and self.decay_steps:
            yield (
                "decay_phase",
                "and decay_steps: give one of them, the phase that the decay begins with or its "
                "length.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSection:
    """The `checkpoint` section: when state is saved, and what is kept."""

    interval_steps: int = 0
    """Optimizer steps between periodic saves; 0 saves only at the end."""
    keep_last: int = 2
    """How many of the newest complete checkpoints are kept."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this step are kept for good, besides `keep_last`; 0 keeps none.
    """
    async_save: bool | Literal["auto", "stream"] = "auto"
    """Periodic saves are written while training continues. true copies what updates change to host
    memory first (12 bytes per trained parameter over all ranks); a node without room for the copy
    is refused. stream needs no copy: the state is written as it lies, and the next update waits
    until it is written. auto copies if every node has room, and streams otherwise. false makes
    training wait for each save."""
    buffer_mib: int = 64
    """Host memory in MiB of each rank through which a save passes what is not fp32 in host memory,
    where no copy was made."""
    stop_budget_seconds: int = 540
    """Longest time in seconds from the decision to stop until the process has left; when it is used
    up, the process ends with exit code 74."""
    stop_margin_seconds: int = 300
    """Under SLURM, seconds before the job's end at which the run stops; at most a quarter of the
    time left at the start."""

    def check(self) -> Iterator[tuple[str, str]]:
        for name in ("interval_steps", "keep_every_steps", "stop_margin_seconds"):
            if getattr(self, name) < 0:
                yield name, f"is {getattr(self, name)}, must be >= 0."
        if self.buffer_mib < 1:
            yield "buffer_mib", f"is {self.buffer_mib}, must be >= 1."
        if self.stop_budget_seconds < 1:
            yield "stop_budget_seconds", f"is {self.stop_budget_seconds}, must be >= 1."
        if self.keep_last < 2:
            yield "keep_last", f"is {self.keep_last}, must be >= 2: one may turn out to be damaged."


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogSection:
    """The `watchdog` section: when a rank counts as hung or slow."""

    enabled: bool = True
    """Watch all ranks; a hung rank ends the run with exit code 71."""
    timeout_seconds: float = 900.0
    """Longest time in seconds in one phase of a step: reading data, forward, backward, update; also
    in the measurement of the network."""
    long_timeout_seconds: float = 14400.0
    """Longest time in seconds in one of the other phases: loading, saving, scoring held-out text,
    sampling, rolling back, exporting."""
    interval_seconds: float = 1.0
    """Seconds between two checks."""
    straggler_ratio: float = 2.0
    """A step of one rank that takes this many times the median step while the others wait is
    reported; 0 turns the report off."""

    def check(self) -> Iterator[tuple[str, str]]:
        if self.interval_seconds < 0.05:
            yield "interval_seconds", f"is {self.interval_seconds}, must be >= 0.05."
        for name in ("timeout_seconds", "long_timeout_seconds"):
            if getattr(self, name) < 4 * self.interval_seconds:
                yield (
                    name,
                    f"is {getattr(self, name)}, must be >= 4 times watchdog.interval_seconds.",
                )
        if self.straggler_ratio != 0 and self.straggler_ratio <= 1:
            yield "straggler_ratio", f"is {self.straggler_ratio}, must be > 1, or 0 for no report."


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSection:
    """The `network` section: the look at the links between nodes at the start of a run."""

    measure: bool = True
    """Measure the rate between the nodes of a run at its start, in a few seconds; nodes far below
    the median are named. A run on one node measures nothing."""
    min_node_gbit: float = 0.0
    """Lowest rate in Gbit/s, each way, at which a node must reach some other node. Below it the run
    ends before weights are loaded: with exit code 70 if other nodes do better, with 78 if none
    does; 0 refuses nothing."""

    def check(self) -> Iterator[tuple[str, str]]:
        if not 0 <= self.min_node_gbit < float("inf"):
            yield "min_node_gbit", f"is {self.min_node_gbit}, must be >= 0."
        if self.min_node_gbit and not self.measure:
            yield (
                "min_node_gbit",
                f"is {self.min_node_gbit:g}, but network.measure is false. Remove one of them.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetrySection:
    """The `telemetry` section: what is measured, and where it is sent."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases mode; offline writes into the run directory. The variables of W&B, such as
    WANDB_MODE and WANDB_NAME, go before these keys, but none switches on what is disabled here."""
    wandb_project: str = "gpt-oss-cpt"
    """Name of the Weights & Biases project."""
    wandb_entity: str | None = None
    """User or team that the W&B run belongs to; the default is the login's."""
    wandb_group: str | None = None
    """Group of W&B runs that belong together."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the W&B run."""
    wandb_notes: str | None = None
    """A text about the W&B run."""
    wandb_job_type: str | None = None
    """Job type of the W&B run, such as `pretrain`."""
    wandb_artifacts: Literal["none", "export", "checkpoints"] = "none"
    """What becomes W&B artifacts: nothing, the export at the end, or that and every checkpoint.
    They refer to the files by path, and nothing is sent."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run directory."""
    memory_report: bool = False
    """Measure the memory of the second step after a start, part by part, and compare it with the
    prediction of --dry_run."""
    export_at_end: bool = False
    """Write a Hugging Face directory into the run directory when the run is done: in bf16, in MXFP4
    where `train.quantize` has rounded the experts, or an adapter alone for PEFT."""
    log_interval_steps: int = 10
    """Optimizer steps between lines of the log about loss, speed, time left and memory; the first
    and the last step of a start have one, too. 0 turns them off."""
    router_interval_steps: int = 100
    """Optimizer steps between measurements of the routers: load, entropy and drift from the
    untouched model, by language; 0 turns them off."""
    report_interval_seconds: int = 600
    """Least time in seconds between two drawings of report.html while the run goes on; each follows
    a checkpoint. The page is also drawn when the run is done or the guard pauses it. 0 turns the
    drawings in between off."""
    sample_interval_steps: int = 0
    """Optimizer steps between continuations of `sample_prompts` in the log, metrics.jsonl and the
    trackers; 0 turns them off."""
    sample_prompts: tuple[str, ...] = (
        "\u6614\u3005\u3001\u3042\u308b\u3068\u3053\u308d\u306b",
        "Once upon a time",
    )
    """Texts that are continued, always by the likeliest token, so that steps can be compared."""
    sample_tokens: int = 32
    """Tokens of each continuation."""

    def check(self) -> Iterator[tuple[str, str]]:
        for name in (
            "log_interval_steps",
            "sample_interval_steps",
            "router_interval_steps",
            "report_interval_seconds",
        ):
            if getattr(self, name) < 0:
                yield name, f"is {getattr(self, name)}, must be >= 0."
        if self.sample_tokens < 1:
            yield "sample_tokens", f"is {self.sample_tokens}, must be >= 1."
        if self.sample_interval_steps and not (self.sample_prompts and all(self.sample_prompts)):
            yield "sample_prompts", "must hold at least one text, and no empty one."


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSection:
    """An entry of `stages`: the layout of one stretch of the run, with rows of one length."""

    seq_len: int
    """Tokens of a packed row; that of the mix's stage at the same place."""
    global_batch_size: int | None = None
    """Packed rows of one optimizer step; the default has as many tokens as a step of the first
    stage."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Packed rows of one forward pass; the default is `train.micro_batch_size`."""
    sequence_parallel_size: int | Literal["auto"] | None = None
    """Ranks that share one packed row; the default is that of the DeepSpeed JSON."""
    activation_checkpointing: bool | None = None
    """Recompute layers in the backward pass; the default is `model.activation_checkpointing`."""
    offload_checkpoints: bool | None = None
    """Keep what that stores in host memory; the default is `model.offload_checkpoints`."""

    def check(self) -> Iterator[tuple[str, str]]:
        if self.seq_len < 2:
            yield "seq_len", f"is {self.seq_len}, must be >= 2."
        for name in ("global_batch_size", "micro_batch_size", "sequence_parallel_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                yield name, f"is {value}, must be >= 1."


@dataclass(frozen=True, kw_only=True, slots=True)
class RunYaml:
    """The run YAML as written."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    adapter: AdapterSection = field(default_factory=AdapterSection)
    guard: GuardSection = field(default_factory=GuardSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    telemetry: TelemetrySection = field(default_factory=TelemetrySection)
    watchdog: WatchdogSection = field(default_factory=WatchdogSection)
    network: NetworkSection = field(default_factory=NetworkSection)
    stages: tuple[StageSection, ...] = ()
    """One layout for each of the mix's `stages`, in the same order; none for a mix without them."""

    def rows_of_stage(self, number: int) -> int:
        """Return the packed rows of a step of a stage: as given, or with as many tokens as before.

        `check` refuses what is no whole number of rows.
        """
        stage = self.stages[number]
        if stage.global_batch_size is not None:
            return stage.global_batch_size
        return max(1, self.train.global_batch_size * self.train.seq_len // stage.seq_len)

    def model_of_stage(self, number: int) -> ModelSection:
        """Return the `model` section as a stage reads it."""
        given: dict[str, Any] = {}
        for name in ("activation_checkpointing", "offload_checkpoints"):
            value = getattr(self.stages[number], name)
            if value is not None:
                given[name] = value
        return dataclasses.replace(self.model, **given)

    def check(self) -> Iterator[tuple[str, str]]:
        yield from self._check_stages()
        if self.train.total_steps == 0 and not self.telemetry.export_at_end:
            yield (
                "train.total_steps",
                "is 0, so nothing would be trained. Give the number of steps, or set "
                "telemetry.export_at_end: true to only load the model, save it and export it.",
            )
        yield from self._check_levers()
        yield from self._check_adapter()
        yield from self._check_quantize()

    def _check_adapter(self) -> Iterator[tuple[str, str]]:
        if not self.adapter.is_on:
            return
        if self.train.freeze:
            yield (
                "train.freeze",
                f"is given, but with adapter.kind: {self.adapter.kind} everything below the "
                "adapters is frozen. Remove it; adapter.targets and adapter.layers choose what is "
                "trained.",
            )
        if self.train.optimizer_state == "int8":
            yield (
                "train.optimizer_state",
                f"is int8, but with adapter.kind: {self.adapter.kind} only small matrices are "
                "trained, whose moments take little memory in any form. Give fp32 or bf16.",
            )
        if self.train.optimizer == "muon":
            yield (
                "train.optimizer",
                f"is muon, but with adapter.kind: {self.adapter.kind} only adapters are trained: "
                "Muon would orthogonalize the factors A and B, not the matrix that they change. "
                "Remove one of the two.",
            )
        if self.guard.router_lever == "freeze":
            yield (
                "guard.router_lever",
                f"is freeze, but with adapter.kind: {self.adapter.kind} the routers are never "
                "trained. Remove it, or give raise_replay.",
            )

    def _check_quantize(self) -> Iterator[tuple[str, str]]:
        quantize = self.train.quantize
        if not quantize.is_on:
            return
        if self.adapter.is_on:
            yield (
                "train.quantize.experts",
                f"is {quantize.experts}, but with adapter.kind: {self.adapter.kind} the experts "
                "below the adapters stay as they are: on the released weights an adapter rounds "
                "nothing and needs none of this. Remove one of the two.",
            )
        total = self.train.total_steps
        if quantize.start_step is not None and quantize.start_step >= total > 0:
            yield (
                "train.quantize.start_step",
                f"is {quantize.start_step}, but train.total_steps is {total}: no step would be "
                f"trained with rounded weights. Give less, such as {total * 2 // 3}.",
            )

    def _check_stages(self) -> Iterator[tuple[str, str]]:
        if not self.stages:
            return
        train = self.train
        first = self.stages[0]
        if first.seq_len != train.seq_len:
            yield (
                "stages[0].seq_len",
                f"is {first.seq_len}, but train.seq_len is {train.seq_len}, which is that of the "
                "first stage. Make them equal.",
            )
        if first.global_batch_size not in (None, train.global_batch_size):
            yield (
                "stages[0].global_batch_size",
                f"is {first.global_batch_size}, but train.global_batch_size is "
                f"{train.global_batch_size}, which is that of the first stage. Remove one.",
            )
        if not train.total_steps:
            yield "stages", "need steps to be divided, but train.total_steps is 0. Remove one."
        if train.kl_targets is not None:
            yield (
                "train.kl_targets",
                "are for rows of one length, and with stages there are several. Remove one of the "
                "two.",
            )
        tokens = train.global_batch_size * train.seq_len
        for number, stage in enumerate(self.stages):
            for key, message in self.model_of_stage(number).check():
                yield f"stages[{number}].{key}", message
            rows, rest = divmod(tokens, stage.seq_len)
            if rest and stage.global_batch_size is None:
                nearest = f"{rows} or {rows + 1}" if rows else "1"
                yield (
                    f"stages[{number}].global_batch_size",
                    f"is not given, and the {tokens} tokens of a step of the first stage are no "
                    f"whole number of rows of {stage.seq_len}. Give it; nearest: {nearest}.",
                )

    def _check_levers(self) -> Iterator[tuple[str, str]]:
        guard = self.guard
        if guard.kl_lever != "off" and self.train.kl_targets is None:
            yield (
                "guard.kl_lever",
                f"is {guard.kl_lever}, but there are no targets to weigh. Give train.kl_targets "
                "and train.kl_weight, or remove it.",
            )
        weight = self.train.kl_weight
        if guard.kl_lever != "off" and weight is not None and weight > guard.max_kl_weight:
            yield (
                "guard.max_kl_weight",
                f"is {guard.max_kl_weight:g}, below train.kl_weight ({weight:g}). Raise it.",
            )
        if guard.router_lever != "off" and not self.telemetry.router_interval_steps:
            yield (
                "guard.router_lever",
                f"is {guard.router_lever}, but telemetry.router_interval_steps is 0: the drift of "
                "the routers is not measured. Give an interval.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertParallelJson:
    """The `expert_parallel` block of the DeepSpeed JSON."""

    enabled: bool = False
    """Spread the experts over ranks."""
    autoep_size: int | Literal["auto"] = "auto"
    """Ranks that together hold all experts of a layer; auto takes the largest size that divides the
    ranks of a node and the experts."""
    preset_model: Literal["gpt_oss"] = "gpt_oss"
    """Layout of the experts; gpt_oss is the only one."""

    def check(self) -> Iterator[tuple[str, str]]:
        if isinstance(self.autoep_size, int) and self.autoep_size < 1:
            yield "autoep_size", f"is {self.autoep_size}, must be 'auto' or >= 1."


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchInfo:
    """The sizes that the launcher decided."""

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
    adapter: AdapterSection
    guard: GuardSection
    checkpoint: CheckpointSection
    telemetry: TelemetrySection
    watchdog: WatchdogSection
    network: NetworkSection
    world_size: int
    """Number of ranks."""
    sp_size: int
    """Ranks that share one packed row."""
    ep_size: int
    """Ranks that together hold all experts of a layer."""
    use_halo: bool
    """Whether window layers exchange with their left neighbor only."""
    micro_batch_size: int
    """Packed rows of one forward pass."""
    gradient_accumulation_steps: int
    """Forward passes of one optimizer step."""
    engine_json: dict[str, Any]
    """Configuration of the DeepSpeed engine."""
    stages: tuple[StageSection, ...] = ()
    """Every stage of the run, with nothing left open; empty without `stages`."""
    stage: int = 0
    """The stage that this configuration is for: its number, counted from 0."""
    lr_factors: tuple[RateFactor, ...] = ()
    """What the phases of the mix make of the learning rate; empty if all factors are 1."""

    @property
    def measured_seq_len(self) -> int:
        """Tokens of the rows in which held-out text is measured: those of the first stage.

        So every measurement of a run compares like with like.
        """
        return self.stages[0].seq_len if self.stages else self.train.seq_len

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the engine."""
        return int(self.engine_json["zero_optimization"]["stage"])

    @property
    def dtype(self) -> torch.dtype:
        """Working precision of weights and activations."""
        return DTYPES[self.train.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of one value in working precision."""
        return self.dtype.itemsize

    def to_plain(self) -> dict[str, Any]:
        """Nested dictionaries of plain values, for config.resolved.yaml and the manifest."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        if not self.lr_factors:
            del plain["lr_factors"]  # so that a run without them is described as before
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value

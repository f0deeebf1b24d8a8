"""Whether a run fits on a GPU, and the smallest changes after which it does.

A run is refused if the estimate (`cpt.planning.memory`) is more than the GPU has: what the estimate
leaves out, fragmentation and libraries, only adds to it.  Above the share that a plan may fill
(`cpt.planning.hardware.Assumptions.memory_share`) a run is warned about.

Every cure that is named was computed: the run is resolved again with the change, as a start would,
and its memory is estimated.  Each is the smallest of its kind that fits by itself; if none does,
they are joined one after the other, and then ranks are added.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers import GptOssConfig

from cpt.config import LaunchInfo, RunConfig, RunYaml, resolve
from cpt.errors import ConfigError
from cpt.planning.hardware import ANY_GPU, GPUS, Assumptions
from cpt.planning.host_memory import host_memory
from cpt.planning.memory import GIB, ParameterCounts, counts_of, device_memory
from data_pipeline.config.strict_yaml import Located

MOST_RANKS = 1024
"""Ranks up to which more of them are proposed."""
RANKS_PER_NODE = 8
LEAST_SEQ_LEN = 1024
"""Tokens of the shortest rows that are proposed."""
NUM_PARTS = 3
"""Parts of memory that a refusal names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A GPU and its memory."""

    name: str
    """Name for messages."""
    memory_bytes: float
    """Memory of the whole card."""

    @classmethod
    def named(cls, name: str) -> Card:
        """Return a GPU of `cpt.planning.hardware` by its short name."""
        gpu = GPUS[name]
        return cls(name=gpu.name, memory_bytes=gpu.memory_bytes)

    @property
    def planned_bytes(self) -> float:
        """The memory that a plan may fill."""
        return Assumptions().memory_share * self.memory_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStart:
    """A run as it would be started."""

    run: RunYaml
    """The run YAML."""
    json: Located
    """The DeepSpeed JSON."""
    model: GptOssConfig
    """Sizes of the model."""
    launch: LaunchInfo
    """World size and ranks per node."""
    counts: ParameterCounts
    """Parameters of the model."""

    @classmethod
    def of(
        cls, run: RunYaml, json: Located, model: GptOssConfig, launch: LaunchInfo
    ) -> PlannedStart:
        """Count the parameters of a start."""
        counts = counts_of(run, model)
        return cls(run=run, json=json, model=model, launch=launch, counts=counts)

    def config(self) -> RunConfig | None:
        """Return the resolved configuration; None if the parts do not fit together."""
        try:
            return resolve(self.run, self.json, self.model, self.launch)
        except ConfigError:
            return None

    def memory(self) -> dict[str, int] | None:
        """Return the bytes on the GPU of one rank by part; None if it does not start."""
        config = self.config()
        if config is None:
            return None
        return device_memory(config, self.model, self.counts)

    def fits(self, card: Card) -> bool:
        """Return whether it starts and fits in the memory that a plan may fill."""
        memory = self.memory()
        return memory is not None and sum(memory.values()) <= card.planned_bytes

    def with_model(self, **keys: Any) -> PlannedStart:
        """Return the start with other keys of the section `model`."""
        return replace(self, run=replace(self.run, model=replace(self.run.model, **keys)))

    def with_train(self, **keys: Any) -> PlannedStart:
        """Return the start with other keys of the section `train`."""
        return replace(self, run=replace(self.run, train=replace(self.run.train, **keys)))

    def with_packed_base(self) -> PlannedStart:
        """Return the start with experts in 4 bits below its adapters."""
        run = replace(self.run, adapter=replace(self.run.adapter, base="mxfp4"))
        return replace(self, run=run, counts=counts_of(run, self.model))

    def with_json(self, **keys: Any) -> PlannedStart:
        """Return the start with other top-level keys of the DeepSpeed JSON."""
        value = {**copy.deepcopy(self.json.value), **keys}
        return replace(self, json=Located(self.json.source, value, self.json.lines))

    def with_zero(self, **keys: Any) -> PlannedStart:
        """Return the start with other keys of `zero_optimization`."""
        return self.with_json(zero_optimization={**self.json.value["zero_optimization"], **keys})


@dataclass(frozen=True, kw_only=True, slots=True)
class Cure:
    """One change of a start."""

    words: str
    """What to do, for people."""
    start: PlannedStart
    """The start after the change."""


def fit_problem(start: PlannedStart, memory: dict[str, int], card: Card) -> str | None:
    """Return why a start does not fit on a GPU, with cures; None if it does.

    Args:
        start: A start that can be resolved.
        memory: Its `memory`.
        card: The GPU of every rank.
    """
    if sum(memory.values()) <= card.memory_bytes:
        return None
    largest = sorted(memory.items(), key=lambda part: -part[1])[:NUM_PARTS]
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in largest)
    lines = [
        f"a rank needs {_gib(sum(memory.values()))} of GPU memory (estimate), {card.name} has "
        f"{_gib(card.memory_bytes)}.",
        f"  Largest parts: {parts}.",
    ]
    found = cures(start, card)
    if found:
        lines.append("  It fits with:")
        lines += [f"    {cure}" for cure in found]
    else:
        lines.append("  Nothing was found with which it fits.")
    lines.append(
        f"  cpt plan --gpus N searches all layouts; --gpu {ANY_GPU} leaves out this check."
    )
    return "\n".join(lines)


def fit_warning(memory: dict[str, int], card: Card) -> str | None:
    """Return a warning about a run that fits on a GPU by less than a plan leaves free, or None."""
    total = sum(memory.values())
    if not card.planned_bytes < total <= card.memory_bytes:
        return None
    return (
        f"a rank needs {_gib(total)} of GPU memory (estimate) of the {_gib(card.memory_bytes)} of "
        f"{card.name}: little is left for fragmentation, NCCL and libraries, so it may run out."
    )


def fitting_gpus(memory: dict[str, int]) -> str:
    """Return a line on the known GPUs that the memory of a rank fits on."""
    total = sum(memory.values())
    fitting = []
    for name in GPUS:
        if total <= Card.named(name).planned_bytes:
            fitting.append(name)
    share = f"{Assumptions().memory_share:.0%} of its memory may be filled"
    if not fitting:
        return f"fits on none of {', '.join(GPUS)} ({share}); --gpu NAME tells what would help"
    return f"fits on {', '.join(fitting)} ({share})"


def cures(start: PlannedStart, card: Card) -> list[str]:
    """Return the smallest change of each kind after which a start fits on a GPU, with its memory.

    Returns:
        One entry for each kind of change that suffices by itself; if none does, one for the first
        combination that does; an empty list if there is none either.
    """
    found = []
    for kind in KINDS:
        change = next((change for change in kind(start) if change.start.fits(card)), None)
        if change is not None:
            found.append(_told(change))
    return found or _joined_cures(start, card)


def _joined_cures(start: PlannedStart, card: Card) -> list[str]:
    """Return the first combination of changes that fits: kind after kind, then more ranks."""
    words: list[str] = []
    changed = start
    for kind in KINDS_AT_THIS_SIZE:
        smallest = changed
        word = ""
        for change in kind(changed):
            if _size(change.start) < _size(smallest):
                smallest = change.start
                word = change.words
        if not word:
            continue
        words.append(word)
        changed = smallest
        if changed.fits(card):
            return [_told(Cure(words=" with ".join(words), start=changed))]
    for change in more_ranks(changed):
        if change.start.fits(card):
            joined = " with ".join([*words, change.words])
            return [_told(Cure(words=joined, start=change.start))]
    return []


def more_ranks(start: PlannedStart) -> Iterator[Cure]:
    """Yield more ranks, twice as many each time."""
    before = start.launch.world_size
    count = 2 * before
    while count <= MOST_RANKS:
        local = max(start.launch.local_world_size, min(count, RANKS_PER_NODE))
        launch = LaunchInfo(world_size=count, local_world_size=local)
        yield Cure(words=f"{count} ranks in place of {before}", start=replace(start, launch=launch))
        count *= 2


def full_sharding(start: PlannedStart) -> Iterator[Cure]:
    """Yield ZeRO stage 3, if it is another one."""
    if start.json.value["zero_optimization"].get("stage") != 3:
        yield Cure(words="ZeRO stage 3", start=start.with_zero(stage=3))


def checkpointing(start: PlannedStart) -> Iterator[Cure]:
    """Yield recomputation of layers, then with their inputs in host memory."""
    model = start.run.model
    if not model.activation_checkpointing:
        yield Cure(
            words="model.activation_checkpointing: true",
            start=start.with_model(activation_checkpointing=True),
        )
    if not model.offload_checkpoints:
        yield Cure(
            words="model.activation_checkpointing and model.offload_checkpoints: true",
            start=start.with_model(activation_checkpointing=True, offload_checkpoints=True),
        )


def packed_base(start: PlannedStart) -> Iterator[Cure]:
    """Yield experts in 4 bits, if there are adapters beside them and they are not packed."""
    if start.run.adapter.is_on and start.run.adapter.base != "mxfp4":
        yield Cure(
            words="adapter.base: mxfp4, for a model.path in MXFP4", start=start.with_packed_base()
        )


def small_micro_batches(start: PlannedStart) -> Iterator[Cure]:
    """Yield one row for each forward pass, if there are more."""
    config = start.config()
    if config is None or config.micro_batch_size == 1:
        return
    value = dict(start.json.value)
    value.pop("train_micro_batch_size_per_gpu", None)
    json = Located(start.json.source, value, start.json.lines)
    yield Cure(
        words="train.micro_batch_size: 1",
        start=replace(start, json=json).with_train(micro_batch_size=1),
    )


def expert_parallelism(start: PlannedStart) -> Iterator[Cure]:
    """Yield larger expert-parallel sizes."""
    config = start.config()
    before = 1 if config is None else config.ep_size
    block = start.json.value.get("expert_parallel", {})
    for size in range(before + 1, start.launch.world_size + 1):
        if start.launch.world_size % size or start.model.num_local_experts % size:
            continue
        changed = {**block, "enabled": True, "autoep_size": size}
        yield Cure(
            words=f"expert_parallel.autoep_size: {size}",
            start=start.with_json(expert_parallel=changed),
        )


def sequence_parallelism(start: PlannedStart) -> Iterator[Cure]:
    """Yield larger sequence-parallel sizes."""
    config = start.config()
    before = 1 if config is None else config.sp_size
    for size in range(before + 1, start.launch.world_size + 1):
        if start.launch.world_size % size == 0:
            yield Cure(
                words=f"sequence_parallel_size: {size}",
                start=start.with_json(sequence_parallel_size=size),
            )


def shorter_rows(start: PlannedStart) -> Iterator[Cure]:
    """Yield rows of half the length, and so on, with as many tokens in a step."""
    train = start.run.train
    times = 2
    while train.seq_len % times == 0 and train.seq_len // times >= LEAST_SEQ_LEN:
        seq_len = train.seq_len // times
        rows = train.global_batch_size * times
        yield Cure(
            words=f"train.seq_len: {seq_len} and train.global_batch_size: {rows}, mix built again",
            start=start.with_train(seq_len=seq_len, global_batch_size=rows),
        )
        times *= 2


def offloading(start: PlannedStart) -> Iterator[Cure]:
    """Yield optimizer state, then weights too, in host memory."""
    zero = start.json.value["zero_optimization"]
    places = {"device": "cpu", "pin_memory": True}
    block = zero.get("offload_optimizer", {})
    if block.get("gradients") == "device":
        yield Cure(
            words="offload_optimizer.gradients: host",
            start=start.with_zero(offload_optimizer={**block, "gradients": "host"}),
        )
    if "offload_optimizer" not in zero:
        yield Cure(
            words="zero_optimization.offload_optimizer to the CPU",
            start=start.with_zero(offload_optimizer=places),
        )
    if "offload_param" not in zero and zero.get("stage") == 3:
        yield Cure(
            words="zero_optimization.offload_optimizer and offload_param to the CPU",
            start=start.with_zero(**{"offload_optimizer": places, **zero, "offload_param": places}),
        )


KINDS_AT_THIS_SIZE = (
    small_micro_batches,
    full_sharding,
    checkpointing,
    packed_base,
    expert_parallelism,
    sequence_parallelism,
    offloading,
)
"""Changes that need neither more GPUs nor other rows; those that cost least speed come first."""
KINDS = (*KINDS_AT_THIS_SIZE[:-1], more_ranks, shorter_rows, offloading)


def _size(start: PlannedStart) -> float:
    memory = start.memory()
    return float("inf") if memory is None else sum(memory.values())


def _told(change: Cure) -> str:
    """Return a change and what a rank takes after it."""
    start = change.start
    text = _gib(_size(start))
    config = start.config()
    on_host = {} if config is None else host_memory(config, start.model, start.counts)
    if on_host:
        text += f", and {_gib(sum(on_host.values()))} of host memory"
    return f"{change.words} ({text})"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"

"""The search over all valid layouts of a model on a number of GPUs for the fastest that fits.

A layout is sequence- and expert-parallel size, ZeRO stage, micro batch size, activation
checkpointing, and what is offloaded where. If no layout fits with the moments as the run YAML has
them, they are tried in fewer bytes; if none fits then, state goes to NVMe, which is slow.

The rules of divisibility are those of `cpt.config.resolve`, which has the last word on the winner.
ZeRO 1 is left out: in bf16 it cannot accumulate gradients in fp32 here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers import GptOssConfig

from cpt.config import LaunchInfo, RunConfig, RunYaml, resolve
from cpt.config.block_parts import block_problems
from cpt.config.exchange_problems import halo_problem, head_groups_problem, overlap_problem
from cpt.errors import ConfigError
from cpt.planning.estimate import Estimate, estimate, estimate_if_it_fits
from cpt.planning.hardware import Assumptions, Gpu
from cpt.planning.memory import ParameterCounts
from cpt.storage.state_bytes import MomentForm
from data_pipeline.config.strict_yaml import Located

ZERO_STAGES = (3, 2)
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
OPTIMIZER = ("offload_optimizer",)
OPTIMIZER_AND_WEIGHTS = ("offload_optimizer", "offload_param")


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where state is that is not on the device."""

    offloads: tuple[str, ...] = ()
    """Keys of the blocks of the DeepSpeed JSON."""
    gradients: str = "host"
    """Where gradients add up while the optimizer state is offloaded."""
    on_nvme: tuple[str, ...] = ()
    """Those of `offloads` whose state is in files."""

    def blocks(self) -> dict[str, Any]:
        """Return the blocks of the DeepSpeed JSON."""
        blocks: dict[str, Any] = {}
        for name in self.offloads:
            blocks[name] = {"device": "cpu", "pin_memory": True}
            if name in self.on_nvme:
                blocks[name] = {"device": "nvme", "nvme_path": NVME_PATH}
        if self.offloads and self.gradients != "host":
            blocks["offload_optimizer"]["gradients"] = self.gradients
        return blocks


NVME_PATH = "runs/nvme"
"""The folder for state on NVMe in a layout found, to be replaced by one on a disk of each node."""
IN_MEMORY = (
    Places(),
    Places(offloads=OPTIMIZER),
    Places(offloads=OPTIMIZER, gradients="device"),
    Places(offloads=OPTIMIZER_AND_WEIGHTS),
    Places(offloads=OPTIMIZER_AND_WEIGHTS, gradients="device"),
)
ON_NVME = (
    Places(offloads=OPTIMIZER, gradients="device", on_nvme=OPTIMIZER),
    Places(offloads=OPTIMIZER, on_nvme=OPTIMIZER),
    Places(offloads=OPTIMIZER_AND_WEIGHTS, gradients="device", on_nvme=OPTIMIZER),
    Places(offloads=OPTIMIZER_AND_WEIGHTS, on_nvme=OPTIMIZER),
    Places(offloads=OPTIMIZER_AND_WEIGHTS, on_nvme=OPTIMIZER_AND_WEIGHTS),
)
FORMS: tuple[MomentForm, ...] = ("fp32", "bf16", "int8")
"""Forms of Adam's moments; each takes fewer bytes than the one before."""
CHECKPOINTING = ((False, False), (True, False), (True, True))
"""Pairs of (activation_checkpointing, offload_checkpoints)."""
SIMPLER_UNTIL = 1.02
"""A layout must be this much faster than a simpler one to be worth it: the estimate is no finer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way to lay out a model and a batch over ranks."""

    sp_size: int
    ep_size: int
    stage: int
    micro_batch_size: int
    activation_checkpointing: bool
    offload_checkpoints: bool
    places: Places = IN_MEMORY[0]
    optimizer_state: MomentForm | None = None
    """The form of Adam's moments; None for that of the run YAML."""

    def json(self) -> dict[str, Any]:
        """Return the DeepSpeed JSON that asks for this layout."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
        }
        if self.stage == 3:
            zero |= {
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
            }
        zero |= {"reduce_bucket_size": "auto"}
        zero |= self.places.blocks()
        return {
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": zero,
            "sequence_parallel_size": self.sp_size,
            "expert_parallel": {
                "enabled": True,
                "autoep_size": self.ep_size,
                "preset_model": "gpt_oss",
            },
        }

    def run_yaml(self, run: RunYaml) -> RunYaml:
        """Return the run YAML with the keys that this layout sets."""
        return replace(
            run,
            model=replace(
                run.model,
                activation_checkpointing=self.activation_checkpointing,
                offload_checkpoints=self.offload_checkpoints,
            ),
            train=replace(
                run.train,
                micro_batch_size=self.micro_batch_size,
                optimizer_state=self.optimizer_state or run.train.optimizer_state,
            ),
        )

    def simplicity(self) -> tuple[int, ...]:
        """Return a rank; smaller is simpler: nothing offloaded, shared, or computed twice."""
        return (
            len(self.places.offloads) + len(self.places.on_nvme),
            int(self.offload_checkpoints),
            self.sp_size,
            int(self.activation_checkpointing),
        )


def layouts(
    run: RunYaml,
    model: GptOssConfig,
    world_size: int,
    places: tuple[Places, ...] = IN_MEMORY,
) -> Iterator[Layout]:
    """Yield every layout whose sizes divide what they must divide.

    Args:
        run: The run YAML.
        model: The model.
        world_size: Number of ranks.
        places: The choices of where state is.
    """
    choices = itertools.product(
        _sp_sizes(run, model, world_size),
        _ep_sizes(run, model, world_size),
        _stages(run, model, world_size),
        MICRO_BATCH_SIZES,
        CHECKPOINTING,
        places,
    )
    for sp_size, ep_size, stage, micro_batch_size, checkpointing, place in choices:
        rows_at_a_time = micro_batch_size * world_size // sp_size
        if run.train.global_batch_size % rows_at_a_time:
            continue
        if stage != 3 and ("offload_param" in place.offloads or place.on_nvme):
            continue
        activation_checkpointing, offload_checkpoints = checkpointing
        yield Layout(
            sp_size=sp_size,
            ep_size=ep_size,
            stage=stage,
            micro_batch_size=micro_batch_size,
            activation_checkpointing=activation_checkpointing,
            offload_checkpoints=offload_checkpoints,
            places=place,
        )


def _stages(run: RunYaml, model: GptOssConfig, world_size: int) -> list[int]:
    """Return the ZeRO stages that cut no block of the weights that a run rounds."""
    stages = []
    for stage in ZERO_STAGES:
        if not block_problems(run.train.quantize, model, zero_stage=stage, world_size=world_size):
            stages.append(stage)
    return stages


def _sp_sizes(run: RunYaml, model: GptOssConfig, world_size: int) -> list[int]:
    """Return the sequence-parallel sizes that divide ranks, heads and rows as the run cuts them."""
    heads = model.num_attention_heads
    kv_heads = model.num_key_value_heads
    seq_len = run.train.seq_len
    sizes = []
    for size in range(1, min(heads, world_size) + 1):
        if world_size % size or heads % size or seq_len % size:
            continue
        if kv_heads % size and size % kv_heads:
            continue
        groups = head_groups_problem(run.model, model, size)
        halo = halo_problem(run.model, model, size, seq_len)
        if groups is None and halo is None:
            sizes.append(size)
    return sizes


def _ep_sizes(run: RunYaml, model: GptOssConfig, world_size: int) -> list[int]:
    """Return the expert-parallel sizes that divide ranks and experts as the run overlaps them."""
    experts = model.num_local_experts
    sizes = []
    for size in range(1, min(experts, world_size) + 1):
        divides_both = world_size % size == experts % size == 0
        if divides_both and overlap_problem(run.model, model, size) is None:
            sizes.append(size)
    return sizes


def as_config(layout: Layout, run: RunYaml, model: GptOssConfig, world_size: int) -> RunConfig:
    """Resolve a layout as a start of training would, without reading any file.

    Raises:
        ConfigError: the layout does not fit the run or the model.
    """
    info = LaunchInfo(world_size=world_size, local_world_size=world_size)
    return resolve(
        layout.run_yaml(run), Located("the layout found", layout.json(), {}), model, info
    )


def search(
    run: RunYaml,
    model: GptOssConfig,
    counts: ParameterCounts,
    world_size: int,
    gpu: Gpu,
    assumed: Assumptions,
) -> tuple[Layout, Estimate] | None:
    """Return the simplest of the layouts that fit and come within SIMPLER_UNTIL of the fastest.

    Returns:
        The layout and its estimate; None if no layout fits.
    """
    for places, form in _attempts(run, gpu):
        in_form = replace(run, train=replace(run.train, optimizer_state=form))
        found = layouts(in_form, model, world_size, places)
        try:
            fitting = _fitting(found, in_form, model, counts, world_size, gpu, assumed)
        except ConfigError:
            if form == run.train.optimizer_state:
                raise
            continue  # the run cannot have its moments in that form
        if fitting:
            layout = _simplest_fast(fitting)
            if form != run.train.optimizer_state:
                layout = replace(layout, optimizer_state=form)
            config = as_config(layout, run, model, world_size)
            return layout, estimate(config, model, counts, gpu, assumed)
    return None


def _attempts(run: RunYaml, gpu: Gpu) -> Iterator[tuple[tuple[Places, ...], MomentForm]]:
    """Yield (places of state, form of the moments), from what costs least to what costs most."""
    own = run.train.optimizer_state
    forms = [own]
    # a start refuses Muon with another form
    if not run.adapter.is_on and run.train.optimizer == "adamw":
        forms = list(FORMS[FORMS.index(own) :])
    for form in forms:
        yield IN_MEMORY, form
    if gpu.nvme_bytes:
        yield ON_NVME, own


def _fitting(
    found: Iterator[Layout],
    run: RunYaml,
    model: GptOssConfig,
    counts: ParameterCounts,
    world_size: int,
    gpu: Gpu,
    assumed: Assumptions,
) -> list[tuple[Layout, Estimate]]:
    """Return the layouts that fit, with their estimates."""
    fitting = []
    template: dict[tuple[Any, ...], RunConfig] = {}
    too_large: set[Layout] = set()
    for layout in found:
        # Fewer rows at a time, which come first, never need more memory. Under ZeRO 2 they may:
        # gradients are there at the loss if they add up.
        of_any_rows = replace(layout, micro_batch_size=0)
        if of_any_rows in too_large:
            continue
        config = _quick_config(layout, run, model, world_size, template)
        one = estimate_if_it_fits(config, model, counts, gpu, assumed)
        if one is not None:
            fitting.append((layout, one))
        elif layout.stage == 3:
            too_large.add(of_any_rows)
    return fitting


def _simplest_fast(fitting: list[tuple[Layout, Estimate]]) -> Layout:
    """Return the simplest layout that is about as fast as the fastest; of equals, the faster."""
    best = max(found.tokens_per_gpu_second for _, found in fitting)
    ranked = []
    for layout, found in fitting:
        speed = found.tokens_per_gpu_second
        if speed * SIMPLER_UNTIL >= best:
            ranked.append((layout.simplicity(), -speed, layout))
    _, _, simplest = min(ranked, key=lambda entry: entry[:2])
    return simplest


def _quick_config(
    layout: Layout,
    run: RunYaml,
    model: GptOssConfig,
    world_size: int,
    template: dict[tuple[Any, ...], RunConfig],
) -> RunConfig:
    """Return what `as_config` gives; layouts that differ in sizes alone are resolved once."""
    key = (
        layout.stage,
        layout.activation_checkpointing,
        layout.offload_checkpoints,
        layout.places,
        layout.sp_size,
    )
    if key not in template:
        template[key] = as_config(layout, run, model, world_size)
    passes = run.train.global_batch_size * layout.sp_size // (layout.micro_batch_size * world_size)
    return replace(
        template[key],
        ep_size=layout.ep_size,
        micro_batch_size=layout.micro_batch_size,
        gradient_accumulation_steps=passes,
    )

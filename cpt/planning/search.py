"""All valid layouts of a model on a number of GPUs, and the fastest one that fits.

A layout is sequence- and expert-parallel size, ZeRO stage, micro batch size, activation
checkpointing and offloading. The rules of divisibility are those of `cpt.config.resolve`, which has
the last word on the winner.  ZeRO 1 is left out: in bf16 it cannot accumulate gradients in fp32
here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from transformers import GptOssConfig

from cpt.config import LaunchInfo, RunConfig, RunYaml, resolve
from cpt.planning.estimate import Estimate, estimate
from cpt.planning.hardware import Assumptions, Gpu
from cpt.planning.memory import ParameterCounts
from data_pipeline.config.strict_yaml import Located

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
OFFLOADS: tuple[tuple[str, ...], ...] = (
    (),
    ("offload_optimizer",),
    ("offload_optimizer", "offload_param"),
)
CHECKPOINTING = ((False, False), (True, False), (True, True))
"""(activation_checkpointing, offload_checkpoints)"""
SIMPLER_UNTIL = 1.02
"""A layout must be this much faster than a simpler one to be worth it: the estimate is no finer."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One point of the search."""

    sp_size: int
    ep_size: int
    stage: int
    micro_batch_size: int
    activation_checkpointing: bool
    offload_checkpoints: bool
    offloads: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        """The DeepSpeed JSON that asks for it."""
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
        zero |= {name: {"device": "cpu", "pin_memory": True} for name in self.offloads}
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
        """The run YAML with this layout's part of it."""
        return dataclasses.replace(
            run,
            model=dataclasses.replace(
                run.model,
                activation_checkpointing=self.activation_checkpointing,
                offload_checkpoints=self.offload_checkpoints,
            ),
            train=dataclasses.replace(run.train, micro_batch_size=self.micro_batch_size),
        )

    def simplicity(self) -> tuple[int, ...]:
        """Smaller is simpler: nothing offloaded, nothing shared, nothing computed twice."""
        return (
            len(self.offloads),
            int(self.offload_checkpoints),
            self.sp_size,
            int(self.activation_checkpointing),
        )


def layouts(run: RunYaml, model: GptOssConfig, world_size: int) -> Iterator[Layout]:
    """Everything that divides."""
    train, heads, kv_heads = run.train, model.num_attention_heads, model.num_key_value_heads
    sp_sizes = [
        n
        for n in range(1, min(heads, world_size) + 1)
        if world_size % n == 0
        and heads % n == 0
        and (kv_heads % n == 0 or n % kv_heads == 0)
        and train.seq_len % n == 0
    ]
    experts = model.num_local_experts
    ep_sizes = [
        n
        for n in range(1, min(experts, world_size) + 1)
        if world_size % n == 0 and experts % n == 0
    ]
    for sp, ep, stage, micro, (checkpointing, out), offloads in itertools.product(
        sp_sizes, ep_sizes, (3, 2), MICRO_BATCH_SIZES, CHECKPOINTING, OFFLOADS
    ):
        if train.global_batch_size % (micro * world_size // sp) == 0 and (
            stage == 3 or "offload_param" not in offloads
        ):
            yield Layout(
                sp_size=sp,
                ep_size=ep,
                stage=stage,
                micro_batch_size=micro,
                activation_checkpointing=checkpointing,
                offload_checkpoints=out,
                offloads=offloads,
            )


def as_config(layout: Layout, run: RunYaml, model: GptOssConfig, world_size: int) -> RunConfig:
    """The layout resolved as a start of training would, without reading any file.

    Raises:
        ConfigError: what does not fit together.
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
    """The fastest layout that fits, the simplest among those within SIMPLER_UNTIL of it; None if
    none fits.
    """
    fitting = []
    template: dict[tuple[Any, ...], RunConfig] = {}
    for layout in layouts(run, model, world_size):
        config = _quick_config(layout, run, model, world_size, template)
        found = estimate(config, model, counts, gpu, assumed)
        if found.fits:
            fitting.append((layout, found))
    if not fitting:
        return None
    best = max(found.tokens_per_gpu_second for _, found in fitting)
    near = [pair for pair in fitting if pair[1].tokens_per_gpu_second * SIMPLER_UNTIL >= best]
    layout, _ = min(near, key=lambda pair: (*pair[0].simplicity(), -pair[1].tokens_per_gpu_second))
    return layout, estimate(as_config(layout, run, model, world_size), model, counts, gpu, assumed)


def _quick_config(
    layout: Layout,
    run: RunYaml,
    model: GptOssConfig,
    world_size: int,
    template: dict[tuple[Any, ...], RunConfig],
) -> RunConfig:
    """What `as_config` gives; configurations that differ in sizes alone are resolved once."""
    key = (
        layout.stage,
        layout.activation_checkpointing,
        layout.offload_checkpoints,
        layout.offloads,
        layout.sp_size,
    )
    if key not in template:
        template[key] = as_config(layout, run, model, world_size)
    passes = run.train.global_batch_size * layout.sp_size // (layout.micro_batch_size * world_size)
    return dataclasses.replace(
        template[key],
        ep_size=layout.ep_size,
        micro_batch_size=layout.micro_batch_size,
        gradient_accumulation_steps=passes,
    )

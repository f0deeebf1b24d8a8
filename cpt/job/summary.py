"""Tables for people about what a start is going to do."""

from __future__ import annotations

import contextlib
import shutil
from typing import Any

from transformers import GptOssConfig

from cpt.checkpoint.lineage import lineage_of_run, lineage_text
from cpt.config import RunConfig
from cpt.errors import CptError
from cpt.job.passed_gate import PassedGate
from cpt.job.run_dir import existing_folder
from cpt.model.adapters.layout import adapter_summary
from cpt.model.freezing import frozen_names
from cpt.model.parameters import parameter_numels
from cpt.planning.fit import fitting_gpus
from cpt.planning.host_memory import memory_tables
from cpt.planning.low_precision import products_text, rounding_text
from cpt.planning.memory import GIB, counts_of, device_memory
from data_pipeline.build.found_builds import input_bytes


def describe(passed: PassedGate) -> str:
    """Return the resolved configuration as a table."""
    config, model = passed.config, passed.model_config
    rows_per_step, seq_len = config.train.global_batch_size, config.train.seq_len
    accumulation = config.gradient_accumulation_steps
    rows: dict[str, Any] = {
        "model": describe_model(config),
        "architecture": (
            f"{model.num_hidden_layers} layers, {model.num_local_experts} experts, "
            f"{model.num_attention_heads}/{model.num_key_value_heads} heads"
        ),
        "world size": config.world_size,
        "sequence parallel": describe_sequence_parallel(config),
        "expert parallel": config.ep_size,
        "data parallel": config.world_size // config.sp_size,
        "ZeRO stage": config.zero_stage,
        "dtype": config.train.dtype,
        "optimizer": describe_optimizer(config, model),
        "adapter": adapter_summary(config.adapter, model),
        "rounded after a step": rounding_text(config, counts_of(config, model).expert_matrices),
        "8-bit products": products_text(config, model),
        "frozen": describe_frozen(config, model),
        "guard compares with": describe_untouched(config),
        "tokens per step": f"{rows_per_step} rows x {seq_len} = {rows_per_step * seq_len} slots",
        "accumulation": f"{accumulation} x micro batch {config.micro_batch_size}",
        "steps": config.train.total_steps,
        "mix": config.data.mix,
        "run directory": passed.run_dir,
        "resumes from": describe_resume(passed),
        "checkpoints": describe_room(passed),
    }
    width = max(len(name) for name in rows)
    lines = ["resolved configuration"]
    for name, value in rows.items():
        lines.append(f"  {name:<{width}}  {value}")
    return "\n".join(lines)


def describe_model(config: RunConfig) -> str:
    """Return what the run starts from; of a run or an export, also where that came from."""
    path = config.model.path
    if path is None:
        return str(config.model.init)
    lineage: list[dict[str, Any]] = []
    with contextlib.suppress(CptError):  # the gate refuses what cannot be read
        lineage = lineage_of_run(config)
    if len(lineage) < 2:
        return str(path)
    return f"{path}: {lineage_text(lineage)}"


def describe_untouched(config: RunConfig) -> str:
    """Return the model that the guard compares with."""
    if not config.guard.enabled:
        return "nothing: guard.enabled is false"
    return str(config.guard.baseline_model or "the model that the run starts from")


def describe_sequence_parallel(config: RunConfig) -> str:
    """Return the sequence-parallel size and how window layers exchange."""
    if config.sp_size == 1:
        return "1"
    exchange = "halo" if config.use_halo else "all-to-all"
    return f"{config.sp_size}, window layers by {exchange}"


def describe_resume(passed: PassedGate) -> str:
    """Return the checkpoint that the run goes on from, before its files are hashed."""
    checkpoint = passed.checkpoint
    if checkpoint is None:
        return "nothing"
    text = f"step {checkpoint.step}"
    for reason in checkpoint.rejected:
        text += f" (passed over: {reason})"
    return text


def describe_room(passed: PassedGate) -> str:
    """Return the space that the run takes at one time, and what is free."""
    if passed.room is None:
        return "not known"
    free = shutil.disk_usage(existing_folder(passed.run_dir)).free
    return passed.room.describe(free)


def describe_frozen(config: RunConfig, model_config: GptOssConfig) -> str:
    """Return the share of the model that training leaves as it is."""
    if config.adapter.is_on:
        return "everything below the adapter"
    numels = parameter_numels(model_config)
    frozen = sum(numels[name] for name in frozen_names(config.train.freeze, numels))
    if not frozen:
        return "nothing"
    return f"{', '.join(config.train.freeze)}: {frozen:,} of {sum(numels.values()):,} parameters"


def describe_optimizer(config: RunConfig, model_config: GptOssConfig) -> str:
    """Return what updates the weights, and how much of them."""
    counts = counts_of(config, model_config)
    if not counts.by_muon:
        form = config.train.optimizer_state
        return "AdamW" if form == "fp32" else f"AdamW, moments in {form}"
    trained = counts.trained_dense + counts.trained_experts
    return f"Muon for {counts.by_muon:,} of {trained:,} trained parameters, AdamW for the rest"


def describe_memory(passed: PassedGate) -> str:
    """Return what a rank takes by part, and which GPUs have that much."""
    config, model = passed.config, passed.model_config
    memory = device_memory(config, model, counts_of(config, model))
    if passed.card is None:
        fit = fitting_gpus(memory)
    else:
        fit = f"{passed.card.name} has {passed.card.memory_bytes / GIB:.1f} GiB"
    tables = memory_tables(config, model, passed.environment.local_world_size)
    return f"{tables}\n  {fit}"


def describe_data(passed: PassedGate) -> str:
    """Return the data plan, or that the mix is not built yet."""
    if passed.plan is not None:
        return passed.plan.describe()
    size = input_bytes(passed.mix) / 1e6
    return f"data\n  {passed.config.data.mix} is not built yet ({size:.1f} MB of input)."

"""Everything this project relies on inside DeepSpeed, in one file, behind a version check.

Decisions
    Expert parallelism uses the engine's AutoEP support without patching it: the engine recognises an
    `AutoEPMoELayer` by class and reads four marks on its expert parameters.  If either is missing, ZeRO-3 shards
    *different* experts over the whole world as if they were replicas, without an error.
    Sequence parallelism is never told to DeepSpeed: to the engine every rank is a data-parallel rank.
    A ZeRO shard is reported as a contiguous range of the flattened parameter, whatever the stage.
    State on NVMe is host memory to the engine, and that memory is a file (cpt/storage/file_memory.py).  DeepSpeed's own swapper
    holds such state in files of which it reads a group at a time: no save, resume or gradient norm would see it.

Read in deepspeed 0.19.8: runtime/engine.py (`_configure_distributed_model`, `_configure_zero_optimizer`),
runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py, runtime/zero/partition_parameters.py,
runtime/zero/offload_config.py, utils/groups.py, utils/tensor_fragment.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime import zero
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import groups
from torch import nn

from cpt.config.engine_json import OFFLOADS
from cpt.errors import ConfigError, InternalError
from cpt.storage.file_memory import FileMemory

TESTED_VERSIONS = ("0.19.8",)
MOMENTS = ("exp_avg", "exp_avg_sq")
HOST_STATE_BYTES = 4 * (1 + len(MOMENTS) + 2)
"""Per trained parameter, fp32: master weight, moments, and the gradient twice: as it adds up and as Adam reads it."""

ExpertLayerBase = AutoEPMoELayer
"""The class by which the engine knows an expert layer; subclasses must not call its constructor."""


def check_version() -> None:
    """Refuse a DeepSpeed whose inside has not been read.

    Raises:
        ConfigError: another version is installed.
    """
    if deepspeed.__version__ not in TESTED_VERSIONS:
        raise ConfigError(
            f"deepspeed {deepspeed.__version__} is installed; expert parallelism and checkpoints rely on the inside "
            f"of {', '.join(TESTED_VERSIONS)}. Install that version (constraints.txt), or run the tests under "
            "tests/dist with yours and add it to TESTED_VERSIONS in cpt/deepspeed_adapter/internals.py."
        )


def init_distributed(device: torch.device) -> None:
    """Join the process group that the launcher prepared.

    On CPU, DeepSpeed would compile a shared-memory all-reduce at first use (most of a minute) that leaves its buffers
    in /dev/shm when a rank is killed; it is declared incompatible, so that gloo does the work.
    """
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        raise ConfigError(
            f"port {port} is in use by another process. Give another: deepspeed --master_port N ..."
        ) from error


def expert_group_name(ep_size: int) -> str:
    """The name under which DeepSpeed files the expert groups of this size."""
    return f"ep_size_{ep_size}"


def create_expert_groups(ep_size: int) -> dist.ProcessGroup:
    """Create (once) the expert-parallel and expert-data-parallel groups; every rank must call this.

    Returns:
        This rank's expert-parallel group: `ep_size` consecutive ranks.
    """
    groups._create_expert_and_data_parallel(expert_parallel_size_=ep_size, mp_size=1, pp_size=1)
    return groups._get_expert_parallel_group(expert_group_name(ep_size))


def mark_expert(parameter: nn.Parameter, ep_size: int) -> None:
    """Tell the engine that a parameter holds this rank's experts, not a replica."""
    parameter.allreduce = False  # type: ignore[attr-defined]
    parameter.group_name = expert_group_name(ep_size)  # type: ignore[attr-defined]
    parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
    parameter.ds_zero_partition_group_name = expert_group_name(ep_size)  # type: ignore[attr-defined]


def allocate(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """The same parameter, uninitialised on a device, with its marks."""
    real = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device), parameter.requires_grad)
    real.__dict__.update(parameter.__dict__)
    return real


class _EmptyInit(zero.Init):  # type: ignore[misc]
    """zero.Init for a model on the meta device whose values come later.

    The base class takes whole tensors and broadcasts them from the first rank; here a parameter is allocated, cut up
    and freed before the next one, nothing is sent, and experts are cut over their own group.
    """

    def _convert_to_zero_parameters(self, param_list: Any) -> None:
        for module in self.module.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                real: Any = allocate(parameter, self.local_device)
                if is_expert(real):
                    name_of_group = real.ds_zero_partition_group_name
                    group = groups._get_expert_data_parallel_group(name_of_group)
                    real.ds_zero_partition_process_group = group
                module.register_parameter(name, real)
                self._convert_to_deepspeed_param(real)
                real.partition()
                if self.remote_device == "cpu" and not self.pin_memory:
                    # the part is a copy of nothing yet: pages that nobody has touched take no memory
                    real.ds_tensor.data = torch.empty_like(real.ds_tensor)


def materialise_partitioned(model: nn.Module, engine_json: dict[str, Any], dtype: torch.dtype) -> None:
    """Give every parameter of a meta model its uninitialised ZeRO-3 part on this rank; call it on all ranks."""
    _EmptyInit(module=model, config_dict_or_path=_on_host(engine_json), dtype=dtype)


def file_bytes(model: nn.Module, engine_json: dict[str, Any]) -> dict[str, int]:
    """Bytes of this rank's state that goes to NVMe, by key of the JSON; the model's parameters are partitioned."""
    parameters: list[Any] = list(model.parameters())
    sizes = {
        "offload_optimizer": sum(HOST_STATE_BYTES * p.ds_tensor.numel() for p in parameters if p.requires_grad),
        "offload_param": sum(p.ds_tensor.nbytes for p in parameters),
    }
    return {name: sizes[name] for name in nvme_paths(engine_json)}


def nvme_paths(engine_json: dict[str, Any]) -> dict[str, Path]:
    """The folders for state on NVMe, by key of the JSON."""
    blocks = {name: engine_json["zero_optimization"].get(name, {}) for name in OFFLOADS}
    return {name: Path(block["nvme_path"]) for name, block in blocks.items() if block.get("device") == "nvme"}


def _on_host(engine_json: dict[str, Any]) -> dict[str, Any]:
    """The JSON for DeepSpeed, to which state on NVMe is state on the host.

    Not page-locked, which is DeepSpeed's default: torch keeps such memory for good, also when files take its place.
    """
    on_host = {name: {"device": "cpu", "pin_memory": False} for name in nvme_paths(engine_json)}
    return {**engine_json, "zero_optimization": {**engine_json["zero_optimization"], **on_host}}


def initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, engine_json: dict[str, Any], files: dict[str, FileMemory]
) -> Any:
    """The engine.

    Args:
        files: The memory of the state that goes to NVMe, of the sizes that `file_bytes` says.
    """
    with _state_in(files):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_on_host(engine_json))
    if "offload_optimizer" in files:
        _place_gradients(engine.optimizer, files["offload_optimizer"])
        create_optimizer_state(engine, files["offload_optimizer"].zeros_like)
    if "offload_param" in files:
        _move_frozen_weights(model, files["offload_param"])
    return engine


@contextmanager
def _state_in(files: dict[str, FileMemory]) -> Iterator[None]:
    """Let an engine that is built meanwhile take weights, masters and their gradients from files.

    They are never in other memory, not even while the engine is built: they might not fit.
    """
    cls, ours = DeepSpeedZeroOptimizer_Stage3, {}

    def create_weights(zero: Any) -> None:
        for group in zero.trainable_param_groups:
            numel = sum(parameter.partition_numel() for parameter in group["params"])
            zero.param_groups_fp16_flat_cpu_memory.append(files["offload_param"].zeros(numel, zero.dtype))

    def create_masters(zero: Any) -> None:
        for half, ids in zip(zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups_flat_id, strict=True):
            master: Any = files["offload_optimizer"].zeros(half.numel(), torch.float32).copy_(half).requires_grad_()
            master.ds_id = f"{ids[0]}_{ids[-1]}"
            zero.fp32_partitioned_groups_flat.append(master)
        zero.subgroup_to_device = dict.fromkeys(range(len(zero.fp32_partitioned_groups_flat)), "cpu")
        for group in zero.optimizer.param_groups:
            group["params"] = []  # DeepSpeed fills them in before a step

    def create_gradients(zero: Any) -> None:
        for master in zero.fp32_partitioned_groups_flat:
            master.grad = files["offload_optimizer"].zeros_like(master)
        zero.device = torch.device("meta")  # where DeepSpeed makes its buffer next, which `_place_gradients` replaces

    if "offload_param" in files:
        ours["_create_param_groups_fp16_flat_cpu_memory"] = create_weights
    if "offload_optimizer" in files:
        ours |= {"_create_fp32_partitions": create_masters, "initialize_optimizer_states": create_gradients}
    theirs = {name: getattr(cls, name) for name in ours}
    try:
        for name, method in ours.items():
            setattr(cls, name, method)
        yield
    finally:
        for name, method in theirs.items():
            setattr(cls, name, method)


def _place_gradients(zero: Any, memory: FileMemory) -> None:
    """The buffer in which gradients add up over the accumulation steps."""
    zero.device = OffloadDeviceEnum.cpu
    zero.grad_partitions_flat_buffer = memory.zeros_like(zero.grad_partitions_flat_buffer)
    views = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    for key, view in views.items():
        views[key] = zero.grad_partitions_flat_buffer.narrow(0, view.storage_offset(), view.numel())


def _move_frozen_weights(model: nn.Module, memory: FileMemory) -> None:
    """This rank's partitions of frozen parameters, which the optimizer does not know."""
    parameters: list[Any] = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    partitions = [parameter.ds_tensor for parameter in parameters]
    for partition, copy in zip(partitions, memory.copies(partitions), strict=True):
        partition.data = copy


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether `mark_expert` was applied."""
    return getattr(parameter, "ds_zero_placement_family", None) == "autoep_expert"


def separate_experts(parameter_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split optimizer groups so that none mixes experts with replicated parameters; empty ones are dropped."""
    return [g for g in split_params_into_different_moe_groups_for_optimizer(parameter_groups) if g["params"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalShard:
    """What this rank holds of one parameter and its optimizer state, as a range of the flattened local tensor."""

    offset: int
    """First element, counted in the flattened tensor that this rank would hold without ZeRO."""
    tensors: dict[str, torch.Tensor]
    """`master`, `exp_avg`, `exp_avg_sq`: 1-D fp32 views without ZeRO padding; writing to them changes the state.  Of a
    frozen parameter `master` alone, in the working dtype: there is no other copy."""


def create_optimizer_state(engine: Any, zeros_like: Callable[[torch.Tensor], torch.Tensor] = torch.zeros_like) -> None:
    """Give every flat partition Adam moments if it has none, as the first optimizer step would.

    DeepSpeed creates the state lazily; a checkpoint is loaded, and step 0 is saved, before that step.
    """
    inner = engine.optimizer.optimizer
    for flat in _flat_partitions(engine):
        if not inner.state.get(flat):
            inner.state[flat] = {
                # a fused optimizer hands the step to its kernel, so it lives where the partition lives
                "step": torch.zeros((), device=flat.device if inner.defaults.get("fused") else "cpu"),
                **{key: zeros_like(flat) for key in MOMENTS},
            }


def _flat_partitions(engine: Any) -> list[torch.Tensor]:
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def state_tensors(engine: Any) -> dict[str, list[torch.Tensor]]:
    """The tensors that the engine keeps between steps on this rank, by part; they may share storages.

    Gradients of ZeRO 1 and 2 are made anew in every step and are not among them.
    """
    zero, inner = engine.optimizer, engine.optimizer.optimizer
    masters = _flat_partitions(engine)
    moments = [inner.state[flat][key] for flat in masters for key in MOMENTS if key in inner.state.get(flat, {})]
    parameters = list(engine.module.parameters())
    if engine.zero_optimization_stage() != 3:
        return {"weights": [p.data for p in parameters], "optimizer": [*masters, *moments]}
    whole = [p.data for p in parameters if p.data.numel() == p.ds_numel]  # small ones are never partitioned
    return {
        "weights": [*(p.ds_tensor.data for p in parameters), *whole],
        "gradients": [zero.grad_partitions_flat_buffer, *(m.grad for m in masters if m.grad is not None)],
        "optimizer": [*masters, *moments],
    }


def set_optimizer_step(engine: Any, step: int) -> None:
    """Set Adam's step count, which decides the bias correction."""
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state["step"]):
            state["step"].fill_(float(step))
        else:
            state["step"] = step


def local_shards(engine: Any) -> dict[str, LocalShard]:
    """Views of everything this rank must save, by parameter name; parameters with an empty range are left out."""
    create_optimizer_state(engine)
    stage = engine.zero_optimization_stage()
    find = _shard_of_stage3 if stage == 3 else _shard_of_stage1_or_2
    shards = {
        name: find(engine, parameter) if parameter.requires_grad else _frozen_shard(stage, parameter)
        for name, parameter in engine.module.named_parameters()
    }
    return {name: shard for name, shard in shards.items() if shard is not None}


def _partition_of_stage3(parameter: Any) -> tuple[int, int]:
    """(first element, elements without padding) of this rank's partition; the padding fills the last ranks."""
    partition_numel = parameter.ds_tensor.ds_numel
    offset = dist.get_rank(group=parameter.ds_process_group) * partition_numel
    return offset, max(0, min(parameter.ds_numel - offset, partition_numel))


def _frozen_shard(stage: int, parameter: Any) -> LocalShard | None:
    """ZeRO-3 cuts frozen parameters as it cuts the others; stages 1 and 2 leave them whole on every rank."""
    if stage != 3:
        return LocalShard(offset=0, tensors={"master": parameter.data.view(-1)})
    offset, real = _partition_of_stage3(parameter)
    if real == 0:
        return None
    return LocalShard(offset=offset, tensors={"master": parameter.ds_tensor.data.view(-1)[:real]})


def _shard_of_stage3(engine: Any, parameter: Any) -> LocalShard | None:
    zero, partition_numel = engine.optimizer, parameter.ds_tensor.ds_numel
    offset, real = _partition_of_stage3(parameter)
    if real == 0:
        return None
    index, start, numel = zero.grad_position[zero.get_param_id(parameter)]
    flat = zero.fp32_partitioned_groups_flat[index]
    assert numel == partition_numel, "ZeRO-3 partition geometry is not the one this file was written for"
    state = zero.optimizer.state[flat]
    sources = {"master": flat, **{key: state[key] for key in MOMENTS}}
    return LocalShard(offset=offset, tensors={key: t.narrow(0, start, real) for key, t in sources.items()})


def _shard_of_stage1_or_2(engine: Any, parameter: Any) -> LocalShard | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    zero, where = engine.optimizer, mapping.hp_fragment_address
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    # not mapping.optim_fragment: it is linked after the first group's first step and lacks the other groups' state
    sources = {"master": flat, **{key: zero.optimizer.state[flat][key] for key in MOMENTS}}
    tensors = {key: source.narrow(0, where.start, where.numel) for key, source in sources.items()}
    return LocalShard(offset=mapping.lp_fragment_address.start, tensors=tensors)


def squared_gradient_norm(engine: Any) -> float:
    """This rank's share of the squared global gradient norm: each gradient element is owned by exactly one rank.

    Valid between `backward` of the last accumulation step, which has reduced and partitioned the gradients, and `step`.
    NaN or infinity anywhere in the share makes it NaN or infinite.
    """
    zero = engine.optimizer
    if (engine.zero_optimization_stage() == 3 and zero.offload_optimizer) or getattr(zero, "cpu_offload", False):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies to the host run on streams of their own
        gradients = [flat.grad for flat in _flat_partitions(engine) if flat.grad is not None]
    else:
        gradients = [gradient for group in zero.averaged_gradients.values() for gradient in group or ()]
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32) for gradient in gradients]
    return float(torch.stack(norms).double().square().sum())


def discard_gradients(engine: Any) -> None:
    """Finish an optimizer step without an update, on all ranks: gradients are dropped, the engine's counters go on.

    DeepSpeed drops gradients by itself if their norm is not finite; here it is told so, whatever they are, because
    the judgement is made before and holds for all ranks.  Neither weights nor Adam's state are touched.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    invalid = torch.full((), -1.0, device=_flat_partitions(engine)[0].device)  # DeepSpeed's word for not finite
    name, replacement = ("_get_norm_groups", [invalid]) if stage == 3 else ("scaled_global_norm", invalid)
    assert callable(getattr(zero, name)), f"ZeRO-{stage} has no {name}: this is not the DeepSpeed that was read"
    setattr(zero, name, lambda *_, **__: replacement)
    try:
        engine.step()
    finally:
        delattr(zero, name)
    if engine.was_step_applied():
        raise InternalError("DeepSpeed applied an update that was to be dropped; the last checkpoint is intact.")


def full_local_numel(parameter: Any) -> int:
    """Elements of the tensor that this rank would hold without ZeRO."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def full_local_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of the tensor that this rank would hold without ZeRO."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def publish_master_weights(engine: Any) -> None:
    """After writing fp32 master shards: bring the working weights that the next forward reads in line."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() != 3:
        for group_index in range(len(zero.bit16_groups)):
            for parameter in zero.bit16_groups[group_index]:
                if parameter._hp_mapping is not None:
                    parameter._hp_mapping.update_lp()
        _gather_updated_partitions(zero)
        return
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
    for parameter in engine.module.parameters():
        shard = _shard_of_stage3(engine, parameter) if parameter.requires_grad else None
        if shard is not None:
            master = shard.tensors["master"]
            parameter.ds_tensor.data.view(-1)[: master.numel()].copy_(master)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _gather_updated_partitions(zero: Any) -> None:
    from deepspeed.runtime.utils import all_gather_dp_groups

    all_gather_dp_groups(
        groups_flat=zero.bit16_groups_flat,
        partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Whole parameters inside the block, to be read only; all ranks must enter together."""
    with zero.GatheredParameters(parameters):
        yield

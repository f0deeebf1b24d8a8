"""The time of one optimizer step by resource, and what it makes of tokens per second.

    compute   operations / (share of the peak), experts as slow as the busiest rank
    exchange  Ulysses and experts: their autograd Functions wait for them, nothing overlaps
    exposed   what is left of ZeRO's traffic and of the copies of offloading: a share `1 - overlap` of the longer
    step      max(compute + exchange + exposed, NVLink, InfiniBand, PCIe, HBM) + update

DeepSpeed fetches weights ahead of use, but not an expert tensor that is larger than its prefetch
bucket, so how much of ZeRO's traffic hides behind compute is an assumption.  The halo hides.  The
update follows the last backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.planning.flops import TokenFlops, flops_per_token
from cpt.planning.hardware import Assumptions, Gpu
from cpt.planning.memory import ParameterCounts, device_memory, host_memory
from cpt.planning.traffic import Wire, traffic

ADAM_BYTES = 30
"""Memory traffic of an Adam update per parameter: weight, gradient and two moments in fp32 read,
three written, and the bf16 weight."""
PASS_BYTES = 12
"""Memory traffic of one micro step per parameter that is computed with: read forward, recomputed
and backward, its gradient written, read for the reduction and added to the fp32 sum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One layout on one kind of GPU."""

    config: RunConfig
    memory: dict[str, int]
    """Device bytes by part."""
    host: dict[str, int]
    """Host bytes by part, of one rank."""
    nvme: dict[str, int]
    """Bytes by part in files on NVMe, of one rank."""
    wire: dict[str, Wire]
    """Bytes that one rank sends in one step, by kind."""
    flops: TokenFlops
    """Operations of one token."""
    seconds: dict[str, float]
    """What each resource needs for one step if nothing else had to be waited for."""
    exchange_seconds: float
    """Time in which compute waits for Ulysses and expert exchanges."""
    exposed_seconds: float
    """Time in which compute waits for ZeRO's traffic or for offloaded state."""
    step_seconds: float
    """Time of one optimizer step."""
    fits: bool
    """Whether device and host memory suffice."""

    @property
    def tokens_per_gpu_second(self) -> float:
        """Input slots per GPU and second."""
        train, world = self.config.train, self.config.world_size
        return train.global_batch_size * train.seq_len / world / self.step_seconds

    @property
    def gpu_hours_per_billion_tokens(self) -> float:
        """Cost."""
        return 1e9 / self.tokens_per_gpu_second / 3600

    @property
    def bottleneck(self) -> str:
        """The resource that needs longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    def mfu(self, gpu: Gpu) -> float:
        """Useful operations over the peak; recomputed ones do not count."""
        return self.tokens_per_gpu_second * self.flops.total / gpu.bf16_flops


def estimate(
    config: RunConfig, model: GptOssConfig, counts: ParameterCounts, gpu: Gpu, assumed: Assumptions
) -> Estimate:
    """Memory, traffic and time of one resolved layout."""
    memory, host = device_memory(config, model, counts), host_memory(config, model, counts)
    wire = traffic(config, model, counts, assumed.ranks_per_node)
    flops = flops_per_token(model, config.train.seq_len)
    tokens = config.train.global_batch_size * config.train.seq_len / config.world_size
    recomputed = 4 / 3 if config.model.activation_checkpointing else 1.0
    operations = (
        tokens * recomputed * (flops.dense + flops.attention + flops.experts * assumed.imbalance)
    )
    compute = operations / (assumed.mfu * gpu.bf16_flops)
    links = _link_seconds(wire, gpu, assumed)
    exchange = links["ulysses"] + links["experts"]
    busy = _busy_seconds(config, counts, wire, host, gpu, assumed)
    exposed = (1 - assumed.overlap) * max(links["ZeRO gather"] + links["ZeRO reduce"], busy["PCIe"])
    update = _update_seconds(config, counts, gpu, assumed)
    seconds = {"compute": compute, **busy, "update": update}
    return Estimate(
        config=config,
        memory=memory,
        host=host,
        nvme=host_memory(config, model, counts, "nvme"),
        wire=wire,
        flops=flops,
        seconds=seconds,
        exchange_seconds=exchange,
        exposed_seconds=exposed,
        step_seconds=max(compute + exchange + exposed, *busy.values()) + update,
        fits=sum(memory.values()) <= assumed.memory_share * gpu.memory_bytes
        and sum(host.values()) <= assumed.host_memory_share * gpu.host_memory_bytes,
    )


def _link_seconds(wire: dict[str, Wire], gpu: Gpu, assumed: Assumptions) -> dict[str, float]:
    """How long each kind takes on the slower of the two links, which work at once."""
    inside = assumed.nvlink_share * gpu.nvlink_bytes_per_second
    between = assumed.network_share * gpu.network_bytes_per_second
    skew = {"experts": assumed.imbalance}  # the busiest rank receives that much more
    return {k: skew.get(k, 1.0) * max(w.intra / inside, w.inter / between) for k, w in wire.items()}


def _busy_seconds(
    config: RunConfig,
    counts: ParameterCounts,
    wire: dict[str, Wire],
    host: dict[str, int],
    gpu: Gpu,
    assumed: Assumptions,
) -> dict[str, float]:
    """How long each link and the memory are at work."""
    micro_steps = config.gradient_accumulation_steps
    held = counts.dense + counts.experts / config.ep_size
    zero = config.engine_json["zero_optimization"]
    itemsize = 2 if config.train.dtype == "bf16" else 4
    owned = (counts.dense + counts.experts) / config.world_size
    copied: float = micro_steps * host.get(
        "layer inputs", 0
    )  # out in the forward, back in the backward: one per direction
    if "offload_param" in zero:
        copied += micro_steps * 2 * itemsize * owned
    if "offload_optimizer" in zero:
        copied += micro_steps * 4 * owned
    return {
        "NVLink": sum(w.intra for w in wire.values())
        / (assumed.nvlink_share * gpu.nvlink_bytes_per_second),
        "InfiniBand": sum(w.inter for w in wire.values())
        / (assumed.network_share * gpu.network_bytes_per_second),
        "PCIe": copied / gpu.pcie_bytes_per_second,
        "HBM": micro_steps * PASS_BYTES * held / (assumed.hbm_share * gpu.hbm_bytes_per_second),
    }


def _update_seconds(
    config: RunConfig, counts: ParameterCounts, gpu: Gpu, assumed: Assumptions
) -> float:
    """Adam is bound by the memory that holds its state."""
    trained = (counts.trained_dense + counts.trained_experts) / config.world_size
    offloaded = "offload_optimizer" in config.engine_json["zero_optimization"]
    rate = gpu.host_bytes_per_second if offloaded else assumed.hbm_share * gpu.hbm_bytes_per_second
    return trained * ADAM_BYTES / rate

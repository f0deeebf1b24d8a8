"""The time of one optimizer step by resource, and the tokens per second that follow from it.

    compute   the sum over the parts of the model (part_times.py), experts as slow as on the
              busiest rank; or operations / (share of the peak), if a share is given
    exchange  Ulysses and experts: their autograd Functions wait for them, nothing overlaps, except
              half of the experts' where `model.expert_overlap` is halves: what travels while the
              other half is computed (counted, not measured)
    exposed   ZeRO's traffic and the copies of offloading as far as compute does not hide them:
              a share `1 - overlap` of the longer of the two; copies to and from memory that is not
              page-locked wholly
    step      max(compute + exchange + exposed, NVLink, InfiniBand, PCIe) + update + NVMe +
              orthogonalizing + rounding

DeepSpeed fetches weights ahead of use, but not an expert tensor that is larger than its prefetch
bucket, so how much of ZeRO's traffic hides behind compute is an assumption.  The halo hides.  The
update follows the last backward; what it is made of on a host is in host_work.py, and how Muon
orthogonalizes matrices, whose parts travel between ranks, in matrix_updates.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.planning.adapter_work import AdapterWork
from cpt.planning.flops import TokenFlops, flops_per_token
from cpt.planning.hardware import Assumptions, Gpu
from cpt.planning.host_memory import host_memory
from cpt.planning.host_work import Copies, copies, nvme_bytes
from cpt.planning.host_work import update_seconds as host_update_seconds
from cpt.planning.low_precision import EightBitWork, rounding_seconds
from cpt.planning.matrix_updates import MUON_BYTES, orthogonalizing_seconds
from cpt.planning.memory import ParameterCounts, device_memory, offloads, trained_per_rank
from cpt.planning.part_times import PRODUCTS, REST, UPDATE_BYTES, Held, micro_step_parts
from cpt.planning.step_work import PASSES, ModelSizes, Share
from cpt.planning.traffic import Wire, traffic
from cpt.planning.trained_weights import TrainedShares


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
    """Time that each resource needs for one step if it never waits for another."""
    parts: dict[str, float]
    """Seconds of computing in one step by part of the model; empty if a share of the peak is given.
    """
    exchange_seconds: float
    """Time in which compute waits for Ulysses and expert exchanges."""
    exposed_seconds: float
    """Time in which compute waits for ZeRO's traffic or for offloaded state."""
    step_seconds: float
    """Time of one optimizer step."""
    fits: bool
    """Whether device and host memory, and the space on NVMe, suffice."""

    @property
    def tokens_per_gpu_second(self) -> float:
        """Input slots per GPU and second."""
        return _tokens_per_rank(self.config) / self.step_seconds

    @property
    def gpu_hours_per_billion_tokens(self) -> float:
        """GPU-hours that a billion input slots cost."""
        return 1e9 / self.tokens_per_gpu_second / 3600

    @property
    def bottleneck(self) -> str:
        """The resource that needs the most time."""
        return max(self.seconds, key=self.seconds.__getitem__)

    def mfu(self, gpu: Gpu) -> float:
        """Return useful operations over the peak; recomputed ones do not count."""
        return self.tokens_per_gpu_second * self.flops.total / gpu.bf16_flops


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBytes:
    """Bytes of a rank by part."""

    device: dict[str, int]
    host: dict[str, int]
    nvme: dict[str, int]

    @classmethod
    def of(cls, config: RunConfig, model: GptOssConfig, counts: ParameterCounts) -> RankBytes:
        """Return what a layout holds."""
        return cls(
            device=device_memory(config, model, counts),
            host=host_memory(config, model, counts),
            nvme=host_memory(config, model, counts, "nvme"),
        )

    def fits(self, gpu: Gpu, assumed: Assumptions) -> bool:
        """Return whether device and the shares of host and disks suffice.

        Disks of which nothing is known suffice.
        """
        return (
            sum(self.device.values()) <= assumed.memory_share * gpu.memory_bytes
            and sum(self.host.values()) <= assumed.host_memory_share * gpu.host_memory_bytes
            and (not gpu.nvme_bytes or sum(self.nvme.values()) <= gpu.nvme_bytes)
        )


def estimate(
    config: RunConfig, model: GptOssConfig, counts: ParameterCounts, gpu: Gpu, assumed: Assumptions
) -> Estimate:
    """Estimate memory, traffic and time of one resolved layout."""
    return _estimate(RankBytes.of(config, model, counts), config, model, counts, gpu, assumed)


def estimate_if_it_fits(
    config: RunConfig, model: GptOssConfig, counts: ParameterCounts, gpu: Gpu, assumed: Assumptions
) -> Estimate | None:
    """Estimate a layout; None if it does not fit, whose time is not worth finding."""
    held = RankBytes.of(config, model, counts)
    if not held.fits(gpu, assumed):
        return None
    return _estimate(held, config, model, counts, gpu, assumed)


def _estimate(
    held: RankBytes,
    config: RunConfig,
    model: GptOssConfig,
    counts: ParameterCounts,
    gpu: Gpu,
    assumed: Assumptions,
) -> Estimate:
    wire = traffic(config, model, counts, assumed.ranks_per_node)
    flops = flops_per_token(model, config.train.seq_len, TrainedShares.of(config, model))
    parts: dict[str, float] = {}
    if assumed.mfu is None:
        parts = _part_seconds(config, model, counts, flops, gpu, assumed)
        compute = sum(parts.values())
    else:
        compute = _seconds_at_peak(config, model, flops, assumed.mfu * gpu.bf16_flops, assumed)
    links = _link_seconds(wire, gpu, assumed)
    # the busiest rank receives that much more
    links["experts"] *= assumed.rank_imbalance(config.ep_size, model.num_local_experts)
    exchange = links["ulysses"] + links["experts"]
    if config.model.expert_overlap == "halves":
        in_experts = compute * flops.experts / flops.total
        if parts:
            in_experts = parts[PRODUCTS] + parts[REST]
        # The first half on its way out and the second one on its way back meet no computing.
        exchange -= min(links["experts"] / 2, in_experts)
    moved = copies(config, counts, held.host)
    busy = _busy_seconds(wire, moved, gpu, assumed)
    zero = links["ZeRO gather"] + links["ZeRO reduce"]
    exposed = (1 - assumed.overlap) * max(zero, busy["PCIe"])
    if not moved.page_locked:
        exposed = max(exposed, busy["PCIe"])
    afterwards = _update_seconds(config, counts, gpu)
    if counts.by_muon:
        orthogonalizing = orthogonalizing_seconds(config, counts, gpu)
        afterwards["orthogonalizing"] = orthogonalizing + links["muon"]
    if config.train.quantize.is_on:
        afterwards["rounding"] = rounding_seconds(config, counts.expert_matrices, gpu)
    return Estimate(
        config=config,
        memory=held.device,
        host=held.host,
        nvme=held.nvme,
        wire=wire,
        flops=flops,
        seconds={"compute": compute, **busy, **afterwards},
        parts=parts,
        exchange_seconds=exchange,
        exposed_seconds=exposed,
        step_seconds=max(compute + exchange + exposed, *busy.values()) + sum(afterwards.values()),
        fits=held.fits(gpu, assumed),
    )


def _tokens_per_rank(config: RunConfig) -> float:
    """Return the input slots of one step for each rank."""
    return config.train.global_batch_size * config.train.seq_len / config.world_size


def _seconds_at_peak(
    config: RunConfig,
    model: GptOssConfig,
    flops: TokenFlops,
    flops_per_second: float,
    assumed: Assumptions,
) -> float:
    """Return the time of all operations at one speed."""
    # activation checkpointing runs the forward, a third of the whole, once more; it is a half where
    # weights have no gradients
    share_of_forward = 1 / 2 if config.adapter.is_on else 1 / 3
    recomputed = 1 + share_of_forward if config.model.activation_checkpointing else 1.0
    imbalance = assumed.rank_imbalance(config.ep_size, model.num_local_experts)
    per_token = flops.dense + flops.attention + flops.experts * imbalance
    return _tokens_per_rank(config) * recomputed * per_token / flops_per_second


def _part_seconds(
    config: RunConfig,
    model: GptOssConfig,
    counts: ParameterCounts,
    flops: TokenFlops,
    gpu: Gpu,
    assumed: Assumptions,
) -> dict[str, float]:
    """Return the time of one step by part."""
    micro_steps = config.gradient_accumulation_steps
    tokens = config.micro_batch_size * config.train.seq_len // config.sp_size
    share = Share(
        tokens=tokens,
        attention_flops=tokens * (flops.attention - flops.window_attention) / 3,
        window_flops=tokens * flops.window_attention / 3,
        ep_size=config.ep_size,
        sp_size=config.sp_size,
        imbalance=assumed.rank_imbalance(config.ep_size, model.num_local_experts),
    )
    passes: tuple[str, ...] = PASSES
    if not config.model.activation_checkpointing:
        passes = ("forward", "backward")
    once = micro_step_parts(
        ModelSizes.of(model),
        share,
        _held(config, counts),
        passes,
        gpu.attainable(),
        TrainedShares.of(config, model),
        AdapterWork.of(config, model, counts.adapted, counts.packed),
        EightBitWork.of(config, model),
    )
    return {part: micro_steps * seconds for part, seconds in once.items()}


def _held(config: RunConfig, counts: ParameterCounts) -> Held:
    """Return the parameters that a rank computes with, gathers and owns."""
    experts = counts.experts / config.ep_size
    gathered = 0.0
    if config.zero_stage == 3 and config.world_size > 1:
        gathered += counts.dense
    if config.zero_stage == 3 and config.world_size > config.ep_size:
        gathered += experts
    trained = counts.trained_dense + counts.trained_experts
    return Held(
        computed_with=counts.trained_dense + counts.trained_experts / config.ep_size,
        gathered=gathered,
        owned=trained / config.world_size,
    )


def _link_seconds(wire: dict[str, Wire], gpu: Gpu, assumed: Assumptions) -> dict[str, float]:
    """Return how long each kind takes on the slower of the two links, which work at once."""
    inside = assumed.nvlink_share * gpu.nvlink_bytes_per_second
    between = assumed.network_share * gpu.network_bytes_per_second
    seconds = {}
    for kind, sent in wire.items():
        seconds[kind] = max(sent.intra / inside, sent.inter / between)
    return seconds


def _busy_seconds(
    wire: dict[str, Wire], moved: Copies, gpu: Gpu, assumed: Assumptions
) -> dict[str, float]:
    """Return how long each link is at work."""
    # what Muon sends travels after the last backward, when the links have nothing else to do
    during = [sent for kind, sent in wire.items() if kind != "muon"]
    intra = sum(sent.intra for sent in during)
    inter = sum(sent.inter for sent in during)
    return {
        "NVLink": intra / (assumed.nvlink_share * gpu.nvlink_bytes_per_second),
        "InfiniBand": inter / (assumed.network_share * gpu.network_bytes_per_second),
        "PCIe": moved.seconds(gpu),
    }


def _update_seconds(config: RunConfig, counts: ParameterCounts, gpu: Gpu) -> dict[str, float]:
    """Return the time of clipping and the update, which the memory that holds the state bounds, and
    that of the disks, whatever lies there.
    """
    if offloads(config, "optimizer"):
        seconds = {"update": host_update_seconds(config, counts, gpu)}
    else:
        moved = UPDATE_BYTES * trained_per_rank(config, counts)
        moved += MUON_BYTES * (counts.by_muon // config.world_size)
        seconds = {"update": moved / gpu.attainable().memory_bytes_per_second}
    on_nvme = nvme_bytes(config, counts)
    if on_nvme:
        seconds["NVMe"] = on_nvme / gpu.nvme_bytes_per_second
    return seconds

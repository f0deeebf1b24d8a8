"""Rates of GPUs, links and hosts from data sheets, and how much of them a plan counts on.

What a GPU attains was measured on one H100 (bench/gpu/acceptance.py; the figures are in
bench/gpu/results); for another GPU it is that, times the ratio of the data sheets. Nothing that
links several GPUs was measured by this project.  Sources: NVIDIA data sheets of H100 SXM, H200 SXM,
HGX B200, GH200, A100 SXM, L40S and RTX 4090 (dense bf16 and FP8 with sums in fp32); 400
Gbit/s InfiniBand per GPU as in DGX H100 and DGX B200, 200 as in DGX A100; collective rates as
published for NCCL and DeepEP on such nodes (bus bandwidth of 350 of 450 GB/s over NVLink, 43 to 47
of 50 GB/s over InfiniBand).  Figures of clusters are those of their operators' pages
(docs/clusters.md has the links).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from cpt.planning.routing import Routing
from data_pipeline.config.strict_yaml import nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class FlashRates:
    """FLOPs per second of attention."""

    forward: float
    backward: float

    def scaled(self, ratio: float) -> FlashRates:
        """Return the rates of a GPU whose products are that much faster."""
        return FlashRates(forward=ratio * self.forward, backward=ratio * self.backward)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attainable:
    """Rates that kernels reach on a GPU."""

    product_flops: float
    """FLOPs per second of a large bf16 product."""
    grouped_flops: float
    """FLOPs per second of a grouped product whose groups have very many rows."""
    grouped_exposed: float
    """Share of the time in which the weights of a grouped product are read that nothing hides."""
    attention_flops: FlashRates
    """Flash attention in full layers, at the heads of gpt-oss."""
    window_flops: FlashRates
    """Flash attention in window layers; only keys inside the window count as FLOPs."""
    memory_bytes_per_second: float
    """Bytes read and written per second by a copy."""
    launch_seconds: float
    """Time in which the host starts a kernel."""
    eight_bit_ratio: float
    """How many times as fast products in 8 bits are; from the data sheet, not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU, its links, and its share of the host."""

    name: str
    """Name as in the data sheet."""
    bf16_flops: float
    """Dense bf16 operations per second."""
    memory_bytes: float
    """Capacity of device memory."""
    hbm_bytes_per_second: float
    """Bandwidth of device memory."""
    nvlink_bytes_per_second: float
    """Rate to GPUs of the node, in one direction."""
    network_bytes_per_second: float = 50e9
    """Rate to other nodes, in one direction: one 400 Gbit/s adapter per GPU."""
    pcie_bytes_per_second: float = 55e9
    """Rate to the host, in one direction: PCIe 5.0 x16 has 63 GB/s."""
    host_memory_bytes: float = 250e9
    """This GPU's share of host memory: 2 TB for eight."""
    host_bytes_per_second: float = 37e9
    """This GPU's share of host memory bandwidth: about 300 GB/s sustained on two sockets, for
    eight.
    """
    host_cores: float = 12.0
    """This GPU's share of the host's cores: 96 for eight."""
    nvme_bytes: float = 0.0
    """This GPU's share of the space on the node's NVMe disks; 0 if nothing is known of them."""
    nvme_bytes_per_second: float = 3e9
    """This GPU's share of what these disks read and write, both together: one disk of PCIe 4.0 x4
    for each two GPUs (6 to 7 GB/s by data sheets).
    """
    ranks_per_node: int = 8
    """GPUs of a usual node."""
    fp8_flops: float | None = None
    """Dense FP8 operations per second with sums in fp32; None if it has no such products."""
    has_grouped_fp8: bool = True
    """Whether torch has grouped products in 8 bits for it, which those of experts are."""

    def attainable(self) -> Attainable:
        """Return what kernels reach: measured on an H100, scaled by the data sheets."""
        eight_bit_ratio = (self.fp8_flops or self.bf16_flops) / self.bf16_flops
        return _attainable(self.bf16_flops, self.hbm_bytes_per_second, eight_bit_ratio)


H100_SHEET_FLOPS = 989e12
H100_SHEET_BYTES = 3.35e12
H100_SHEET_FP8_FLOPS = 1979e12

H100_MEASURED = Attainable(
    product_flops=745e12,
    grouped_flops=715e12,
    grouped_exposed=0.78,
    attention_flops=FlashRates(forward=309e12, backward=250e12),
    window_flops=FlashRates(forward=73e12, backward=49e12),
    memory_bytes_per_second=2.94e12,
    launch_seconds=7.5e-6,
    eight_bit_ratio=H100_SHEET_FP8_FLOPS / H100_SHEET_FLOPS,
)
"""One H100 80GB HBM3 (26 November 2026, torch 2.11.0+cu130).

Memory is a copy of 1 GB, a launch a small operation from Python (2.85 to 2.94 TB/s and 7.3 to 10.9
us in three runs). Products are those of a training step of two layers of gpt-oss-20b, by its
profile: aten::mm and addmm reach 761 TFLOP/s with rows of 4,096 tokens and 735 with 32,768 (a
square product of 8,192 alone: 762); grouped products take 9.37 and 57.2 ms, through which there is
a line; attention (torch's flash attention) is the profile of the long row, where copies of ZeRO
run beside it.
"""


@functools.cache
def _attainable(sheet_flops: float, sheet_bytes: float, eight_bit_ratio: float) -> Attainable:
    products = sheet_flops / H100_SHEET_FLOPS
    memory = sheet_bytes / H100_SHEET_BYTES
    return replace(
        H100_MEASURED,
        product_flops=products * H100_MEASURED.product_flops,
        grouped_flops=products * H100_MEASURED.grouped_flops,
        attention_flops=H100_MEASURED.attention_flops.scaled(products),
        window_flops=H100_MEASURED.window_flops.scaled(products),
        memory_bytes_per_second=memory * H100_MEASURED.memory_bytes_per_second,
        eight_bit_ratio=eight_bit_ratio,
    )


def _gh200(name: str, *, memory_bytes: float, hbm_bytes_per_second: float) -> Gpu:
    """Return a Grace Hopper superchip.

    NVLink-C2C has 450 GB/s to the host in one direction, and the host's LPDDR5X 384 GB/s (with 480
    GB): what copies beside computing attain is assumed to be half, and was not measured.  Four of
    them in a node have 150 GB/s between each two, in one direction.
    """
    return Gpu(
        name=name,
        bf16_flops=990e12,
        memory_bytes=memory_bytes,
        hbm_bytes_per_second=hbm_bytes_per_second,
        nvlink_bytes_per_second=3 * 150e9,
        pcie_bytes_per_second=190e9,
        host_memory_bytes=480e9,
        host_bytes_per_second=190e9,
        host_cores=72,
        ranks_per_node=1,
        fp8_flops=1979e12,
    )


def _without_nvlink(
    name: str,
    *,
    bf16_flops: float,
    fp8_flops: float,
    memory_bytes: float,
    memory_bytes_per_second: float,
) -> Gpu:
    """Return a card whose neighbors are reached over PCIe 4.0 x16, which has 32 GB/s."""
    return Gpu(
        name=name,
        bf16_flops=bf16_flops,
        memory_bytes=memory_bytes,
        hbm_bytes_per_second=memory_bytes_per_second,
        nvlink_bytes_per_second=27e9,
        network_bytes_per_second=12.5e9,
        pcie_bytes_per_second=27e9,
        host_memory_bytes=128e9,
        ranks_per_node=4,
        fp8_flops=fp8_flops,
        has_grouped_fp8=False,
    )


GPUS = {
    "h100": Gpu(
        name="H100 SXM 80 GB",
        bf16_flops=H100_SHEET_FLOPS,
        memory_bytes=80e9,
        hbm_bytes_per_second=H100_SHEET_BYTES,
        nvlink_bytes_per_second=450e9,
        fp8_flops=H100_SHEET_FP8_FLOPS,
    ),
    "h100-94gb": Gpu(
        # 94 GB of HBM2e, with less bandwidth than the 80 GB of HBM3: that of TSUBAME 4.0
        name="H100 SXM 94 GB",
        bf16_flops=H100_SHEET_FLOPS,
        memory_bytes=94e9,
        hbm_bytes_per_second=2.396e12,
        nvlink_bytes_per_second=450e9,
        fp8_flops=H100_SHEET_FP8_FLOPS,
        ranks_per_node=4,
    ),
    "h200": Gpu(
        name="H200 SXM 141 GB",
        bf16_flops=989e12,
        memory_bytes=141e9,
        hbm_bytes_per_second=4.8e12,
        nvlink_bytes_per_second=450e9,
        fp8_flops=H100_SHEET_FP8_FLOPS,
    ),
    "b200": Gpu(
        name="B200 180 GB",
        bf16_flops=2250e12,
        memory_bytes=180e9,
        hbm_bytes_per_second=8.0e12,
        nvlink_bytes_per_second=900e9,
        fp8_flops=4500e12,
    ),
    "a100-80gb": Gpu(
        name="A100 SXM 80 GB",
        bf16_flops=312e12,
        memory_bytes=80e9,
        hbm_bytes_per_second=2.039e12,
        nvlink_bytes_per_second=300e9,
        network_bytes_per_second=25e9,
        pcie_bytes_per_second=27e9,
    ),
    "l40s": _without_nvlink(
        "L40S 48 GB",
        bf16_flops=362e12,
        fp8_flops=733e12,
        memory_bytes=48e9,
        memory_bytes_per_second=864e9,
    ),
    "rtx4090": _without_nvlink(
        "RTX 4090 24 GB",
        bf16_flops=165e12,
        fp8_flops=330e12,
        memory_bytes=24e9,
        memory_bytes_per_second=1.008e12,
    ),
    "gh200-96gb": _gh200("GH200 96 GB", memory_bytes=96e9, hbm_bytes_per_second=4.0e12),
    "gh200-144gb": _gh200("GH200 144 GB", memory_bytes=144e9, hbm_bytes_per_second=4.9e12),
}
"""GPUs by the names of --gpu."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeShape:
    """One node of a cluster, from its operator's pages."""

    name: str
    """Name of the cluster."""
    gpu: str
    """Key of `GPUS`."""
    ranks_per_node: int
    """GPUs of a node."""
    fabric_gbit: float
    """Rate of the node to other nodes in Gbit/s, in one direction: the sum of its adapters."""
    host_memory_bytes: float
    """Memory of the host."""
    host_bytes_per_second: float
    """Rate of that memory; half of what its channels have, as 300 of 614 GB/s in a DGX H100."""

    def in_gpu(self) -> Gpu:
        """Return the node's GPU with its shares of the node."""
        return replace(
            with_fabric(GPUS[self.gpu], self.ranks_per_node, self.fabric_gbit),
            host_memory_bytes=self.host_memory_bytes / self.ranks_per_node,
            host_bytes_per_second=self.host_bytes_per_second / self.ranks_per_node,
        )


CLUSTERS = {
    "abci3": NodeShape(
        name="ABCI 3.0",
        gpu="h200",
        ranks_per_node=8,
        fabric_gbit=8 * 200,
        host_memory_bytes=32 * 64e9,
        host_bytes_per_second=0.5 * 16 * 4400e6 * 8,  # two sockets of 8 channels at 4400 MT/s
    ),
    "tsubame4": NodeShape(
        name="TSUBAME 4.0",
        gpu="h100-94gb",
        ranks_per_node=4,
        fabric_gbit=4 * 200,
        host_memory_bytes=768 * 2**30,
        host_bytes_per_second=0.5 * 24 * 4800e6 * 8,  # two sockets of 12 channels at 4800 MT/s
    ),
    "miyabi": NodeShape(
        name="Miyabi-G",
        gpu="gh200-96gb",
        ranks_per_node=1,
        fabric_gbit=200,
        host_memory_bytes=120e9,
        host_bytes_per_second=0.5 * 512e9,
    ),
}
"""Clusters by the names of --cluster."""


def with_fabric(gpu: Gpu, ranks_per_node: int, fabric_gbit: float) -> Gpu:
    """Return a GPU that shares the adapters of a node with the node's others.

    Args:
        gpu: The GPU.
        ranks_per_node: GPUs of the node.
        fabric_gbit: Rate of the node to other nodes in Gbit/s, in one direction.
    """
    share = fabric_gbit / ranks_per_node * 1e9 / 8
    return replace(gpu, ranks_per_node=ranks_per_node, network_bytes_per_second=share)


def gigabytes(size: float) -> str:
    """Return bytes as memory is sold: GB of 10^9, TB of 10^12 bytes."""
    if size >= 1e12:
        return f"{size / 1e12:.2f} TB"
    if size >= 10e9:
        return f"{size / 1e9:,.0f} GB"
    return f"{size / 1e9:.3g} GB"


def _nvme_lines(gpu: Gpu, ranks: int) -> list[str]:
    """Return what a plan assumes of the disks of a node."""
    space = "not searched (--nvme_gb)"
    if gpu.nvme_bytes:
        space = f"{gigabytes(ranks * gpu.nvme_bytes)} per node (--nvme_gb)"
    return [
        f"NVMe: {space}; state there is read and written at "
        f"{ranks * gpu.nvme_bytes_per_second / 1e9:,.0f} GB/s per node, both together "
        "(--nvme_gb_per_second); what the page cache holds is not counted on"
    ]


ANY_GPU = "any"
"""Name that stands for no GPU in particular: nothing is compared with its memory."""


def gpu_problems(name: str | None) -> list[str]:
    """Return what is wrong with the name of a GPU; None was not given."""
    if name is None or name == ANY_GPU or name in GPUS:
        return []
    return [f"--gpu {name} is not known.{nearest(name, [*GPUS, ANY_GPU])}"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """Assumptions of a plan; they are printed with every plan."""

    mfu: float | None = None
    """Share of the peak that computing reaches, recomputed operations counted as operations; None:
    computed part by part.
    """
    imbalance: float = 1.0
    """Rows of the busiest expert rank over the mean: 1 is balanced routing, natural routing is
    above. Without expert parallelism every rank computes its own rows, and nothing is uneven.
    """
    routing: Routing | None = None
    """The routing of a run, in place of `imbalance`."""
    overlap: float = 0.5
    """Share of ZeRO's and offloading's traffic that hides behind compute."""
    ranks_per_node: int = 8
    """Ranks that NVLink connects."""
    nvlink_share: float = 0.78
    """Share of the NVLink rate that collectives reach."""
    network_share: float = 0.9
    """Share of the network rate that collectives reach."""
    memory_share: float = 0.9
    """Share of device memory that a plan may fill; the rest is for fragmentation, NCCL and library
    workspaces.
    """
    host_memory_share: float = 0.85
    """Share of host memory that offloaded state may fill."""

    def rank_imbalance(self, ep_size: int, num_experts: int) -> float:
        """Return the rows of the busiest rank over the mean."""
        if ep_size == 1:
            return 1.0
        if self.routing is not None:
            return self.routing.rank_imbalance(num_experts // ep_size, num_experts)
        return self.imbalance

    def routing_text(self) -> str:
        """Return how evenly experts are taken to be used."""
        if self.routing is not None:
            return f"routing as in {self.routing.run}"
        if self.imbalance == 1:
            return "balanced routing"
        return f"busiest expert rank {self.imbalance:g} x the mean"

    def computing_text(self) -> str:
        """Return how the time of computing is found."""
        if self.mfu is None:
            return "time of each part from its FLOPs, bytes and launches"
        return f"{self.mfu:.0%} of the bf16 peak while computing"

    def describe(self, gpu: Gpu) -> list[str]:
        """Return the lines printed under a plan."""
        return [
            *self._computing_lines(gpu),
            self._routing_line(),
            *self._node_lines(gpu),
            f"{self.overlap:.0%} of ZeRO's and offloading's traffic hides behind compute (assumed; "
            "--overlap); the halo does, Ulysses and expert exchanges do not (half of the latter "
            "may with model.expert_overlap: halves; not measured)",
            "links between GPUs: data sheets and assumptions; this project measured one H100, "
            "never several",
        ]

    def _node_lines(self, gpu: Gpu) -> list[str]:
        ranks = self.ranks_per_node
        network = self.network_share * gpu.network_bytes_per_second / 1e9
        fabric = ranks * gpu.network_bytes_per_second * 8 / 1e9
        links = f"InfiniBand {network:.3g} GB/s"
        if ranks > 1:
            nvlink = self.nvlink_share * gpu.nvlink_bytes_per_second / 1e9
            links = f"NVLink {nvlink:.0f} GB/s and {links}"
        plural = "s" if ranks > 1 else ""
        return [
            f"{links} per GPU and direction, {ranks} rank{plural} per node with {fabric:,.0f} "
            f"Gbit/s (--ranks_per_node, --fabric_gbit, --cluster); {self.memory_share:.0%} of "
            "device memory may be filled",
            f"host: {gigabytes(ranks * gpu.host_memory_bytes)} per node (--host_gb), of which "
            f"offloaded state may fill {self.host_memory_share:.0%}; "
            f"{ranks * gpu.host_bytes_per_second / 1e9:,.0f} GB/s of memory bandwidth and "
            f"{ranks * gpu.host_cores:,.0f} cores, shared by its ranks; "
            f"{gpu.pcie_bytes_per_second / 1e9:.0f} GB/s per GPU and direction between them",
            *_nvme_lines(gpu, ranks),
        ]

    def _computing_lines(self, gpu: Gpu) -> list[str]:
        peak = f"{gpu.name}: {gpu.bf16_flops / 1e12:.0f} TFLOP/s dense bf16"
        if self.mfu is not None:
            return [f"{peak}, computing reaches {self.mfu:.0%} of it (--mfu)"]
        rates = gpu.attainable()
        source = "measured on an H100"
        if gpu.bf16_flops != H100_SHEET_FLOPS or gpu.hbm_bytes_per_second != H100_SHEET_BYTES:
            source += ", times the ratio of the data sheets"
        return [
            f"{peak}; attained: products {rates.product_flops / 1e12:.0f} TFLOP/s, memory "
            f"{rates.memory_bytes_per_second / 1e12:.2f} TB/s, a launch in "
            f"{rates.launch_seconds * 1e6:.1f} us ({source})",
            "work of each part: counted on fake tensors (bench/gpu_counts.py), scaled to layouts",
        ]

    def _routing_line(self) -> str:
        if self.routing is not None:
            return f"routing: {self.routing.describe()}"
        routing = self.routing_text().removesuffix(" routing")
        return (
            f"routing: {routing} (assumed; --imbalance, --routing_of); natural routing may be far "
            "from balanced"
        )

"""Rates of GPUs, links and hosts from data sheets, and the share of them that a plan counts on.

Nothing here was measured by this project.  Sources: NVIDIA data sheets of H100 SXM, H200 SXM and
HGX B200 (dense bf16, without sparsity); 400 Gbit/s InfiniBand per GPU as in DGX H100 and DGX B200;
collective rates as published for NCCL and DeepEP on such nodes (bus bandwidth of 350 of 450 GB/s
over NVLink, 43 to 47 of 50 GB/s over InfiniBand).
"""

from __future__ import annotations

from dataclasses import dataclass


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


GPUS = {
    "h100": Gpu(
        name="H100 SXM 80 GB",
        bf16_flops=989e12,
        memory_bytes=80e9,
        hbm_bytes_per_second=3.35e12,
        nvlink_bytes_per_second=450e9,
    ),
    "h200": Gpu(
        name="H200 SXM 141 GB",
        bf16_flops=989e12,
        memory_bytes=141e9,
        hbm_bytes_per_second=4.8e12,
        nvlink_bytes_per_second=450e9,
    ),
    "b200": Gpu(
        name="B200 180 GB",
        bf16_flops=2250e12,
        memory_bytes=180e9,
        hbm_bytes_per_second=8.0e12,
        nvlink_bytes_per_second=900e9,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """Assumptions of a plan; they are printed with every plan."""

    mfu: float = 0.4
    """Share of the peak that computing reaches, recomputed operations counted as operations."""
    imbalance: float = 1.0
    """Rows of the busiest expert rank over the mean: 1 is balanced routing, natural routing is
    above.
    """
    overlap: float = 0.5
    """Share of ZeRO's and offloading's traffic that hides behind compute."""
    ranks_per_node: int = 8
    """Ranks that NVLink connects."""
    nvlink_share: float = 0.78
    """Share of the NVLink rate that collectives reach."""
    network_share: float = 0.9
    """Share of the network rate that collectives reach."""
    hbm_share: float = 0.8
    """Share of the memory bandwidth that is reached."""
    memory_share: float = 0.9
    """Share of device memory that a plan may fill; the rest is for fragmentation, NCCL and library
    workspaces.
    """
    host_memory_share: float = 0.85
    """Share of host memory that offloaded state may fill."""

    def routing_text(self) -> str:
        """Return how evenly experts are taken to be used."""
        if self.imbalance == 1:
            return "balanced routing"
        return f"busiest expert rank {self.imbalance:g} x the mean"

    def describe(self, gpu: Gpu) -> list[str]:
        """Return the lines printed under a plan."""
        routing = self.routing_text().removesuffix(" routing")
        nvlink = self.nvlink_share * gpu.nvlink_bytes_per_second / 1e9
        network = self.network_share * gpu.network_bytes_per_second / 1e9
        return [
            f"{gpu.name}: {gpu.bf16_flops / 1e12:.0f} TFLOP/s dense bf16, computing reaches "
            f"{self.mfu:.0%} of it (assumed; --mfu)",
            f"routing: {routing} (assumed; --imbalance); natural routing may be far from balanced",
            f"NVLink {nvlink:.0f} GB/s and InfiniBand {network:.0f} GB/s per GPU and direction, "
            f"{self.ranks_per_node} ranks per node; {self.memory_share:.0%} of device memory may "
            "be filled",
            f"{self.overlap:.0%} of ZeRO's and offloading's traffic hides behind compute (assumed; "
            "--overlap); the halo does, Ulysses and expert exchanges do not",
            "every rate is a data sheet's or an assumption: nothing of this was measured on a GPU "
            "by this project",
        ]

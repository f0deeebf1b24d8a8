"""What is rehearsed: the shapes whose costs the table holds, and the features of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

LAYERS_IN_TURN = 2
"""A window layer and a full one; every number of layers is a multiple."""
LAYERS_OF_PRESET = {"gpt-oss-20b": 24, "gpt-oss-120b": 36}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is rehearsed, in which shape."""

    name: str
    preset: str
    layers: int
    tokens: int
    """Tokens of a rank in one micro batch."""
    ep_size: int = 1
    sp_size: int = 1
    documents: int = 1
    """Documents of a row."""
    micro_batches: int = 1
    checkpointing: bool = True
    offload: bool = False
    expert_recompute: str = "recompute"
    expert_overlap: str = "none"
    kl_targets: bool = False
    router_watch: bool = False
    """Both penalties, all measurements, and the routers before training."""
    packed_base: bool = False
    """Whether adapters on attention and experts are trained over experts in 4 bits."""
    rounding: bool = False
    """Whether the experts are rounded to MXFP4 after the update."""
    eight_bit: str | None = None
    """What shares a scale in 8-bit products of experts and attention, rows or blocks; None without
    such products."""
    few_labels: bool = False
    """Whether every second token has no label."""
    evaluates: bool = False
    """Whether to score and to sample after the step."""
    fault: str | None = None
    """Name of a planted error."""

    @property
    def world_size(self) -> int:
        """Ranks of the run: as few as the layout needs."""
        return max(self.ep_size, self.sp_size)

    @property
    def seq_len(self) -> int:
        """Tokens of a whole row."""
        return self.tokens * self.sp_size


SHAPES = (
    Scenario(name="20b 4k", preset="gpt-oss-20b", layers=4, tokens=4096),
    Scenario(name="20b 16k", preset="gpt-oss-20b", layers=4, tokens=16_384),
    Scenario(name="20b 32k", preset="gpt-oss-20b", layers=4, tokens=32_768),
    Scenario(
        name="120b 4k, EP 8, SP 4",
        preset="gpt-oss-120b",
        layers=4,
        tokens=4096,
        ep_size=8,
        sp_size=4,
        documents=7,
    ),
)
"""The shapes of the table: 4,096 to 32,768 tokens of a rank."""

SMALL = Scenario(name="small", preset="gpt-oss-20b", layers=2, tokens=256)
"""Few tokens, for what does not depend on their number."""
EIGHT_BIT = replace(SMALL, layers=4)
"""Layers at both ends compute in bf16."""
LAYOUT = replace(SMALL, preset="gpt-oss-120b", ep_size=8, sp_size=4, documents=3)

FEATURES = (
    replace(SMALL, name="evaluation", evaluates=True),
    replace(SMALL, name="no checkpointing", checkpointing=False, micro_batches=2),
    replace(SMALL, name="checkpoints on the host", offload=True),
    replace(SMALL, name="targets", kl_targets=True, documents=7, micro_batches=2),
    replace(SMALL, name="few labels", few_labels=True, micro_batches=2),
    replace(SMALL, name="packed base", packed_base=True, micro_batches=2),
    replace(SMALL, name="rounding", rounding=True),
    replace(EIGHT_BIT, name="8-bit products", eight_bit="rows", micro_batches=2),
    replace(EIGHT_BIT, name="8-bit products in blocks", eight_bit="blocks"),
    replace(SMALL, name="router watch", router_watch=True, micro_batches=2),
    replace(
        LAYOUT,
        name="layout",
        kl_targets=True,
        router_watch=True,
        micro_batches=2,
        evaluates=True,
    ),
    replace(LAYOUT, name="layout, rows kept", expert_recompute="keep", micro_batches=2),
    replace(LAYOUT, name="layout, packed base", packed_base=True),
    replace(LAYOUT, name="layout, rounding", rounding=True),
    replace(LAYOUT, name="layout, 8-bit products", layers=4, eight_bit="rows"),
    replace(LAYOUT, name="layout, experts in halves", expert_overlap="halves", evaluates=True),
)
"""Every feature of a step, for devices and waits."""


def two_layers(shape: Scenario) -> Scenario:
    """Return the same shape with the fewest layers, from which a layer's share follows."""
    return replace(shape, name=f"{shape.name}, two layers", layers=LAYERS_IN_TURN)

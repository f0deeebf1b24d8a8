"""What the layouts are compared on: a small gpt-oss with every detail, and rows with every
difficulty.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from cpt.training.kl_target_format import SIDECAR, Sidecar, TargetsOfSource, target_file
from data_pipeline.dataset import PackedRow

SEQ_LEN, ROWS, STEPS, WINDOW = 128, 8, 6, 32
SETTINGS: dict[str, Any] = {
    "lr": 1e-3,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
}
CLIPPING = 1.0
KL_WEIGHT, KL_TOP_K = 0.7, 5
SOURCES = ("even", "odd")
"""A row's number in its batch says which source it is of."""
PROMPTS = [[5, 17, 300, 42], [7], [*range(100, 140)]]
"""Texts to continue: the first two end inside the first rank's part of a row, the last one crosses
into the second's.
"""
NEW_TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One layout and its options."""

    world_size: int
    sp: int
    ep: int
    stage: int
    dtype: str = "fp32"
    micro_batch_size: int = 1
    checkpointing: bool = False
    offload_checkpoints: bool = False
    exchange: str = "auto"
    expert_recompute: str = "recompute"
    router_penalties: bool = False
    """Whether both router losses are on."""
    kl: bool = False
    """Whether the divergence from the targets of `write_targets` is in the loss."""
    steps: int = STEPS
    resume_from: str = ""
    """Name of the scenario whose checkpoint is loaded first."""
    start: int = 0
    """First step to run."""
    freeze: tuple[str, ...] = ()
    """Patterns of `train.freeze`."""
    saves_first: bool = False
    """Whether there is a checkpoint of the first step, too."""
    omit: tuple[int, ...] = ()
    """Steps that are not run at all."""
    offloads: dict[str, str] = field(default_factory=dict)
    """`optimizer` and `param`: the device that DeepSpeed's block names."""
    sub_group_size: int = 0
    """Parameters that DeepSpeed updates at a time; 0: its default."""
    ds_config: str = ""
    """A shipped file of ds_configs/, whose stage, SP and EP give way to those here."""

    @property
    def name(self) -> str:
        options = (
            f"{self.dtype}-micro{self.micro_batch_size}{'-ckpt' if self.checkpointing else ''}"
        )
        options += "-host" if self.offload_checkpoints else ""
        options += "-omits" if self.omit else ""
        options += f"-from-{self.resume_from}" if self.resume_from else ""
        options += f"-{self.exchange}" if self.exchange != "auto" else ""
        options += f"-{self.expert_recompute}" if self.expert_recompute != "recompute" else ""
        options += "-penalties" if self.router_penalties else ""
        options += "-kl" if self.kl else ""
        options += f"-frozen-{len(self.freeze)}" if self.freeze else ""
        options += "".join(f"-{what}-{device}" for what, device in self.offloads.items())
        options += f"-groups-{self.sub_group_size}" if self.sub_group_size else ""
        options += f"-{Path(self.ds_config).stem}" if self.ds_config else ""
        return f"world{self.world_size}-sp{self.sp}-ep{self.ep}-zero{self.stage}-{options}"

    def dump(self) -> str:
        return json.dumps(asdict(self))


def model_config() -> GptOssConfig:
    """Hidden and expert sizes differ (a transpose would show); 4 kv heads; window smaller than a
    row; YaRN active.
    """
    return GptOssConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        max_position_embeddings=4096,
        pad_token_id=511,
        bos_token_id=510,
        eos_token_id=509,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    )


def reference_model() -> GptOssForCausalLM:
    """fp32, with random biases and sinks: zero ones would hide half of the possible errors.

    Expert 5 of layer 1 is never chosen; sinks reach from -3 to 9.
    """
    torch.manual_seed(0)
    config = model_config()
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.5)
        if "sinks" in name:
            parameter.data = torch.linspace(-3, 9, parameter.numel())
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[5] = -50.0
    return model


def rows_of_step(step: int) -> list[PackedRow]:
    """Packed documents of all lengths; one row of padding only, one short row, one row of a single
    repeated token.
    """
    generator = np.random.default_rng(100 + step)
    rows = []
    for index in range(ROWS):
        cuts = sorted(
            generator.choice(
                np.arange(1, SEQ_LEN), size=int(generator.integers(0, 6)), replace=False
            )
        )
        used = {2: SEQ_LEN // 3, 5: 0}.get(index, SEQ_LEN)
        bounds = [
            0,
            *(int(cut) for cut in cuts if cut < used),
            *([used] if 0 < used < SEQ_LEN else []),
            SEQ_LEN,
        ]
        tokens = generator.integers(0, 500, size=SEQ_LEN)
        if index == 6:
            tokens[:] = (
                7  # every token of the row goes to the same experts: the others are idle on its rank
            )
        labels = generator.integers(0, 500, size=SEQ_LEN)
        labels[used:], tokens[used:] = -100, 511
        positions = np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(bounds)])
        documents = np.arange(sum(1 for start in bounds[:-1] if start < used))
        rows.append(
            PackedRow(
                input_ids=tokens,
                labels=labels,
                position_ids=positions,
                bounds=bounds,
                documents=documents,
            )
        )
    return rows


def even_row_tokens() -> list[int]:
    """Predicted tokens of the rows of the even source, step after step."""
    return [
        int((row.labels >= 0).sum()) for step in range(STEPS) for row in rows_of_step(step)[0::2]
    ]


def targets_of_step(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Made-up ids and log-probabilities of the even rows of a step."""
    generator, targets = torch.Generator().manual_seed(900 + step), []
    for count in even_row_tokens()[step * ROWS // 2 : (step + 1) * ROWS // 2]:
        ids = torch.rand(count, 500, generator=generator).topk(KL_TOP_K).indices
        targets.append((ids, torch.randn(count, KL_TOP_K + 1, generator=generator).log_softmax(1)))
    return targets


def write_targets(folder: Path) -> None:
    """What `cpt kl_targets` would leave of `targets_of_step`."""
    folder.mkdir()
    parts = [part for step in range(STEPS) for part in targets_of_step(step)]
    ids, log_p = (torch.cat([part[index] for part in parts]) for index in (0, 1))
    save_file({"ids": ids.int(), "log_p": log_p}, target_file(folder, SOURCES[0]))
    stored = TargetsOfSource(rows=len(parts), tokens=len(ids), row_hash="", xxh3="")
    sidecar = Sidecar(
        base_model="", computed_in="float32", build="", top_k=KL_TOP_K, sources={SOURCES[0]: stored}
    )
    (folder / SIDECAR).write_text(json.dumps(sidecar.content()))


def parameter_file(folder: Path, scenario: Scenario) -> Path:
    """Where a scenario leaves its losses."""
    return folder / f"{scenario.name}.json"

"""The small gpt-oss and the difficult rows on which layouts are compared."""

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
from cpt.training.sampling import Sampling
from data_pipeline.dataset import PackedRow
from data_pipeline.store.packing import Integers
from data_pipeline.text.tokenizer import encode
from tests.dist.spread_routing import spread_routing

SEQ_LEN = 128
ROWS = 8
STEPS = 3
"""Three updates; test_golden.py holds ten of one process, and five of four."""
WINDOW = 32
EXPERT_SIZE = 48
NUM_LAYERS = 3
"""Window, full, window: both kinds of attention, two layers of a kind, and one that is neither the
first nor the last. Another layer would only take time, that of DeepSpeed between the modules."""
SETTINGS: dict[str, Any] = {
    "lr": 1e-3,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
}
CLIPPING = 1.0
KL_WEIGHT = 0.7
KL_TOP_K = 5
ROUTING_SEED = 9
"""Seed of the experts that each kind of tokens chooses in `reference_model`."""
SOURCES = ("even", "odd")
"""Sources of the rows, by the row's number in its batch."""
PROMPTS = [[5, 17, 300, 42], [7], [*range(100, 140)]]
"""Texts to continue.

The first two end inside the first rank's part of a row; the last one crosses into the second's.
"""
NEW_TOKENS = 12
GREEDY = Sampling(max_new_tokens=20)
SAMPLED = Sampling(max_new_tokens=20, temperature=1.0, top_p=0.98, seed=4)
DECODING_VOCAB_SIZE = 16_384
"""The smallest vocabulary with the tokens of `decoding_prompts`, nearly."""
POISONED = "model.layers.0.mlp.experts.gate_up_proj"
"""The expert matrix that `Scenario.poison` changes."""
STOPS = range(0, DECODING_VOCAB_SIZE, 12)
"""Tokens at which a drawn text ends: texts end at different times."""


def decoding_prompts() -> list[list[int]]:
    """Return prompts shorter and longer than the window, the last two of them Japanese."""
    long = [token * 7 % 500 for token in range(2 * WINDOW + 9)]
    at_the_window = [*range(100, 100 + WINDOW)]
    japanese = "\u65e5\u672c\u306e\u4e2d\u306e\u4e00\u4eba\u3067\u3059\u3002"
    short = encode(japanese).tolist()
    return [
        [5, 17, 300, 42],
        long,
        [7],
        at_the_window,
        long[:20],
        encode(8 * japanese).tolist(),
        short,
    ]


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
    expert_overlap: str = "none"
    expert_size: int = EXPERT_SIZE
    router_penalties: bool = False
    """Whether both router losses are on."""
    kl: bool = False
    """Whether the divergence from the targets of `write_targets` is in the loss."""
    loss_weights: tuple[float, ...] = ()
    """Loss weight of each source; empty for none."""
    masked: bool = False
    """Whether the rows have loss masks; see `mask_labels`."""
    steps: int = STEPS
    resume_from: str = ""
    """Name of the scenario whose checkpoint is loaded first."""
    start: int = 0
    """First step to run."""
    freeze: tuple[str, ...] = ()
    """Patterns of `train.freeze`."""
    saves_first: bool = False
    """Whether the first step is saved, too."""
    omit: tuple[int, ...] = ()
    """Steps that are not run at all."""
    offloads: dict[str, str] = field(default_factory=dict)
    """Device that DeepSpeed's block names, for `optimizer` and `param`."""
    gradients: str = ""
    """Where gradients add up beside offloaded state; empty for the default."""
    clipping: float = CLIPPING
    """`train.gradient_clipping`."""
    sub_group_size: int = 0
    """Parameters that DeepSpeed updates at a time; 0 for its default."""
    ds_config: str = ""
    """A shipped file of ds_configs/, whose stage, SP and EP give way to those here."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """The `adapter` section; its tensors begin as `adapter_value` gives them."""
    quantize: dict[str, Any] = field(default_factory=dict)
    """The `train.quantize` section without `experts`, which is mxfp4 if it is given."""
    poison: str = ""
    """What the first master weight of an expert matrix is set to at the start: nan or inf."""
    persistence_threshold: int = 100
    """Elements up to which ZeRO-3 keeps a parameter whole."""
    products: dict[str, Any] = field(default_factory=dict)
    """The `train.products` section."""
    weight_decay: float = SETTINGS["weight_decay"]
    """`train.weight_decay`."""
    optimizer_state: str = "fp32"
    """`train.optimizer_state`."""
    optimizer: str = "adamw"
    """`train.optimizer`."""

    @property
    def name(self) -> str:
        """Layout and options, as the name of a folder."""
        parts = [f"world{self.world_size}", f"sp{self.sp}", f"ep{self.ep}", f"zero{self.stage}"]
        parts += [self.dtype, f"micro{self.micro_batch_size}"]
        if self.checkpointing:
            parts.append("ckpt")
        if self.offload_checkpoints:
            parts.append("host")
        if self.omit:
            parts.append("omits")
        if self.resume_from:
            parts.append(f"from-{self.resume_from}")
        if self.exchange != "auto":
            parts.append(self.exchange)
        if self.expert_recompute != "recompute":
            parts.append(self.expert_recompute)
        if self.expert_overlap != "none":
            parts.append(self.expert_overlap)
        if self.expert_size != EXPERT_SIZE:
            parts.append(f"experts{self.expert_size}")
        if self.router_penalties:
            parts.append("penalties")
        if self.kl:
            parts.append("kl")
        if self.masked:
            parts.append("masked")
        if self.loss_weights:
            parts.append("weighted")
        if self.freeze:
            parts.append(f"frozen-{len(self.freeze)}")
        for what, device in self.offloads.items():
            parts.append(f"{what}-{device}")
        if self.gradients:
            parts.append(f"gradients-{self.gradients}")
        if self.clipping != CLIPPING:
            parts.append(f"clipped-{self.clipping:g}")
        if self.sub_group_size:
            parts.append(f"groups-{self.sub_group_size}")
        if self.ds_config:
            parts.append(Path(self.ds_config).stem)
        if self.adapter:
            parts += [self.adapter["kind"], *map(str, self.adapter.get("layers", ()))]
            parts += ["shared"] if self.adapter.get("share_experts") else []
            parts += ["packed"] if self.adapter.get("base") == "mxfp4" else []
        for key, value in self.quantize.items():
            parts.append(f"{key}-{value}")
        if self.poison:
            parts.append(self.poison)
        if self.persistence_threshold != 100:
            parts.append(f"whole-{self.persistence_threshold}")
        if self.products:
            parts.append("fp8")
            parts += [key for key, value in self.products.items() if value == "fp8"]
            parts.append(self.products.get("scaling", ""))
        if self.optimizer_state != "fp32":
            parts.append(f"state-{self.optimizer_state}")
        if self.optimizer != "adamw":
            parts.append(self.optimizer)
        return "-".join(parts)

    def dump(self) -> str:
        return json.dumps(asdict(self))


def rows_of_two_passes(world_size: int, sp: int) -> int:
    """Return the rows of a micro batch with which a step has two micro batches.

    Most of the time of a small step of ZeRO-3 is DeepSpeed's work between the modules, which is
    the same for a micro batch of any size.
    """
    return ROWS * sp // (2 * world_size)


def model_config(expert_size: int = EXPERT_SIZE, *, num_layers: int = NUM_LAYERS) -> GptOssConfig:
    """Return a small gpt-oss in which every mistake shows.

    Hidden and expert sizes differ (a transpose would show), there are fewer key/value than query
    heads, the window is smaller than a row, and YaRN is active.
    """
    return GptOssConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=expert_size,
        num_hidden_layers=num_layers,
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


def reference_model(expert_size: int = EXPERT_SIZE) -> GptOssForCausalLM:
    """Return the model in fp32 with random biases and sinks; zeros would hide half of the errors.

    Tokens go to many experts, unevenly (tests/dist/spread_routing.py); sinks reach from -3 to 9.
    """
    torch.manual_seed(0)
    config = model_config(expert_size)
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.5)
        if "sinks" in name:
            parameter.data = torch.linspace(-3, 9, parameter.numel())
    spread_routing(model, seed=ROUTING_SEED)
    return model


def decoding_model(vocab_size: int, num_layers: int) -> GptOssForCausalLM:
    """Return a small fp32 model whose next token depends on all tokens that it sees.

    In `reference_model` the tokens before weigh little: a wrong cache would change losses, but
    hardly a token.
    """
    torch.manual_seed(0)
    config = model_config(num_layers=num_layers)
    config.vocab_size = vocab_size
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(parameter)
        elif "sinks" in name:
            parameter.data = torch.linspace(-3, 3, parameter.numel())
        elif "bias" in name:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    return model.eval()


def rows_of_step(step: int, *, masked: bool = False) -> list[PackedRow]:
    """Return packed documents of all lengths.

    One row is padding only, one is short, and one is a single repeated token.

    Args:
        step: Number of the step.
        masked: Whether the labels have gone through `mask_labels`.
    """
    generator = np.random.default_rng(100 + step)
    rows = []
    for index in range(ROWS):
        num_cuts = int(generator.integers(0, 6))
        cuts = sorted(generator.choice(np.arange(1, SEQ_LEN), size=num_cuts, replace=False))
        used = {2: SEQ_LEN // 3, 5: 0}.get(index, SEQ_LEN)
        bounds = [0]
        for cut in cuts:
            if cut < used:
                bounds.append(int(cut))
        if 0 < used < SEQ_LEN:
            bounds.append(used)
        bounds.append(SEQ_LEN)
        tokens = generator.integers(0, 500, size=SEQ_LEN)
        if index == 6:
            # all tokens of the row go to the same experts: the others are idle on its rank
            tokens[:] = 7
        labels = generator.integers(0, 500, size=SEQ_LEN)
        labels[used:] = -100
        if masked:
            mask_labels(labels, index)
        tokens[used:] = 511
        positions = np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(bounds)])
        documents = np.arange(sum(1 for start in bounds[:-1] if start < used))
        row = PackedRow(
            input_ids=tokens,
            labels=labels,
            position_ids=positions,
            bounds=bounds,
            documents=documents,
        )
        rows.append(row)
    return rows


def mask_labels(labels: Integers, index: int) -> None:
    """Take labels of a row away, as a loss mask does.

    Row 3 keeps none; rows 0 and 1 keep none in one half, so that a rank that shares them has none;
    the others lose stretches.

    Args:
        labels: Labels of the row, [T]; changed in place.
        index: Number of the row in its step.
    """
    generator = np.random.default_rng(700 + index)
    if index == 0:
        labels[: SEQ_LEN // 2] = -100
    elif index == 1:
        labels[SEQ_LEN // 2 :] = -100
    elif index == 3:
        labels[:] = -100
    else:
        labels[np.repeat(generator.random(SEQ_LEN // 8) < 0.6, 8)] = -100


def num_predicted(rows: list[PackedRow]) -> int:
    """Return the number of tokens that rows predict."""
    return sum(int((row.labels >= 0).sum()) for row in rows)


def even_row_tokens(*, masked: bool = False) -> list[int]:
    """Return the predicted tokens of each row of the even source, step after step."""
    counts = []
    for step in range(STEPS):
        counts += [num_predicted([row]) for row in rows_of_step(step, masked=masked)[0::2]]
    return counts


def targets_of_step(step: int, *, masked: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return made-up ids and log-probabilities of the even rows of a step."""
    generator = torch.Generator().manual_seed(900 + step)
    targets = []
    for count in even_row_tokens(masked=masked)[step * ROWS // 2 : (step + 1) * ROWS // 2]:
        ids = torch.rand(count, 500, generator=generator).topk(KL_TOP_K).indices
        log_p = torch.randn(count, KL_TOP_K + 1, generator=generator).log_softmax(1)
        targets.append((ids, log_p))
    return targets


def write_targets(folder: Path, *, masked: bool = False) -> None:
    """Write `targets_of_step` of all steps as `cpt kl_targets` would."""
    folder.mkdir()
    parts = []
    for step in range(STEPS):
        parts += targets_of_step(step, masked=masked)
    ids = torch.cat([part[0] for part in parts])
    log_p = torch.cat([part[1] for part in parts])
    save_file({"ids": ids.int(), "log_p": log_p}, target_file(folder, SOURCES[0]))
    stored = TargetsOfSource(rows=len(parts), tokens=len(ids), row_hash="", xxh3="")
    sidecar = Sidecar(
        base_model="", computed_in="float32", build="", top_k=KL_TOP_K, sources={SOURCES[0]: stored}
    )
    (folder / SIDECAR).write_text(json.dumps(sidecar.content()))


def adapter_value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the first value of an adapter tensor of all ranks.

    B is not zero, as A had no gradient then; magnitudes keep the row norms that they begin with.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator) * 0.05


def parameter_file(folder: Path, scenario: Scenario) -> Path:
    """Return the file in which a scenario leaves its losses."""
    return folder / f"{scenario.name}.json"

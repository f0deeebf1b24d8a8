"""Exports of a random model with shapes and values that show mistakes.

Hidden and expert sizes differ, so that a transposed matrix does not fit.  YaRN is not that of the
released models: a reader that takes its own defaults computes other numbers.  Sequences are longer
than the window and than YaRN's original length.  The weights are large: routers are decided,
activations reach the clamp of the experts, and sinks take a share of the attention.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GptOssConfig

from cpt.checkpoint.adapter_state import AdapterBase, AdapterState
from cpt.checkpoint.manifest import TensorRecord
from cpt.checkpoint.run_state import RunState
from cpt.checkpoint.writer import write_alone
from cpt.config.adapter_section import AdapterSection
from cpt.export.adapter import export_adapter
from cpt.export.huggingface import export_checkpoint
from cpt.model.adapters.layout import adapter_shapes
from cpt.model.parameters import parameter_shapes

ROPE = {
    "rope_type": "yarn",
    "rope_theta": 50_000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 256,
}
# transformers 4.55 takes max_position_embeddings / original_max_position_embeddings for the factor
MAX_POSITIONS = 1024
NUM_TOKENS = 320
FORMATS = ("fp32", "bf16", "mxfp4")
ADAPTER = AdapterSection(kind="lora", rank=16, expert_rank=8, alpha=8.0)
SEED = 7


def config() -> GptOssConfig:
    """Return the configuration: 4 layers, 8 experts, hidden 128, experts of 192."""
    return GptOssConfig(
        vocab_size=201_088,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=3,
        sliding_window=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=ROPE,
        initial_context_length=ROPE["original_max_position_embeddings"],
    )


def write_exports(folder: Path) -> None:
    """Write an export of every format, and an adapter over that in fp32."""
    torch.manual_seed(SEED)
    shapes = parameter_shapes(config())
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"master/{name}"] = _values(name, shape)
    state = RunState(model_config=config().to_dict())
    step = write_alone(folder / "run", 0, tensors, _records(shapes), state.to_json())
    for format_name in FORMATS:
        export_checkpoint(step, folder / format_name, format_name)
    _write_adapter(folder)


def _values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.randn(shape)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * values
    if "gate_up_proj" in name:
        return 0.4 * values  # some of them reach the clamp
    if name.endswith("sinks"):
        return values
    return 0.12 * values


def _write_adapter(folder: Path) -> None:
    shapes = adapter_shapes(ADAPTER, config())
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"master/{name}"] = 0.1 * torch.randn(shape)
    base = AdapterBase.of(folder / "fp32", 0, config())
    adapter = AdapterState(section=ADAPTER, base=base, dtype="fp32")
    state = RunState(model_config=config().to_dict(), adapter=adapter.to_json())
    step = write_alone(folder / "adapter_run", 0, tensors, _records(shapes), state.to_json())
    export_adapter(step, folder / "peft", "fp32")
    export_checkpoint(step, folder / "merged", "fp32", base=folder / "fp32")


def _records(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorRecord]:
    records = {}
    for name, shape in shapes.items():
        records[name] = TensorRecord(shape=shape, dtype="float32", trained=False)
    return records


def tokens() -> torch.Tensor:
    """Return (NUM_TOKENS,) ids of text tokens."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, 199_998, (NUM_TOKENS,), generator=generator)

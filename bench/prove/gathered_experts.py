"""Prove that autograd does not keep the gathered experts of a layer until the backward.

    python bench/prove/gathered_experts.py

ZeRO-3 must be able to free them after the layer's forward.  One process trains without activation
checkpointing on so few tokens that activations do not count.  Between forward and backward, the
resident memory must have grown by less than the experts of two layers (of eight); the script ends
with 1 if it has grown more.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import GptOssConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import measuring  # noqa: E402
from step_parts.cases import OURS, Case, model_config, row  # noqa: E402
from step_parts.ours import build  # noqa: E402

LAYERS = 8
EXPERTS = 32
TOKENS = 64


def main() -> None:
    """Print how much memory the forward left behind."""
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:  # glibc reads it when a process starts
        environment = {**os.environ, **measuring.RETURN_MEMORY}
        os.execve(sys.executable, [sys.executable, __file__], environment)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29611")
    case = Case(
        contender=OURS,
        tokens=TOKENS,
        ranks=1,
        steps=1,
        threads=1,
        experts=EXPERTS,
        layers=LAYERS,
        clock="wall",
    )
    engine, topology = build(case)
    from cpt.training.loader import make_micro_batch

    batch = make_micro_batch([row(case, 0)], [0], topology)
    engine.step([batch], [TOKENS], step=1)
    before = measuring.reset_peak()
    loss = engine.token_losses(batch).sum()
    kept = measuring.reset_peak() - before
    engine.deepspeed.backward(loss / TOKENS, scale_wrt_gas=False)
    layer = expert_bytes(model_config(case))
    mib = layer / 2**20
    print(f"experts of a layer: {mib:.0f} MiB, of all {LAYERS}: {LAYERS * mib:.0f} MiB")
    print(f"resident memory after the forward: {kept / 2**20:+.0f} MiB")
    sys.exit(kept >= 2 * layer)


def expert_bytes(config: GptOssConfig) -> int:
    """Return the bytes of one layer's expert matrices in bf16, without biases."""
    expert_numel = 3 * config.hidden_size * config.intermediate_size
    return config.num_local_experts * expert_numel * torch.bfloat16.itemsize


if __name__ == "__main__":
    main()

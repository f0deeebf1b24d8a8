"""The experts' kernels compile for an H100, without one.

In a process of its own, because here triton is an interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
CAPABILITY = 90
EXPERTS = 32
ROWS = 64
MODEL_SIZE = 2880
EXPERT_SIZE = 2880


def launch_all() -> None:
    """Launch each kernel with bf16 tensors of gpt-oss-20b's sizes."""
    from cpt.model.kernels import triton_empty_experts, triton_expert_output, triton_gated_unit

    def bf16(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    ends = torch.full((EXPERTS,), ROWS, dtype=torch.int32)
    weights = bf16(ROWS)
    products = torch.empty(ROWS)
    gate_up = bf16(ROWS, 2 * EXPERT_SIZE)
    hidden = bf16(ROWS, EXPERT_SIZE)
    bias = bf16(EXPERTS, 2 * EXPERT_SIZE)
    triton_gated_unit.forward(gate_up, bias, ends, 1.702, 7.0, hidden)
    for d_bias in (bf16(EXPERTS, 2 * EXPERT_SIZE), None):
        triton_gated_unit.backward(
            gate_up,
            hidden,
            bias,
            weights,
            ends,
            1.702,
            7.0,
            d_gate_up_R2I=gate_up,
            weighted_RI=hidden,
            products_R=products,
            d_bias_E2I=d_bias,
        )
    out = bf16(ROWS, MODEL_SIZE)
    bias = bf16(EXPERTS, MODEL_SIZE)
    triton_expert_output.forward(out, bias, weights, ends, out)
    for d_weights, d_bias in ((weights, bias), (weights, None), (None, bias)):
        triton_expert_output.backward(
            out, products, bias, weights, ends, d_weights_R=d_weights, d_bias_EM=d_bias
        )
    counts = torch.zeros(EXPERTS, dtype=torch.int64)
    triton_empty_experts.clear(bf16(EXPERTS, 16, 16), counts)


def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) >= 9, result.stdout


if __name__ == "__main__":
    from tests.support.kernel_compilation import compiling_only

    with compiling_only(CAPABILITY) as compiled:
        launch_all()
    print(*compiled)

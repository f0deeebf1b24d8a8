"""Every kernel compiles for an H100, without one: the interpreter runs what the compiler refuses.

In a process of its own, because here triton is an interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpt.model.weights.mxfp4 import EXPONENT_RULES

ROOT = Path(__file__).resolve().parents[3]
CAPABILITY = 90
LAUNCH = re.compile(r"^\s+(_\w+)\[", re.MULTILINE)
"""The name of a kernel where it is launched."""
TOKENS = 16
TOP_K = 4
ROWS = TOKENS * TOP_K
EXPERTS = 32
SIZE = 2880
"""Model size and expert size of gpt-oss-20b."""
BESIDE = 8
"""Columns beside a row that goes to another rank."""
WORDS = 4096
EPS = 1e-5


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def int64(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def launch_experts() -> None:
    from cpt.model.kernels import triton_empty_experts, triton_expert_output, triton_gated_unit

    ends = torch.full((EXPERTS,), ROWS, dtype=torch.int32)
    weights = bf16(ROWS)
    products = torch.empty(ROWS)
    gate_up = bf16(ROWS, 2 * SIZE)
    hidden = bf16(ROWS, SIZE)
    bias = bf16(EXPERTS, 2 * SIZE)
    triton_gated_unit.forward(gate_up, bias, ends, 1.702, 7.0, hidden)
    for d_bias in (bias, None):
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
    out = bf16(ROWS, SIZE)
    bias = bf16(EXPERTS, SIZE)
    triton_expert_output.forward(out, bias, weights, ends, out)
    for d_weights, d_bias in ((weights, bias), (weights, None), (None, bias)):
        triton_expert_output.backward(
            out, products, bias, weights, ends, d_weights_R=d_weights, d_bias_EM=d_bias
        )
    triton_empty_experts.clear(bf16(EXPERTS, 16, 16), int64(EXPERTS))


def launch_rows() -> None:
    from cpt.model.kernels import triton_rows

    places = int64(TOKENS, TOP_K)
    triton_rows.gather(bf16(TOKENS, SIZE), int64(ROWS), bf16(ROWS, SIZE))
    triton_rows.combine(bf16(ROWS, SIZE), places, bf16(TOKENS, SIZE))
    arrived = bf16(ROWS, SIZE + BESIDE)
    triton_rows.combine(arrived[:, :SIZE], places, bf16(TOKENS, SIZE))
    triton_rows.pack(bf16(TOKENS, SIZE), bf16(TOKENS, TOP_K), int64(ROWS), arrived)


def launch_norms() -> None:
    from cpt.model.kernels import triton_rms_norm

    x = bf16(TOKENS, SIZE)
    weight = bf16(SIZE)
    triton_rms_norm.norm(x, weight, EPS, x)
    triton_rms_norm.add_norm(x, x, weight, EPS, x, x)
    for d_stream in (x, None):
        triton_rms_norm.backward(x, d_stream, x, weight, EPS, x, weight)


def launch_rotation() -> None:
    from cpt.model.kernels import triton_rope

    q = bf16(1, 64, TOKENS, 64)
    k = bf16(1, 8, TOKENS, 64)
    dense = bf16(1, TOKENS, 32)
    by_angle = bf16(1, 32, TOKENS).transpose(1, 2)
    for angles in (dense, by_angle):
        for inverse in (False, True):
            triton_rope.rotate(q, k, angles, angles, q, k, inverse=inverse)


def launch_loss_tiles() -> None:
    from cpt.model.kernels import triton_loss_tiles

    logits = bf16(TOKENS, WORDS)
    labels = int64(TOKENS)
    wide = torch.empty(TOKENS)
    triton_loss_tiles.statistics(logits, labels, wide, wide, 0)
    for pull in (wide, None):
        triton_loss_tiles.gradient(logits, labels, wide, wide, pull, 0, out_Nv=logits)


def launch_decoding() -> None:
    from cpt.model.kernels import triton_packed_weights

    blocks = torch.zeros(EXPERTS, SIZE, SIZE // 32, 16, dtype=torch.uint8)
    scales = torch.zeros(EXPERTS, SIZE, SIZE // 32, dtype=torch.uint8)
    triton_packed_weights.decode(blocks, scales, bf16(EXPERTS, SIZE, SIZE))


def launch_rounding() -> None:
    from cpt.model.kernels import triton_block_rounding

    narrow = bf16(EXPERTS, SIZE, SIZE)
    wide = torch.empty(EXPERTS, SIZE, SIZE)
    for rule in EXPONENT_RULES:
        triton_block_rounding.round_values(narrow, rule, narrow)
        triton_block_rounding.round_values(wide, rule, wide)
    triton_block_rounding.round_values(wide, "least", narrow)


def launch_e4m3() -> None:
    from cpt.model.kernels import triton_e4m3

    codes = torch.empty(EXPERTS, SIZE, SIZE, dtype=torch.float8_e4m3fn)
    for num_scales in (1, SIZE // 32):
        scales = torch.empty(EXPERTS, SIZE, num_scales)
        triton_e4m3.encode_rows(bf16(EXPERTS, SIZE), codes[0, :EXPERTS], scales[0, :EXPERTS])
        triton_e4m3.encode_columns(bf16(EXPERTS, SIZE, SIZE), codes, scales)


def launch_all() -> None:
    launch_experts()
    launch_e4m3()
    launch_decoding()
    launch_rounding()
    launch_rows()
    launch_norms()
    launch_rotation()
    launch_loss_tiles()


def test_every_kernel_compiles_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    compiled = set(result.stdout.split())
    launched = set()
    for path in (ROOT / "cpt" / "model" / "kernels").glob("triton_*.py"):
        launched |= set(LAUNCH.findall(path.read_text(encoding="utf-8")))
    assert compiled == launched, f"launch_all leaves out {launched - compiled}"


if __name__ == "__main__":
    from tests.support.kernel_compilation import compiling_only

    with compiling_only(CAPABILITY) as compiled:
        launch_all()
    print(*compiled)

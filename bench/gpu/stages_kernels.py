"""Stages about single kernels: ceilings of the machine, attention and experts beside float64."""

from __future__ import annotations

import copy
import functools
import math
from types import SimpleNamespace
from typing import Any

import torch

from cpt.commands.doctor_report import report
from cpt.model.attention import choice, probe
from cpt.model.attention.machine import Machine
from cpt.model.experts.dispatch import Assignment
from cpt.model.experts.grouped import Groups
from cpt.model.experts.layer import LocalExperts
from cpt.model.experts.packed import PackedMatrices
from cpt.model.kernels.block_rounding import round_blocks, round_by_definition, round_into
from cpt.model.kernels.packed_weights import decode_mxfp4
from cpt.model.weights import mxfp4
from cpt.model.weights.hf_layout import EXPERT_TENSORS
from gpu.stages import Options, Planned, milliseconds, relative_error
from tests.support.mxfp4_blocks import as_matrices, bits, hard_blocks

BF16 = torch.bfloat16


def doctor(options: Options) -> dict[str, Any]:
    """Print what `cpt doctor` says."""
    text, ready = report()
    (options.out / "doctor.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return {"ready": ready}


def ceilings(options: Options) -> dict[str, float]:
    """Measure what the plan of a run is made of: copies, products, launches."""
    numel = options.size(2**29, 2**20)
    source = torch.randn(numel, device=options.device, dtype=BF16)
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source), options)
    size = options.size(8192, 256)
    square = torch.randn(size, size, device=options.device, dtype=BF16)
    product_ms = milliseconds(lambda: square @ square, options)
    small = torch.zeros(16, device=options.device)

    def thousand() -> None:
        for _ in range(1000):
            small.add_(1)

    return {
        "copy_TB_s": 2 * source.nbytes / copy_ms / 1e9,
        "product_TFLOP_s": 2 * size**3 / product_ms / 1e9,
        "us_per_small_op": milliseconds(thousand, options, rounds=3),
    }


def attention_is_right(options: Options) -> dict[str, Any]:
    """Compare every backend that runs here with softmax in float64, at the heads of gpt-oss."""
    found: dict[str, Any] = {}
    heads = {"num_query_heads": options.size(64, 8), "num_kv_heads": options.size(8, 2)}
    machine = Machine.of(options.device)
    for backend in choice.BACKENDS:
        refusal = backend.usable(options.device, BF16, 64, machine)
        if refusal is not None:
            found[backend.name] = f"not here: {refusal}"
            continue
        shape = probe.probe_shape(**heads, head_dim=64, window=128, sp_size=1)
        setting = probe.ProbeSetting(attention=backend.attention, device=options.device, dtype=BF16)
        try:
            answer = probe.measure(setting, shape)
        except Exception as error:
            found[backend.name] = f"FAILED {type(error).__name__}: {error}"[:500]
            continue
        print(f"{backend.name}\n{answer.table()}", flush=True)
        found[backend.name] = {"passed": answer.passed, "largest error": answer.largest_error}
    return found


class ExpertCase:
    """Experts at the shape of gpt-oss with random rows, the last of them without rows."""

    def __init__(self, options: Options, *, experts: int, tokens: int) -> None:
        model_size = options.size(2880, 64)
        expert_size = options.size(2880, 96)

        def normal(*shape: int, std: float) -> torch.Tensor:
            return torch.randn(*shape, device=options.device, dtype=BF16) * std

        source = SimpleNamespace(
            alpha=1.702,
            limit=7.0,
            gate_up_proj=normal(experts, model_size, 2 * expert_size, std=0.02),
            gate_up_proj_bias=normal(experts, 2 * expert_size, std=0.1),
            down_proj=normal(experts, expert_size, model_size, std=0.02),
            down_proj_bias=normal(experts, model_size, std=0.1),
        )
        self.layer = LocalExperts(source, 0, experts)
        chosen = torch.randn(tokens, experts, device=options.device).topk(4).indices
        chosen[chosen == experts - 1] = 0
        assignment = Assignment.of(chosen, experts)
        hidden = normal(tokens, model_size, std=1.0)
        self.rows = assignment.spread(hidden).detach()
        self.weights = torch.rand(tokens * 4, device=options.device).to(BF16)
        self.d_out = torch.randn_like(self.rows)
        self.groups = Groups(assignment.counts_E)

    def solve(self, dtype: torch.dtype, *, grouped: bool) -> dict[str, torch.Tensor]:
        """Return the output and all gradients."""
        layer = self.layer.to(dtype)
        layer.zero_grad()
        rows = self.rows.to(dtype, copy=True).requires_grad_()
        weights = self.weights.to(dtype, copy=True).requires_grad_()
        out = layer(rows, weights, self.groups, grouped=grouped)
        out.backward(self.d_out.to(dtype))
        leaves = {"d_rows": rows, "d_weights": weights}
        for name in EXPERT_TENSORS:
            leaves[name] = getattr(layer, name)
        found = {"out": out.detach()}
        for name, leaf in leaves.items():
            assert leaf.grad is not None, name
            found[name] = leaf.grad
        return found


def experts_are_right(options: Options) -> dict[str, Any]:
    """Compare grouped products, and the loop over experts, with the loop in float64."""
    case = ExpertCase(options, experts=8, tokens=options.size(1024, 64))
    grouped = case.solve(BF16, grouped=True)
    again = case.solve(BF16, grouped=True)
    loop = case.solve(BF16, grouped=False)
    want = case.solve(torch.float64, grouped=False)
    found: dict[str, Any] = {}
    for name, value in want.items():
        found[name] = {
            "grouped": relative_error(grouped[name], value),
            "loop": relative_error(loop[name], value),
            "same bits twice": torch.equal(grouped[name], again[name]),
        }
    empty = case.groups.counts_E == 0
    largest = 0.0
    for name in EXPERT_TENSORS:
        largest = max(largest, float(grouped[name][empty].abs().max()))
    found["gradients of experts without rows"] = largest
    found["what torch._grouped_mm leaves there"] = _left_by_the_kernel(case)
    return found


def _left_by_the_kernel(case: ExpertCase) -> float:
    """Return the largest value that the plain kernel leaves for a group without rows."""
    empty = case.groups.counts_E == 0
    largest = 0.0
    for _ in range(5):
        shape = (empty.numel(), case.rows.shape[1], case.d_out.shape[1])
        poison = torch.full(shape, 7.0, device=case.rows.device, dtype=BF16)
        del poison  # the allocator hands the same memory to the product
        raw = torch._grouped_mm(case.rows.to(BF16).t(), case.d_out, offs=case.groups.ends_E)
        largest = max(largest, float(raw[empty].abs().nan_to_num(9e9).max()))
    return largest


def experts_speed(options: Options) -> dict[str, Any]:
    """Time one layer of 32 experts, beside the products alone."""
    found: dict[str, Any] = {}
    for tokens in (options.size(4096, 64), options.size(16384, 128)):
        case = ExpertCase(options, experts=options.size(32, 4), tokens=tokens)
        rows = case.rows.requires_grad_()
        weights = case.weights.requires_grad_()

        def forward(case: ExpertCase = case, rows: Any = rows, weights: Any = weights) -> Any:
            return case.layer(rows, weights, case.groups)

        def both(case: ExpertCase = case, run: Any = forward) -> None:
            run().backward(case.d_out)

        forward_ms = milliseconds(forward, options)
        both_ms = milliseconds(both, options)
        flops = 2 * rows.shape[0] * rows.shape[1] * 3 * case.layer.down_proj.shape[1]
        found[str(tokens)] = {
            "forward_ms": forward_ms,
            "forward_backward_ms": both_ms,
            "TFLOP_s forward": flops / forward_ms / 1e9,
            "TFLOP_s both": 3 * flops / both_ms / 1e9,
            "product_ms": _products_ms(case, options),
        }
    return found


def _products_ms(case: ExpertCase, options: Options) -> float:
    """Return the time of the two grouped products of a forward alone."""
    sizes = case.rows.shape[0], case.layer.down_proj.shape[1]
    hidden = torch.randn(*sizes, device=options.device, dtype=BF16)

    def products() -> None:
        with torch.no_grad():
            torch._grouped_mm(case.rows, case.layer.gate_up_proj, offs=case.groups.ends_E)
            torch._grouped_mm(hidden, case.layer.down_proj, offs=case.groups.ends_E)

    return milliseconds(products, options)


def mxfp4_decodes_alike(options: Options) -> dict[str, bool]:
    """Compare decoding on the device with decoding on the host, with every scale that is finite."""
    found = {}
    for name, shape in {"whole tiles": (2, 128, 8), "beside a tile": (3, 70, 5)}.items():
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(0, 253, shape, dtype=torch.uint8)
        for dtype, as_bits in {torch.bfloat16: torch.int16, torch.float32: torch.int32}.items():
            on_host = mxfp4.decode(blocks, scales, dtype)
            on_device = decode_mxfp4(blocks.to(options.device), scales.to(options.device), dtype)
            same = torch.equal(on_host.view(as_bits), on_device.cpu().view(as_bits))
            found[f"{name}, {dtype}: same bits"] = same
    return found


class PackedCase:
    """The experts of a case with frozen MXFP4 values, decoded and packed."""

    def __init__(self, case: ExpertCase) -> None:
        self.case = case
        self.packed = copy.deepcopy(case.layer)
        for name in ("gate_up_proj", "down_proj"):
            parameter = getattr(case.layer, name)
            parts = []
            for expert in parameter.detach():  # fp32 copies of all of them would not fit
                parts.append(mxfp4.encode(expert[None]))
            blocks, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            matrices = PackedMatrices(blocks, scales)
            parameter.data = matrices.decoded(parameter.dtype)
            delattr(self.packed, name)
            setattr(self.packed, name, matrices)
        for layer in (case.layer, self.packed):
            layer.requires_grad_(False)

    def solve(self, layer: LocalExperts) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output and the gradient of the rows."""
        rows = self.case.rows.detach().clone().requires_grad_()
        out = layer(rows, self.case.weights, self.case.groups)
        out.backward(self.case.d_out)
        assert rows.grad is not None
        return out.detach(), rows.grad


def packed_experts(options: Options) -> dict[str, Any]:
    """Compare one layer of frozen experts in 4 bits with the same one decoded: bits and time."""
    found: dict[str, Any] = {}
    for tokens in (options.size(4096, 64), options.size(16384, 128)):
        case = PackedCase(ExpertCase(options, experts=options.size(32, 4), tokens=tokens))
        decoded = case.solve(case.case.layer)
        packed = case.solve(case.packed)
        gate_up = case.packed.gate_up_proj
        decode_ms = milliseconds(functools.partial(gate_up.decoded, BF16), options)
        moved = gate_up.nbytes + 2 * math.prod(gate_up.shape)
        found[str(tokens)] = {
            "same bits": all(torch.equal(a, b) for a, b in zip(decoded, packed, strict=True)),
            "decode_ms": decode_ms,
            "decode_TB_s": moved / decode_ms / 1e9,
            "decoded_forward_backward_ms": milliseconds(
                functools.partial(case.solve, case.case.layer), options
            ),
            "packed_forward_backward_ms": milliseconds(
                functools.partial(case.solve, case.packed), options
            ),
        }
    return found


def mxfp4_rounds_alike(options: Options) -> dict[str, Any]:
    """Compare the kernel that rounds to MXFP4 with the definition, in bits and in time.

    Every kind of block is compared with the host; the first matrices of one layer's experts with
    the definition on the device.
    """
    found: dict[str, Any] = {}
    hard = as_matrices(hard_blocks(options.size(300, 10)), 96)
    shape = (options.size(32, 2), options.size(2880, 64), options.size(5760, 96))
    matrices = torch.randn(shape, device=options.device, dtype=BF16) * 0.02
    for rule in mxfp4.EXPONENT_RULES:
        for dtype in (BF16, torch.float32):
            on_host = mxfp4.rounded(hard.to(dtype), rule)
            on_device = round_blocks(hard.to(options.device, dtype), rule)
            same = torch.equal(bits(on_host), bits(on_device))
            found[f"{rule}, {dtype}: same bits"] = same
        by_definition = torch.empty_like(matrices)
        by_kernel = torch.empty_like(matrices)
        definition = functools.partial(round_by_definition, matrices, rule, by_definition)
        kernel = functools.partial(round_into, matrices, rule, by_kernel)
        definition_ms = milliseconds(definition, options, rounds=2)
        kernel_ms = milliseconds(kernel, options)
        found[f"{rule}, one layer"] = {
            "same bits": torch.equal(by_definition.view(torch.int16), by_kernel.view(torch.int16)),
            "definition_ms": definition_ms,
            "kernel_ms": kernel_ms,
            "kernel_TB_s": 2 * matrices.nbytes / kernel_ms / 1e9,
        }
    return found


STAGES = (
    Planned(doctor, 5),
    Planned(ceilings, 5),
    Planned(experts_are_right, 10),
    Planned(attention_is_right, 15),
    Planned(experts_speed, 15),
    Planned(mxfp4_decodes_alike, 5),
    Planned(packed_experts, 15),
    Planned(mxfp4_rounds_alike, 15),
)

"""The part of the model that an operator works for, by the code that called it.

Forward and recomputation are read off the Python stack. torch's own backward nodes have none: they
belong to the part whose forward made the node, which is known by the node's sequence number.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parents[3]

HUGGING_FACE = "transformers/models/gpt_oss/modeling_gpt_oss.py"

ENGINE = "engine"
"""The part of what no rule names: loader, bookkeeping, sums of the loss."""

RULES: tuple[tuple[str, str, str], ...] = (
    # file, beginning of the function's qualified name, part
    ("cpt/model/kernels/block_rounding", "", "rounding"),
    ("cpt/model/products/", "", "8-bit products"),
    ("cpt/model/kernels/e4m3", "", "8-bit products"),
    ("cpt/model/kernels/gated_unit", "", "experts"),
    ("cpt/model/kernels/expert", "", "experts"),
    ("cpt/model/kernels/loss", "", "loss head"),
    ("cpt/model/kernels/rows", "", "dispatch"),
    ("cpt/model/kernels/rms_norm", "", "norms"),
    ("cpt/model/kernels/rope", "", "rope"),
    ("cpt/model/experts/function.py", "", "experts"),
    ("cpt/model/experts/grouped.py", "", "experts"),
    ("cpt/model/experts/overlap.py", "", "experts"),
    ("cpt/model/experts/dispatch.py", "", "dispatch"),
    ("cpt/model/experts/layer.py", "LocalExperts", "experts"),
    ("cpt/model/experts/layer.py", "", "dispatch"),
    ("cpt/model/experts/router_watch.py", "", "router"),
    ("cpt/model/attention/", "", "attention core"),
    ("cpt/parallel/ulysses.py", "", "attention exchange"),
    ("cpt/parallel/halo.py", "", "attention exchange"),
    ("cpt/model/loss/", "", "loss head"),
    ("cpt/model/gpt_oss.py", "", "loss head"),
    ("cpt/model/decoder_layer.py", "RotaryAttention", "attention projections"),
    ("cpt/model/decoder_layer.py", "", "residual"),
    ("cpt/training/", "", ENGINE),
    ("cpt/deepspeed_adapter/", "", ENGINE),
    (HUGGING_FACE, "GptOssRMSNorm", "norms"),
    (HUGGING_FACE, "GptOssRotaryEmbedding", "rope"),
    (HUGGING_FACE, "GptOssTopKRouter", "router"),
    (HUGGING_FACE, "GptOssModel", "embedding"),
)
"""The innermost function that a rule names decides; rules are tried in this order."""

_known: dict[CodeType, str | None] = {}


def part_of_stack() -> str | None:
    """Return the part that the calling code belongs to, None if no rule names any of it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code not in _known:
            _known[code] = _part_of_code(code)
        part = _known[code]
        if part is not None:
            return part
        frame = frame.f_back
    return None


def _part_of_code(code: CodeType) -> str | None:
    for file, function, part in RULES:
        if file in code.co_filename and code.co_qualname.startswith(function):
            return part
    return None


def place_in_code() -> tuple[str, str, int]:
    """Return file, function and line of the innermost code of this project or of the model."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = _shown_file(frame.f_code.co_filename)
        if file is not None:
            return file, frame.f_code.co_qualname, frame.f_lineno
        frame = frame.f_back
    return "torch", "autograd", 0


def _shown_file(path: str) -> str | None:
    for folder in ("cpt", "data_pipeline"):
        if path.startswith(f"{ROOT / folder}/"):
            return Path(path).relative_to(ROOT).as_posix()
    if HUGGING_FACE in path:
        return HUGGING_FACE
    return None

"""Sink attention for gpt-oss: the function that transformers calls, and what stands behind it.

    register()                          makes attn_implementation="sink" known to transformers
    sink_attention(...)                 flatten rows -> choose() -> an Attention -> restore rows
      interface.py  AttentionInputs     what an Attention and a Kernel are given
      rows.py       PackedRows          the documents of a micro batch
      choice.py     choose()            the table of backends
      function.py   SinkAttention       folds the sinks into any flash kernel, exactly
      cpu.py        CpuKernel           one such kernel
      reference.py  reference_attention the definition, and decoding with a key/value cache

Documents are given by `position_ids` that restart, or by `packed_rows`, but never by a mask.
Nothing here imports DeepSpeed: docs/standalone-attention.md shows the use without this project.
"""

from __future__ import annotations

from cpt.model.attention.choice import AUTO, choose, known_names
from cpt.model.attention.function import FoldedSinks, SinkAttention
from cpt.model.attention.interface import Attention, AttentionInputs, Kernel, SequenceParallel
from cpt.model.attention.reference import reference_attention
from cpt.model.attention.rows import PackedRows
from cpt.model.attention.sink import NAME, register, sink_attention, sink_mask

__all__ = [
    "AUTO",
    "NAME",
    "Attention",
    "AttentionInputs",
    "FoldedSinks",
    "Kernel",
    "PackedRows",
    "SequenceParallel",
    "SinkAttention",
    "choose",
    "known_names",
    "reference_attention",
    "register",
    "sink_attention",
    "sink_mask",
]

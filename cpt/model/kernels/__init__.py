"""The elementwise work of the model as operators: Triton kernels on a GPU, eager torch elsewhere.

Decisions
    - Each operator `torch.ops.cpt.NAME` has an eager body, which the CPU runs and against which its
      kernel is tested, and a shape-only body, so that a step can be rehearsed without a GPU.
    - Kernels have fixed tiles and no atomics: two runs give the same bits.
    - Arithmetic is fp32 inside, with one rounding at each store.
    - Modules named `triton_*` import Triton, and are imported where a kernel is launched.
"""

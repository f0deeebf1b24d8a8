"""Activation checkpointing: each layer keeps only its input, on the device or in host memory.

torch's non-reentrant checkpoint saves the layer's input as autograd saves any tensor, so a
saved-tensor hook around the call decides where it waits. The tensors that the layer saves inside
belong to torch's own hooks and are never copied.

On CUDA the copy leaves on a stream of its own, into pinned memory, while the layer computes. The
copy back is ordered before the recomputation that needs it. On a CPU there is no other memory, and
a plain copy is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cpt.model.recomputation import context_fn


def enable_checkpointing(
    model: PreTrainedModel, *, offload: bool, keep_exchanged_rows: bool
) -> None:
    """Make every layer compute its activations again in the backward pass.

    Args:
        model: A Hugging Face model whose layers support it.
        offload: Keep the inputs of the layers in host memory.
        keep_exchanged_rows: Keep the rows that the experts received instead of exchanging them
            again.
    """
    # No layer of gpt-oss draws random numbers, so there is no random state to save and restore,
    # for which the host would wait in every layer.
    assert not model.config.attention_dropout, model.config.attention_dropout
    run: Callable[..., Any] = partial(
        checkpoint,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=context_fn(keep=keep_exchanged_rows),
    )
    if offload:
        run = partial(_run_with_input_on_host, HostCopies(), run)
    # The public gradient_checkpointing_enable takes arguments for torch's checkpoint, but no other
    # function in its place.
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=run)


def _run_with_input_on_host(
    copies: HostCopies, run: Callable[..., Any], layer: Callable[..., Any], *args: Any
) -> Any:
    with saved_tensors_hooks(copies.out, copies.back):
        return run(layer, *args)


class HostCopies:
    """Tensors on their way to host memory and back."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def out(self, tensor: Tensor) -> tuple[Tensor, torch.device, torch.cuda.Event | None]:
        """Begin the copy to host memory; the tensor may be freed at once."""
        if not tensor.is_cuda:
            return tensor.detach().clone(), tensor.device, None
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            # The memory is not given away before the copy has read it.
            tensor.record_stream(self._stream)
        return host, tensor.device, self._stream.record_event()

    def back(self, packed: tuple[Tensor, torch.device, torch.cuda.Event | None]) -> Tensor:
        """Return the tensor on its device, in the order of the current stream."""
        host, device, copied = packed
        if copied is None:
            return host
        torch.cuda.current_stream().wait_event(copied)
        return host.to(device, non_blocking=True)

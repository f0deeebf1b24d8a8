"""Activation checkpointing keeps layer inputs where it is told; garbage is collected when asked."""

from __future__ import annotations

import gc
from typing import Any, ClassVar

import pytest
import torch
from transformers import GptOssForCausalLM

from cpt.training import activation_checkpointing as checkpointing
from cpt.training.activation_checkpointing import HostCopies, enable_checkpointing
from cpt.training.garbage_collection import collecting
from tests.dist.cases import model_config


class Recorded(HostCopies):
    """Records the shapes that go to the host and come back.

    torch before 2.12 hands an empty tensor of its own through the hooks, too.
    """

    sent: ClassVar[list[tuple[int, ...]]] = []
    returned: ClassVar[list[tuple[int, ...]]] = []

    def out(self, tensor: torch.Tensor) -> Any:
        packed = super().out(tensor)
        if tensor.numel() == 0:
            return packed
        self.sent.append(tuple(tensor.shape))
        assert packed[0].data_ptr() != tensor.data_ptr()
        return packed

    def back(self, packed: Any) -> torch.Tensor:
        tensor = super().back(packed)
        if tensor.numel():
            self.returned.append(tuple(tensor.shape))
        return tensor


def loss_and_gradients(offload: bool | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = GptOssForCausalLM(model_config())
    model.train()
    if offload is not None:
        enable_checkpointing(model, offload=offload, keep_exchanged_rows=False)
    ids = torch.randint(0, 500, (2, 24))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def test_inputs_of_all_layers_and_nothing_else_go_to_the_host_and_change_no_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of sums is the same as without checkpointing, so equality is bitwise."""
    monkeypatch.setattr(checkpointing, "HostCopies", Recorded)
    plain_loss, plain_gradients = loss_and_gradients(offload=None)
    on_device = loss_and_gradients(offload=False)
    on_host = loss_and_gradients(offload=True)
    layer_inputs = [(2, 24, 64)] * model_config().num_hidden_layers
    assert Recorded.sent == Recorded.returned == layer_inputs
    for loss, gradients in (on_device, on_host):
        assert torch.equal(loss, plain_loss)
        for got, expected in zip(gradients, plain_gradients, strict=True):
            assert torch.equal(got, expected)


def test_no_random_state_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> torch.Tensor:
        raise AssertionError("the random state was read")

    torch.manual_seed(0)
    model = GptOssForCausalLM(model_config())
    model.train()
    enable_checkpointing(model, offload=False, keep_exchanged_rows=False)
    ids = torch.randint(0, 500, (1, 24))
    monkeypatch.setattr(torch, "get_rng_state", refuse)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def test_collection_happens_at_its_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda *_: calls.append(0) or 0)
    with collecting(3) as after_step:
        assert not gc.isenabled() and len(calls) == 1
        for step in range(1, 8):
            after_step(step)
    assert gc.isenabled() and len(calls) == 1 + 2


def test_interval_of_zero_leaves_collection_to_python() -> None:
    with collecting(0) as after_step:
        after_step(1)
        assert gc.isenabled()

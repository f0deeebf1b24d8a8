"""Stages about the whole model: values and gradients beside Hugging Face in float64."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

from cpt.model import attention, gpt_oss
from cpt.model.attention import PackedRows
from cpt.model.configuration import PRESETS
from cpt.parallel.traffic import Traffic
from gpu.stages import Options, Planned, relative_error

EXPERTS = 8
PREFERRED_EXPERTS = 4
"""The routers choose these for every token, by their biases: with a choice that hangs on the last
bit, errors of bf16 would send tokens to other experts, and all gradients would differ by that.
"""
LARGEST_RATIO = 1.2
"""Largest accepted mean error of all gradients, as a multiple of the mean error of Hugging Face's
own eager code in bf16.
"""
LARGEST_SINGLE_RATIO = 3.0
"""The same for one gradient: errors of small sums differ by chance."""


def model_agrees_with_hugging_face(options: Options) -> dict[str, Any]:
    """Compare loss and every gradient of two layers of the 20b shape with float64.

    Hugging Face's eager code in bf16 on the same device gives the errors that bf16 costs anyway.
    """
    config = _config(options)
    tokens = torch.randint(0, config.vocab_size - 10, (1, options.size(512, 96) + 1))
    tokens = tokens.to(options.device)
    want, weights = _hugging_face(config, options, torch.float64, tokens, None)
    plain, _ = _hugging_face(config, options, torch.bfloat16, tokens, weights)
    ours = _this_project(config, options, tokens, weights)
    errors = {}
    for name, value in want.items():
        if name != "loss":
            errors[name] = relative_error(ours[name], value)
    plain_errors = {name: relative_error(plain[name], want[name]) for name in errors}
    for name, error in errors.items():
        print(f"{name:50s} {error:.2e} beside {plain_errors[name]:.2e}", flush=True)
    mean_ratio = sum(errors.values()) / sum(plain_errors.values())
    largest_ratio = max(error / plain_errors[name] for name, error in errors.items())
    return {
        "mean error as a multiple of HF's in bf16": mean_ratio,
        "largest ratio of one gradient": largest_ratio,
        "agrees": mean_ratio <= LARGEST_RATIO and largest_ratio <= LARGEST_SINGLE_RATIO,
        "loss": [float(ours["loss"]), float(plain["loss"]), float(want["loss"])],
    }


def _config(options: Options) -> GptOssConfig:
    preset = dict(PRESETS["tiny" if options.tiny else "gpt-oss-20b"])
    words = options.size(8192, 320)
    preset |= {
        "num_hidden_layers": 2,
        "num_local_experts": EXPERTS,
        "vocab_size": words,
        "pad_token_id": words - 1,
        "bos_token_id": words - 2,
        "eos_token_id": words - 3,
    }
    config = GptOssConfig(**preset)
    config._experts_implementation = "eager"
    return config


def _gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the loss and every gradient, on the host, and free the model's."""
    loss.backward()
    found = {"loss": loss.detach().cpu()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.cpu()
        parameter.grad = None
    return found


def _hugging_face(
    config: GptOssConfig,
    options: Options,
    dtype: torch.dtype,
    tokens: torch.Tensor,
    weights: dict[str, torch.Tensor] | None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return loss and gradients of the eager code, and the weights in bf16, on the host."""
    with torch.device(options.device):
        model = GptOssForCausalLM(config)
    model.to(dtype)
    gpt_oss.restore_rotary_frequencies(model, options.device)
    model.set_attn_implementation("eager")
    if weights is None:
        weights = {}
        for name, parameter in model.named_parameters():
            spread = 1.0 if name.endswith("sinks") else 0.02
            drawn = torch.randn(parameter.shape, device=options.device) * spread
            if name.endswith("norm.weight"):
                drawn += 1
            if name.endswith("router.bias"):
                drawn[-PREFERRED_EXPERTS:] += 10
            weights[name] = drawn.to(torch.bfloat16).cpu()
    _fill(model, weights)
    logits = model(input_ids=tokens[:, :-1]).logits
    loss = nn.functional.cross_entropy(logits[0].double(), tokens[0, 1:])
    found = _gradients(model, loss)
    del model, logits, loss
    gc.collect()
    return found, weights


def _this_project(
    config: GptOssConfig, options: Options, tokens: torch.Tensor, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return loss and gradients of the patched model in bf16."""
    model = gpt_oss.skeleton(config, torch.bfloat16)
    topology: Any = SimpleNamespace(ep_size=1, ep_rank=0, ep_group=None, traffic=Traffic())
    gpt_oss.patch(model, topology)
    gpt_oss.materialize(model, options.device)
    _fill(model, weights)
    model.train()
    length = tokens.shape[1] - 1
    kernel = attention.choose(
        "auto", device=options.device, dtype=torch.bfloat16, head_dim=config.head_dim
    )
    losses = model(
        input_ids=tokens[:, :-1],
        position_ids=torch.arange(length, device=options.device)[None],
        labels=tokens[:, 1:].contiguous(),
        packed_rows=PackedRows.from_bounds([(0, length)], length),
        sequence_parallel=None,
        kernel=kernel,
    )
    return _gradients(model, losses.double().mean())


@torch.no_grad()
def _fill(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


STAGES = (Planned(model_agrees_with_hugging_face, 25),)

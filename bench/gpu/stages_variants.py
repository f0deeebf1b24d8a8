"""Stages about ways of training that move state and copies beside the computation.

Streams, events and page-locked memory are used on a GPU only, so no test without one sees a copy
that is read too early. Each way makes the same steps of the tiny model from the same weights; its
losses are held to those of the plain one.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from gpu.stages import Options, Planned
from gpu.stages_engine import Changes, Slice

STEPS = 4
"""Optimizer steps of two micro batches each."""
LARGEST_DIFFERENCE = 1e-3
"""Largest accepted relative difference of a loss: where the update runs on the host, and in bf16
weights, last bits differ. A wrong or stale copy changes a loss by more: each step lowers it so."""
TRAIN = {"global_batch_size": 2, "lr": 1e-3}
ON_HOST = {"device": "cpu", "pin_memory": True}
CHECKPOINTING = {"activation_checkpointing": True}

WAYS: dict[str, dict[str, Any]] = {
    "checkpointing": {"model": CHECKPOINTING},
    "inputs of layers on the host": {"model": {**CHECKPOINTING, "offload_checkpoints": True}},
    "ZeRO-3, gradients on the host": {"zero": {"offload_optimizer": ON_HOST}},
    "ZeRO-3, gradients on the GPU": {
        "zero": {"offload_optimizer": {**ON_HOST, "gradients": "device"}}
    },
    "ZeRO-3, weights on the host": {
        "zero": {"offload_optimizer": ON_HOST, "offload_param": ON_HOST}
    },
    "ZeRO-2": {"zero": {"stage": 2}},
    "ZeRO-2, gradients on the host": {"zero": {"stage": 2, "offload_optimizer": ON_HOST}},
    "ZeRO-2, gradients on the GPU": {
        "zero": {"stage": 2, "offload_optimizer": {**ON_HOST, "gradients": "device"}}
    },
    "moments in 2 bytes": {"train": {"optimizer_state": "bf16"}},
    "moments in 8 bits": {"train": {"optimizer_state": "int8"}},
}
"""Ways that give the losses of the plain one, by what is told of them."""


def ways_agree(options: Options) -> dict[str, Any]:
    """Compare the losses of every way with those of the plain one."""
    plain = _losses(options, {})
    found: dict[str, Any] = {"plain": plain}
    for name, changes in WAYS.items():
        if options.seconds_left < 20:
            found[name] = "no time left"
            continue
        try:
            losses = _losses(options, changes)
        except Exception as error:
            found[name] = f"FAILED {type(error).__name__}: {error}"[:500]
            continue
        found[name] = agreement(losses, plain)
        print(f"{name}: {found[name]}", flush=True)
    return found


def agreement(losses: list[float], plain: list[float]) -> dict[str, Any]:
    """Compare losses with those of the plain run; NaN, as of a copy read early, does not agree."""
    differences = [abs(a - b) / b for a, b in zip(losses, plain, strict=True)]
    return {
        "differences": differences,
        "agrees": all(one <= LARGEST_DIFFERENCE for one in differences),
    }


def _losses(options: Options, changes: dict[str, Any]) -> list[float]:
    """Return the losses of the first steps of a new engine."""
    own = {**changes, "train": {**TRAIN, **changes.get("train", {})}}
    part = Slice(options, Changes(tiny=True, **own))
    tokens = options.size(1024, 128)
    losses = []
    for _ in range(STEPS):
        part.steps += 1
        # loaded anew, as a run does: the copies to the device are part of what is tested
        batches = [part.batch(tokens, documents=2), part.batch(tokens - 64, documents=1)]
        labels = sum(batch.labels.numel() for batch in batches)
        part.engine._positions = labels
        losses.append(part.engine.step(batches, [labels], step=part.steps).loss)
    del part
    gc.collect()
    if not options.tiny:
        torch.cuda.empty_cache()
    return losses


STAGES = (Planned(ways_agree, 40),)

"""AdamW whose moments are held in 2 bytes or in 8-bit blocks (`train.optimizer_state`).

The update itself is torch's fused AdamW, on fp32 copies of the moments of a chunk of elements.
Afterwards the moments are rounded back (cpt/storage/narrow_moments.py); the weights have been
updated by moments that were not rounded yet.

Decisions
    A chunk fits the cache of the cores on a host, where reading and writing memory takes the time;
    on a GPU it bounds the memory of the copies.
    The second moment is rounded stochastically. It is a mean over 1 / (1 - beta2) steps: rounded to
    the nearest it would not follow changes that are smaller than half a unit. The first moment is a
    mean over few steps, unless beta1 is above `LARGEST_NEAREST_BETA`: in bf16 it is rounded to the
    nearest, which has the smaller error; in 8 bits stochastically, because half a unit is large
    there (docs/precision.md has the measurement).
    The random numbers belong to (seed, step, parameter, position): see
    cpt/storage/rounding_noise.py. So every layout rounds alike, and a resumed run as an unbroken
    one.
    The count of steps lies on the host: the random numbers depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cpt.deepspeed_adapter.fragments import Fragment
from cpt.deepspeed_adapter.shards import new_moments
from cpt.storage.narrow_moments import (
    CUT,
    EXPONENTS,
    Blocks,
    Scratch,
    add_half_,
    cut_,
)
from cpt.storage.rounding_noise import (
    NoisyRun,
    add_noise_,
    mixed,
    noisy_runs,
    number_of_name,
    runs_within,
)
from cpt.storage.state_bytes import MOMENTS, MomentForm, moments_of_group

HOST_CHUNK = 1 << 17
"""Elements of a chunk for each thread: the copies of the moments take 1 MB of its cache."""
DEVICE_CHUNK = 1 << 24
"""Elements of a chunk on a GPU: the copies take 128 MB."""
CHUNK_BYTES: dict[MomentForm, int] = {"fp32": 0, "bf16": 8, "int8": 14}
"""Bytes of each element of a chunk while it is updated: the fp32 copies of both moments, and whole
numbers of 2 bytes from which 8-bit codes are made.
"""
STOCHASTIC: dict[MomentForm, tuple[str, ...]] = {
    "bf16": ("exp_avg_sq",),
    "int8": ("exp_avg", "exp_avg_sq"),
}
"""Moments that are rounded stochastically, by form; the others are rounded to the nearest."""
LARGEST_NEAREST_BETA = 0.98
"""Decay rate above which every moment is rounded stochastically: a mean over more steps changes by
less than half a unit of bf16 in a step.
"""


def chunk_numel(device: torch.device) -> int:
    """Return how many elements are updated at a time."""
    if device.type == "cpu":
        return HOST_CHUNK * torch.get_num_threads()
    return DEVICE_CHUNK


class NarrowAdamW(torch.optim.Optimizer):
    """AdamW for flat partitions, with moments in the forms that the parameter groups say."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        seed: int,
    ) -> None:
        """Take parameter groups; `place` must follow before the first step.

        Args:
            groups: See `cpt.training.optimizer.parameter_groups`.
            lr: The learning rate.
            betas: Decay rates of the two moments.
            eps: Adam's epsilon.
            seed: Seed of the random numbers.
        """
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._seed = seed
        self._runs: dict[int, list[NoisyRun]] = {}

    def place_whole(self, named: Mapping[str, torch.nn.Parameter]) -> None:
        """Hold whole parameters, as a single process without an engine does.

        Args:
            named: All trained parameters, contiguous, by name.
        """
        names = {id(parameter): name for name, parameter in named.items()}
        for group in self.param_groups:
            for parameter in group["params"]:
                numel = parameter.numel()
                whole = Fragment(name=names[id(parameter)], start=0, numel=numel, offset=0)
                self.place({parameter: [whole]})
                moments = new_moments(parameter, moments_of_group(group))
                self.state[parameter] = {"step": torch.zeros(()), **moments}

    def place(self, partitions: Mapping[torch.Tensor, list[Fragment]]) -> None:
        """Learn which elements of which parameters the flat partitions hold."""
        for flat, fragments in partitions.items():
            runs: list[NoisyRun] = []
            for part in fragments:
                number = number_of_name(part.name)
                runs += noisy_runs(part.start, part.numel, part.offset, number)
            self._runs[id(flat)] = sorted(runs)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all partitions that have a gradient."""
        assert closure is None, "DeepSpeed gives none"
        for group in self.param_groups:
            forms = moments_of_group(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, forms)

    def _update(
        self, parameter: torch.Tensor, group: dict[str, Any], forms: dict[str, MomentForm]
    ) -> None:
        """Update one flat partition, chunk by chunk."""
        assert parameter.grad is not None
        flat = parameter.view(-1)
        gradient = parameter.grad.reshape(-1)
        state = self.state[parameter]
        state["step"] += 1
        # the kernel wants the count beside the weights; filling it in waits for no device
        counter = torch.full((), float(state["step"]), device=flat.device)
        size = max(1, flat.numel())
        if set(forms.values()) != {"fp32"}:
            size = min(size, chunk_numel(flat.device))
        held = self._held(state, group["betas"], forms, size)
        for start in range(0, flat.numel(), size):
            stop = min(start + size, flat.numel())
            runs = runs_within(self._runs[id(parameter)], start, stop)
            moments = [moment.as_fp32(start, stop) for moment in held]
            torch._fused_adamw_(
                [flat[start:stop]],
                [gradient[start:stop]],
                [moments[0]],
                [moments[1]],
                [],
                [counter],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            for moment, values in zip(held, moments, strict=True):
                moment.keep(values, start, runs)

    def _held(
        self,
        state: dict[str, Any],
        betas: tuple[float, float],
        forms: dict[str, MomentForm],
        numel: int,
    ) -> list[_Held]:
        """Return the moments of a partition, ready for chunks of so many elements."""
        step = int(state["step"])
        device = state[MOMENTS[0]].device
        scratch = Scratch(numel, device) if "int8" in forms.values() else None
        held = []
        for beta, (name, form) in zip(betas, forms.items(), strict=True):
            moment = _Held(state, name, form, self._key(step, name), beta)
            moment.allocate(numel, device, scratch)
            held.append(moment)
        return held

    def _key(self, step: int, moment: str) -> int:
        """Return what the random numbers of all parameters have in common."""
        return mixed(mixed(self._seed) ^ (len(MOMENTS) * step + MOMENTS.index(moment)))


class _Held:
    """One moment of a flat partition, in the form in which it is kept between steps."""

    def __init__(
        self, state: dict[str, Any], name: str, form: MomentForm, key: int, beta: float
    ) -> None:
        self._form = form
        self._key = key
        self._tensor: torch.Tensor = state[name]
        self._is_stochastic = form != "fp32" and (
            name in STOCHASTIC[form] or beta > LARGEST_NEAREST_BETA
        )
        self._values = self._tensor
        self._scratch: Scratch | None = None
        self._blocks: Blocks | None = None
        if form == "int8":
            signed = name == MOMENTS[0]
            self._blocks = Blocks(
                codes=state[name], exponents=state[name + EXPONENTS], signed=signed
            )

    def allocate(self, numel: int, device: torch.device, scratch: Scratch | None) -> None:
        """Allocate the fp32 copy of a chunk, for all chunks of an update."""
        self._scratch = scratch
        if self._form != "fp32":
            self._values = torch.empty(numel, device=device)

    def as_fp32(self, start: int, stop: int) -> torch.Tensor:
        """Return fp32 values of some elements; those of an fp32 moment are a view of it."""
        if self._form == "fp32":
            return self._tensor[start:stop]
        if self._blocks is None:
            return self._values[: stop - start].copy_(self._tensor[start:stop])
        values = self._values[: stop - start]
        self._blocks.narrow(start, stop - start).decode(values, self._scratch)
        return values

    def keep(self, values: torch.Tensor, start: int, runs: list[NoisyRun]) -> None:
        """Round values and keep them; they are overwritten."""
        if self._form == "fp32":
            return
        if self._is_stochastic:
            add_noise_(values.view(torch.int32), start, runs, self._key, CUT[self._form])
        elif self._blocks is not None:
            add_half_(values, self._form)
        if self._blocks is not None:
            self._blocks.narrow(start, values.numel()).encode(values, self._scratch)
            return
        if self._is_stochastic:
            cut_(values, self._form)
        self._tensor[start : start + values.numel()].copy_(values)

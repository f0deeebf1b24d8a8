"""Muon and AdamW as the papers have them, in one process on Hugging Face's model, in fp32.

Written for the comparison alone: it knows no ranges, no batches of matrices and no names of the
product's.  One matrix is orthogonalized after the other.
"""

from __future__ import annotations

import torch
from torch import nn

ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")


def orthogonalized(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return the update of one matrix by Newton-Schulz, with more columns than rows inside."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / max(float(x.double().norm()), 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def matrices_of(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return views of the matrices of a parameter that Muon trains; none if AdamW trains it."""
    if name.endswith("experts.gate_up_proj"):
        return [half for expert in tensor for half in (expert[:, 0::2], expert[:, 1::2])]
    if name.endswith("experts.down_proj"):
        return list(tensor)
    if name.endswith(ATTENTION):
        return [tensor]
    return []


class PlainMuon:
    """Both optimizers of a model."""

    def __init__(self, model: nn.Module, settings: dict[str, float], momentum: float = 0.95):
        self._lr = settings["lr"]
        self._decay = settings["weight_decay"]
        self._momentum = momentum
        self.means: dict[str, torch.Tensor] = {}
        """The running mean of the gradients of each parameter of Muon."""
        self._matrices = {}
        decayed = []
        others = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if matrices_of(name, parameter):
                self._matrices[name] = parameter
                self.means[name] = torch.zeros_like(parameter)
            elif name.endswith(("bias", "sinks")) or "norm" in name:
                others.append(parameter)
            else:
                decayed.append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self._decay},
            {"params": others, "weight_decay": 0.0},
        ]
        betas = (settings["beta1"], settings["beta2"])
        options = {"lr": self._lr, "betas": betas, "eps": settings["eps"]}
        self._adamw = torch.optim.AdamW(groups, **options)
        matrices = list(self._matrices.values())
        self._of_matrices = torch.optim.AdamW(matrices, weight_decay=self._decay, **options)

    def step_of_adamw(self) -> None:
        """Update every parameter by AdamW, whose first moments are the running means then."""
        self._adamw.step()
        self._of_matrices.step()
        for name, parameter in self._matrices.items():
            self.means[name].copy_(self._of_matrices.state[parameter]["exp_avg"])

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter."""
        self._adamw.step()
        for name, parameter in self._matrices.items():
            gradient = parameter.grad
            assert gradient is not None
            mean = self.means[name]
            mean.mul_(self._momentum).add_(gradient, alpha=1 - self._momentum)
            ahead = (1 - self._momentum) * gradient + self._momentum * mean
            parameter.mul_(1 - self._lr * self._decay)
            pairs = zip(matrices_of(name, parameter), matrices_of(name, ahead), strict=True)
            for weights, matrix in pairs:
                scale = 0.2 * max(matrix.shape) ** 0.5
                weights.sub_(self._lr * scale * orthogonalized(matrix))

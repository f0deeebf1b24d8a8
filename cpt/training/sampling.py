"""How tokens are drawn from the logits of a model.

Decisions
    - Each text has a random stream of its own, which follows from the seed and the number of its
      prompt. So a reply does not depend on the layout, on the other prompts, or on which of them
      are decoded beside it.
    - A token takes one number u in [0, 1): the first token, in the order of the vocabulary, at
      which the sum of the probabilities exceeds u. That order does not change when two likely
      tokens change places, as it does in sums that were taken in another order.
    - Probabilities are summed in fp64 on the device, u is drawn on the host.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from cpt.training.sampling_settings import Sampling

__all__ = ["Sampling", "draw_tokens", "random_stream"]


def random_stream(seed: int, number: int) -> np.random.Generator:
    """Return the random numbers of one text, from the seed and the number of its prompt."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number])))


def draw_tokens(
    logits_BV: torch.Tensor, sampling: Sampling, uniforms_B: torch.Tensor
) -> torch.Tensor:
    """Draw the next token of each row, (B,), on the device of the logits.

    Args:
        logits_BV: fp32 logits.
        sampling: The settings; at temperature 0 the likeliest token is taken.
        uniforms_B: fp64 random numbers in [0, 1), on the same device.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probabilities_BV = (logits_BV.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        probabilities_BV = _without_tail(probabilities_BV, sampling.top_p)
    sums_BV = probabilities_BV.cumsum(-1)
    targets_B1 = uniforms_B.unsqueeze(1) * sums_BV[:, -1:]
    tokens_B1 = torch.searchsorted(sums_BV, targets_B1, right=True)
    # Logits that are not finite have no such token; the last one keeps the next pass from failing.
    return tokens_B1.squeeze(1).clamp_(max=logits_BV.shape[1] - 1)


def _without_tail(probabilities_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose probabilities add up to `top_p`."""
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    likelier_BV = sorted_BV.cumsum(-1) - sorted_BV
    is_tail_BV = torch.zeros_like(order_BV, dtype=torch.bool)
    is_tail_BV.scatter_(1, order_BV, likelier_BV >= top_p)
    return probabilities_BV.masked_fill(is_tail_BV, 0)

"""Text from a plain transformers model: how tokens are drawn, and how they are read by people.

`generate` gives the tokens of `AutoModelForCausalLM.generate` with the same settings. The model
that is being trained has a generator of its own, cpt/training/generate.py, because all its ranks
must take part in every forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.text.harmony import STOP_IDS
from data_pipeline.text.harmony_reply import parse_reply
from data_pipeline.text.tokenizer import END_OF_TEXT, encoding


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """The settings by which tokens are drawn."""

    max_new_tokens: int = 64
    """Tokens to generate at most."""
    temperature: float = 0.0
    """Temperature of the distribution; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Probability of the smallest set of likeliest tokens that are drawn from."""
    seed: int = 0
    """Seed of the draws."""

    def problems(self) -> list[str]:
        """Return a sentence for each setting that makes no sense, with its command-line option."""
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"--max_new_tokens {self.max_new_tokens} must be >= 1.")
        if not 0 <= self.temperature < math.inf:
            problems.append(f"--temperature {self.temperature} must be >= 0.")
        if not 0 < self.top_p <= 1:
            problems.append(f"--top_p {self.top_p} must be in (0, 1].")
        if self.top_p < 1 and self.temperature == 0:
            problems.append(
                f"--top_p {self.top_p} has no meaning at --temperature 0: give a temperature."
            )
        return problems


@torch.no_grad()
def generate(model: Any, prompt: Sequence[int], sampling: Sampling) -> list[int]:
    """Return the new tokens that continue a prompt, the one that ended them included."""
    torch.manual_seed(sampling.seed)
    ids_1T = torch.tensor([list(prompt)], device=model.device)
    settings: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        settings = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    out_1T = model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(STOP_IDS),
        pad_token_id=END_OF_TEXT,
        **settings,
    )
    new_tokens: list[int] = out_1T[0, ids_1T.shape[1] :].tolist()
    return new_tokens


def decode_tokens(tokens: Sequence[int]) -> str:
    """Return the text of tokens; control tokens appear by name."""
    return encoding().decode(list(tokens))


def decode_channels(tokens: Sequence[int]) -> str:
    """Return a reply for people: each of its messages under the name of its channel."""
    blocks = []
    for message in parse_reply(tokens):
        name = message.channel or "no channel"
        if message.recipient:
            name += f" to {message.recipient}"
        blocks.append(f"[{name}]\n{message.text}")
    if not tokens or tokens[-1] not in STOP_IDS:
        blocks.append("[cut off by --max_new_tokens]")
    return "\n".join(blocks)

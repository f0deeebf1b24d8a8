"""The settings by which tokens are drawn; without torch, so that commands check them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
        if self.seed < 0:
            problems.append(f"--seed {self.seed} must be >= 0.")
        return problems

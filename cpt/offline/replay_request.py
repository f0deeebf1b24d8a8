"""A set of replay text that is to be written; without torch, so that it is checked at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpt.errors import ConfigError
from cpt.training.sampling_settings import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayRequest:
    """A set of replay text that is to be written."""

    model_dir: Path
    """Hugging Face directory of the base model."""
    out: Path
    """Folder to write; it must not exist."""
    prefixes: Path | None
    """JSONL with `text`: the first tokens of each are continued."""
    questions: Path | None
    """JSONL with `prompt`: each is asked in the Harmony format."""
    prefix_tokens: int
    """Tokens of each text that are continued."""
    sampling: Sampling
    """How tokens are drawn; its seed is that of the whole set."""

    def check(self) -> None:
        """Refuse a set that makes no sense.

        Raises:
            ConfigError: everything that is wrong with it.
        """
        problems = self.sampling.problems()
        if self.prefixes is None and self.questions is None:
            problems.append(
                "--prefixes and --questions are both missing. Give at least one of them."
            )
        for option, path in (("--prefixes", self.prefixes), ("--questions", self.questions)):
            if path is not None and not path.is_file():
                problems.append(f"{option} {path}: no such file.")
        if self.prefix_tokens < 1:
            problems.append(f"--prefix_tokens {self.prefix_tokens} must be >= 1.")
        if self.sampling.temperature == 0:
            problems.append(
                "--temperature is 0: the likeliest text is no sample of what the model knows. "
                "Give 1.0."
            )
        if problems:
            raise ConfigError(problems)

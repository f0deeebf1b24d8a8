"""How large the proof of MXFP4 is: the real one, and a quick one that shows that all parts work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Sizes of all parts of the proof."""

    num_merges: int
    """Merges of the vocabulary."""
    model: dict[str, int]
    """Keys of the model's configuration."""
    seq_len: int
    """Tokens of a packed row."""
    global_batch_size: int
    """Packed rows of one optimizer step."""
    release_lr: float
    """Steady learning rate of the release, before it decays."""
    warmup_steps: int
    """Steps of the warm-up, of the release and of the training after it."""
    check_steps: int
    """Steps of the release between two measurements of held-out English."""
    short_steps: int
    """Steady steps of the short release."""
    long_steps: int
    """Steady steps of the long releases, and the least of a converged one."""
    most_steps: int
    """Steady steps after which the converged release ends, whatever was measured."""
    decay_steps: int
    """Steps in which a release's learning rate falls, and its experts are rounded."""
    steps: int
    """Steps of Japanese; MXFP4-aware training has the last third of them."""
    lrs: tuple[float, ...]
    """Peaks of the learning rate of the training on Japanese."""
    num_seeds: int
    """Seeds of the model, the release and the order of all data; an arm may have fewer."""
    text_bytes: int
    """UTF-8 bytes of the text of one use, at most."""
    held_out_bytes: int
    """UTF-8 bytes of a held-out domain, about."""

    @property
    def aware_from(self) -> int:
        """Steps of Japanese that are done when the experts are rounded for the first time."""
        return 2 * self.steps // 3

    @property
    def middle_lr(self) -> float:
        """The middle one of the peaks, or the upper one of the two in the middle."""
        return self.lrs[len(self.lrs) // 2]

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.seq_len * self.global_batch_size


REAL = Scale(
    num_merges=4096,
    model={
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
    },
    seq_len=512,
    global_batch_size=2,
    release_lr=3e-3,
    warmup_steps=6,
    check_steps=100,
    short_steps=400,
    long_steps=1500,
    most_steps=5000,
    decay_steps=90,
    steps=72,
    lrs=(5e-5, 2e-4, 6e-4),
    num_seeds=3,
    text_bytes=3_000_000,
    held_out_bytes=32_000,
)
QUICK = Scale(
    num_merges=1024,
    model={
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    seq_len=128,
    global_batch_size=2,
    release_lr=3e-3,
    warmup_steps=1,
    check_steps=4,
    short_steps=4,
    long_steps=8,
    most_steps=12,
    decay_steps=4,
    steps=6,
    lrs=(1e-3, 3e-3),
    num_seeds=2,
    text_bytes=100_000,
    held_out_bytes=12_000,
)

"""Compare a training step of this project's adapters with PEFT and the Hugging Face Trainer.

    python bench/adapters.py [--lengths 1024 4096] [--rounds 5] [--json FILE] [--svg FILE]

All train the same LoRA of a small gpt-oss in bf16 on the same packed rows, in one process:
attention, and both matrices of every expert of every layer.  The contenders are this project, PEFT
with the Trainer on transformers' eager experts, and the same on its grouped_mm experts.  PEFT adds
the dense product of the adapters of all experts of a layer to their weights in every pass.

Everything else is as in bench/step.py, whose options this script takes.
"""

from __future__ import annotations

import sys

import step


def main() -> None:
    """Run bench/step.py with adapters."""
    step.main(["--lora", "--ranks", "1", "--lengths", "1024", "4096", *sys.argv[1:]])


if __name__ == "__main__":
    main()

"""o200k_harmony as a tokenizer of plain transformers, from our own ranks.

What lies beside somebody's weights is not read: a tokenizer_config.json can name a class and code,
and token shards are of o200k_harmony whatever it says.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from data_pipeline.text.tokenizer import encoding

BOS = "<|startoftext|>"
EOS = "<|return|>"
PAD = "<|endoftext|>"
_LAST_CONTROL_ID = 200_018
"""Last id of a control token in the released tokenizer; the vocabulary beyond it is padding."""


class _OfflineConverter(TikTokenConverter):  # type: ignore[misc]
    """A converter that takes the verified ranks of the data pipeline instead of downloading any."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return encoding()._mergeable_ranks


@functools.cache
def _converted() -> Any:
    """Return the tokenizer as the `tokenizers` library has it; the conversion takes seconds."""
    control_tokens: dict[int, str] = {}
    for name, number in encoding()._special_tokens.items():
        if number <= _LAST_CONTROL_ID:
            control_tokens.setdefault(number, name)
    converter = _OfflineConverter(
        vocab_file="o200k_base",
        pattern=encoding()._pat_str,
        extra_special_tokens=[control_tokens[number] for number in sorted(control_tokens)],
    )
    return converter.converted()


def plain_tokenizer(max_length: int, chat_template: str | None = None) -> Any:
    """Return o200k_harmony as transformers takes it.

    Args:
        max_length: Largest position of the model, in tokens.
        chat_template: Template of a conversation; None for a tokenizer of plain text.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=_converted(),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        chat_template=chat_template,
    )

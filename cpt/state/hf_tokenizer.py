"""The tokenizer of an export, as `AutoTokenizer` reads it: o200k_harmony in Hugging Face's own format."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from data_pipeline.tokenizer import encoding

_LAST_CONTROL_ID = 200_018
"""The released tokenizer names control tokens up to this id; the rest of the vocabulary is padding."""


class _OfflineConverter(TikTokenConverter):  # type: ignore[misc]
    """Takes the ranks from the verified tokenizer of the data pipeline instead of downloading them."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return encoding()._mergeable_ranks


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    names: dict[int, str] = {}
    for name, number in encoding()._special_tokens.items():
        if number <= _LAST_CONTROL_ID and number not in names:
            names[number] = name
    converter = _OfflineConverter(
        vocab_file="o200k_base", pattern=encoding()._pat_str, extra_special_tokens=[names[n] for n in sorted(names)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(str(folder))

"""The tokenizer of an export, as `AutoTokenizer` reads it: o200k_harmony, with Harmony's chat
template.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from data_pipeline.text.tokenizer import encoding

TEMPLATE = Path(__file__).with_name("harmony.jinja")
"""The chat template of an export: it renders as a string what `data_pipeline.text.harmony` renders
as tokens.
"""
_LAST_CONTROL_ID = 200_018
"""The released tokenizer names control tokens up to this id; the rest of the vocabulary is
padding.
"""


class _OfflineConverter(TikTokenConverter):  # type: ignore[misc]
    """Takes the ranks from the verified tokenizer of the data pipeline instead of downloading
    them.
    """

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return encoding()._mergeable_ranks


@functools.cache
def _converted() -> Any:
    """The tokenizer in the format of the `tokenizers` library; made once per process, it takes
    seconds.
    """
    names: dict[int, str] = {}
    for name, number in encoding()._special_tokens.items():
        if number <= _LAST_CONTROL_ID and number not in names:
            names[number] = name
    converter = _OfflineConverter(
        vocab_file="o200k_base",
        pattern=encoding()._pat_str,
        extra_special_tokens=[names[n] for n in sorted(names)],
    )
    return converter.converted()


def save_tokenizer(folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Args:
        folder: Where.
        max_length: Positions of the model.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_converted(),
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        chat_template=TEMPLATE.read_text(encoding="utf-8"),
    )
    tokenizer.save_pretrained(str(folder))

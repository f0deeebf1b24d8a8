"""The tokenizer of an export: o200k_harmony for `AutoTokenizer`, with Harmony's chat template."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from cpt.export.reader_forms import BOS, PAD, TOKENIZER_CLASS
from data_pipeline.store.files import write_json
from data_pipeline.text.tokenizer import encoding

TEMPLATE = Path(__file__).with_name("harmony.jinja")
"""Chat template of an export. It renders as a string what `data_pipeline.text.harmony` renders as
tokens.
"""
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


def save_tokenizer(folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Args:
        folder: The directory of the export.
        max_length: Largest position of the model.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_converted(),
        bos_token=BOS,
        eos_token="<|return|>",
        pad_token=PAD,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        chat_template=TEMPLATE.read_text(encoding="utf-8"),
    )
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = TOKENIZER_CLASS
    write_json(file, settings, indent=2, sort_keys=True)

"""The tokenizer of an export: o200k_harmony for `AutoTokenizer`, with Harmony's chat template."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from cpt.export.reader_forms import TOKENIZER_CLASS
from cpt.offline.plain_tokenizer import plain_tokenizer
from data_pipeline.store.files import write_json

TEMPLATE = Path(__file__).with_name("harmony.jinja")
"""Chat template of an export. It renders as a string what `data_pipeline.text.harmony` renders as
tokens.
"""


def save_tokenizer(folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Args:
        folder: The directory of the export.
        max_length: Largest position of the model.
    """
    for name, content in _files(max_length).items():
        (folder / name).write_bytes(content)


@functools.lru_cache(maxsize=1)
def _files(max_length: int) -> dict[str, bytes]:
    """Return the files by name, 28 MB; a process that exports several times makes them once."""
    tokenizer = plain_tokenizer(max_length, TEMPLATE.read_text(encoding="utf-8"))
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(name)
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["tokenizer_class"] = TOKENIZER_CLASS
        write_json(file, settings, indent=2, sort_keys=True)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

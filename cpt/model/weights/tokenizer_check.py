"""Compare the tokenizer that lies beside weights with the one that token shards are made with.

Training reads token ids from shards, so it needs no tokenizer of the model; but weights of another
vocabulary would be trained on tokens that mean something else to them.
"""

from __future__ import annotations

from pathlib import Path

from cpt.errors import ConfigError
from cpt.model.weights.hf_layout import read_json
from data_pipeline.text.tokenizer import VOCAB_SIZE, encoding

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 2**26
"""The released tokenizer.json has 28 MB."""
LARGEST_RELEASED_ID = 200_018
"""The released tokenizer names control tokens up to this id."""


def tokenizer_problems(folder: Path, vocab_size: int) -> list[str]:
    """Return why weights do not fit the token ids of o200k_harmony.

    Args:
        folder: The directory of the weights; a directory without tokenizer.json is accepted.
        vocab_size: Rows of the embedding, from config.json.

    Raises:
        ConfigError: tokenizer.json is not readable.
    """
    problems = []
    if vocab_size < VOCAB_SIZE:
        problems.append(
            f"{folder / 'config.json'}: vocab_size is {vocab_size}, but token shards hold ids up "
            f"to {VOCAB_SIZE - 1} (o200k_harmony). Give the weights of a gpt-oss model."
        )
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        return problems
    ids = _added_tokens(file)
    for name, number in encoding()._special_tokens.items():
        if number <= LARGEST_RELEASED_ID and ids.get(name, number) != number:
            problems.append(
                f"{file}: token '{name}' has id {ids[name]}, token shards use {number} "
                "(o200k_harmony). Give the weights of a gpt-oss model."
            )
    return problems


def _added_tokens(file: Path) -> dict[str, int]:
    """Return the ids of the control tokens that a tokenizer.json adds, by name."""
    ids: dict[str, int] = {}
    try:
        for token in read_json(file, MAX_TOKENIZER_BYTES).get("added_tokens", []):
            ids[str(token["content"])] = int(token["id"])
    except (TypeError, LookupError, ValueError) as error:
        raise ConfigError(
            f"{file}: added_tokens is no list of objects with content and id. Fetch it again."
        ) from error
    return ids

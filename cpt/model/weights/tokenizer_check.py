"""Compare the tokenizer that lies beside weights with the one that token shards are made with.

Training reads token ids from shards, so it needs no tokenizer of the model; but weights of another
vocabulary would be trained on tokens that mean something else to them.
"""

from __future__ import annotations

from pathlib import Path

from cpt.model.weights.hf_layout import read_json
from data_pipeline.text.tokenizer import VOCAB_SIZE, encoding

TOKENIZER_FILE = "tokenizer.json"
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
    ids: dict[str, int] = {}
    for token in read_json(file).get("added_tokens", []):
        ids[token["content"]] = token["id"]
    for name, number in encoding()._special_tokens.items():
        if number <= LARGEST_RELEASED_ID and ids.get(name, number) != number:
            problems.append(
                f"{file}: token '{name}' has id {ids[name]}, token shards use {number} "
                "(o200k_harmony). Give the weights of a gpt-oss model."
            )
    return problems

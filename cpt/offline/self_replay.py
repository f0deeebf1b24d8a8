"""Replay that the base model writes itself: the only text that is distributed like what it was
trained on.

    texts -> their first tokens ----+-> sampled, one seed a document -> plain.jsonl, chat.jsonl ->
    sidecar, last questions -> Harmony prompts ---+

Decisions
    A document's seed is (seed, number): the same model, prompts and settings give the same file in
    one process. A reply without an end or without a final channel is no conversation: it is left
    out and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cpt.errors import ConfigError, DataError
from cpt.model.weights.hf_layout import tensor_files
from cpt.offline.sampling import Sampling, generate, load_for_sampling
from data_pipeline.build.self_replay import SIDECAR, weights_hash, write_sidecar
from data_pipeline.store.files import write_text
from data_pipeline.text.harmony import DEFAULT_DATE, RETURN, STOP_IDS, encode_prompt
from data_pipeline.text.harmony_reply import parse_reply
from data_pipeline.text.tokenizer import decode, encode


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayRequest:
    """What to sample."""

    model_dir: Path
    """Hugging Face directory of the base model."""
    out: Path
    """New folder for the files."""
    prefixes: Path | None
    """JSONL with `text`: the first tokens of each are continued."""
    questions: Path | None
    """JSONL with `prompt`: each is asked in the Harmony format."""
    prefix_tokens: int
    """Tokens of a prefix."""
    sampling: Sampling
    """How tokens are chosen; its seed is that of the whole set."""


def sample_replay(request: ReplayRequest) -> str:
    """Sample both kinds and write them; returns what was done, for people.

    Raises:
        ConfigError: a request that cannot be right.
        DataError: records that cannot be used, or a model that gave nothing.
    """
    _check(request)
    texts = _read(request.prefixes, "text")
    questions = _read(request.questions, "prompt")
    base = weights_hash(sorted(set(tensor_files(request.model_dir).values())))
    model = load_for_sampling(request.model_dir, None)
    plain, chat = list(_plain(model, texts, request)), list(_chat(model, questions, request))
    if not plain and not chat:
        raise DataError(
            f"{request.model_dir}: none of {len(texts) + len(questions)} samples can be used."
        )
    request.out.mkdir(parents=True, exist_ok=True)
    names = []
    for name, records in (("plain.jsonl", plain), ("chat.jsonl", chat)):
        if records:
            write_text(request.out / name, "".join(json.dumps(r) + "\n" for r in records))
            names.append(name)
    settings = {
        "sampling": asdict(request.sampling),
        "prefix_tokens": request.prefix_tokens,
        "prompts": hashlib.sha256(json.dumps([texts, questions]).encode()).hexdigest(),
        "left_out": {"plain": len(texts) - len(plain), "chat": len(questions) - len(chat)},
    }
    write_sidecar(request.out, base, settings, names)
    return (
        f"{request.out}: {len(plain)} of {len(texts)} texts, {len(chat)} of {len(questions)} conversations, written by "
        f"the model {base[:16]}"
    )


def _check(request: ReplayRequest) -> None:
    problems = request.sampling.problems()
    if request.prefixes is None and request.questions is None:
        problems.append("--prefixes and --questions are both missing. Give at least one of them.")
    if request.prefix_tokens < 1:
        problems.append(f"--prefix_tokens {request.prefix_tokens} must be >= 1.")
    if request.sampling.temperature == 0:
        problems.append(
            "--temperature is 0: the likeliest text is no sample of what the model knows. Give 1.0."
        )
    if (request.out / SIDECAR).exists():
        problems.append(f"--out {request.out} holds replay already. Choose another folder.")
    if problems:
        raise ConfigError(problems)


def _read(path: Path | None, field: str) -> list[str]:
    if path is None:
        return []
    try:
        values = [
            json.loads(line).get(field)
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as JSONL ({error}).") from error
    bad = [
        number
        for number, value in enumerate(values, 1)
        if not isinstance(value, str) or not value.strip()
    ]
    if bad or not values:
        raise DataError(f"{path}: record {bad[0] if bad else 1} has no text '{field}'.")
    return values


def _plain(model: Any, texts: Sequence[str], request: ReplayRequest) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(tqdm(texts, desc="texts", unit="text")):
        prefix = encode(text).tolist()[: request.prefix_tokens]
        tokens = generate(model, prefix, _seeded(request.sampling, 2 * number))
        tokens = tokens[
            : next((i for i, token in enumerate(tokens) if token in STOP_IDS), len(tokens))
        ]
        # a cut within a character cannot be written as text: what is left of it goes
        written = decode(np.array(prefix + tokens, np.uint32)).rstrip("\N{REPLACEMENT CHARACTER}")
        if tokens and written.strip():
            yield {"text": written, "number": number}


def _chat(model: Any, questions: Sequence[str], request: ReplayRequest) -> Iterator[dict[str, Any]]:
    for number, question in enumerate(tqdm(questions, desc="conversations", unit="conversation")):
        prompt = encode_prompt(question, developer=None, effort="medium", date=DEFAULT_DATE)
        tokens = generate(model, prompt, _seeded(request.sampling, 2 * number + 1))
        parts = parse_reply(tokens)
        if (
            not tokens
            or tokens[-1] != RETURN
            or parts[-1].channel != "final"
            or not parts[-1].text.strip()
        ):
            continue
        said = [
            {"role": "assistant", "channel": part.channel, "content": part.text}
            for part in parts
            if part.channel in ("analysis", "final") and part.text.strip()
        ]
        yield {"messages": [{"role": "user", "content": question}, *said], "number": number}


def _seeded(sampling: Sampling, number: int) -> Sampling:
    """A seed of its own for each document, the same whatever was sampled before."""
    digest = hashlib.sha256(f"{sampling.seed}:{number}".encode()).digest()
    return replace(sampling, seed=int.from_bytes(digest[:6], "little"))

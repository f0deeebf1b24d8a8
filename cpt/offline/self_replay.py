"""Replay text that the base model writes: only this text is distributed like its training data.

    texts     -> their first tokens -> sampled, one seed a document -> plain.jsonl
    questions -> Harmony prompts    -> sampled, one seed a document -> chat.jsonl
                                                                    -> the sidecar, last

Decisions
    The seed of a document follows from the seed of the set and the document's number: the same
    model, prompts and settings give the same file in one process.
    A reply without an end or without a final channel is no conversation. It is left out and
    counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cpt.errors import ConfigError, DataError
from cpt.model.weights.hf_layout import tensor_files
from cpt.offline.plain_model import load_export
from cpt.offline.sampling import decode_tokens, generate
from cpt.training.sampling import Sampling
from data_pipeline.build.self_replay import SIDECAR, weights_hash, write_sidecar
from data_pipeline.store.files import atomic_write
from data_pipeline.text.harmony import DEFAULT_DATE, RETURN, STOP_IDS, encode_prompt
from data_pipeline.text.harmony_reply import ReplyMessage, parse_reply
from data_pipeline.text.tokenizer import encode

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayRequest:
    """A set of replay text that is to be written."""

    model_dir: Path
    """Hugging Face directory of the base model."""
    out: Path
    """New folder for the files."""
    prefixes: Path | None
    """JSONL with `text`: the first tokens of each are continued."""
    questions: Path | None
    """JSONL with `prompt`: each is asked in the Harmony format."""
    prefix_tokens: int
    """Tokens of each text that are continued."""
    sampling: Sampling
    """How tokens are drawn; its seed is that of the whole set."""


def sample_replay(request: ReplayRequest) -> str:
    """Sample both kinds of text, write them, and return a sentence about them for people.

    Raises:
        ConfigError: the request makes no sense.
        DataError: a record cannot be used, or the model wrote nothing usable.
    """
    _check(request)
    texts = _read(request.prefixes, "text")
    questions = _read(request.questions, "prompt")
    base_model = weights_hash(sorted(set(tensor_files(request.model_dir).values())))
    model = load_export(request.model_dir)
    plain = list(_continued_texts(model, texts, request))
    chat = list(_conversations(model, questions, request))
    if not plain and not chat:
        raise DataError(
            f"{request.model_dir}: none of {len(texts) + len(questions)} samples can be used."
        )
    request.out.mkdir(parents=True, exist_ok=True)
    names = []
    for name, records in (("plain.jsonl", plain), ("chat.jsonl", chat)):
        if records:
            _write_records(request.out / name, records)
            names.append(name)
    settings = {
        "sampling": asdict(request.sampling),
        "prefix_tokens": request.prefix_tokens,
        "prompts": hashlib.sha256(json.dumps([texts, questions]).encode()).hexdigest(),
        "left_out": {"plain": len(texts) - len(plain), "chat": len(questions) - len(chat)},
    }
    write_sidecar(request.out, base_model, settings, names)
    return (
        f"{request.out}: {len(plain)} of {len(texts)} texts, {len(chat)} of {len(questions)} "
        f"conversations, written by the model {base_model[:16]}"
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
    """Return one field of every record of a JSONL file."""
    if path is None:
        return []
    values = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                values.append(json.loads(line).get(field))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as JSONL ({error}).") from error
    for number, value in enumerate(values, 1):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{path}: record {number} has no text '{field}'.")
    if not values:
        raise DataError(f"{path}: record 1 has no text '{field}'.")
    return values


def _write_records(path: Path, records: Sequence[Record]) -> None:
    with atomic_write(path) as file:
        for record in records:
            file.write(json.dumps(record).encode("ascii") + b"\n")


def _continued_texts(model: Any, texts: Sequence[str], request: ReplayRequest) -> Iterator[Record]:
    for number, text in enumerate(tqdm(texts, desc="texts", unit="text")):
        prefix = encode(text).tolist()[: request.prefix_tokens]
        tokens = generate(model, prefix, _with_own_seed(request.sampling, 2 * number))
        written = _until_stop(tokens)
        # a cut within a character cannot be written as text: the rest of the character goes
        whole = decode_tokens(prefix + written).rstrip("\N{REPLACEMENT CHARACTER}")
        if written and whole.strip():
            yield {"text": whole, "number": number}


def _until_stop(tokens: list[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in STOP_IDS:
            return tokens[:index]
    return tokens


def _conversations(
    model: Any, questions: Sequence[str], request: ReplayRequest
) -> Iterator[Record]:
    for number, question in enumerate(tqdm(questions, desc="conversations", unit="conversation")):
        prompt = encode_prompt(question, developer=None, effort="medium", date=DEFAULT_DATE)
        tokens = generate(model, prompt, _with_own_seed(request.sampling, 2 * number + 1))
        reply = parse_reply(tokens)
        if not _is_whole(tokens, reply):
            continue
        messages = [{"role": "user", "content": question}]
        for message in reply:
            if message.channel in ("analysis", "final") and message.text.strip():
                messages.append(
                    {"role": "assistant", "channel": message.channel, "content": message.text}
                )
        yield {"messages": messages, "number": number}


def _is_whole(tokens: list[int], reply: list[ReplyMessage]) -> bool:
    """Return whether a reply ended by itself with a message in the final channel."""
    if not tokens or tokens[-1] != RETURN:
        return False
    return reply[-1].channel == "final" and bool(reply[-1].text.strip())


def _with_own_seed(sampling: Sampling, number: int) -> Sampling:
    """Give a document a seed that does not depend on what was sampled before."""
    digest = hashlib.sha256(f"{sampling.seed}:{number}".encode()).digest()
    return replace(sampling, seed=int.from_bytes(digest[:6], "little"))

"""Replay text that the base model writes: only this text is distributed like its training data.

    texts     -> their first tokens -> sampled -> pieces (cpt/offline/pieces.py) -> plain.jsonl
    questions -> Harmony prompts    -> sampled -> pieces                         -> chat.jsonl
                                                                                 -> sidecar, last

Decisions
    The random stream of a document follows from the seed of the set and the document's number. So
    the same model, prompts and settings give the same files, in one process and on all ranks of a
    launcher, in one go and in several: bit for bit on CPUs in fp32, as far as no two tokens are
    equally likely up to the order of sums. On GPUs the rounding of bf16 may differ between layouts.
    A reply without an end or without a final channel is no conversation. It is left out and
    counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpt.errors import DataError
from cpt.model.configuration import load_config
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.checksums import model_hash
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.hf_layout import tensor_files
from cpt.model.weights.writer import published, refuse_existing
from cpt.offline.model import OfflineModel
from cpt.offline.pieces import ItemSeries, Pieces, kept_pieces, partial_folder
from cpt.offline.rank_options import RankOptions
from cpt.offline.ranks import offline_ranks
from cpt.offline.replay_request import ReplayRequest
from cpt.offline.replies import compute_replies
from cpt.offline.sampling import decode_tokens
from cpt.resilience.faults import fault_point
from data_pipeline.build.self_replay import write_sidecar
from data_pipeline.store.files import atomic_write
from data_pipeline.text.harmony import DEFAULT_DATE, RETURN, STOP_IDS, encode_prompt
from data_pipeline.text.harmony_reply import ReplyMessage, parse_reply
from data_pipeline.text.tokenizer import encode

Record = dict[str, Any]


def sample_replay(request: ReplayRequest, options: RankOptions | None = None) -> str:
    """Sample both kinds of text, write them, and return a sentence about them for people.

    All ranks of a launcher call it together. What another start has sampled is not sampled again.

    Raises:
        ConfigError: the request makes no sense, or pieces of another one are there.
        DataError: a record cannot be used, or the model wrote nothing usable.
        RequeueRequested: a stop was asked for; what is sampled stays for the next start.
    """
    request.check()
    prompts = _Prompts(request)
    config = load_config(request.model_dir, None, option="--model")
    files = set(tensor_files(request.model_dir).values())
    weights = DirectoryWeights(request.model_dir, parameter_shapes(config))
    folder = partial_folder(request.out)
    with offline_ranks(config, folder, options or RankOptions()) as ranks:
        ranks.on_first(lambda: refuse_existing(request.out))
        model = OfflineModel(config, ranks.topology)
        identity = {
            "command": "replay",
            "model": ranks.on_first(lambda: model_hash(request.model_dir, files)),
            "sampling": asdict(request.sampling),
            "prefix_tokens": request.prefix_tokens,
            "prompts": prompts.digest,
            "computed_in": str(model.dtype).removeprefix("torch."),
        }
        with kept_pieces(request.out, identity, ranks) as pieces:
            if pieces.missing(prompts.of_texts) or pieces.missing(prompts.of_questions):
                model.load(weights)
            # texts have the even random streams, questions the odd ones
            for series, asked, parity in (
                (prompts.of_texts, prompts.prefixes, 0),
                (prompts.of_questions, prompts.asked, 1),
            ):
                numbers = range(parity, 2 * len(asked) + parity, 2)
                compute_replies(pieces, series, model, asked, request.sampling, numbers)
            base_model = ranks.hash_of_weights(files)
            return ranks.on_first(lambda: _write(request, prompts, pieces, base_model))


class _Prompts:
    """The texts and questions of a request, and what the model is asked."""

    def __init__(self, request: ReplayRequest) -> None:
        self.texts = _read(request.prefixes, "text")
        self.questions = _read(request.questions, "prompt")
        self.digest = hashlib.sha256(json.dumps([self.texts, self.questions]).encode()).hexdigest()
        self.prefixes: list[list[int]] = []
        for text in self.texts:
            self.prefixes.append(encode(text).tolist()[: request.prefix_tokens])
        self.asked: list[list[int]] = []
        for question in self.questions:
            self.asked.append(
                encode_prompt(question, developer=None, effort="medium", date=DEFAULT_DATE)
            )
        self.of_texts = ItemSeries(name="texts", num_items=len(self.texts), unit="text")
        self.of_questions = ItemSeries(
            name="conversations", num_items=len(self.questions), unit="conversation"
        )


def _write(request: ReplayRequest, prompts: _Prompts, pieces: Pieces, base_model: str) -> str:
    """Write what can be used of the samples, and return a sentence about it."""
    fault_point("offline_publish", 0)
    plain = list(_continued_texts(prompts.prefixes, _items(pieces, prompts.of_texts)))
    chat = list(_conversations(prompts.questions, _items(pieces, prompts.of_questions)))
    num_texts = len(prompts.texts)
    num_questions = len(prompts.questions)
    if not plain and not chat:
        raise DataError(
            f"{request.model_dir}: none of {num_texts + num_questions} samples can be used."
        )
    settings = {
        "sampling": asdict(request.sampling),
        "prefix_tokens": request.prefix_tokens,
        "prompts": prompts.digest,
        "left_out": {"plain": num_texts - len(plain), "chat": num_questions - len(chat)},
    }
    with published(request.out) as folder:
        names = []
        for name, records in (("plain.jsonl", plain), ("chat.jsonl", chat)):
            if records:
                _write_records(folder / name, records)
                names.append(name)
        write_sidecar(folder, base_model, settings, names)
    return (
        f"{request.out}: {len(plain)} of {num_texts} texts, {len(chat)} of {num_questions} "
        f"conversations, written by the model {base_model[:16]}"
    )


def _items(pieces: Pieces, series: ItemSeries) -> Iterator[list[int]]:
    for content in pieces.read(series):
        yield from content


def _read(path: Path | None, field: str) -> list[str]:
    """Return one field of every record of a JSONL file."""
    if path is None:
        return []
    values = []
    try:
        with path.open("rb") as file:  # text may hold characters that end a line for Python
            for line in file:
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


def _continued_texts(
    prefixes: Sequence[list[int]], replies: Iterable[list[int]]
) -> Iterator[Record]:
    for number, (prefix, tokens) in enumerate(zip(prefixes, replies, strict=True)):
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


def _conversations(questions: Sequence[str], replies: Iterable[list[int]]) -> Iterator[Record]:
    for number, (question, tokens) in enumerate(zip(questions, replies, strict=True)):
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

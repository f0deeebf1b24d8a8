"""The traces of one domain on disk, in <run_dir>/guard/traces.

    NAME.sampled-00000.json  replies that are sampled so far, some prompts a file
    NAME.safetensors         the untouched model's likeliest next tokens (kl_target_format.py)
    NAME.json                prompts, replies, and what they come from; it completes the others

Decisions
    NAME.json is written last and never again: a run that is resumed reads it. A run that is killed
    while it samples finds the replies that it had, and samples the rest.
    The first rank writes and reads what is small. Every rank reads its own part of the targets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt.errors import ConfigError, DataError
from cpt.guard.traces.rows import Trace
from cpt.model.weights.checksums import is_identity
from cpt.training.kl_target_format import (
    TargetFileReader,
    TargetFileWriter,
    hash_target_file,
    target_file,
)
from data_pipeline.bounded.json_text import LARGE_BYTES, read_json
from data_pipeline.store.files import make_folder, write_json

FORMAT_VERSION = 1
TRACE_FOLDER = "traces"
"""Folder of all traces within <run_dir>/guard."""

Json = dict[str, Any]
Tokens = list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceOrigin:
    """Everything that the traces of a domain follow from."""

    name: str
    """Name of the domain."""
    weights: str
    """Hash of the untouched model's weights."""
    prompts: str
    """Hex sha256 of the tokens of all prompts."""
    max_new_tokens: int
    """Tokens of a trace."""
    seed: int
    """Seed of the draws."""

    def differences(self, other: TraceOrigin) -> list[str]:
        """Return the names of the fields that differ from those that are wanted now."""
        mine = asdict(self)
        theirs = asdict(other)
        if is_identity(self.weights, other.weights):
            del mine["weights"]
        return [name for name in mine if mine[name] != theirs[name]]


def prompts_hash(prompts: Sequence[Tokens]) -> str:
    """Return the hex sha256 of the tokens of prompts."""
    return hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptTraces:
    """The complete traces of one domain."""

    origin: TraceOrigin
    """Where they come from."""
    model: str
    """Name of the untouched model, for people."""
    top_k: int
    """Tokens listed per token of a reply."""
    targets_xxh3: str
    """Hash of the file of the targets."""
    traces: Sequence[Trace]
    """The traces, in the order of their targets."""

    def to_json(self) -> Json:
        """Return the content of NAME.json."""
        prompts = [list(trace.prompt) for trace in self.traces]
        replies = [list(trace.reply) for trace in self.traces]
        return {
            "format_version": FORMAT_VERSION,
            "origin": asdict(self.origin),
            "model": self.model,
            "top_k": self.top_k,
            "targets_xxh3": self.targets_xxh3,
            "prompts": prompts,
            "replies": replies,
        }

    @classmethod
    def from_json(cls, content: Json) -> KeptTraces:
        """Read the output of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"not of format version {FORMAT_VERSION}")
        traces = []
        for prompt, reply in zip(content["prompts"], content["replies"], strict=True):
            traces.append(Trace(prompt=prompt, reply=reply))
        return cls(
            origin=TraceOrigin(**content["origin"]),
            model=content["model"],
            top_k=content["top_k"],
            targets_xxh3=content["targets_xxh3"],
            traces=traces,
        )


class TraceFolder:
    """The files of the traces of a run; each method is for one rank alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """The folder; it may be missing."""

    def traces_file(self, name: str) -> Path:
        """Return the path of a domain's traces."""
        return self.folder / f"{name}.json"

    def read(self, name: str) -> KeptTraces | None:
        """Return the traces of a domain; None if they are not complete.

        Raises:
            DataError: a file is damaged, or the targets are missing.
        """
        path = self.traces_file(name)
        if not path.is_file():
            return None
        try:
            kept = KeptTraces.from_json(read_json(path, LARGE_BYTES, follow_links=False))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not the traces of a run ({error}). {_RESTORE}") from error
        targets = target_file(self.folder, name)
        found = hash_target_file(self.folder, name) if targets.is_file() else "no file"
        if found != kept.targets_xxh3:
            raise DataError(
                f"{targets}: damaged, its hash is {found[:16]}, {path.name} says "
                f"{kept.targets_xxh3[:16]}. {_RESTORE}"
            )
        return kept

    def read_chunk(self, origin: TraceOrigin, number: int) -> list[Tokens] | None:
        """Return the replies of a chunk of prompts; None if they were not sampled yet.

        Raises:
            ConfigError: they come from something else than `origin`.
            DataError: the file is damaged.
        """
        path = self._chunk_file(origin.name, number)
        if not path.is_file():
            return None
        try:
            content = read_json(path, LARGE_BYTES, follow_links=False)
            stored = TraceOrigin(**content["origin"])
            replies: list[Tokens] = content["replies"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not the replies of a run ({error}). Delete it.") from error
        check_origin(path, stored, origin)
        return replies

    def write_chunk(self, origin: TraceOrigin, number: int, replies: Sequence[Tokens]) -> None:
        """Keep the replies of a chunk of prompts."""
        make_folder(self.folder)
        content = {"origin": asdict(origin), "replies": [list(reply) for reply in replies]}
        write_json(self._chunk_file(origin.name, number), content)

    def _chunk_file(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.sampled-{number:05d}.json"

    def open_targets(self, name: str, num_tokens: int, top_k: int) -> TargetFileWriter:
        """Begin the file of a domain's targets."""
        make_folder(self.folder)
        return TargetFileWriter(self.folder, name, num_tokens, top_k)

    def complete(
        self, origin: TraceOrigin, model: str, top_k: int, traces: Sequence[Trace]
    ) -> None:
        """Write the traces whose targets are there, and remove the chunks."""
        name = origin.name
        kept = KeptTraces(
            origin=origin,
            model=model,
            top_k=top_k,
            targets_xxh3=hash_target_file(self.folder, name),
            traces=traces,
        )
        write_json(self.traces_file(name), kept.to_json())
        for path in self.folder.glob(f"{name}.sampled-*.json"):
            path.unlink()

    def targets(self, kept: KeptTraces) -> TargetFileReader:
        """Open the targets of a domain."""
        return TargetFileReader(self.folder, kept.origin.name, kept.top_k)


_RESTORE = "Restore it from a copy of the run directory, or use a new --run_dir."


def missing_traces(path: Path, step: int) -> ConfigError:
    """Return the refusal of a run whose traces of the untouched model are gone."""
    return ConfigError(
        f"{path} is missing, and at step {step} the untouched model is gone. Restore the file, or "
        "go on without guard.traces in the mix."
    )


def check_origin(path: Path, stored: TraceOrigin, wanted: TraceOrigin) -> None:
    """Refuse traces that come from something else than the run has now.

    Raises:
        ConfigError: naming what differs.
    """
    told = {
        "weights": "another untouched model",
        "prompts": "other prompts",
        "max_new_tokens": f"max_new_tokens {stored.max_new_tokens}",
        "seed": f"seed {stored.seed}",
    }
    names = stored.differences(wanted)
    if names:
        listed = ", ".join(told.get(name, name) for name in names)
        raise ConfigError(
            f"{path} was written with {listed}; traces are frozen before step 0. Change it back, "
            "or use a new --run_dir."
        )

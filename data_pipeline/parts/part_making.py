"""The parts of a source, and their making: taken from the cache, or made by tasks of an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.source_config import FILE_FORMATS, SourceConfig
from data_pipeline.console.progress import show_progress
from data_pipeline.engine.executor import Executor
from data_pipeline.parts.part import Part, read_account
from data_pipeline.parts.part_cache import provide_part
from data_pipeline.reading.input_files import InputFile
from data_pipeline.reading.stored_rows import hub_files
from data_pipeline.reading.units import Unit, split_into_units
from data_pipeline.store.file_states import state_of

log = logging.getLogger(__name__)


def source_parts(
    work_dir: Path,
    mix: MixConfig,
    source: SourceConfig,
    inputs: Sequence[InputFile],
    cache_dir: Path | None,
) -> list[Part]:
    """Return the parts of a source, none of which need be there yet.

    Args:
        work_dir: Folder of the build in progress.
        mix: The mix.
        source: One of its sources.
        inputs: Its input files, hashed.
        cache_dir: Folder of parts that builds share; None for none.

    Raises:
        DataError: a file is missing, empty or unreadable.
    """
    parts = []
    files_of = _files_by_unit(source, inputs)
    # the files that were hashed: a folder may have got or lost some since
    files = [file.path for file in inputs]
    for number, unit in enumerate(split_into_units(source, files)):
        parts.append(
            Part(
                source=source,
                unit=unit,
                number=number,
                work_dir=work_dir,
                near_duplicates=mix.near_duplicates > 0 and source.format != "mock",
                seq_len=mix.longest_conversation(source),
                inputs=files_of(unit),
                cache_dir=cache_dir,
            )
        )
    return parts


def _files_by_unit(
    source: SourceConfig, inputs: Sequence[InputFile]
) -> Callable[[Unit], tuple[InputFile, ...]]:
    """Return a function that gives the input files that a unit is read from."""
    if source.format in FILE_FORMATS:
        by_path = {file.path: file for file in inputs}
        return lambda unit: tuple(by_path[path] for path in unit.paths)
    all_files = tuple(inputs)
    if source.format == "huggingface" and not all_files:
        paths = hub_files(source)
        all_files = tuple(InputFile(path, state_of(path), "") for path in paths)
    return lambda unit: all_files


def make_parts(parts: list[Part], progress: bool, executor: Executor) -> None:
    """Take or make those of the parts that are not there yet, and tell how many were."""
    missing = []
    reused = _Amount()
    for part in parts:
        account = read_account(part)
        if account is None:
            missing.append(part)
        else:
            reused.add(account.num_tokens)
    total_bytes = sum(part.unit.size_bytes for part in parts)
    missing_bytes = sum(part.unit.size_bytes for part in missing)
    made = _Amount()
    bar = show_progress(
        total_bytes,
        "build",
        "B",
        initial=total_bytes - missing_bytes,
        unit_scale=True,
        hidden=not progress,
    )
    told: set[str] = set()
    with bar:
        for part, provided in executor.run(provide_part, missing):
            (reused if provided.is_reused else made).add(provided.num_tokens)
            if provided.problem and provided.problem not in told:
                told.add(provided.problem)
                log.warning("%s", provided.problem)
            tokens = made.tokens + reused.tokens
            bar.set_postfix_str(f"{part.source.name}, {tokens / 1e6:,.1f} M tokens", refresh=False)
            bar.update(part.unit.size_bytes)
    if reused.parts and progress:
        log.info("%s", _describe_reuse(reused, made))


@dataclass(slots=True)
class _Amount:
    """Parts and the tokens in them."""

    parts: int = 0
    tokens: int = 0

    def add(self, tokens: int) -> None:
        """Add one part."""
        self.parts += 1
        self.tokens += tokens


def _describe_reuse(reused: _Amount, made: _Amount) -> str:
    """Return how much of a build was there already, such as `3 of 4 parts ... 1.2 of 1.5 M`."""
    total_parts = reused.parts + made.parts
    total_tokens = reused.tokens + made.tokens
    scale, name = (1e9, "B") if total_tokens >= 1e9 else (1e6, "M")
    return (
        f"{reused.parts:,} of {total_parts:,} parts were there already: "
        f"{reused.tokens / scale:,.2f} of {total_tokens / scale:,.2f} {name} tokens"
    )

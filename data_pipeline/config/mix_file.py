"""The data-mix YAML: file -> checked `MixConfig`.

Decisions
    Every problem is reported in one ConfigError, each with file, line and key. Paths in the file
    are relative to it; `MixConfig` holds them absolute.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from data_pipeline.config.document_hook import resolved_hook
from data_pipeline.config.file_patterns import absolute_pattern
from data_pipeline.config.mix_checks import check_across
from data_pipeline.config.mix_config import GuardDomain, MixConfig
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.config.strict_yaml import Reader, load_yaml


def load_mix(path: Path | str, *, need_files: bool = True) -> MixConfig:
    """Read and check a data-mix YAML.

    The files of a guard domain become a source of their own that is never trained on.

    Args:
        path: The YAML file.
        need_files: Whether to refuse a mix whose files are not here; a whole build needs none.

    Raises:
        ConfigError: the file has problems; every one is listed as `file:line: key problem`.
    """
    path = Path(path)
    reader = Reader(load_yaml(path))
    base = path.resolve().parent
    mix = reader.read(MixConfig)
    if isinstance(reader.located.value, dict):
        check_across(reader, reader.located.value, base, need_files)
    reader.finish()
    assert mix is not None
    own_sources = [domain.own_source for domain in mix.guard.domains if domain.path is not None]
    sources = tuple(_with_absolute_paths(source, base) for source in (*mix.sources, *own_sources))
    domains = tuple(_over_sources(domain) for domain in mix.guard.domains)
    generation = []
    for asked in mix.guard.generation:
        generation.append(dataclasses.replace(asked, path=str(base / asked.path)))
    traces = []
    for traced in mix.guard.traces:
        traces.append(dataclasses.replace(traced, path=str(base / traced.path)))
    return dataclasses.replace(
        mix,
        name=mix.name or path.stem,
        seq_len=mix.stages[0].seq_len if mix.stages else mix.seq_len,
        sources=sources,
        guard=dataclasses.replace(
            mix.guard, domains=domains, generation=tuple(generation), traces=tuple(traces)
        ),
    )


def _with_absolute_paths(source: SourceConfig, base: Path) -> SourceConfig:
    patterns = tuple(absolute_pattern(pattern, base) for pattern in source.patterns())
    hook = None if source.hook is None else resolved_hook(base, source.hook)
    return dataclasses.replace(source, path=patterns or None, hook=hook)


def _over_sources(domain: GuardDomain) -> GuardDomain:
    """Return a guard domain that names sources only, its own one in place of `path`."""
    if domain.path is None:
        return domain
    return GuardDomain(
        name=domain.name,
        language=domain.language,
        sources=(domain.own_source.name,),
        served_by=domain.served_by,
    )

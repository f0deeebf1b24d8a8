"""What a build is made from: the rules of its mix and its input files, and what differs by now.

Decisions
    The rules are all settings that decide tokens and rows, and the versions of what this package
    does to a text. Weights, the seed, labels and guard domains do not belong to them.
    Files are known by name, size and hash. A build is found and refused by the hash of it all, the
    fingerprint. A run compares names and sizes alone where there is too much input to read it at
    every start.
    A whole build needs no raw files. Where all files of a source are gone, they are not compared.
    Nor does it need the file of a hook: where that is gone, the name of the function is compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.config.decontamination_config import MIN_WHOLE_TOKENS
from data_pipeline.config.document_hook import has_hook_file
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.source_config import CLUSTER_PLACES, FILE_FORMATS, SourceConfig
from data_pipeline.engine.executor import Executor
from data_pipeline.errors import StorageError
from data_pipeline.objects.object_paths import is_address
from data_pipeline.reading import units
from data_pipeline.reading.clusters import KEY_RULES_VERSION
from data_pipeline.reading.document import COPIES_BY
from data_pipeline.reading.hooks import hook_rules
from data_pipeline.reading.input_files import (
    HashNotes,
    InputFile,
    Inputs,
    look_at_inputs,
    read_inputs,
)
from data_pipeline.reading.record_fields import value_fields
from data_pipeline.reading.stored_rows import may_hold_conversations
from data_pipeline.reading.table_columns import VALUE_RULES_VERSION
from data_pipeline.store.manifest import BuildManifest, InputFiles
from data_pipeline.text.cleaning import STEP_VERSIONS
from data_pipeline.text.conversation_reader import LOSS_RULES_VERSION
from data_pipeline.text.harmony_records import RULES_VERSION
from data_pipeline.text.tokenizer import RANKS_SHA256

MAX_LISTED_FILES = 1000
"""Files of a source that a manifest lists one by one."""
MAX_SHOWN_FILES = 5
"""Files of a source that a message names."""
UNKNOWN = "unknown"
"""A rule that files decide which cannot be read."""
_FORMAT = 4
"""Format of the tokens and rows. The manifest has a version of its own."""
_DECONTAMINATION_VERSION = 2
"""Version of the rules by which held-out text is taken out."""
_SOURCE_KEYS = (
    "name",
    "format",
    "text_field",
    "template",
    "normalise",
    "held_out_share",
    "num_documents",
    "mean_tokens",
    "dataset",
    "revision",
    "subset",
    "split",
    "build_sources",
    "kind",
)
"""Fields of a source that decide its tokens and rows."""

Rules = dict[str, Any]
FileFacts = tuple[str, int, str]
"""Name, size in bytes, and xxh3_128 of a file; the last one empty if the file was not read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What differs between a build and a mix."""

    differences: tuple[str, ...]
    """One line for each rule or file that differs; empty if the build is that of the mix."""
    absent: tuple[str, ...]
    """Sources whose files, or hook, are not here, so their rules, or fewer of them, decide."""
    read_contents: bool
    """Whether files were compared by content, not only by name and size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The rules and the input files of a build, read at its start."""

    rules: Rules
    """`build_rules` of the mix."""
    inputs: Inputs
    """Input files of each source, in order, with their hashes."""

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of everything that decides the tokens and rows of the build."""
        sources = []
        for rules in self.rules["sources"]:
            facts = [file.facts for file in self.inputs[rules["name"]]]
            sources.append({**rules, "files": facts})
        return _hash_of({**self.rules, "sources": sources})

    def listed_inputs(self) -> dict[str, InputFiles]:
        """Return the input files of each source, for the manifest."""
        listed = {}
        for name, files in self.inputs.items():
            listed[name] = _input_files([file.facts for file in files])
        return listed


def read_origin(
    mix: MixConfig, executor: Executor | None = None, notes: HashNotes | None = None
) -> Origin:
    """Read all input files of a mix whose hashes are not noted.

    The arguments are those of `input_files.read_inputs`.

    Raises:
        DataError: an input file cannot be read, or is written to.
    """
    inputs = read_inputs(mix.sources, executor, notes)
    return Origin(rules=_with_file_rules(mix, inputs), inputs=inputs)


def fingerprint(
    mix: MixConfig, executor: Executor | None = None, notes: HashNotes | None = None
) -> str:
    """Return the fingerprint of a build of the mix; see `read_origin`.

    Raises:
        DataError: an input file cannot be read, or is written to.
    """
    return read_origin(mix, executor, notes).fingerprint


def build_rules(mix: MixConfig) -> Rules:
    """Return the settings and versions that decide the tokens and rows of a build, as JSON."""
    rules: Rules = {
        "format_version": _FORMAT,
        "seq_len": mix.seq_len,
        "packing": mix.packing,
        "near_duplicates": mix.near_duplicates,
        "decontaminate_tokens": mix.decontamination_rules.tokens,
        "tokenizer": RANKS_SHA256,
        "unit_bytes": units.MIN_UNIT_BYTES,
        "sources": [_source_rules(source) for source in mix.sources],
    }
    if mix.stages:
        rules["stages"] = [dataclasses.asdict(stage) for stage in mix.stages]
    if mix.decontamination_rules.tokens:
        rules["decontamination"] = {
            "version": _DECONTAMINATION_VERSION,
            "min_kept_tokens": mix.decontamination_rules.min_kept_tokens,
            "stock_text": mix.decontamination_rules.stock_text,
        }
        if any(source.held_out_share >= 1 for source in mix.sources):
            rules["decontamination"]["whole_texts"] = MIN_WHOLE_TOKENS
    return json.loads(json.dumps(rules))  # type: ignore[no-any-return]


def _source_rules(source: SourceConfig) -> Rules:
    """Return the rules of a source.

    What a source does not use is left out, so that a change of it leaves other builds alone.
    """
    rules = {key: getattr(source, key) for key in _SOURCE_KEYS}
    if source.format == "harmony":
        rules["conversation_rules"] = RULES_VERSION
        rules["ignored_keys"] = sorted(source.ignored_keys)
        rules |= _conversation_rules(source)
    if source.cluster_by is not None:
        rules["cluster_by"] = source.cluster_by
        if source.cluster_by not in CLUSTER_PLACES:
            rules["cluster_rules"] = KEY_RULES_VERSION
    if source.filters:
        rules["filters"] = [dataclasses.asdict(rule) for rule in source.filters]
    if source.hook is not None:
        rules["hook"] = hook_rules(source)
    if source.keep:
        rules["keep"] = list(source.keep)
    for key in ("min_characters", "min_tokens", "max_tokens"):
        if getattr(source, key) is not None:
            rules[key] = getattr(source, key)
    versions = {}
    for step, version in STEP_VERSIONS.items():
        if step in source.normalise:
            versions[step] = version
    if versions:
        rules["step_versions"] = versions
    return rules


def _conversation_rules(source: SourceConfig) -> Rules:
    """Return the rules that a source of conversations has beside those of every one."""
    rules: Rules = {}
    if source.shape != "auto":
        rules["shape"] = source.shape
    if source.loss != "all":
        rules["loss"] = source.loss
        rules["loss_rules"] = LOSS_RULES_VERSION
    if source.turns != "last":
        rules["turns"] = source.turns
    if source.require_analysis:
        rules["require_analysis"] = True
    return rules


def _with_file_rules(mix: MixConfig, inputs: Inputs) -> Rules:
    """Return the rules of a mix, with those that its files decide.

    Large sources name the rules by which they are cut into units, and sources of tables those by
    which columns beside the text are read. Conversations of an earlier build name by what copies
    are told, where others come from records: such copies were not found before.
    """
    rules = build_rules(mix)
    has_records = any(source.format == "harmony" for source in mix.sources)
    for source, of_source in zip(mix.sources, rules["sources"], strict=True):
        sizes = [file.state.size_bytes for file in inputs.get(source.name, ())]
        if source.format in FILE_FORMATS and units.is_large(sizes):
            of_source["unit_rules"] = units.LARGE_RULES
        if _reads_values_of_tables(source, inputs.get(source.name, ())):
            of_source["value_rules"] = VALUE_RULES_VERSION
        if has_records and source.format == "build":
            holds = may_hold_conversations(source)
            if holds is not False:
                of_source["copies_by"] = UNKNOWN if holds is None else COPIES_BY
    return rules


def _reads_values_of_tables(source: SourceConfig, files: Sequence[InputFile]) -> bool:
    """Return whether other columns of tables than those of the text are read."""
    if not value_fields(source):
        return False
    if source.format == "huggingface":
        return True
    return any(source.format_of(file.path) == "parquet" for file in files)


def absent_sources(mix: MixConfig) -> tuple[str, ...]:
    """Return the names of the sources that cannot be read: no file, or no hook, is here."""
    names = []
    for source in mix.sources:
        if _lacks_files(source) or (source.hook is not None and not has_hook_file(source.hook)):
            names.append(source.name)
    return tuple(names)


def _lacks_files(source: SourceConfig) -> bool:
    """Return whether a source names files, none of which is here."""
    return bool(source.patterns()) and is_absent(source)


def is_absent(source: SourceConfig) -> bool:
    """Return whether no file of a source is here; objects are not if their store is out of reach.

    A whole build is trained on where nothing leads to the store, or without its credentials.
    """
    try:
        return not source.files()
    except (OSError, StorageError):
        if not any(map(is_address, source.patterns())):
            raise
        return True


def compare(manifest: BuildManifest, mix: MixConfig, *, read_contents: bool) -> Comparison:
    """Compare the rules and files of a build with those of a mix.

    Args:
        manifest: The manifest of the build.
        mix: The mix, whose files need not be here.
        read_contents: Whether to read the files; otherwise their names and sizes are compared.

    Raises:
        DataError: an input file cannot be read.
    """
    absent = absent_sources(mix)
    lines: list[str] = []
    if manifest.rules:
        present = [source for source in mix.sources if not _lacks_files(source)]
        rules = _with_file_rules(mix, look_at_inputs(present))
        _take_what_is_unknown(rules, manifest.rules, {source.name for source in present})
        lines += _rule_differences(manifest.rules, rules)
        for source in present:
            before = manifest.inputs.get(source.name)
            if before is not None:
                lines += _file_differences(source, before, read_contents)
    elif absent or not read_contents or fingerprint(mix) != manifest.fingerprint:
        lines.append(
            "rules and files: not those of the build, or not known to be (an earlier version of "
            "this package made it, and kept their fingerprint only)"
        )
    return Comparison(differences=tuple(lines), absent=absent, read_contents=read_contents)


def _take_what_is_unknown(rules: Rules, of_build: Mapping[str, Any], present: set[str]) -> None:
    """Take the rules that only files which are absent or unreadable could tell from a build.

    Args:
        rules: The rules of the mix, which are changed.
        of_build: The rules of the build.
        present: Names of the sources whose files are here.
    """
    built = {source["name"]: source for source in of_build["sources"]}
    for of_mix in rules["sources"]:
        before = built.get(of_mix["name"], {})
        for key in ("unit_rules", "value_rules", "copies_by"):
            is_unknown = of_mix["name"] not in present or of_mix.get(key) == UNKNOWN
            if is_unknown and key in before:
                of_mix[key] = before[key]
            elif of_mix.get(key) == UNKNOWN:
                del of_mix[key]
        function, digest = of_mix.get("hook", ("", ""))
        if function and not digest and before.get("hook", [""])[0] == function:
            of_mix["hook"] = before["hook"]


def _rule_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    yield from _changes("", {**old, "sources": None}, {**new, "sources": None})
    old_sources = {source["name"]: source for source in old["sources"]}
    new_sources = {source["name"]: source for source in new["sources"]}
    for name in _names_of_both(old_sources, new_sources):
        if name not in new_sources:
            yield f"sources[{name}]: in the build, not in the mix"
        elif name not in old_sources:
            yield f"sources[{name}]: in the mix, not in the build"
        else:
            yield from _changes(f"sources[{name}].", old_sources[name], new_sources[name])
    same_names = old_sources.keys() == new_sources.keys()
    if same_names and list(old_sources) != list(new_sources):
        yield f"sources: the build has them in the order {', '.join(old_sources)}"


def _changes(prefix: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for key in _names_of_both(old, new):
        before = old.get(key)
        now = new.get(key)
        if before != now:
            yield f"{prefix}{key}: {_show(before)} in the build, {_show(now)} in the mix"


def _names_of_both(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*old, *new]))


def _show(value: Any) -> str:
    return "none" if value is None else json.dumps(value)


def _file_differences(
    source: SourceConfig, before: InputFiles, read_contents: bool
) -> Iterator[str]:
    now = _input_files(_file_facts(source, read_contents))
    same_contents = not read_contents or now.contents_hash == before.contents_hash
    if now.sizes_hash == before.sizes_hash and same_contents:
        return
    label = f"sources[{source.name}].path"
    if before.is_listed and now.is_listed:
        changes = _listed_changes(before.listed, now.listed)
    else:
        changes = [f"{_count(now)}, the build has {_count(before)}; or other contents"]
    for change in changes[:MAX_SHOWN_FILES]:
        yield f"{label}: {change}"
    if len(changes) > MAX_SHOWN_FILES:
        yield f"{label}: {len(changes) - MAX_SHOWN_FILES} more files differ"


def _count(inputs: InputFiles) -> str:
    return f"{inputs.files} files of {inputs.bytes} bytes together"


def _listed_changes(before: Sequence[FileFacts], now: Sequence[FileFacts]) -> list[str]:
    """Return how two lists of files differ, file by file."""
    old_files = _by_name(before)
    new_files = _by_name(now)
    changes = []
    for name in _names_of_both(old_files, new_files):
        if name not in new_files:
            changes.append(f"{name} is in the build, and not here")
        elif name not in old_files:
            changes.append(f"{name} is here, and not in the build")
        else:
            changes += _file_changes(name, old_files[name], new_files[name])
    return changes or ["the build has the files in another order"]


def _by_name(files: Sequence[FileFacts]) -> dict[str, list[FileFacts]]:
    """Return the files by name; files of several folders may share one."""
    named: dict[str, list[FileFacts]] = {}
    for facts in files:
        named.setdefault(facts[0], []).append(facts)
    return named


def _file_changes(name: str, old: Sequence[FileFacts], new: Sequence[FileFacts]) -> Iterator[str]:
    if len(old) != len(new):
        yield f"{len(new)} files are named {name}, {len(old)} in the build"
        return
    for (_, old_bytes, old_hash), (_, new_bytes, new_hash) in zip(old, new, strict=True):
        if old_bytes != new_bytes:
            yield f"{name} has {new_bytes} bytes, {old_bytes} in the build"
        elif new_hash and old_hash != new_hash:
            yield f"{name} has other content than in the build"


def _input_files(files: Sequence[FileFacts]) -> InputFiles:
    sizes = [(name, size) for name, size, _ in files]
    return InputFiles(
        files=len(files),
        bytes=sum(size for _, size in sizes),
        sizes_hash=_hash_of(sizes),
        contents_hash=_hash_of(files),
        listed=tuple(files) if len(files) <= MAX_LISTED_FILES else (),
    )


def _file_facts(source: SourceConfig, read_contents: bool) -> list[FileFacts]:
    read = read_inputs if read_contents else look_at_inputs
    return [file.facts for file in read([source])[source.name]]


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

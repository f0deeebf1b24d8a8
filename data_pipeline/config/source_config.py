"""One source of a data mix: its keys, the rules within it, and the files that it names."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.config.file_patterns import expand, plain_files
from data_pipeline.config.record_filters import FilterRule, is_field_name
from data_pipeline.config.strict_yaml import nearest
from data_pipeline.objects.object_paths import is_address

NATURAL_LANGUAGES = {
    "ar": "Arabic",
    "cs": "Czech",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fa": "Persian",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
"""Languages that a source may be in, by ISO 639-1 code."""
NOT_ONE_LANGUAGE = ("code", "math", "parallel", "mixed")
"""Labels for text that is not in one natural language."""
LANGUAGES = (*NATURAL_LANGUAGES, *NOT_ONE_LANGUAGE)
"""Valid values of `language`."""

SUFFIXES = {".jsonl": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text"}
"""Format that `format: auto` reads a file as, by its suffix without one of COMPRESSIONS."""
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
"""Suffixes of compressed JSONL and text files; whether one is compressed, its content decides."""
FILE_FORMATS = ("auto", "jsonl", "parquet", "text", "harmony")
"""Formats whose `path` names files; the others read a folder or nothing."""

DECIDING_RECORD_KEYS = ("messages", "reasoning_effort", "current_date")
RECORD_KEYS = (*DECIDING_RECORD_KEYS, "tools")
"""Keys of a conversation that are read."""
THINKING_KEYS = ("thinking", "reasoning_content", "reasoning")
"""Names of an assistant's analysis: the chat template's, and those of inference servers."""
TOOL_CALL_KEYS = ("tool_calls", "function_call")
"""Keys of a message that say that it calls a tool."""
DECIDING_MESSAGE_KEYS = ("role", "channel", "content", "loss", *THINKING_KEYS, *TOOL_CALL_KEYS)
MESSAGE_KEYS = (*DECIDING_MESSAGE_KEYS, "recipient", "name", "tool_call_id")
"""Keys of a message that are read. Those that do not decide may be listed in `ignored_keys`."""
DECIDING_SHAPE_KEYS = (
    "conversations",
    "from",
    "value",
    "system",
    "instruction",
    "input",
    "output",
    "history",
)
"""Keys that decide what a record says in the shape of ShareGPT or Alpaca, and in no other."""

MAX_EPOCHS = 10_000
"""Largest number of epochs that a source may ask for."""
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_COMMIT = re.compile(r"[0-9a-f]{40}")

Shape = Literal["auto", "harmony", "openai", "sharegpt", "alpaca"]
"""Shapes of records of conversations; `text.record_shapes` says what each is."""
Normalization = Literal["newlines", "nfc", "nfkc", "width", "control", "spaces"]
"""Names of the cleaning steps; `text.cleaning` says what each does, and what it destroys."""
CLUSTER_PLACES = ("file", "folder")
"""Values of `cluster_by` that are no key."""
Problem = tuple[str, str]
"""Key of a configuration, and what is wrong with its value."""


def check_name(name: str) -> Iterator[Problem]:
    """Yield a problem if `name` cannot be the name of a folder and of a metric."""
    if not NAME.fullmatch(name):
        yield "name", f"is '{name}', must be 1 to 64 of: lower-case letters, digits, '_', '-'."


def check_language(language: str) -> Iterator[Problem]:
    """Yield a problem if `language` is not one of LANGUAGES."""
    if language not in LANGUAGES:
        yield "language", f"is '{language}', which is not known.{nearest(language, LANGUAGES)}"


def check_ignored_keys(
    keys: tuple[str, ...], file_format: str, shape: Shape = "auto"
) -> Iterator[Problem]:
    """Yield a problem if there are ignored keys that nothing reads, or that mean something."""
    if keys and file_format != "harmony":
        yield (
            "ignored_keys",
            f"is given, but format: {file_format} has no conversations. Remove it.",
        )
    for key in keys:
        if key in (*DECIDING_RECORD_KEYS, *DECIDING_MESSAGE_KEYS):
            yield (
                "ignored_keys",
                f"lists '{key}', which decides what a conversation says. Remove it from the list.",
            )
        elif key in DECIDING_SHAPE_KEYS and shape not in ("harmony", "openai"):
            yield (
                "ignored_keys",
                f"lists '{key}', which decides what a conversation of ShareGPT or Alpaca says. "
                "Remove it from the list, or set shape: harmony or openai if all records have "
                "'messages'.",
            )


def check_normalise(steps: tuple[Normalization, ...], file_format: str) -> Iterator[Problem]:
    """Yield a problem if cleaning steps exclude each other, or have no plain text to clean."""
    if "nfc" in steps and "nfkc" in steps:
        yield "normalise", "lists nfc and nfkc. Choose one."
    if steps and file_format in ("mock", "harmony"):
        yield "normalise", f"is given, but format: {file_format} has no plain text. Remove it."


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One stream of documents of one language and domain."""

    name: str
    """Unique name within the mix, used for folders and metrics: lower-case letters, digits, `_` and
    `-`."""
    language: str
    """Label of the text: an ISO 639-1 code, or code, math, parallel or mixed."""
    domain: str
    """Kind of text in your own words, for example web, encyclopedia or code."""
    path: str | tuple[str, ...] | None = None
    """File, glob, or a list of them, relative to the YAML file, or s3://BUCKET/KEY with the same
    patterns; a folder for the formats huggingface and build."""
    format: Literal[
        "auto", "jsonl", "parquet", "text", "harmony", "huggingface", "build", "mock"
    ] = "auto"
    """auto goes by the suffix; text is one document per file; harmony reads JSONL conversations;
    huggingface reads a dataset from the Hub or from disk; build takes the training documents of an
    earlier build; mock invents random tokens for speed tests."""
    kind: Literal["given", "self_replay"] = "given"
    """self_replay is text that the base model wrote (`cpt replay`): its sidecar is verified, and
    training refuses it if the run starts from another model."""
    text_field: str = "text"
    """Key (JSONL) or column (Parquet, datasets) that holds the text. `a.b` is the field b inside
    the field a, unless there is a field whose own name is `a.b`."""
    template: str | None = None
    """Text composed of several fields, for example "{title}: {meta.body}"; replaces
    `text_field`. With `shape: alpaca` it is the question."""
    filters: tuple[FilterRule, ...] = ()
    """Conditions on fields of a record, all of which a document must meet. Documents that do not
    are counted by condition, and are no rejects."""
    hook: str | None = None
    """Function of your own that every cleaned text passes through, as "clean.py:function", relative
    to the YAML file: function(text, record) returns the text, or None to leave the document out."""
    min_characters: int | None = None
    """Characters that a cleaned text must have; shorter ones are filtered out."""
    min_tokens: int | None = None
    """Tokens that a document must have; shorter ones are filtered out."""
    max_tokens: int | None = None
    """Tokens that a document may have; longer ones are filtered out."""
    keep: tuple[str, ...] = ()
    """Fields of a record that the build keeps beside the tokens, such as url and id, for `cpt data
    where`; each is cut to 2,000 characters."""
    cluster_by: str | None = None
    """What documents that belong together have in common: `file`, `folder`, or the key or column
    that names it, for example url, of which the host counts. The guard measures one held-out
    document of each cluster first; without it every document counts as independent, but for the
    turns of one conversation (`turns: each`)."""
    dataset: str | None = None
    """Name on the Hugging Face Hub, for `format: huggingface` without `path`."""
    revision: str | None = None
    """Commit of `dataset`: 40 hexadecimal digits, so that the text cannot change under the run."""
    subset: str | None = None
    """Configuration of `dataset`, if it has several."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    build_sources: tuple[str, ...] = ()
    """Sources to take from an earlier build; empty takes all of them."""
    shape: Shape = "auto"
    """Shape of the records of `format: harmony`: harmony is that of this project; openai has parts
    of content, `weight` and `function_call`; sharegpt has `conversations` of `from` and `value`;
    alpaca has `instruction`, `input` and `output`, or a `template`. auto takes `messages` as
    harmony, and the other two as what they are."""
    loss: Literal["all", "assistant"] = "all"
    """Tokens of conversations that are learned: all; or assistant, those that the model generates
    at inference in the last turn, up to <|call|> or <|return|>."""
    turns: Literal["last", "each"] = "last"
    """Documents that a conversation becomes with `loss: assistant`: one, of which the last turn is
    learned; or each, one for every turn, with the history as inference shows it."""
    require_analysis: bool = False
    """Whether a conversation whose last turn has no analysis is rejected and counted. Answers
    without analysis teach the model not to think."""
    too_long: Literal["reject"] | None = None
    """What becomes of a conversation longer than a row: reject, also if it is not given, leaves it
    out and counts it. A conversation is never cut."""
    ignored_keys: tuple[str, ...] = ()
    """Keys of conversations and their messages that may be dropped, for `format: harmony`; any
    other key that is not known rejects its record."""
    normalise: tuple[Normalization, ...] = ()
    """Cleaning steps, done in the order of `STEPS` in data_pipeline/text/cleaning.py; empty leaves
    the text unchanged."""
    fill_in_the_middle: float | None = None
    """Refused with the reason: gpt-oss's vocabulary (o200k_harmony) has no tokens for it."""
    weight: float = 0.0
    """Share of the predicted tokens, 0 to 1; all weights sum to 1. Every source gives this or
    `epochs`, and 0 means that it is never trained on, unless a phase gives it a weight or a guard
    domain names it in `served_by` or among the sources of its prompts."""
    epochs: float | None = None
    """Instead of `weight`, in all sources of the mix: how often the source is read over the run,
    above 0. Its weight follows from the learned tokens of the build."""
    loss_weight: float = 1.0
    """How much the loss of each of its predicted tokens counts, 0 or from 1e-6 to 1e6: the loss
    that is trained is the mean over the tokens of a batch, weighted by it. What is logged is not
    weighted."""
    held_out_share: float = 0.0
    """Share of the documents that are held out for measurement and never trained on, 0 to 1."""
    max_epochs: float | None = None
    """Largest number of epochs; a plan that repeats the source more often is refused."""
    num_documents: int | None = None
    """Documents to invent, for `format: mock` only."""
    mean_tokens: int | None = None
    """Mean tokens of an invented document, for `format: mock` only."""

    def check(self) -> Iterator[Problem]:
        """Yield (key, problem) for each broken rule within one source."""
        yield from check_name(self.name)
        yield from check_language(self.language)
        if not self.domain.strip():
            yield "domain", "is empty. Say what kind of text this is, for example: web."
        if not 0 <= self.held_out_share <= 1:
            yield (
                "held_out_share",
                f"is {self.held_out_share:g}, must be from 0 to 1 (a share of the documents).",
            )
        if self.held_out_share == 1 and self.is_trained:
            yield (
                "held_out_share",
                "is 1, which leaves nothing to train on. Set weight: 0, or hold out less.",
            )
        if self.loss_weight != 0 and not 1e-6 <= self.loss_weight <= 1e6:
            yield (
                "loss_weight",
                f"is {self.loss_weight:g}, must be 0 or from 1e-6 to 1e6. Remove it to count each "
                "token once.",
            )
        if self.max_epochs is not None and self.max_epochs <= 0:
            yield (
                "max_epochs",
                f"is {self.max_epochs:g}, must be above 0. Remove it to repeat without limit.",
            )
        yield from self._check_epochs()
        yield from self._check_template()
        yield from self._check_text()
        yield from self._check_filters()
        yield from self._check_fill_in_the_middle()
        yield from self._check_clusters()
        yield from check_ignored_keys(self.ignored_keys, self.format, self.shape)
        yield from self._check_conversations()
        yield from self._check_hub()
        yield from self._check_folder()
        yield from self._check_mock()

    def _check_epochs(self) -> Iterator[Problem]:
        if self.epochs is None:
            return
        if not 0 < self.epochs <= MAX_EPOCHS:
            yield (
                "epochs",
                f"is {self.epochs:g}, must be above 0 and at most {MAX_EPOCHS:,}. A source that is "
                "never trained on has weight: 0 in its place.",
            )
        elif self.max_epochs is not None and self.epochs >= self.max_epochs:
            yield (
                "epochs",
                f"is {self.epochs:g}, must be below max_epochs {self.max_epochs:g}: a run draws "
                "whole batches, so it ends a little behind its epochs. Lower it, raise max_epochs "
                "by a hundredth or more, or remove it.",
            )

    def _check_template(self) -> Iterator[Problem]:
        if self.template is None:
            return
        try:
            fields = template_fields(self.template)
        except ValueError as error:
            yield (
                "template",
                f"is not a template: {error}. Write a brace that is text twice: {{{{.",
            )
            return
        if not fields:
            yield (
                "template",
                "names no field. Write fields in braces, for example: '{title}\\n{text}'.",
            )

    def _check_text(self) -> Iterator[Problem]:
        if self.format in ("text", "harmony", "build", "mock"):
            problem = f"is given, but format: {self.format} has no fields. Remove it."
            if self.template is not None and self.shape != "alpaca":
                yield "template", problem
            elif self.text_field != "text":
                yield "text_field", problem
        if self.kind == "self_replay" and self.format not in ("auto", "jsonl", "harmony"):
            yield (
                "kind",
                f"is self_replay, but cpt replay writes JSONL, not format: {self.format}. "
                "Remove one of them.",
            )
        if self.kind == "self_replay" and any(map(is_address, self.patterns())):
            yield (
                "kind",
                "is self_replay, but path names objects. Copy the files and their sidecar here.",
            )
        yield from check_normalise(self.normalise, self.format)

    def _check_conversations(self) -> Iterator[Problem]:
        """Yield the broken rules on the keys of conversations."""
        given = {
            "shape": self.shape != "auto",
            "loss": self.loss != "all",
            "turns": self.turns != "last",
            "require_analysis": self.require_analysis,
            "too_long": self.too_long is not None,
        }
        for key, is_given in given.items():
            if is_given and self.format != "harmony":
                yield key, f"is given, but format: {self.format} has no conversations. Remove it."
        if self.turns == "each" and self.loss == "all":
            yield (
                "turns",
                "is each, but loss is all: every document would teach all earlier turns again, "
                "without their analysis. Set loss: assistant, or turns: last.",
            )

    def _check_filters(self) -> Iterator[Problem]:
        for key, given in (("filters", self.filters), ("keep", self.keep)):
            if given and self.format in ("text", "build", "mock"):
                yield key, f"is given, but format: {self.format} has no fields. Remove it."
        if self.hook is not None and self.format in ("harmony", "mock"):
            yield "hook", f"is given, but format: {self.format} has no plain text. Remove it."
        if self.min_characters is not None and self.format == "harmony":
            yield (
                "min_characters",
                "is given, but format: harmony has no plain text. Set min_tokens in its place.",
            )
        for name in self.keep:
            if not is_field_name(name) or self.keep.count(name) > 1:
                yield "keep", f"lists '{name}', which names no field, or one that it lists twice."
        if not is_field_name(self.text_field):
            yield "text_field", f"is '{self.text_field}', which names no field."
        limits = {
            "min_characters": self.min_characters,
            "min_tokens": self.min_tokens,
            "max_tokens": self.max_tokens,
        }
        for key, value in limits.items():
            if value is not None and value < 1:
                yield key, f"is {value}, must be at least 1. Remove it to set no limit."
            elif value is not None and self.format == "mock":
                yield key, "is given, but format: mock invents documents. Remove it."
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            yield (
                "min_tokens",
                f"is {self.min_tokens}, above max_tokens {self.max_tokens}: no document would "
                "pass.",
            )

    def _check_fill_in_the_middle(self) -> Iterator[Problem]:
        if self.fill_in_the_middle is not None:
            yield (
                "fill_in_the_middle",
                "is given, but the vocabulary of gpt-oss (o200k_harmony) has no token that marks a "
                "prefix, a middle or a suffix, and a reserved one would mean nothing to the "
                "programs that run the model. Remove it: code is learned from left to right.",
            )

    def _check_clusters(self) -> Iterator[Problem]:
        if self.cluster_by is None:
            return
        if self.format in ("build", "mock"):
            yield "cluster_by", f"is given, but format: {self.format} has no files. Remove it."
        elif self.cluster_by in CLUSTER_PLACES:
            if self.format == "huggingface":
                yield "cluster_by", "is given, but a dataset has no files. Name one of its columns."
        elif self.format in ("text", "harmony"):
            yield (
                "cluster_by",
                f"is '{self.cluster_by}', but format: {self.format} has no such key. Set file or "
                "folder.",
            )

    def _check_hub(self) -> Iterator[Problem]:
        """Yield the broken rules on the keys of a dataset on the Hugging Face Hub."""
        from_hub = self.format == "huggingface" and self.path is None
        if from_hub and self.dataset is None:
            yield (
                "dataset",
                "is missing. Give a name on the hub, or the path of a dataset saved on disk.",
            )
        if from_hub and self.dataset is not None and not _COMMIT.fullmatch(self.revision or ""):
            yield (
                "revision",
                f"is '{self.revision}', must be a commit (40 hexadecimal digits): names move.",
            )
        hub_keys = {"dataset": self.dataset, "revision": self.revision, "subset": self.subset}
        for key, value in hub_keys.items():
            if value is not None and not from_hub:
                yield (
                    key,
                    "is given, but only format: huggingface without a path uses it. Remove it.",
                )

    def _check_folder(self) -> Iterator[Problem]:
        if self.split != "train" and self.format != "huggingface":
            yield "split", "is given, but only format: huggingface has splits. Remove it."
        if self.build_sources and self.format != "build":
            yield "build_sources", "is given, but only format: build has them. Remove it."
        if self.format in ("huggingface", "build") and isinstance(self.path, tuple):
            yield (
                "path",
                f"is a list, but format: {self.format} reads one folder. "
                "Write one source for each folder.",
            )
        if self.format == "build" and self.path is None:
            yield "path", "is missing. Give the folder of an earlier build."

    def _check_mock(self) -> Iterator[Problem]:
        is_mock = self.format == "mock"
        if is_mock and self.path is not None:
            yield "path", "is given, but format: mock reads no files. Remove one of the two."
        sizes = {"num_documents": self.num_documents, "mean_tokens": self.mean_tokens}
        for key, value in sizes.items():
            if value is None and is_mock:
                yield key, "is missing. format: mock needs it."
            elif value is not None and not is_mock:
                yield key, "is given, but only format: mock invents documents. Remove it."
            elif value is not None and value < 2:
                yield key, f"is {value}, must be at least 2."

    @property
    def is_trained(self) -> bool:
        """Whether the mix draws from the source without a phase that says so."""
        return self.weight > 0 or self.epochs is not None

    def patterns(self) -> tuple[str, ...]:
        """Return `path` as a tuple, empty if there is none."""
        if self.path is None:
            return ()
        if isinstance(self.path, str):
            return (self.path,)
        return self.path

    def files(self) -> list[Path]:
        """Return the input files, or the objects of a store as paths that open by requests.

        Patterns keep the order in which they are given; the files of one glob or folder are sorted
        by name.
        """
        files: list[Path] = []
        if self.format in FILE_FORMATS:
            for pattern in self.patterns():
                files += expand(pattern)
            return files
        for folder in self.patterns():
            files += plain_files(Path(folder).rglob("*"))
        return sorted(files)

    def format_of(self, path: Path) -> str | None:
        """Return the format to read `path` in; None if `auto` does not know the suffix."""
        if self.format == "auto":
            return suffix_format(path)
        return self.format


def suffix_format(path: Path) -> str | None:
    """Return the format that the suffix of a file stands for; None if it is not known."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        if name.endswith(compression):
            inner = SUFFIXES.get(Path(name.removesuffix(compression)).suffix)
            return None if inner == "parquet" else inner
    return SUFFIXES.get(Path(name).suffix)


def template_fields(template: str) -> tuple[str, ...]:
    """Return the names of the fields in a template, in order.

    Raises:
        ValueError: A brace is left open, or a field is not a plain name.
    """
    names = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not is_field_name(name) or spec or conversion or set("[]") & set(name):
            raise ValueError(f"'{{{name}}}' is not a plain field name")
        names.append(name)
    return tuple(names)


def fill_template(template: str, texts: Mapping[str, str]) -> str:
    """Return a template with its fields replaced.

    Args:
        template: One whose fields `template_fields` accepts.
        texts: Text of each field by its whole name, dots included: nothing is looked up in an
            object, as `str.format` would do.
    """
    pieces = []
    for literal, name in _template_pieces(template):
        pieces.append(literal)
        if name is not None:
            pieces.append(texts[name])
    return "".join(pieces)


@functools.lru_cache(maxsize=64)
def _template_pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """Return (text, name of the field behind it or None) for each piece of a template."""
    return tuple((literal, name) for literal, name, _, _ in string.Formatter().parse(template))

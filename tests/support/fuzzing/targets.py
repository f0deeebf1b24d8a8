"""The kinds of files that others may have made: a good one of each, and what reads it."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import yaml

from cpt import cli
from cpt.checkpoint.listing import checkpoint_table, list_checkpoints
from cpt.checkpoint.manifest import METADATA, RANGES
from cpt.checkpoint.manifest import read_manifest as read_checkpoint_manifest
from cpt.checkpoint.reader import read_weights
from cpt.checkpoint.run_state import RunState
from cpt.config import LaunchInfo, load, resolve
from cpt.model.configuration import PRESETS, load_config
from cpt.offline.evaluation.local import local_contents
from cpt.offline.evaluation.tasks import load_tasks
from cpt.resilience.lock import LOCK, describe, look_at_lock
from data_pipeline.build.build import build
from data_pipeline.config.generation_config import read_prompts
from data_pipeline.config.mix_file import load_mix
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.reading.sources import read_texts
from data_pipeline.store.manifest import read_manifest as read_build_manifest
from data_pipeline.store.verification import check_files
from data_pipeline.text.cleaning import Tally
from tests.support.checkpoints import old_checkpoint, sign_file, write_checkpoint
from tests.support.fuzzing.attack import Target
from tests.support.fuzzing.mutations import text_of
from tests.support.run_events import long_run, traces
from tests.support.run_folders import leave_lock, make_run

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "data_pipeline" / "sample"
STEP = 100
MIX = """
seq_len: 32
seed: 7
near_duplicates: 0
decontaminate_tokens: 0
guard: {min_documents: 1, min_tokens: 1}
sources:
  - {name: en, language: en, domain: web, path: en.jsonl, held_out_share: 0.5, weight: 1.0}
"""


class BadOutput(BaseException):
    """A command that told of a bug of its own, or showed a control character of others."""


def run_command(*words: str) -> None:
    """Run a subcommand of cpt in this process.

    Raises:
        BadOutput: it shows a stack trace, calls something a bug, or sends a control character.
    """
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        cli.main(list(words))
    text = shown.getvalue()
    for line in text.split("\n"):
        if "This is a bug" in line or line.lstrip().startswith("Traceback"):
            raise BadOutput(f"cpt {words[0]}: {line[:200]}")
        raw = [character for character in line if unicodedata.category(character) in ("Cc", "Cf")]
        if raw:
            raise BadOutput(f"cpt {words[0]} shows {raw[:5]!r} raw")


# checkpoints and builds


def make_checkpoint(folder: Path) -> Path:
    return write_checkpoint(folder, STEP) / "manifest.json"


def sign_checkpoint(folder: Path, tree: Any) -> str:
    if not isinstance(tree, dict):
        return text_of(tree)
    tree.pop("checksum", None)
    try:
        # as the reader computes it, from what the text says
        body = json.dumps(json.loads(text_of(tree)), sort_keys=True)
    except (ValueError, RecursionError):
        return text_of(tree)
    tree["checksum"] = xxhash.xxh3_128(body.encode()).hexdigest()
    return text_of(tree)


def read_checkpoint(folder: Path) -> None:
    checkpoint_table(list_checkpoints(folder, verify=True))
    for step in sorted((folder / "checkpoints").iterdir()):
        manifest = read_checkpoint_manifest(step)
        RunState.from_json(manifest.state, step.name)


def make_range_index(folder: Path) -> Path:
    return write_checkpoint(folder, STEP) / RANGES


def make_old_metadata(folder: Path) -> Path:
    return old_checkpoint(folder) / METADATA


def make_old_shard(folder: Path) -> Path:
    return old_checkpoint(folder) / "__0_0.distcp"


def read_old_shard(folder: Path) -> None:
    (step,) = (folder / "checkpoints").iterdir()
    sign_file(step, "__0_0.distcp")
    manifest = read_checkpoint_manifest(step)
    read_weights(step, list(manifest.tensors), manifest)


def signed_reader(name: str) -> Callable[[Path], None]:
    """Return a reader of a checkpoint whose manifest names the true hash of a changed file."""

    def read(folder: Path) -> None:
        (step,) = (folder / "checkpoints").iterdir()
        sign_file(step, name)
        read_checkpoint(folder)

    return read


def make_build(folder: Path) -> Path:
    lines = (SAMPLE / "en_web.jsonl").read_text().splitlines()[:6]
    (folder / "en.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "mix.yaml").write_text(MIX)
    build(load_mix(folder / "mix.yaml"), folder / "built")
    return folder / "built" / "manifest.json"


def sign_build(folder: Path, tree: Any) -> str:
    if not isinstance(tree, dict):
        return text_of(tree)
    tree.pop("checksum", None)
    try:
        body = json.dumps(json.loads(text_of(tree)), sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return text_of(tree)
    tree["checksum"] = hashlib.sha256(body.encode()).hexdigest()
    return text_of(tree)


def read_build(folder: Path) -> None:
    built = folder / "built"
    manifest = read_build_manifest(built)
    manifest.guard_sets()
    manifest.row_hashes()
    check_files(built, manifest, verify=True)


# configurations


def make_mix(folder: Path) -> Path:
    return Path(shutil.copy(ROOT / "configs" / "mixes" / "sample.yaml", folder / "mix.yaml"))


def read_mix(folder: Path) -> None:
    load_mix(folder / "mix.yaml", need_files=False)


def make_run_files(folder: Path) -> None:
    shutil.copy(ROOT / "configs" / "tiny.yaml", folder / "run.yaml")
    shutil.copy(ROOT / "ds_configs" / "z3_ulysses.json", folder / "ds.json")


def make_run_yaml(folder: Path) -> Path:
    make_run_files(folder)
    return folder / "run.yaml"


def make_ds_json(folder: Path) -> Path:
    make_run_files(folder)
    return folder / "ds.json"


def read_run_files(folder: Path) -> None:
    from cpt.deepspeed_adapter.json_values import block_problems

    run, located = load(folder / "run.yaml", folder / "ds.json", {}, block_problems)
    model = load_config(run.model.path, run.model.init)
    resolve(run, located, model, LaunchInfo(world_size=2, local_world_size=2))


def make_model_config(folder: Path) -> Path:
    values = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], **PRESETS["tiny"]}
    (folder / "config.json").write_text(json.dumps(values))
    return folder / "config.json"


def read_model_config(folder: Path) -> None:
    load_config(folder, None)


def make_tasks(folder: Path) -> Path:
    shutil.copytree(ROOT / "configs" / "tasks", folder, dirs_exist_ok=True)
    return folder / "sample.yaml"


def make_task_lines(folder: Path) -> Path:
    make_tasks(folder)
    return folder / "english_choice.jsonl"


def read_tasks(folder: Path) -> None:
    local_contents(load_tasks(folder / "sample.yaml"))


def make_prompts(folder: Path) -> Path:
    lines = [json.dumps({"prompt": f"What is {n}?", "answer": str(n)}) for n in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "prompts.jsonl"


# data


def source_texts(path: Path, **keys: Any) -> None:
    source = SourceConfig(
        name="s", language="en", domain="web", weight=1.0, path=(str(path),), **keys
    )
    for _ in read_texts(source, Tally()):
        pass


def make_jsonl(folder: Path) -> Path:
    lines = (SAMPLE / "ja_story.jsonl").read_text().splitlines()[:40]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "texts.jsonl"


def make_chat(folder: Path) -> Path:
    return Path(shutil.copy(SAMPLE / "en_chat.jsonl", folder / "chat.jsonl"))


def make_parquet(folder: Path) -> Path:
    lines = (SAMPLE / "en_web.jsonl").read_text().splitlines()[:40]
    texts = [json.loads(line)["text"] for line in lines]
    pq.write_table(pa.table({"text": texts}), folder / "texts.parquet", row_group_size=16)
    return folder / "texts.parquet"


def make_compressed(folder: Path) -> Path:
    content = (SAMPLE / "en_web.jsonl").read_bytes()
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    return folder / "texts.jsonl.gz"


# run directories


def make_metrics(folder: Path) -> Path:
    events = [{"event": "start", "step": 0, "time": 1.8e9}, *long_run(), traces(30)]
    return make_run(folder / "run", *events, saved=30) / "metrics.jsonl"


def read_status(folder: Path) -> None:
    run_command("status", "--run_dir", str(folder / "run"))
    run_command("checkpoints", "--run_dir", str(folder / "run"))


def read_report(folder: Path) -> None:
    run_command("report", "--run_dir", str(folder / "run"))


def make_resolved(folder: Path) -> Path:
    make_metrics(folder)
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    (folder / "run" / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    return folder / "run" / "config.resolved.yaml"


def make_lock(folder: Path) -> Path:
    leave_lock(folder)
    return folder / LOCK


def read_lock(folder: Path) -> None:
    sight = look_at_lock(folder)
    describe(None if sight is None else sight.holder)


def make_names(folder: Path) -> Path:
    make_metrics(folder)
    names = ["run/notes", "run/checkpoints/step-00000031", "run/logs", "run/.lock", "run/export"]
    (folder / "names.json").write_text(json.dumps(names))
    return folder / "names.json"


def read_names(folder: Path) -> None:
    """Make files of the names that a changed list holds, and look at the run directory."""
    for name in names_in(folder / "names.json"):
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError, ValueError):  # it cannot be a name
            if os.path.realpath(path).startswith(f"{folder}/run/"):
                os.makedirs(path)
    read_status(folder)
    run_command("report", "--run_dir", str(folder / "run"))


def names_in(path: Path) -> list[str]:
    """Return the relative paths of a list, each with an odd last part as well."""
    try:
        names = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        names = []
    if not isinstance(names, list):
        names = [names]
    found = []
    for name in names:
        if isinstance(name, str) and not name.startswith("/"):
            found += [name, f"run/{name}"[:200], f"run/checkpoints/step-{name}"[:200]]
    return found


def texts_of(name: str, **keys: Any) -> Any:
    """Return a reader of a data file of an attacked folder."""

    def read(folder: Path) -> None:
        source_texts(folder / name, **keys)

    return read


TARGETS = (
    Target(
        name="checkpoint manifest",
        make=make_checkpoint,
        read=read_checkpoint,
        sign=sign_checkpoint,
    ),
    Target(name="range index", make=make_range_index, read=signed_reader(RANGES)),
    Target(
        name="metadata of format 1",
        make=make_old_metadata,
        read=signed_reader(METADATA),
        is_tree=False,
    ),
    Target(name="shard of format 1", make=make_old_shard, read=read_old_shard, is_tree=False),
    Target(name="build manifest", make=make_build, read=read_build, sign=sign_build),
    Target(name="mix", make=make_mix, read=read_mix, load=yaml.safe_load),
    Target(name="run YAML", make=make_run_yaml, read=read_run_files, load=yaml.safe_load),
    Target(name="DeepSpeed JSON", make=make_ds_json, read=read_run_files),
    Target(name="config.json", make=make_model_config, read=read_model_config),
    Target(
        name="prompts",
        make=make_prompts,
        read=lambda folder: read_prompts(folder / "prompts.jsonl"),
        is_lines=True,
    ),
    Target(name="tasks", make=make_tasks, read=read_tasks, load=yaml.safe_load),
    Target(name="lines of a task", make=make_task_lines, read=read_tasks, is_lines=True),
    Target(name="JSONL", make=make_jsonl, read=texts_of("texts.jsonl"), is_lines=True),
    Target(
        name="conversations",
        make=make_chat,
        read=texts_of("chat.jsonl", format="harmony"),
        is_lines=True,
    ),
    Target(name="gzip", make=make_compressed, read=texts_of("texts.jsonl.gz"), is_tree=False),
    Target(name="Parquet", make=make_parquet, read=texts_of("texts.parquet"), is_tree=False),
    Target(name="metrics.jsonl", make=make_metrics, read=read_status, is_lines=True),
    Target(name="config.resolved.yaml", make=make_resolved, read=read_status, load=yaml.safe_load),
    Target(name="names of files", make=make_names, read=read_names),
    Target(name="lock", make=make_lock, read=read_lock),
    Target(name="report", make=make_metrics, read=read_report, is_lines=True),
)

"""Small corpora where the paths of a shipped data-mix template point, so that it can be read."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from data_pipeline.build.self_replay import write_sidecar
from tests.data_pipeline.inputs import make_texts

ROOT = Path(__file__).resolve().parents[2]


def template_with_corpora(name: str, root: Path, seq_len: int | None = None) -> Path:
    """Copy the template `name` below `root`, and write a small corpus for each of its sources.

    Args:
        seq_len: Replaces the template's `seq_len`, as the comment of a run YAML asks for.

    Returns:
        The copy, `root`/configs/mixes/`name`.yaml.
    """
    path = root / "configs" / "mixes" / f"{name}.yaml"
    path.parent.mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "mixes" / f"{name}.yaml", path)
    shutil.copytree(ROOT / "configs" / "guard", root / "configs" / "guard")
    if seq_len is not None:
        text, replaced = re.subn(r"(?m)^seq_len: \d+$", f"seq_len: {seq_len}", path.read_text())
        assert replaced == 1
        path.write_text(text)
    for source in yaml.safe_load(path.read_text())["sources"]:
        corpus = path.parent / source["path"].replace("*", "part")
        _write(corpus, _records(source))
        if source.get("kind") == "self_replay":
            write_sidecar(corpus.parent, "0" * 32, {}, [corpus.name])
    return path


def _records(source: dict[str, Any]) -> list[dict[str, Any]]:
    texts = make_texts(30, source["name"])
    if source.get("format") == "harmony":
        answer = {"role": "assistant", "thinking": "One word is enough.", "content": "yes"}
        return [{"messages": [{"role": "user", "content": text}, answer]} for text in texts]
    return [
        {key: text for key in ("text", "title", "content", "en", "ja", "url")} for text in texts
    ]


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_bytes(content)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        datasets.Dataset.from_list(records).save_to_disk(str(path))

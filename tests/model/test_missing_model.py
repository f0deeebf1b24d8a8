"""A path that holds no model is told by what it is instead, with the right path or command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt.errors import ConfigError
from cpt.model.configuration import load_config
from cpt.model.missing_model import download_command

FETCH = 'hf download openai/gpt-oss-20b --exclude "original/*" --exclude "metal/*"'


def told(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, None)
    return str(caught.value)


def put(path: Path, content: bytes = b"{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def hub_cache(root: Path) -> Path:
    """A model in the Hub's cache with two snapshots, of which `main` is the older one."""
    model = root / "models--openai--gpt-oss-20b"
    put(model / "snapshots" / "aaa" / "config.json")
    put(model / "snapshots" / "bbb" / "config.json")
    put(model / "refs" / "main", b"aaa")
    return model


def test_name_on_the_hub_is_told_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    text = told(tmp_path / "openai" / "gpt-oss-120b")
    assert text.startswith(f"model.path: {tmp_path}/openai/gpt-oss-120b does not exist.")
    assert "If openai/gpt-oss-120b is a name on the Hugging Face Hub, fetch it first" in text
    assert download_command("openai/gpt-oss-120b") in text
    assert "--local-dir models/gpt-oss-120b" in text
    assert "hf download someone/gpt-oss-20b-ja " in told(tmp_path / "someone/gpt-oss-20b-ja")


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b"])
@pytest.mark.parametrize("there", [False, True])
def test_folder_of_a_recipe_is_told_with_the_release_that_belongs_there(
    tmp_path: Path, name: str, there: bool
) -> None:
    folder = tmp_path / "models" / name
    if there:
        put(folder.parent / "gpt-oss-20b-ja" / "config.json")
    text = told(folder)
    assert f"hf download openai/{name} " in text
    assert text.endswith(f"--local-dir {folder}")


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-20b@2000"])
def test_run_that_a_recipe_begins_from_is_no_name_on_the_hub(tmp_path: Path, name: str) -> None:
    text = told(tmp_path / "runs" / name)
    assert "needs that run first" in text and "--set model.path=DIRECTORY" in text
    assert "hf download" not in text


@pytest.mark.parametrize("name", ["~/models/20b", "$HOME/models/20b"])
def test_variable_that_nobody_filled_in_is_told(tmp_path: Path, name: str) -> None:
    assert "Variables such as $HOME are not filled in here" in told(tmp_path / name)


def test_misspelled_folder_is_told_with_its_neighbor(tmp_path: Path) -> None:
    put(tmp_path / "gpt-oss-20b" / "config.json")
    assert told(tmp_path / "gpt-oss-20").endswith("does not exist. Did you mean 'gpt-oss-20b'?")


def test_gguf_file_is_named_as_such(tmp_path: Path) -> None:
    file = put(tmp_path / "gpt-oss-20b-Q4_K_M.gguf", b"GGUF\x03\x00\x00\x00" + bytes(64))
    text = told(file)
    assert f"{file} is a GGUF file (quantized weights of llama.cpp)" in text and FETCH in text
    text = told(tmp_path)
    assert f"It holds {file.name}: GGUF is quantized for llama.cpp" in text and FETCH in text


def test_model_in_the_hubs_cache_is_told_with_its_snapshot(tmp_path: Path) -> None:
    model = hub_cache(tmp_path)
    right = model / "snapshots" / "aaa"
    assert told(model).endswith(f"It is a model in the Hub's cache, whose files are in {right}")
    assert told(tmp_path).endswith(
        f"the Hub's cache: give the folder of one model, such as {right}"
    )
    (model / "refs" / "main").unlink()
    assert f"{model / 'snapshots'}/" in told(model)
    for name in ("aaa", "bbb"):
        (model / "snapshots" / name / "config.json").unlink()
    assert told(model).endswith("Fetch it again: hf download openai/gpt-oss-20b")


def test_openais_own_format_is_told_from_hugging_faces(tmp_path: Path) -> None:
    original = tmp_path / "original"
    put(original / "config.json", json.dumps({"num_experts": 32}).encode())
    put(original / "dtypes.json")
    text = told(original)
    assert "It is OpenAI's own format, which is not read." in text and FETCH in text
    text = told(tmp_path)
    assert "It holds OpenAI's own format (original/), which is not read." in text and FETCH in text


def of_config(folder: Path) -> Path:
    return put(folder / "config.json", b'{"model_type": "gpt_oss"}')


def of_weights(folder: Path) -> Path:
    return put(folder / "model.safetensors", b"\x02" + bytes(7) + b"{}")


def of_page(folder: Path) -> Path:
    return put(folder / "page", b"<!DOCTYPE html><html></html>")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (of_config, "is a file. Give its directory, which must have a config.json: "),
        (of_weights, "is a file. Give its directory, which must have a config.json: "),
        (of_page, "is a file (an HTML page), must be a Hugging Face directory"),
    ],
)
def test_file_is_told_as_what_it_is(
    tmp_path: Path, make: Callable[[Path], Path], words: str
) -> None:
    assert words in told(make(tmp_path))


def test_directory_with_pickles_only_is_told(tmp_path: Path) -> None:
    put(tmp_path / "pytorch_model.bin")
    assert "It holds pytorch_model.bin: pickles can run code and are not read." in told(tmp_path)


def test_weights_without_configuration_are_told(tmp_path: Path) -> None:
    of_weights(tmp_path)
    assert told(tmp_path).endswith("fetch config.json from where they are from, too.")


def test_run_and_checkpoint_of_this_project_are_told_with_the_export(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step-00000030"
    put(step / "manifest.json")
    for path in (tmp_path, step):
        assert f"Export its weights first: cpt export --run_dir {tmp_path} " in told(path)


@pytest.mark.parametrize("name", ["config.resolved.yaml", "metrics.jsonl"])
def test_run_without_a_checkpoint_is_told_as_a_run(tmp_path: Path, name: str) -> None:
    put(tmp_path / name)
    assert "a run of this project that has saved no checkpoint yet. Wait for" in told(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_alone_is_told_with_the_import_and_the_merged_export(
    tmp_path: Path, name: str
) -> None:
    put(tmp_path / name)
    text = told(tmp_path)
    assert "It holds an adapter alone, in PEFT's format" in text
    assert "cpt import-adapter" in text and "cpt export --format bf16 of the run" in text


def test_folder_above_a_model_is_told_with_the_model(tmp_path: Path) -> None:
    of_config(tmp_path / "step-00000030")
    assert told(tmp_path).endswith(f"Did you mean {tmp_path / 'step-00000030'}?")


def test_empty_directory_is_told_with_the_command(tmp_path: Path) -> None:
    text = told(tmp_path)
    assert text.startswith(f"model.path: {tmp_path / 'config.json'} does not exist.")
    assert FETCH in text


def test_option_is_named_as_the_person_wrote_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--base: "):
        load_config(tmp_path, None, option="--base")

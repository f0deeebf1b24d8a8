"""A model that is spread over devices computes what it computes on one."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import GptOssForCausalLM

from cpt.offline.plain_model import LAYER, load_export
from cpt.offline.sampling import generate
from cpt.training.sampling_settings import Sampling
from tests.dist.cases import decoding_model

IDS = torch.arange(1, 200)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    decoding_model(512, num_layers=4).save_pretrained(str(folder))
    return folder


def test_a_directory_gives_what_transformers_itself_gives(folder: Path) -> None:
    theirs = GptOssForCausalLM.from_pretrained(folder)
    ours = load_export(folder)
    assert ours.dtype == theirs.dtype and ours.config.dtype == theirs.config.dtype
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_parts_in_files_and_in_memory_give_the_numbers_of_one_device(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    whole = load_export(folder)
    assert {type(layer).__name__ for layer in whole.model.layers} == {LAYER}
    device_map: dict[str, str | int] = {"model": "cpu", "lm_head": "disk"}
    for index in range(len(whole.model.layers)):
        device_map[f"model.layers.{index}"] = "disk" if index % 2 else "cpu"
    for name in ("embed_tokens", "norm", "rotary_emb"):
        device_map[f"model.{name}"] = "cpu"
    del device_map["model"]
    spread = load_export(folder, device_map)
    assert any(parameter.is_meta for parameter in spread.parameters())
    with torch.no_grad():
        assert torch.equal(spread(IDS).logits, whole(IDS).logits)
    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    assert generate(spread, [5, 6, 7], sampling) == generate(whole, [5, 6, 7], sampling)
    assert [path.name.startswith("cpt-offload-") for path in tmp_path.iterdir()] == [True]
    del spread

    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_automatic_map_without_a_gpu_keeps_a_small_model_in_memory(folder: Path) -> None:
    with torch.no_grad():
        expected = load_export(folder)(IDS).logits
        model = load_export(folder, "auto")
        assert torch.equal(model(IDS).logits, expected)
    assert not any(parameter.is_meta for parameter in model.parameters())

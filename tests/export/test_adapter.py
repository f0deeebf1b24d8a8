"""An adapter's export is what PEFT loads and merges to our numbers, and comes back as it was.

The oracle is peft over transformers' eager model in fp32, which gets the files unedited.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.model_weights import open_weights
from cpt.checkpoint.reader import read_weights, step_folder
from cpt.config.adapter_section import AdapterSection
from cpt.errors import ConfigError
from cpt.export.adapter import BASE_FILE, export_adapter
from cpt.export.adapter_import import ImportRequest, import_adapter
from cpt.export.huggingface import export_checkpoint
from cpt.model.weights.hf_layout import ADAPTER_CONFIG, ADAPTER_FILE, SINGLE_FILE
from cpt.model.weights.source import fill_parts
from tests.dist.cases import model_config, reference_model
from tests.support.adapters import write_adapter

SECTIONS = {
    "all": AdapterSection(kind="lora", rank=16, expert_rank=8, alpha=8.0),
    "shared": AdapterSection(kind="lora", rank=8, share_experts=True, alpha=20.0),
    "some_layers": AdapterSection(kind="lora", layers=(0, 2), rank=8, expert_rank=16),
    "down_only": AdapterSection(kind="lora", targets=("q_proj", "down_proj"), expert_rank=8),
    "experts": AdapterSection(kind="lora", targets=("experts",), rank=4, expert_rank=8, alpha=6.0),
    "dora": AdapterSection(kind="dora", targets=("attention",), rank=8, alpha=12.0),
}
"""Sections by what is special about them; no rank equals another one of its section by chance."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "base"
    reference_model().save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    """Return a folder with a run of every section."""
    for name, section in SECTIONS.items():
        write_adapter(base.parent / name, base, section, model_config())
    return base.parent


def checkpoint(folder: Path, name: str) -> Path:
    return step_folder(folder / name, 3)


def load_base(base: Path) -> Any:
    return GptOssForCausalLM.from_pretrained(
        str(base), dtype=torch.float32, attn_implementation="eager"
    ).eval()


def load_peft(base: Path, adapter: Path) -> Any:
    """Return PEFT's model, having checked that it has every tensor of the file and no other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(
            load_base(base), str(adapter), autocast_adapter_dtype=False
        )
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = load_file(adapter / ADAPTER_FILE)
    assert loaded.keys() == stored.keys()
    for name, value in stored.items():
        assert torch.equal(loaded[name], value), name
    return model.eval()


def fill(model: Any, step: Path) -> None:
    """Give a model the weights of a checkpoint, with its adapter added."""
    source = open_weights(step, read_manifest(step), torch.float32)
    targets = {}
    for name, parameter in model.named_parameters():
        targets[name] = (parameter.detach().view(-1), 0)
    fill_parts(targets, source)


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(80).view(2, 40) * 5 % 500
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("name", SECTIONS)
def test_peft_loads_and_merges_what_is_written_to_our_merged_model(
    base: Path, folder: Path, tmp_path: Path, name: str
) -> None:
    adapter = export_adapter(checkpoint(folder, name), tmp_path / "peft", "fp32")
    theirs = load_peft(base, adapter)
    ours = load_base(base)
    plain = logits_of(ours)
    fill(ours, checkpoint(folder, name))
    with_adapter = logits_of(theirs)
    assert largest(with_adapter, plain) > 0.01  # the adapter does something
    assert largest(with_adapter, logits_of(ours)) < 2e-5
    unloaded = dict(theirs.merge_and_unload().named_parameters())
    for parameter, value in ours.named_parameters():
        assert largest(value, unloaded[parameter]) < 1e-6, parameter


@pytest.mark.parametrize("mistake", ["order", "nesting", "alpha"])
def test_files_with_a_mistake_give_other_logits_or_do_not_load(
    base: Path, folder: Path, tmp_path: Path, mistake: str
) -> None:
    """So the comparison above would find them."""
    adapter = export_adapter(checkpoint(folder, "all"), tmp_path / "peft", "fp32")
    right = logits_of(load_peft(base, adapter))
    tensors = load_file(adapter / ADAPTER_FILE)
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text())
    changed = {}
    for key, value in tensors.items():
        if mistake == "order" and ".experts." in key and "lora_B" in key:
            value = value.view(value.shape[0], -1, 8).transpose(1, 2).reshape(value.shape)
        elif mistake == "nesting" and ".experts." in key:
            key = key.replace(".base_layer.", ".gate_up_proj.")
        changed[key] = value.contiguous()
    if mistake == "alpha":
        settings["alpha_pattern"] = {}
    save_file(changed, adapter / ADAPTER_FILE, metadata={"format": "pt"})
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = PeftModel.from_pretrained(
            load_base(base), str(adapter), autocast_adapter_dtype=False
        )
    assert largest(logits_of(wrong.eval()), right) > 0.002


def request(base: Path, source: Path, run_dir: Path, section: AdapterSection) -> ImportRequest:
    return ImportRequest(
        source=source,
        run_dir=run_dir,
        section=section,
        base_path=base,
        seed=0,
        dtype="fp32",
        config=model_config(),
    )


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_an_imported_adapter_is_exported_as_the_same_bytes(
    base: Path, folder: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    first = export_adapter(checkpoint(folder, name), tmp_path / "first", dtype)
    imported = import_adapter(request(base, first, tmp_path / "run", SECTIONS[name]))
    second = export_adapter(imported, tmp_path / "second", dtype)
    for file in (ADAPTER_FILE, ADAPTER_CONFIG, BASE_FILE, "SHA256SUMS"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_what_peft_saves_comes_back_as_the_same_bytes(
    base: Path, folder: Path, tmp_path: Path
) -> None:
    ours = export_adapter(checkpoint(folder, "all"), tmp_path / "ours", "fp32")
    load_peft(base, ours).save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    imported = import_adapter(request(base, tmp_path / "theirs", tmp_path / "run", SECTIONS["all"]))
    again = export_adapter(imported, tmp_path / "again", "fp32")
    stored = (tmp_path / "theirs" / ADAPTER_FILE).read_bytes()
    assert (again / ADAPTER_FILE).read_bytes() == stored


def test_merged_model_of_a_bf16_run_adds_to_the_weights_that_it_held(
    base: Path, tmp_path: Path
) -> None:
    section = SECTIONS["all"]
    write_adapter(tmp_path / "run", base, section, model_config(), dtype="bf16")
    merged = export_checkpoint(step_folder(tmp_path / "run", 3), tmp_path / "out", "fp32")
    before = load_file(base / SINGLE_FILE)
    after = load_file(merged / SINGLE_FILE)
    norm = "model.norm.weight"
    embeddings = "model.embed_tokens.weight"
    for name in (norm, embeddings):
        assert torch.equal(after[name], before[name].bfloat16().float()), name
    name = "model.layers.2.mlp.experts.down_proj"
    values = read_weights_of(tmp_path / "run", name)
    delta = section.scale * (values[0][3] @ values[1][3])
    expected = before[name][3].bfloat16().float() + delta
    assert largest(after[name][3], expected) < 1e-6


def read_weights_of(run_dir: Path, matrix: str) -> list[torch.Tensor]:
    step = step_folder(run_dir, 3)
    names = [f"{matrix}_lora_A", f"{matrix}_lora_B"]
    tensors = read_weights(step, names, read_manifest(step))
    return [tensors[name] for name in names]


def test_base_is_found_by_its_content_wherever_it_lies(
    base: Path, folder: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in base.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    step = checkpoint(folder, "all")
    out = export_checkpoint(step, tmp_path / "out", "bf16", base=moved)
    assert (out / SINGLE_FILE).is_file()
    tensors = load_file(moved / SINGLE_FILE)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, moved / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"another base: that of base has the hash tensors:\w+, moved"
    ):
        export_checkpoint(step, tmp_path / "other", "bf16", base=moved)
    assert not (tmp_path / "other").exists()

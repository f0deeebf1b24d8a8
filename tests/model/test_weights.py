"""A directory of weights is read whole and exactly, or refused by tensor and file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

from cpt.errors import ConfigError
from cpt.model import gpt_oss
from cpt.model.configuration import PRESETS, load_config
from cpt.model.experts.layer import EXPERT_TENSORS
from cpt.model.parameters import parameter_shapes
from cpt.model.weights import mxfp4
from cpt.model.weights.directory import DirectoryWeights, check_directory
from cpt.model.weights.hf_layout import (
    BLOCKS,
    INDEX_FILE,
    SCALES,
    SINGLE_FILE,
    is_expert_name,
    tensor_files,
)
from cpt.model.weights.source import fill_model
from cpt.parallel.traffic import Traffic

NORM = "model.layers.1.input_layernorm.weight"
EXPERT = "model.layers.0.mlp.experts.down_proj"


def small_config(**changes: Any) -> GptOssConfig:
    sizes = {
        "vocab_size": 96,
        "pad_token_id": 95,
        "bos_token_id": 94,
        "eos_token_id": 93,
        "num_hidden_layers": 2,
    }
    return GptOssConfig(**{**PRESETS["tiny"], **sizes, **changes})


def patched(
    ep_size: int = 1, ep_rank: int = 0, dtype: torch.dtype = torch.float32
) -> gpt_oss.GptOssForCPT:
    """A patched model on the meta device, as it is when a directory is checked."""
    model = gpt_oss.skeleton(small_config(), dtype)
    topology: Any = SimpleNamespace(
        ep_size=ep_size, ep_rank=ep_rank, ep_group=None, traffic=Traffic()
    )
    gpt_oss.patch(model, topology)
    return model


def filled(path: Path, **arguments: Any) -> dict[str, Tensor]:
    model = patched(**arguments)
    gpt_oss.materialize(model, torch.device("cpu"))
    fill_model(model, DirectoryWeights(path, parameter_shapes(small_config())))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def source() -> GptOssForCausalLM:
    """A model of plain transformers, every tensor random."""
    model = GptOssForCausalLM(small_config()).float()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def tensors(source: GptOssForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in source.named_parameters()}


@pytest.fixture
def path(tmp_path: Path, source: GptOssForCausalLM) -> Path:
    """One safetensors file, as save_pretrained writes it."""
    source.save_pretrained(str(tmp_path))
    assert (tmp_path / SINGLE_FILE).is_file()
    return tmp_path


@pytest.fixture
def cut(tmp_path: Path, source: GptOssForCausalLM) -> Path:
    """Several safetensors files and an index."""
    source.save_pretrained(str(tmp_path), max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    content = load_file(str(file))
    change(content)
    save_file(content, str(file), metadata={"format": "pt"})


def problems(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_directory(path, parameter_shapes(small_config()))
    return caught.value.problems


# values


def test_one_file_gives_every_value_of_transformers(path: Path, tensors: dict[str, Tensor]) -> None:
    found = filled(path)
    assert found.keys() == tensors.keys() and all(
        torch.equal(found[name], tensors[name]) for name in tensors
    )


def test_several_files_give_every_value_of_transformers(
    cut: Path, tensors: dict[str, Tensor]
) -> None:
    found = filled(cut)
    assert found.keys() == tensors.keys() and all(
        torch.equal(found[name], tensors[name]) for name in tensors
    )


@pytest.mark.parametrize("ep_size", [2, 8])
def test_ranks_together_hold_every_expert_once(
    path: Path, tensors: dict[str, Tensor], ep_size: int
) -> None:
    parts = [filled(path, ep_size=ep_size, ep_rank=rank) for rank in range(ep_size)]
    for name in (
        f"model.layers.{layer}.mlp.experts.{kind}" for layer in (0, 1) for kind in EXPERT_TENSORS
    ):
        assert torch.equal(torch.cat([part[name] for part in parts]), tensors[name]), name


def test_every_rank_holds_what_is_no_expert(path: Path, tensors: dict[str, Tensor]) -> None:
    found = filled(path, ep_size=4, ep_rank=3)
    assert all(
        torch.equal(found[name], tensors[name]) for name in tensors if ".experts." not in name
    )


def test_bf16_directory_fills_a_bf16_model_exactly(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(rounded, str(tmp_path / SINGLE_FILE))
    found = filled(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(found[name], rounded[name]) for name in rounded)


def test_bf16_directory_fills_an_fp32_model_exactly(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(rounded, str(tmp_path / SINGLE_FILE))
    found = filled(tmp_path)
    assert all(torch.equal(found[name], rounded[name].float()) for name in rounded)


def test_parameter_shapes_are_those_of_transformers(tensors: dict[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert parameter_shapes(small_config()) == expected
    assert list(parameter_shapes(small_config())) == list(expected)


@pytest.mark.parametrize("ep_size", [1, 4])
def test_parameter_shapes_are_global_whatever_the_layout(ep_size: int) -> None:
    shapes = parameter_shapes(small_config())
    for name, parameter in patched(ep_size=ep_size).named_parameters():
        local = tuple(parameter.shape)
        ranks = ep_size if is_expert_name(name) else 1
        assert shapes[name] == (local[0] * ranks, *local[1:]), name


def test_parameter_shapes_are_found_once_and_cannot_be_changed() -> None:
    shapes: Any = parameter_shapes(small_config())
    assert parameter_shapes(small_config()) is shapes
    assert parameter_shapes(small_config(vocab_size=128)) is not shapes
    with pytest.raises(TypeError):
        shapes["lm_head.weight"] = (1,)


# tensors


def test_missing_tensor_is_named(path: Path) -> None:
    rewrite(path / SINGLE_FILE, lambda content: content.pop(NORM))
    assert problems(path) == [f"{path}: tensor '{NORM}' is missing."]


def test_unknown_tensor_is_named_with_its_file(path: Path) -> None:
    rewrite(path / SINGLE_FILE, lambda content: content.update({"model.extra": torch.zeros(2)}))
    assert problems(path) == [f"{path / SINGLE_FILE}: unknown tensor 'model.extra'."]


@pytest.mark.parametrize("name", [NORM, EXPERT])
def test_misshapen_tensor_is_named_with_both_shapes(
    path: Path, tensors: dict[str, Tensor], name: str
) -> None:
    rewrite(path / SINGLE_FILE, lambda content: content.update({name: torch.zeros(3, 5)}))
    shape = tuple(tensors[name].shape)
    assert problems(path) == [
        f"{path / SINGLE_FILE}: tensor '{name}' has shape (3, 5), expected {shape}."
    ]


def test_transposed_expert_is_named(path: Path) -> None:
    rewrite(
        path / SINGLE_FILE,
        lambda content: content.update({EXPERT: content[EXPERT].mT.contiguous()}),
    )
    assert f"tensor '{EXPERT}' has shape" in problems(path)[0]


def test_directory_with_fewer_experts_is_named(path: Path) -> None:
    rewrite(
        path / SINGLE_FILE,
        lambda content: content.update({EXPERT: content[EXPERT][:4].contiguous()}),
    )
    assert f"tensor '{EXPERT}' has shape" in problems(path)[0]


def test_all_wrong_tensors_are_named_at_once(path: Path) -> None:
    def damage(content: dict[str, Tensor]) -> None:
        del content["lm_head.weight"]
        content.update({NORM: torch.zeros(1), "model.extra": torch.zeros(2)})

    rewrite(path / SINGLE_FILE, damage)
    found = "\n".join(problems(path))
    assert all(f"'{name}'" in found for name in ("lm_head.weight", NORM, "model.extra"))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn], ids=str
)
def test_tensor_that_is_no_plain_float_is_named(
    path: Path, tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """A quantized tensor of the right shape would be cast, and its scale forgotten."""
    rewrite(
        path / SINGLE_FILE,
        lambda content: content.update({EXPERT: torch.zeros(tensors[EXPERT].shape).to(dtype)}),
    )
    assert f"'{EXPERT}'" in problems(path)[0]


# files


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file_is_named(path: Path, share: float) -> None:
    file = path / SINGLE_FILE
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    found = problems(path)
    assert len(found) == 1 and found[0].startswith(f"{file}: not a whole safetensors file")


def test_file_that_is_no_safetensors_is_named(path: Path) -> None:
    (path / SINGLE_FILE).write_bytes(b"PK\x03\x04 a zip, as torch.save writes it" * 10)
    assert "not a whole safetensors file" in problems(path)[0]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
@pytest.mark.case("X2", ".bin and .pt refused, never opened")
def test_pickle_is_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()  # reading it would fail in another way
    found = problems(tmp_path)
    assert len(found) == 1 and name in found[0] and "pickles can run code" in found[0]


def test_pickle_beside_safetensors_is_left_alone(path: Path, tensors: dict[str, Tensor]) -> None:
    (path / "pytorch_model.bin").mkdir()
    assert torch.equal(filled(path)[NORM], tensors[NORM])


def test_empty_directory_is_refused(tmp_path: Path) -> None:
    assert SINGLE_FILE in problems(tmp_path)[0]


def test_index_that_names_a_missing_file_is_refused_with_the_file(cut: Path) -> None:
    gone = sorted(cut.glob("*.safetensors"))[1]
    gone.unlink()
    assert problems(cut) == [
        f"{cut / INDEX_FILE} names {gone}, which does not exist. Fetch it too."
    ]


def test_index_that_names_the_wrong_file_is_refused_with_the_tensor(cut: Path) -> None:
    index = json.loads((cut / INDEX_FILE).read_text(encoding="utf-8"))
    wrong = next(
        file
        for file in sorted(set(index["weight_map"].values()))
        if file != index["weight_map"][NORM]
    )
    index["weight_map"][NORM] = wrong
    (cut / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    assert (
        f"{cut / wrong}: tensor '{NORM}' is missing, though {INDEX_FILE} says it is here."
        in problems(cut)
    )


def test_tensor_in_a_file_that_the_index_does_not_know_is_named(cut: Path) -> None:
    file = sorted(cut.glob("*.safetensors"))[0]
    rewrite(file, lambda content: content.update({"model.extra": torch.zeros(2)}))
    assert "model.extra" in problems(cut)[0]


def test_whole_file_beside_shards_is_a_second_set(cut: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, str(cut / "model.safetensors"), metadata={"format": "pt"})
    (problem,) = problems(cut)
    assert "two sets of weights" in problem and "that of model.safetensors (1 file" in problem


def test_shards_that_the_index_does_not_name_are_a_second_set(cut: Path) -> None:
    first = sorted(cut.glob("*.safetensors"))[0]
    (cut / "model-00001-of-00009.safetensors").write_bytes(first.read_bytes())
    assert "two sets of weights" in problems(cut)[0]


def test_shards_beside_a_whole_file_without_an_index_are_a_second_set(
    path: Path, tensors: dict[str, Tensor]
) -> None:
    save_file(tensors, str(path / "model-00001-of-00002.safetensors"), metadata={"format": "pt"})
    assert "that of model-00001-of-00002.safetensors" in problems(path)[0]


def test_adapter_beside_the_weights_is_no_second_set(
    path: Path, tensors: dict[str, Tensor]
) -> None:
    save_file(tensors, str(path / "adapter_model.safetensors"), metadata={"format": "pt"})
    tensor_files(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_damaged_index_is_named(cut: Path, text: str) -> None:
    (cut / INDEX_FILE).write_text(text, encoding="utf-8")
    assert str(cut / INDEX_FILE) in problems(cut)[0]


def test_index_cannot_lead_out_of_the_directory(tmp_path: Path, source: GptOssForCausalLM) -> None:
    inside = tmp_path / "inside"
    source.save_pretrained(str(tmp_path))
    inside.mkdir()
    index = {"weight_map": {name: f"../{SINGLE_FILE}" for name, _ in source.named_parameters()}}
    (inside / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    assert f"{inside / SINGLE_FILE}, which does not exist" in problems(inside)[0]


# config.json


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, None)
    return str(caught.value)


def change_config(path: Path, **values: Any) -> None:
    content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**content, **values}), encoding="utf-8")


def test_configuration_comes_back_as_it_was_saved(path: Path, source: GptOssForCausalLM) -> None:
    found = load_config(path, None).to_dict()
    expected = source.config.to_dict()
    for key in ("architectures", "dtype", "transformers_version", "_name_or_path"):
        found.pop(key, None), expected.pop(key, None)
    assert found == expected


def test_missing_configuration_is_refused_with_its_path(tmp_path: Path) -> None:
    assert f"{tmp_path / 'config.json'} does not exist" in refusal(tmp_path)


@pytest.mark.case("X3", "a name on a hub is no path")
def test_name_on_a_hub_is_refused_as_a_path() -> None:
    assert "does not exist" in refusal(Path("openai/gpt-oss-20b"))


def test_another_architecture_is_refused_by_name(path: Path) -> None:
    change_config(path, model_type="llama")
    assert "model_type is 'llama'" in refusal(path)


def test_quantized_weights_are_refused_with_the_way_out(path: Path) -> None:
    change_config(path, quantization_config={"quant_method": "bitsandbytes"})
    assert "bitsandbytes" in refusal(path) and "the released MXFP4" in refusal(path)


def quantized(path: Path) -> dict[str, Tensor]:
    """Put the expert matrices of a directory into the released layout; return their values."""
    stored = {}
    decoded = {}
    for name, value in load_file(path / SINGLE_FILE).items():
        if is_expert_name(name) and value.ndim == 3:
            stored[name + BLOCKS], stored[name + SCALES] = mxfp4.encode(value)
            decoded[name] = mxfp4.decode(stored[name + BLOCKS], stored[name + SCALES])
        else:
            stored[name] = value
    save_file(stored, path / SINGLE_FILE, metadata={"format": "pt"})
    change_config(path, quantization_config={"quant_method": "mxfp4"})
    return decoded


@pytest.mark.parametrize(("ep_size", "ep_rank"), [(1, 0), (4, 0), (4, 3)])
def test_released_mxfp4_layout_fills_each_rank_with_its_decoded_experts(
    path: Path, ep_size: int, ep_rank: int
) -> None:
    expected = quantized(path)
    values = filled(path, ep_size=ep_size, ep_rank=ep_rank)
    count = small_config().num_local_experts // ep_size
    for name, whole in expected.items():
        assert torch.equal(values[name], whole[ep_rank * count : (ep_rank + 1) * count].float())


def test_mxfp4_blocks_without_their_scales_are_named(path: Path) -> None:
    quantized(path)
    stored = load_file(path / SINGLE_FILE)
    del stored[EXPERT + SCALES]
    save_file(stored, path / SINGLE_FILE, metadata={"format": "pt"})
    assert any(f"'{EXPERT}{SCALES}' is missing" in problem for problem in problems(path))


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_damaged_configuration_is_named(path: Path, text: str) -> None:
    (path / "config.json").write_text(text, encoding="utf-8")
    assert str(path / "config.json") in refusal(path)

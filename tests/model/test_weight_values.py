"""Values that cannot be weights are refused by tensor and file, whichever rank has read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import GptOssConfig

from cpt.errors import ConfigError
from cpt.model.configuration import PRESETS
from cpt.model.parameters import parameter_shapes
from cpt.model.weights import mxfp4
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.hf_layout import BLOCKS, INDEX_FILE, SCALES, SINGLE_FILE
from cpt.model.weights.values import LARGEST, ValuesSeen, describe_values
from data_pipeline.store.files import write_json

EXPERT = "model.layers.0.mlp.experts.down_proj"
GATE = "model.layers.1.mlp.experts.gate_up_proj"
NORM = "model.norm.weight"
SINKS = "model.layers.0.self_attn.sinks"
Tensors = dict[str, torch.Tensor]


def config() -> GptOssConfig:
    sizes = {"vocab_size": 96, "pad_token_id": 95, "bos_token_id": 94, "eos_token_id": 93}
    return GptOssConfig(**{**PRESETS["tiny"], **sizes, "num_hidden_layers": 2})


def sound() -> Tensors:
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, shape in parameter_shapes(config()).items():
        tensors[name] = torch.randn(shape, generator=generator).bfloat16()
    return tensors


def read_all(path: Path, num_ranks: int = 1) -> None:
    """Read a directory as ranks do, each an equal part of every tensor, and judge it together."""
    shapes = parameter_shapes(config())
    seen = []
    for rank in range(num_ranks):
        source = DirectoryWeights(path, shapes)
        for name, shape in shapes.items():
            numel = math.prod(shape)
            start, stop = numel * rank // num_ranks, numel * (rank + 1) // num_ranks
            for _ in source.pieces(name, start, stop):
                pass
        seen.append(source.seen_json())
    source.refuse_unusable(seen)


def refusal(path: Path, num_ranks: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_all(path, num_ranks)
    assert caught.value.exit_code == 78
    return caught.value.problems


def saved(path: Path, change: Callable[[Tensors], object]) -> Path:
    tensors = sound()
    change(tensors)
    save_file(tensors, str(path / SINGLE_FILE))
    return path


def set_value(name: str, index: int, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].view(-1).__setitem__(index, value)


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [EXPERT, NORM, SINKS])
def test_value_that_is_not_finite_is_named_with_tensor_and_file(
    tmp_path: Path, name: str, value: float, num_ranks: int
) -> None:
    told = refusal(saved(tmp_path, set_value(name, 5, value)), num_ranks)
    numel = math.prod(parameter_shapes(config())[name])
    assert told[0] == (
        f"{tmp_path / SINGLE_FILE}: tensor '{name}' holds {value:g} at element 5 of {numel}; "
        "weights must be finite."
    )
    assert len(told) == 2 and "Fetch the files again" in told[1]


def test_first_bad_value_is_named_whichever_rank_has_it(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for index in (7, 30, 63):
            tensors[NORM][index] = math.nan

    assert "element 7 of 64" in refusal(saved(tmp_path, change), 4)[0]


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_tensor_of_zeros_is_refused(tmp_path: Path, num_ranks: int) -> None:
    told = refusal(saved(tmp_path, lambda tensors: tensors[GATE].zero_()), num_ranks)
    assert told[0] == f"{tmp_path / SINGLE_FILE}: tensor '{GATE}' holds nothing but zeros."


def test_tensor_that_is_zero_in_the_part_of_a_rank_is_taken(tmp_path: Path) -> None:
    read_all(saved(tmp_path, lambda tensors: tensors[GATE][:4].zero_()), 2)


def test_biases_and_sinks_may_be_zero(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("bias", "sinks")):
                tensor.zero_()

    read_all(saved(tmp_path, change), 2)


def test_file_that_was_allocated_but_not_fetched_is_refused_in_a_few_lines(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor.zero_()

    told = refusal(saved(tmp_path, change))
    assert sum("nothing but zeros" in line for line in told) >= 10 and len(told) <= 22


def test_second_file_that_is_zero_is_named_and_the_first_is_not(tmp_path: Path) -> None:
    tensors = sound()
    tensors[NORM].zero_()
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {NORM: "b.safetensors"}
    for file in ("a.safetensors", "b.safetensors"):
        own = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(own, str(tmp_path / file))
    write_json(tmp_path / INDEX_FILE, {"weight_map": weight_map})
    told = refusal(tmp_path)
    assert told[0].startswith(f"{tmp_path / 'b.safetensors'}: tensor '{NORM}'")
    assert "a.safetensors" not in " ".join(told)


@pytest.mark.parametrize("number", [1e39, -3.4e38])
def test_value_that_bf16_has_no_number_for_is_refused(tmp_path: Path, number: float) -> None:
    def change(tensors: Tensors) -> None:
        tensors[NORM] = tensors[NORM].double()
        tensors[NORM][2] = number

    assert f"holds {number:g} at element 2" in refusal(saved(tmp_path, change))[0]


def in_mxfp4(change: Callable[[Tensors], object]) -> Callable[[Tensors], object]:
    def apply(tensors: Tensors) -> None:
        matrix = tensors.pop(EXPERT)
        tensors[EXPERT + BLOCKS], tensors[EXPERT + SCALES] = mxfp4.encode(matrix)
        change(tensors)

    return apply


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_scale_of_mxfp4_that_stands_for_nan_is_refused(tmp_path: Path, num_ranks: int) -> None:
    def change(tensors: Tensors) -> None:
        tensors[EXPERT + SCALES][1, 2, 0] = 255

    told = refusal(saved(tmp_path, in_mxfp4(change)), num_ranks)
    assert f"tensor '{EXPERT}' holds" in told[0]


@pytest.mark.parametrize("suffix", [BLOCKS, SCALES])
def test_codes_or_scales_of_zeros_are_refused(tmp_path: Path, suffix: str) -> None:
    change = in_mxfp4(lambda tensors: tensors[EXPERT + suffix].zero_())
    assert f"tensor '{EXPERT}' holds nothing but zeros." in refusal(saved(tmp_path, change))[0]


@given(st.lists(st.floats(width=32), max_size=40), st.integers(1, 5))
def test_any_values_are_judged_alike_whole_and_in_parts(values: list[float], num: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    whole = ValuesSeen()
    whole.look(0, tensor)
    parts = ValuesSeen()
    position = 0
    for piece in tensor.tensor_split(num):
        one = ValuesSeen()
        one.look(position, piece)
        position += len(piece)
        parts.join(one)
    bad = [index for index, value in enumerate(values) if not abs(value) <= LARGEST]
    assert whole.first_bad == parts.first_bad == (bad[0] if bad else -1)
    assert whole.bad_value == parts.bad_value
    is_refused = bool(describe_values("x.weight", parts, (len(values),)))
    assert is_refused == bool(describe_values("x.weight", whole, (len(values),)))

"""Merged weights lie between two models exactly, and are written and scored as they were merged."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

from cpt.errors import ConfigError
from cpt.export import merge as merging
from cpt.export.merge import folder_name, interpolate, parse_alphas
from cpt.export.merge_sweep import PLOT_FILE, RESULT_FILE, merge
from cpt.guard.score import ScoredSet
from cpt.model.configuration import PRESETS
from cpt.model.weights import mxfp4
from cpt.model.weights.hf_layout import BLOCKS, SCALES, SINGLE_FILE
from data_pipeline.charts import PALETTE
from data_pipeline.dataset import PackedRow

SEQ_LEN = 32


def small_config(**changes: Any) -> GptOssConfig:
    sizes = {
        "vocab_size": 96,
        "pad_token_id": 95,
        "bos_token_id": 94,
        "eos_token_id": 93,
        "num_hidden_layers": 2,
    }
    return GptOssConfig(**{**PRESETS["tiny"], **sizes, **changes})


def save_random(
    path: Path, seed: int, dtype: torch.dtype, config: GptOssConfig | None = None
) -> dict[str, Any]:
    """A model of plain transformers, every tensor random, some zeros negative."""
    model = GptOssForCausalLM(config or small_config())
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data.view(-1)[:3] = -0.0
    model.to(dtype).save_pretrained(str(path))
    return dict(load_file(path / SINGLE_FILE))


def quantize(path: Path) -> dict[str, Any]:
    """Turn a directory into the released MXFP4 layout, and return the decoded tensors."""
    stored: dict[str, Any] = {}
    decoded: dict[str, Any] = {}
    for name, value in load_file(path / SINGLE_FILE).items():
        if value.ndim == 3:
            blocks, scales = mxfp4.encode(value)
            stored |= {name + BLOCKS: blocks, name + SCALES: scales}
            decoded[name] = mxfp4.decode(blocks, scales)
        else:
            stored[name] = decoded[name] = value
    save_file(stored, str(path / SINGLE_FILE), metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}})
    )
    return decoded


def same_bits(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    if found.keys() != expected.keys():
        return False
    return all(same_bits_in_tensor(found[name], value) for name, value in expected.items())


def same_bits_in_tensor(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    as_integers = torch.int32 if expected.dtype == torch.float32 else torch.int16
    return torch.equal(found.view(as_integers), expected.view(as_integers))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:1:0.25", [0, 0.25, 0.5, 0.75, 1]),
        ("0.0:1.0:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ("0:0.5:0.2", [0, 0.2, 0.4]),
        ("1,0.3", [0.3, 1]),
        ("0.5", [0.5]),
    ],
)
def test_alphas_are_a_range_with_both_ends_or_a_list(text: str, expected: list[float]) -> None:
    assert parse_alphas(text) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "0:1", "0:1:0", "1:0:0.1", "-0.1", "0:1.5:0.5", "0:1:0.0001", "nan"]
)
def test_alphas_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--alpha"):
        parse_alphas(text)


def test_ends_are_the_two_models_bit_for_bit_and_the_middle_is_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # only the smallest tensors fit into one window
    monkeypatch.setattr(merging, "WINDOW_NUMEL", 1000)
    base = save_random(tmp_path / "base", 1, torch.bfloat16)
    tuned = save_random(tmp_path / "tuned", 2, torch.bfloat16)
    merge(tmp_path / "base", tmp_path / "tuned", "0,0.3,1", tmp_path / "out", [], score_only=False)
    out = tmp_path / "out"
    assert same_bits(load_file(out / folder_name(0.0) / SINGLE_FILE), base)
    assert same_bits(load_file(out / folder_name(1.0) / SINGLE_FILE), tuned)
    middle = load_file(out / folder_name(0.3) / SINGLE_FILE)
    assert middle.keys() == base.keys()
    # fp32 and fp64 may round to neighboring bf16 values
    for name, value in middle.items():
        expected = (0.7 * base[name].double() + 0.3 * tuned[name].double()).bfloat16()
        largest = float((value.float() - expected.float()).abs().max())
        assert largest <= 2**-8, f"largest difference of {name}: {largest}"


def test_windows_hold_at_most_one_expert_or_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "WINDOW_NUMEL", 1000)
    save_random(tmp_path / "base", 1, torch.bfloat16)
    pair = merging.open_pair(tmp_path / "base", tmp_path / "base")
    expert = 64 * 2 * 96
    largest = {1: 0, 2: 0, 3: 0}
    for name, _, base, _ in pair.windows():
        ndim = len(pair.shapes[name])
        largest[ndim] = max(largest[ndim], base.numel())
    assert max(largest[1], largest[2]) == 1000
    assert largest[3] == expert


def test_quantized_base_is_merged_as_its_decoded_values(tmp_path: Path) -> None:
    save_random(tmp_path / "base", 1, torch.bfloat16)
    decoded = quantize(tmp_path / "base")
    save_random(tmp_path / "tuned", 2, torch.bfloat16)
    merge(tmp_path / "base", tmp_path / "tuned", "0,0.5", tmp_path / "out", [], score_only=False)
    folder = tmp_path / "out" / "alpha-0"
    assert same_bits(load_file(folder / SINGLE_FILE), decoded)
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")


def test_fp32_and_bf16_give_fp32(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", 1, torch.float32)
    tuned = save_random(tmp_path / "tuned", 2, torch.bfloat16)
    merge(tmp_path / "base", tmp_path / "tuned", "0,1", tmp_path / "out", [], score_only=False)
    assert same_bits(load_file(tmp_path / "out" / "alpha-0" / SINGLE_FILE), base)
    widened = {name: value.float() for name, value in tuned.items()}
    assert same_bits(load_file(tmp_path / "out" / "alpha-1" / SINGLE_FILE), widened)


def test_models_of_other_shapes_are_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    save_random(tmp_path / "base", 1, torch.bfloat16)
    other = small_config(num_hidden_layers=3, sliding_window=64)
    save_random(tmp_path / "tuned", 2, torch.bfloat16, other)
    with pytest.raises(ConfigError) as caught:
        merge(tmp_path / "base", tmp_path / "tuned", "0.5", tmp_path / "out", [], score_only=False)
    assert "num_hidden_layers is 2 in" in str(caught.value)
    assert "sliding_window is 128 in" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_interpolation_is_linear_in_fp32() -> None:
    base = torch.tensor([1.0, -2.0])
    tuned = torch.tensor([3.0, 2.0])
    assert interpolate(base, tuned, 0.25, torch.float32).tolist() == [1.5, -1.0]


def held_out(name: str, seed: int) -> ScoredSet:
    """Return a set of three documents in two rows."""
    generator = np.random.default_rng(seed)
    rows = []
    for bounds, documents in (([0, 20, SEQ_LEN], [0, 1]), ([0, 25, SEQ_LEN], [2])):
        labels = generator.integers(0, 90, SEQ_LEN)
        labels[bounds[len(documents)] :] = -100
        rows.append(
            PackedRow(
                input_ids=generator.integers(0, 90, SEQ_LEN),
                labels=labels,
                position_ids=np.arange(SEQ_LEN) - np.repeat(bounds[:-1], np.diff(bounds)),
                bounds=bounds,
                documents=np.asarray(documents),
            )
        )
    packed = SimpleNamespace(num_rows=2, read_row=lambda index: rows[index])
    domain: Any = SimpleNamespace(
        name=name,
        language="en",
        seq_len=SEQ_LEN,
        document_bytes=np.asarray([70, 40, 90]),
        pack=lambda documents: packed,
    )
    return ScoredSet(domain, np.arange(3))


def nats_of_transformers(path: Path, domain: ScoredSet) -> list[float]:
    """Score each document alone with plain transformers' eager code, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=torch.float32, attn_implementation="eager"
    )
    nats = []
    for row in map(domain.read_row, range(domain.num_rows)):
        for index in range(len(row.documents)):
            span = slice(row.bounds[index], row.bounds[index + 1])
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(row.input_ids[span])[None]).logits[0]
            labels = torch.from_numpy(row.labels[span])
            nats.append(float(F.cross_entropy(logits, labels, reduction="sum")))
    return nats


def test_sweep_scores_the_merged_weights_and_draws_them(tmp_path: Path) -> None:
    save_random(tmp_path / "base", 1, torch.bfloat16)
    save_random(tmp_path / "tuned", 2, torch.bfloat16)
    sets = [held_out("english", 3), held_out("wikipedia", 4)]
    models = tmp_path / "base", tmp_path / "tuned"
    printed = merge(*models, "0:1:0.5", tmp_path / "out", sets, score_only=True)
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [RESULT_FILE, PLOT_FILE]
    results = json.loads((tmp_path / "out" / RESULT_FILE).read_text())["results"]
    by_key = {(result["alpha"], result["domain"]): result for result in results}
    assert list(by_key) == list(itertools.product((0.0, 0.5, 1.0), ("english", "wikipedia")))
    for alpha, path in ((0.0, models[0]), (1.0, models[1])):
        for domain in sets:
            expected = sum(nats_of_transformers(path, domain)) / np.log(2) / 200
            found = by_key[alpha, domain.name]
            # fp32 sums in another order
            assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
            assert alpha != 0 or found["delta_percent"] == 0
    merge(*models, "0.5", tmp_path / "written", sets, score_only=False)
    again = json.loads((tmp_path / "written" / RESULT_FILE).read_text())["results"]
    assert again == [by_key[0.5, "english"], by_key[0.5, "wikipedia"]]
    assert len(printed.splitlines()) == 4 and "english" in printed
    drawing = (tmp_path / "out" / PLOT_FILE).read_text()
    assert ElementTree.fromstring(drawing).tag.endswith("svg")
    for color in PALETTE[:2]:  # a dot per alpha in the color of each domain
        dots = re.findall(rf"<use [^>]*fill: {color}; stroke: {color}", drawing)
        assert len(dots) == 3

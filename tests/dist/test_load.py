"""Every rank reads its own part of a directory and no more, in every layout, and the first loss is
transformers'.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM, Mxfp4Config

from cpt.model.weights import mxfp4
from cpt.model.weights.checksums import write_sums
from cpt.model.weights.hf_layout import BLOCKS, SCALES, is_expert_name
from tests.dist.cases import Scenario, model_config, reference_model, rows_of_step
from tests.support.launcher import launch

pytestmark = pytest.mark.dist

WORKER = Path(__file__).with_name("load_worker.py")
LAYOUTS = {
    1: [Scenario(world_size=1, sp=1, ep=1, stage=3)],
    2: [Scenario(world_size=2, sp=1, ep=2, stage=3)],
    4: [Scenario(world_size=4, sp=2, ep=2, stage=3), Scenario(world_size=4, sp=1, ep=2, stage=1)],
}
CASES = [
    (directory, scenario)
    for scenarios in LAYOUTS.values()
    for scenario in scenarios
    for directory in ("bf16", "mxfp4")
]
"""Kinds of directory x layouts."""


def quantise(path: Path) -> None:
    """Put the expert matrices of a directory into the released layout, file by file."""
    for file in path.glob("*.safetensors"):
        stored = {}
        for name, value in load_file(str(file)).items():
            if is_expert_name(name) and value.ndim == 3:
                stored[name + BLOCKS], stored[name + SCALES] = mxfp4.encode(value)
            else:
                stored[name] = value
        save_file(stored, str(file), metadata={"format": "pt"})
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {
        name: file.name for file in path.glob("*.safetensors") for name in load_file(str(file))
    }
    index.write_text(json.dumps(content))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))


def damage_after_summing(path: Path) -> None:
    """Write SHA256SUMS, then flip a bit of a weight: no check of the format can see it."""
    files = sorted(path.glob("*.safetensors"))
    write_sums(path, [file.name for file in files])
    content = bytearray(files[1].read_bytes())
    content[-7] ^= 0x10
    files[1].write_bytes(content)


def transformers_loss(model: Any) -> float:
    """Mean nats per predicted token over the rows of step 0, document by document, eager, fp32."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows_of_step(0):
            for start, end in zip(row.bounds[:-1], row.bounds[1:], strict=True):
                labels = torch.as_tensor(row.labels[start:end])
                if (labels >= 0).any():
                    logits = model(
                        input_ids=torch.as_tensor(row.input_ids[start:end])[None]
                    ).logits[0]
                    total += float(
                        torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
                    )
                    count += int((labels >= 0).sum())
    return total / count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both kinds of directory in several files, what transformers reads from them, and what all
    ranks found.
    """
    root = tmp_path_factory.mktemp("load")
    torch.manual_seed(1)
    source = reference_model()
    config = model_config()
    config.intermediate_size = 96  # a multiple of 32, as MXFP4 needs
    model = GptOssForCausalLM(config)
    shared = {
        n: v for n, v in source.state_dict().items() if v.shape == model.state_dict()[n].shape
    }
    model.load_state_dict({**model.state_dict(), **shared})
    for directory in ("bf16", "mxfp4"):
        model.bfloat16().save_pretrained(str(root / directory), max_shard_size="200KB")
        assert len(list((root / directory).glob("*.safetensors"))) > 3
    quantise(root / "mxfp4")
    shutil.copytree(root / "bf16", root / "damaged")
    damage_after_summing(root / "damaged")
    losses = {}
    for directory in ("bf16", "mxfp4"):
        options = (
            {"quantization_config": Mxfp4Config(dequantize=True)} if directory == "mxfp4" else {}
        )
        theirs = GptOssForCausalLM.from_pretrained(
            str(root / directory), dtype=torch.bfloat16, attn_implementation="eager", **options
        )
        theirs = theirs.float()
        save_file(
            {name: value.detach().contiguous() for name, value in theirs.named_parameters()},
            str(root / f"{directory}-expected.safetensors"),
        )
        losses[directory] = transformers_loss(theirs)
    (root / "losses.json").write_text(json.dumps(losses))
    for world_size, scenarios in LAYOUTS.items():
        cases = [
            {"scenario": asdict(s), "directory": d} for s in scenarios for d in ("bf16", "mxfp4")
        ]
        if world_size == 2:
            cases.append({"scenario": asdict(scenarios[0]), "directory": "damaged"})
        assert not any(launch(WORKER, world_size, [str(root), *map(json.dumps, cases)]))
    return root


def found(folder: Path, directory: str, scenario: Scenario) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{directory}-{scenario.name}.json").read_text())
    return content


@pytest.mark.parametrize(
    ("directory", "scenario"), CASES, ids=lambda v: v if isinstance(v, str) else v.name
)
def test_every_rank_holds_transformers_values_bit_for_bit(
    folder: Path, directory: str, scenario: Scenario
) -> None:
    ranks = found(folder, directory, scenario)["ranks"]
    assert [rank["different"] for rank in ranks] == [[]] * scenario.world_size
    held = sum(rank["experts"] + rank["dense"] for rank in ranks)
    whole = sum(
        value.numel()
        for value in load_file(str(folder / f"{directory}-expected.safetensors")).values()
    )
    assert held == whole, "every element is held by exactly one rank"


@pytest.mark.parametrize(
    "scenario", [s for group in LAYOUTS.values() for s in group], ids=lambda s: s.name
)
def test_bytes_read_of_a_bf16_directory_are_those_of_the_ranks_part(
    folder: Path, scenario: Scenario
) -> None:
    for rank in found(folder, "bf16", scenario)["ranks"]:
        assert rank["bytes_read"] == 2 * (rank["experts"] + rank["dense"])


@pytest.mark.parametrize(
    "scenario", [s for group in LAYOUTS.values() for s in group], ids=lambda s: s.name
)
def test_bytes_read_of_an_mxfp4_directory_are_whole_blocks_of_the_ranks_part(
    folder: Path, scenario: Scenario
) -> None:
    """17 bytes per 32 values; a part that begins or ends inside a block column reads that column
    whole.
    """
    config = model_config()
    largest_column = 17 * 2 * 96  # of the gate and up projection: one block of every output row
    matrices = 2 * config.num_hidden_layers
    for rank in found(folder, "mxfp4", scenario)["ranks"]:
        least = 2 * rank["dense"] + rank["experts"] * 17 / 32
        assert least <= rank["bytes_read"] <= least + 2 * matrices * largest_column


@pytest.mark.parametrize(
    ("directory", "scenario"), CASES, ids=lambda v: v if isinstance(v, str) else v.name
)
def test_loss_of_step_1_is_that_of_plain_transformers(
    folder: Path, directory: str, scenario: Scenario
) -> None:
    expected = json.loads((folder / "losses.json").read_text())[directory]
    assert found(folder, directory, scenario)["loss"] == pytest.approx(expected, abs=1e-5)


def test_flipped_bit_of_a_summed_file_is_refused_on_all_ranks_with_its_name(folder: Path) -> None:
    damaged = sorted((folder / "damaged").glob("*.safetensors"))[1]
    for rank in range(2):
        assert f"{damaged}: SHA-256 is" in (folder / f"damaged-refused-{rank}.txt").read_text()

"""Every rank reads its own part of a directory and no more, and the first loss is transformers'."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
    1: [Scenario(world_size=1, sp=1, ep=1, stage=3, micro_batch_size=4)],
    2: [Scenario(world_size=2, sp=1, ep=2, stage=3, micro_batch_size=2)],
    4: [
        Scenario(world_size=4, sp=2, ep=2, stage=3, micro_batch_size=2),
        Scenario(world_size=4, sp=1, ep=2, stage=1, micro_batch_size=2),
    ],
}
SCENARIOS = list(itertools.chain.from_iterable(LAYOUTS.values()))
DIRECTORIES = ("bf16", "mxfp4")
CASES = list(itertools.product(DIRECTORIES, SCENARIOS))


def quantize(path: Path) -> None:
    """Put the expert matrices of a directory into the released layout, file by file."""
    weight_map: dict[str, str] = {}
    for file in path.glob("*.safetensors"):
        stored: dict[str, torch.Tensor] = {}
        for name, value in load_file(str(file)).items():
            if is_expert_name(name) and value.ndim == 3:
                stored[name + BLOCKS], stored[name + SCALES] = mxfp4.encode(value)
            else:
                stored[name] = value
        save_file(stored, str(file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, file.name)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = weight_map
    index.write_text(json.dumps(content))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))


def damage_after_summing(path: Path) -> None:
    """Write SHA256SUMS, then flip a bit of a weight, which no check of the format can see."""
    files = sorted(path.glob("*.safetensors"))
    write_sums(path, [file.name for file in files])
    content = bytearray(files[1].read_bytes())
    content[-7] ^= 0x10
    files[1].write_bytes(content)


def transformers_loss(model: Any) -> float:
    """Return the mean nats per predicted token over the rows of step 0.

    The model reads document by document, eagerly, in fp32.
    """
    total = 0.0
    count = 0
    for row in rows_of_step(0):
        for start, end in itertools.pairwise(row.bounds):
            labels = torch.as_tensor(row.labels[start:end])
            if not (labels >= 0).any():
                continue
            ids = torch.as_tensor(row.input_ids[start:end])[None]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0]
            total += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
            count += int((labels >= 0).sum())
    return total / count


def save_model(root: Path) -> None:
    """Save the same model as `bf16` and `mxfp4`, in several files, and damage a copy."""
    torch.manual_seed(1)
    source = reference_model()
    config = model_config()
    config.intermediate_size = 96  # a multiple of 32, as MXFP4 needs
    model = GptOssForCausalLM(config)
    state = model.state_dict()
    for name, value in source.state_dict().items():
        if value.shape == state[name].shape:
            state[name] = value
    model.load_state_dict(state)
    for directory in DIRECTORIES:
        model.bfloat16().save_pretrained(str(root / directory), max_shard_size="200KB")
        assert len(list((root / directory).glob("*.safetensors"))) > 3
    quantize(root / "mxfp4")
    shutil.copytree(root / "bf16", root / "damaged")
    damage_after_summing(root / "damaged")


def save_expected(root: Path) -> None:
    """Save the values and the losses that transformers reads from each directory."""
    losses = {}
    for directory in DIRECTORIES:
        options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
        if directory == "mxfp4":
            options["quantization_config"] = Mxfp4Config(dequantize=True)
        theirs = GptOssForCausalLM.from_pretrained(str(root / directory), **options).float()
        values = {}
        for name, value in theirs.named_parameters():
            values[name] = value.detach().contiguous()
        save_file(values, str(root / f"{directory}-expected.safetensors"))
        losses[directory] = transformers_loss(theirs)
    (root / "losses.json").write_text(json.dumps(losses))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both kinds of directory, what transformers reads from them, and what all ranks found."""
    root = tmp_path_factory.mktemp("load")
    save_model(root)
    save_expected(root)
    for world_size, scenarios in LAYOUTS.items():
        cases = []
        for scenario, directory in itertools.product(scenarios, DIRECTORIES):
            cases.append({"scenario": asdict(scenario), "directory": directory})
        if world_size == 2:
            cases.append({"scenario": asdict(scenarios[0]), "directory": "damaged"})
        arguments = [str(root), *map(json.dumps, cases)]
        assert not any(launch(WORKER, world_size, arguments))
    return root


def case_name(value: str | Scenario) -> str:
    """Return how a parameter is called in the name of a test."""
    return value if isinstance(value, str) else value.name


def found(folder: Path, directory: str, scenario: Scenario) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{directory}-{scenario.name}.json").read_text())
    return content


@pytest.mark.parametrize(("directory", "scenario"), CASES, ids=case_name)
def test_every_rank_holds_transformers_values_bit_for_bit(
    folder: Path, directory: str, scenario: Scenario
) -> None:
    ranks = found(folder, directory, scenario)["ranks"]
    assert [rank["different"] for rank in ranks] == [[]] * scenario.world_size
    held = sum(rank["experts"] + rank["dense"] for rank in ranks)
    expected = load_file(str(folder / f"{directory}-expected.safetensors"))
    whole = sum(value.numel() for value in expected.values())
    assert held == whole, "every element is held by exactly one rank"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=case_name)
def test_bytes_read_of_a_bf16_directory_are_those_of_the_ranks_part(
    folder: Path, scenario: Scenario
) -> None:
    for rank in found(folder, "bf16", scenario)["ranks"]:
        assert rank["bytes_read"] == 2 * (rank["experts"] + rank["dense"])


@pytest.mark.parametrize("scenario", SCENARIOS, ids=case_name)
def test_bytes_read_of_an_mxfp4_directory_are_whole_blocks_of_the_ranks_part(
    folder: Path, scenario: Scenario
) -> None:
    """There are 17 bytes per 32 values.

    A part that begins or ends inside a block column reads that column whole.
    """
    config = model_config()
    largest_column = 17 * 2 * 96  # of the gate and up projection: one block of every output row
    matrices = 2 * config.num_hidden_layers
    for rank in found(folder, "mxfp4", scenario)["ranks"]:
        least = 2 * rank["dense"] + rank["experts"] * 17 / 32
        assert least <= rank["bytes_read"] <= least + 2 * matrices * largest_column


@pytest.mark.parametrize(("directory", "scenario"), CASES, ids=case_name)
def test_loss_of_step_1_is_that_of_plain_transformers(
    folder: Path, directory: str, scenario: Scenario
) -> None:
    expected = json.loads((folder / "losses.json").read_text())[directory]
    assert found(folder, directory, scenario)["loss"] == pytest.approx(expected, abs=1e-5)


def test_flipped_bit_of_a_summed_file_is_refused_on_all_ranks_with_its_name(folder: Path) -> None:
    damaged = sorted((folder / "damaged").glob("*.safetensors"))[1]
    for rank in range(2):
        assert f"{damaged}: SHA-256 is" in (folder / f"damaged-refused-{rank}.txt").read_text()

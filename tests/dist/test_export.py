"""An export is the trained model, and nothing is lost between Hugging Face and here."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssForCausalLM, Mxfp4Config

from cpt.checkpoint import weights as checkpoint_weights
from cpt.checkpoint.manifest import read_manifest, write_manifest
from cpt.checkpoint.range_index import RangeIndex
from cpt.checkpoint.reader import step_folder
from cpt.errors import CheckpointError, ConfigError
from cpt.export.exponent_choice import ExponentChoice
from cpt.export.huggingface import QUANTIZATION_CONFIG, export_checkpoint
from cpt.export.mxfp4_report import REPORT_FILE
from cpt.model.weights import mxfp4
from cpt.model.weights import writer as tensor_writer
from cpt.model.weights.hf_layout import BLOCKS, INDEX_FILE, SCALES, SINGLE_FILE, tensor_files
from cpt.model.weights.mxfp4 import EXPONENT_RULES
from cpt.offline.plain_model import load_checkpoint
from data_pipeline.text.tokenizer import encode
from tests.dist.cases import NEW_TOKENS, PROMPTS, model_config, reference_model, rows_of_step
from tests.dist.test_layout_parity import explicit_masks
from tests.support.checkpoints import as_format_1, sign_again
from tests.support.launcher import ROOT, launch

pytestmark = pytest.mark.dist


def save_released_layout(path: Path) -> dict[str, torch.Tensor]:
    """Save a directory whose expert matrices are random MXFP4 codes, and return its tensors.

    Every other block does not use its range.
    """
    config = model_config()
    config.intermediate_size = 64
    model = GptOssForCausalLM(config).bfloat16()
    generator = torch.Generator().manual_seed(7)
    stored: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim != 3:
            stored[name] = torch.randn(parameter.shape, generator=generator).bfloat16() * 0.1
            continue
        experts, inputs, rows = parameter.shape
        shape = (experts, rows, inputs // 32, 16)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        blocks[:, ::2] &= 0x99  # codes 0 and 1 and their negatives: values of 0 and 0.5
        scales = torch.randint(115, 123, shape[:3], dtype=torch.uint8, generator=generator)
        stored[name + BLOCKS] = blocks
        stored[name + SCALES] = scales
    path.mkdir()
    save_file(stored, str(path / SINGLE_FILE), metadata={"format": "pt"})
    content = {**config.to_dict(), "quantization_config": QUANTIZATION_CONFIG, "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(content))
    return stored


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    reference_model().save_pretrained(str(folder / "model"))
    save_released_layout(folder / "mxfp4")
    assert launch(ROOT / "tests" / "dist" / "logits_worker.py", 2, [str(folder)]) == [0, 0]
    return folder


def load_eager(path: Path) -> Any:
    """Return plain transformers' model of a directory in fp32."""
    return AutoModelForCausalLM.from_pretrained(
        str(path), dtype=torch.float32, attn_implementation="eager"
    )


@pytest.mark.case("E2", "plain transformers gives the training model's logits")
def test_exported_model_gives_the_training_models_logits(folder: Path) -> None:
    out = export_checkpoint(step_folder(folder / "run", 2), folder / "fp32", "fp32")
    model = load_eager(out)
    row = rows_of_step(0)[0]
    with torch.no_grad():
        got = model(
            input_ids=torch.from_numpy(row.input_ids)[None],
            position_ids=torch.from_numpy(row.position_ids)[None],
            attention_mask=explicit_masks(row.bounds),
            use_cache=False,
        ).logits
    expected = load_file(folder / "logits.safetensors")["logits"]
    difference = (got - expected).abs()
    # fp32 sums are taken in another order
    assert float(difference.max()) <= 1e-5, f"max {difference.max()}, mean {difference.mean()}"


def test_bf16_export_is_the_rounded_master_weights(folder: Path) -> None:
    step = step_folder(folder / "run", 2)
    exact = load_file(export_checkpoint(step, folder / "exact", "fp32") / "model.safetensors")
    rounded = load_file(export_checkpoint(step, folder / "bf16", "bf16") / "model.safetensors")
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def with_model_config(folder: Path, place: Path, **values: Any) -> Path:
    """Return a copy of a checkpoint whose manifest says more about the model, well signed."""
    copy = place / "checkpoints" / "step-00000002"
    shutil.copytree(step_folder(folder / "run", 2), copy)
    sign_again(copy, lambda body: body["state"]["model_config"].update(values))
    return copy


def test_what_a_manifest_of_others_says_beside_the_architecture_is_not_exported(
    folder: Path, tmp_path: Path
) -> None:
    planted = {"_auto_class": "AutoModel", "tokenizer_class": "Evil", "base_model_tp_plan": {}}
    copy = with_model_config(folder, tmp_path, **planted)
    out = export_checkpoint(copy, tmp_path / "out", "bf16")
    told = {}
    for name in ("config.json", "generation_config.json"):
        told.update(json.loads((out / name).read_text()))
    assert not told.keys() & planted.keys()
    assert told["architectures"] == ["GptOssForCausalLM"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("auto_map", {"AutoConfig": "evil.Config"}), ("attn_implementation", "somebody/kernel")],
)
def test_code_that_a_manifest_of_others_names_is_refused(
    folder: Path, tmp_path: Path, key: str, value: Any
) -> None:
    copy = with_model_config(folder, tmp_path, **{key: value})
    for use in (
        lambda: export_checkpoint(copy, tmp_path / "out", "bf16"),
        lambda: load_checkpoint(copy),
    ):
        with pytest.raises(CheckpointError, match=f"checkpoint of step 2, .*: {key} names"):
            use()
    assert not (tmp_path / "out").exists()


def test_export_never_overwrites(folder: Path) -> None:
    (folder / "taken").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_checkpoint(step_folder(folder / "run", 2), folder / "taken", "bf16")


def test_exported_tokenizer_encodes_as_the_data_pipeline_does(folder: Path) -> None:
    out = export_checkpoint(step_folder(folder / "run", 2), folder / "tokenizer", "bf16")
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    texts = (
        "The fox, 12345 times.\n\n  def f(x):\n\treturn x",
        "吾輩は猫である。名前はまだ無い。",
        "naïve café 🦊",
    )
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False) == encode(text).tolist()
    names = ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|call|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [199_998, 199_999, 200_002, 200_012]


@pytest.mark.parametrize(("run", "step"), [("run", 2), ("untouched", 0)], ids=["ep2", "sp2-ep2"])
def test_training_engine_continues_texts_as_plain_transformers_does(
    folder: Path, run: str, step: int
) -> None:
    """Decoding is greedy, in fp32 and two layouts; every rank gets the same tokens."""
    out = export_checkpoint(step_folder(folder / run, step), folder / f"greedy-{run}", "fp32")
    model = load_eager(out)
    found = [json.loads((folder / f"generated-{rank}.json").read_text())[run] for rank in (0, 1)]
    assert found[0] == found[1]
    for prompt, tokens in zip(PROMPTS, found[0], strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=511
        )
        assert tokens == expected[0, len(prompt) :].tolist()


def test_mxfp4_in_and_out_keeps_every_byte_beside_the_release(folder: Path) -> None:
    """Released layout -> ZeRO-3 and expert parallel -> checkpoint -> released layout, no step."""
    before = load_file(folder / "mxfp4" / SINGLE_FILE)
    step = step_folder(folder / "untouched", 0)
    for rule in EXPONENT_RULES:
        choice = ExponentChoice(rule=rule)
        out = folder / f"again-{rule}"
        export_checkpoint(step, out, "mxfp4", base=folder / "mxfp4", choice=choice)
        after = load_file(out / SINGLE_FILE)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_mxfp4_in_and_out_keeps_every_value_and_the_bytes_of_blocks_that_use_their_range(
    folder: Path,
) -> None:
    """The same without the release."""
    before = load_file(folder / "mxfp4" / SINGLE_FILE)
    out = export_checkpoint(step_folder(folder / "untouched", 0), folder / "again", "mxfp4")
    after = load_file(out / SINGLE_FILE)
    assert before.keys() == after.keys()
    same_bytes = 0
    different_bytes = 0
    for name, value in before.items():
        if name.endswith(SCALES):
            continue
        if not name.endswith(BLOCKS):
            assert torch.equal(after[name], value), name
            continue
        scales = name.removesuffix(BLOCKS) + SCALES
        expected = mxfp4.decode(value, before[scales])
        found = mxfp4.decode(after[name], after[scales])
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), name
        codes = torch.stack([value & 7, (value >> 4) & 7], dim=-1).flatten(-2)
        used = codes.amax(-1) >= 6  # a value of 4 or 6: the quantizer chooses this very scale
        assert torch.equal(after[name][used], value[used])
        assert torch.equal(after[scales][used], before[scales][used])
        same_bytes += int(used.sum())
        different_bytes += int((~used).sum())
    assert min(same_bytes, different_bytes) > 100, "both kinds of block must be there"
    report = json.loads((folder / "again" / REPORT_FILE).read_text())
    assert report["exponent"] == "floor"
    assert report["all_expert_matrices"] == {
        "relative_l2_error": 0.0,
        "largest_absolute_error": 0.0,
    }


def test_transformers_decodes_the_mxfp4_export_as_this_project_does(folder: Path) -> None:
    step = step_folder(folder / "untouched", 0)
    exported = export_checkpoint(step, folder / "decoded", "mxfp4")
    model = AutoModelForCausalLM.from_pretrained(
        str(exported), quantization_config=Mxfp4Config(dequantize=True)
    )
    expected = load_file(export_checkpoint(step, folder / "plain", "bf16") / SINGLE_FILE)
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].detach(), expected[name]) for name in expected)
    config = json.loads((exported / "config.json").read_text())
    assert config["quantization_config"] == QUANTIZATION_CONFIG
    assert "quantization_config" not in json.loads((folder / "plain" / "config.json").read_text())


def test_checkpoint_of_the_older_format_gives_the_same_export(folder: Path) -> None:
    step = step_folder(folder / "run", 2)
    older = Path(shutil.copytree(step, step_folder(folder / "older", 2)))
    as_format_1(older)
    expected = load_file(export_checkpoint(step, folder / "of-format-2", "bf16") / SINGLE_FILE)
    found = load_file(export_checkpoint(older, folder / "of-format-1", "bf16") / SINGLE_FILE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_memory_is_bounded_by_a_piece_and_several_files_hold_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_folder(folder / "run", 2)
    whole = load_file(export_checkpoint(step, folder / "one-file", "bf16") / SINGLE_FILE)
    asked: list[int] = []
    read = checkpoint_weights.read_ranges

    def counting(where: Path, index: RangeIndex, ranges: dict[str, Any]) -> None:
        asked.append(sum(part.tensor.numel() for part in ranges.values()))
        read(where, index, ranges)

    monkeypatch.setattr(checkpoint_weights, "read_ranges", counting)
    monkeypatch.setattr(checkpoint_weights, "PIECE_NUMEL", 20_000)
    monkeypatch.setattr(tensor_writer, "LARGEST_FILE_BYTES", 100_000)
    out = export_checkpoint(step, folder / "many-files", "bf16")
    expert = 64 * 2 * 48
    assert max(asked) <= 20_000 and expert <= 20_000 < 8 * expert, (
        "a piece holds whole experts, not whole tensors"
    )
    files = tensor_files(out)
    assert len(set(files.values())) > 3 and files.keys() == whole.keys()
    loaded = {file: load_file(file) for file in set(files.values())}
    assert all(torch.equal(loaded[file][name], whole[name]) for name, file in files.items())
    assert AutoModelForCausalLM.from_pretrained(str(out)).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.case("E1", "nothing that loads is left, the rerun succeeds")
def test_killed_export_leaves_nothing_that_loads_and_the_next_one_succeeds(folder: Path) -> None:
    """All weight files are there when it dies; the index and config.json are not."""
    out = folder / "killed"
    command = [sys.executable, "-m", "cpt.cli", "export"]
    command += ["--run_dir", str(folder / "run"), "--out", str(out)]
    faulty = {**os.environ, "CPT_ALLOW_FAULTS": "1", "CPT_FAULT": "export:*:*:kill"}
    killed = subprocess.run(command, cwd=ROOT, env=faulty, capture_output=True, timeout=200)
    assert killed.returncode == -9
    assert not out.exists()
    (left,) = [path for path in folder.glob(".tmp-killed-*") if path.is_dir()]
    assert not (left / INDEX_FILE).exists() and not (left / "config.json").exists()
    with pytest.raises(ValueError, match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(str(left))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0 and not left.exists(), again.stderr
    assert AutoModelForCausalLM.from_pretrained(str(out)).dtype == torch.bfloat16


def drop(tensors: dict[str, Any]) -> None:
    del tensors["model.norm.weight"]


def invent(tensors: dict[str, Any]) -> None:
    tensors["extra"] = tensors["model.norm.weight"]


def misshape(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["lm_head.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "tensor 'model.norm.weight' is missing"),
        (invent, "tensor 'extra' is unknown"),
        (misshape, r"'model.norm.weight' has shape \(512, 64\), expected \(64,\)"),
    ],
    ids=["missing", "unknown", "misshapen"],
)
@pytest.mark.case("E3", "refused, naming the tensor")
def test_checkpoint_that_lacks_or_invents_a_tensor_is_not_exported(
    folder: Path, tmp_path: Path, change, message
) -> None:
    shutil.copytree(step_folder(folder / "run", 2), tmp_path / "step-00000002")
    manifest = read_manifest(tmp_path / "step-00000002")
    tensors = dict(manifest.tensors)
    change(tensors)
    write_manifest(tmp_path / "step-00000002", dataclasses.replace(manifest, tensors=tensors))
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(tmp_path / "step-00000002", tmp_path / "out", "bf16")
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000002"]

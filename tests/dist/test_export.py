"""An export is the trained model, and nothing is lost between Hugging Face and here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cpt.errors import ConfigError
from cpt.state.export import export_checkpoint
from cpt.state.stored import step_folder
from tests.dist.cases import reference_model, rows_of_step
from tests.dist.test_layout_parity import explicit_masks
from tests.support.launcher import ROOT, launch

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    reference_model().save_pretrained(str(folder / "model"))
    assert launch(ROOT / "tests" / "dist" / "logits_worker.py", 2, [str(folder)]) == [0, 0]
    return folder


def test_exported_model_gives_the_training_models_logits(folder: Path) -> None:
    out = export_checkpoint(step_folder(folder / "run", 2), folder / "fp32", "fp32")
    model = AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.float32, attn_implementation="eager")
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
    assert float(difference.max()) <= 1e-5, f"max {difference.max()}, mean {difference.mean()}"  # fp32 sums reordered


def test_bf16_export_is_the_rounded_master_weights(folder: Path) -> None:
    step = step_folder(folder / "run", 2)
    exact = load_file(export_checkpoint(step, folder / "exact", "fp32") / "model.safetensors")
    rounded = load_file(export_checkpoint(step, folder / "bf16", "bf16") / "model.safetensors")
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def test_export_never_overwrites(folder: Path) -> None:
    (folder / "taken").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_checkpoint(step_folder(folder / "run", 2), folder / "taken", "bf16")


def test_exported_tokenizer_encodes_as_the_data_pipeline_does(folder: Path) -> None:
    from transformers import AutoTokenizer

    from data_pipeline.tokenizer import encode

    out = export_checkpoint(step_folder(folder / "run", 2), folder / "tokenizer", "bf16")
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    for text in (
        "The fox, 12345 times.\n\n  def f(x):\n\treturn x",
        "吾輩は猫である。名前はまだ無い。",
        "naïve café 🦊",
    ):
        assert tokenizer.encode(text, add_special_tokens=False) == encode(text).tolist()
    assert tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|call|>"]) == [
        199_998,
        199_999,
        200_002,
        200_012,
    ]

"""What is sampled and scored of a checkpoint is what would be served."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cpt.export import huggingface
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.directory import DirectoryWeights
from cpt.offline.plain_model import load_checkpoint
from tests.support.mxfp4_exports import moved, release, save_checkpoint, tiny_config


def test_a_checkpoint_whose_experts_were_rounded_is_its_mxfp4_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "save_tokenizer", lambda *_: None)  # it takes seconds
    _, values = release()
    section = {"experts": "mxfp4", "start_step": 0, "exponent": "ceil"}
    folder = save_checkpoint(tmp_path / "run", moved(values, 0.3), None, section)
    shapes = parameter_shapes(tiny_config())
    exported = DirectoryWeights(
        huggingface.export_checkpoint(folder, tmp_path / "out", "mxfp4"), shapes
    )
    served = load_checkpoint(folder).state_dict()
    for name, shape in shapes.items():
        parts = exported.pieces(name, 0, math.prod(shape))
        whole = torch.cat([part for _, part in parts]).view(shape)
        assert torch.equal(served[name], whole.bfloat16()), name


def test_a_checkpoint_of_other_training_keeps_its_values(tmp_path: Path) -> None:
    _, values = release()
    trained = moved(values, 0.3)
    folder = save_checkpoint(tmp_path / "run", trained, None)
    for name, values in load_checkpoint(folder).state_dict().items():
        assert torch.equal(values, trained[name].bfloat16()), name

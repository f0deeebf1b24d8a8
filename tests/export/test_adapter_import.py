"""A PEFT directory is imported if it is the adapter that the run YAML tells of, and else refused
with the cure.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cpt.checkpoint.manifest import TensorRecord, read_manifest
from cpt.checkpoint.reader import step_folder
from cpt.checkpoint.writer import write_alone
from cpt.cli import main
from cpt.config.adapter_section import AdapterSection
from cpt.errors import ConfigError
from cpt.export.adapter import BASE_FILE, export_adapter, vllm_notes
from cpt.export.adapter_import import ImportRequest, import_adapter
from cpt.export.run_export import ExportForm, describe_export, export_run
from cpt.model.adapters.layout import adapted_matrices
from cpt.model.configuration import load_config
from cpt.model.weights.hf_layout import ADAPTER_CONFIG, ADAPTER_FILE
from tests.support.adapters import write_adapter

CONFIG = load_config(None, "tiny")
SECTION = AdapterSection(kind="lora", rank=16, expert_rank=8, alpha=8.0, layers=(0,))
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "run", None, SECTION, CONFIG)
    return export_adapter(step_folder(tmp_path / "run", 3), tmp_path / "peft", "bf16")


def request(source: Path, section: AdapterSection = SECTION, seed: int = 0) -> ImportRequest:
    return ImportRequest(
        source=source,
        run_dir=source.parent / "new",
        section=section,
        base_path=None,
        seed=seed,
        dtype="fp32",
        config=CONFIG,
    )


def edit(source: Path, **changes: Any) -> None:
    file = source / ADAPTER_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(asked: ImportRequest) -> str:
    with pytest.raises(ConfigError) as caught:
        import_adapter(asked)
    assert not (asked.run_dir / "checkpoints").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', must be LORA"),
        ({"use_dora": True}, "Give adapter.kind: dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa_niter_16"}, "belongs to a changed base"),
        ({"r": 8}, "has rank 8, this run has 16. Give adapter.rank: 8."),
        ({"rank_pattern": {}}, "has rank 16, this run has 8. Give adapter.expert_rank: 16."),
        ({"alpha_pattern": {}}, "different scales alpha / rank: 0.5 (model.layers.0.self_attn"),
        ({"lora_alpha": 16, "alpha_pattern": {"mlp.experts.down_proj": 8,
          "mlp.experts.gate_up_proj": 8}}, "Give adapter.alpha: 16."),
        ({"use_rslora": True}, "different scales"),
        ({"alpha_pattern": {".*down_proj": 4}}, "which is no end of the name of a matrix"),
        ({"r": "16"}, "has rank '16' and alpha"),
    ],
)  # fmt: skip
def test_settings_that_differ_are_refused_with_the_cure(
    source: Path, changes: dict[str, Any], told: str
) -> None:
    edit(source, **changes)
    assert told in refused(request(source))


def test_run_whose_untouched_model_was_measured_before_the_import_is_refused(source: Path) -> None:
    """Its guard would compare the imported adapter with the base that it lies over."""
    asked = request(source)
    (asked.run_dir / "guard").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has measurements of the guard already"):
        import_adapter(asked)
    assert not (asked.run_dir / "checkpoints").exists()


@pytest.mark.parametrize(
    ("section", "told"),
    [
        (AdapterSection(kind="none"), "Give it an adapter section"),
        (AdapterSection(kind="lora", rank=16, expert_rank=8, alpha=8.0), "Set adapter.targets"),
        (
            AdapterSection(
                kind="lora", rank=16, expert_rank=8, alpha=8.0, layers=(0,), share_experts=True
            ),
            "the experts have different adapters",
        ),
        (
            AdapterSection(kind="lora", rank=16, targets=("router",)),
            "adapter.targets[0] is 'router', which names the router: no server",
        ),
        (
            AdapterSection(kind="dora", rank=16, layers=(0,)),
            "Give targets: [attention], or kind: lora.",
        ),
    ],
)
def test_another_section_of_the_run_is_refused(
    source: Path, section: AdapterSection, told: str
) -> None:
    assert told in refused(request(source, section))


def test_adapter_of_another_base_is_refused_with_both_hashes(source: Path) -> None:
    known = json.loads((source / BASE_FILE).read_text())["hash"]
    told = refused(request(source, seed=1))
    assert "another base" in told and known in told and "random weights (seed 1) has" in told


def test_base_of_another_name_is_told_where_nothing_else_is_known(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (source / BASE_FILE).unlink()
    edit(source, base_model_name_or_path="someone/else")
    import_adapter(request(source))
    assert "'someone/else'" in caplog.text


@pytest.mark.parametrize("base", ["pretrained", "pretrained@7"])
def test_adapter_over_the_checkpoint_of_another_run_is_imported(
    source: Path, tmp_path: Path, base: str
) -> None:
    state = {"model_config": CONFIG.to_dict()}
    records = {"lm_head.weight": TensorRecord(shape=(4, 2), dtype="float32", trained=False)}
    values = {"master/lm_head.weight": torch.ones(4, 2)}
    step = write_alone(tmp_path / "pretrained", 7, values, records, state)
    run = {
        "model": {"path": base},
        "data": {"mix": "mix.yaml"},
        "train": {"seq_len": 128, "global_batch_size": 2, "total_steps": 2, "lr": 1e-2},
        "adapter": {"kind": "lora", "rank": 16, "expert_rank": 8, "alpha": 8.0, "layers": [0]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (source / BASE_FILE).unlink()
    words = ["import-adapter", str(source), "--config", str(tmp_path / "run.yaml")]
    assert main([*words, "--run_dir", str(tmp_path / "new")]) == 0
    manifest = read_manifest(step_folder(tmp_path / "new", 0))
    assert manifest.state["adapter"]["base"]["path"] == str(step)


def test_pickled_tensors_are_not_read(source: Path) -> None:
    (source / ADAPTER_FILE).rename(source / "adapter_model.bin")
    assert "safe_serialization=True" in refused(request(source))


def test_values_that_are_not_finite_and_wrong_shapes_are_refused(source: Path) -> None:
    tensors = load_file(source / ADAPTER_FILE)
    tensors[Q_PROJ][0, 0] = torch.nan
    save_file(tensors, source / ADAPTER_FILE)
    assert "not finite" in refused(request(source))
    tensors[Q_PROJ] = tensors[Q_PROJ].t().contiguous()
    save_file(tensors, source / ADAPTER_FILE)
    assert "has shape" in refused(request(source))


def test_run_with_checkpoints_is_left_alone(source: Path) -> None:
    first = import_adapter(request(source))
    before = sorted(file.read_bytes() for file in first.iterdir())
    with pytest.raises(ConfigError, match="has checkpoints already"):
        import_adapter(request(source))
    assert sorted(file.read_bytes() for file in first.iterdir()) == before


@pytest.mark.parametrize(
    ("section", "told"),
    [
        (AdapterSection(kind="lora", rank=16), []),
        (AdapterSection(kind="lora", rank=24), ["--max-lora-rank 32"]),
        (AdapterSection(kind="lora", rank=1000), ["Serve the merged model"]),
        (AdapterSection(kind="dora", targets=("attention",)), ["does not load DoRA"]),
        (
            AdapterSection(kind="lora", targets=("gate_up_proj",)),
            ["both matrices of the experts of a layer or on neither"],
        ),
    ],
)
def test_what_vllm_does_not_take_is_told_with_the_cure(
    section: AdapterSection, told: list[str]
) -> None:
    notes = vllm_notes(adapted_matrices(section, CONFIG))
    assert len(notes) == len(told)
    for note, part in zip(notes, told, strict=True):
        assert part in note


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_card_of_an_adapter_says_how_to_load_it(tmp_path: Path, kind: Any) -> None:
    section = AdapterSection(kind=kind, rank=24, targets=("attention",))
    write_adapter(tmp_path / "run", None, section, CONFIG)
    out = export_run(
        tmp_path / "run",
        step_folder(tmp_path / "run", 3),
        tmp_path / "peft",
        ExportForm(format_name="peft"),
    )
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card and "PeftModel.from_pretrained" in card
    assert f"This is an adapter ({kind}, rank 24, alpha 32, attention, all layers)" in card
    assert ("vllm serve" in card and "--max-lora-rank 32" in card) == (kind == "lora")
    assert ("vLLM does not load DoRA" in describe_export(out)) == (kind == "dora")


def test_whole_model_has_no_adapter_to_export(tmp_path: Path) -> None:
    state = {"model_config": CONFIG.to_dict()}
    records = {"lm_head.weight": TensorRecord(shape=(4, 2), dtype="float32", trained=False)}
    step = write_alone(tmp_path, 1, {"master/lm_head.weight": torch.ones(4, 2)}, records, state)
    with pytest.raises(ConfigError, match="holds a whole model, not an adapter"):
        export_adapter(step, tmp_path / "peft", "bf16")

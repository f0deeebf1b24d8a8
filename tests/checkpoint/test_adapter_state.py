"""A checkpoint of an adapter knows what it is an adapter of, and says what differs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cpt.checkpoint.adapter_state import AdapterBase, AdapterState, base_from
from cpt.checkpoint.reader import step_folder
from cpt.checkpoint.run_state import RunState
from cpt.checkpoint.starting_model import check_starting_weights
from cpt.config.adapter_section import AdapterSection
from cpt.errors import CheckpointError, ConfigError
from cpt.model.configuration import load_config
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.checksums import TENSOR_BLOCK_BYTES, write_sums
from tests.support.adapters import write_adapter

CONFIG = load_config(None, "tiny")
SECTION = AdapterSection(kind="lora", rank=16, layers=(0, "1-2"))
STATE = AdapterState(section=SECTION, base=AdapterBase.of(None, 7, CONFIG), dtype="bf16")


def read(plain: Any) -> AdapterState | None:
    state = RunState(model_config={}, adapter=plain)
    return AdapterState.of(RunState.from_json(state.to_json(), "step-3"), "step-3")


def test_what_is_written_is_read_and_a_whole_model_has_none() -> None:
    assert read(STATE.to_json()) == STATE
    assert read(None) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("section", {"kind": "none"}),
        ("section", {"kind": "lora", "rank": 0}),
        ("section", {"kind": "lora", "unknown": 1}),
        ("section", [1]),
        ("base", {"path": None, "seed": None, "hash": "a"}),
        ("base", {"path": "/base", "seed": 3, "hash": "a"}),
        ("base", {"path": "/base", "seed": None}),
        ("base", {"path": "/base", "seed": None, "hash": "a", "sums": 3}),
        ("dtype", "fp8"),
    ],
)
def test_damaged_state_is_refused(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"step-3: state\.adapter"):
        read({**STATE.to_json(), key: value})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": 8}, "step-3 has adapter.rank 16, now it is 8."),
        ({"alpha": 16.0}, "step-3 has adapter.alpha 32.0, now it is 16.0."),
        ({"kind": "dora", "targets": ("attention",)}, "step-3 has adapter.kind lora, now it is"),
        ({"expert_rank": 24}, "step-3 has adapter.expert_rank 8, now it is 24."),
        ({"share_experts": True}, "step-3 has adapter.share_experts False, now it is True."),
        (
            {"layers": (0, 1)},
            "6 matrices, such as model.layers.2.mlp.experts.down_proj, which this run does not",
        ),
        (
            {"layers": ()},
            "6 matrices, such as model.layers.3.mlp.experts.down_proj, which it has no adapter of",
        ),
    ],
)
def test_every_difference_is_told_with_both_values(changes: dict[str, Any], told: str) -> None:
    now = dataclasses.replace(SECTION, **changes)
    problems = STATE.problems(now, "bf16", CONFIG, "step-3")
    assert any(told in problem for problem in problems), problems
    assert "new --run_dir" in problems[-1]


def test_the_same_adapter_in_other_words_is_the_same() -> None:
    """The packed base has the same numbers, and a default is what it stands for."""
    now = dataclasses.replace(SECTION, base="mxfp4", expert_rank=8, layers=("0-2",))
    assert STATE.problems(now, "bf16", CONFIG, "step-3") == []


def test_an_adapter_goes_on_in_the_dtype_of_its_base_unless_it_was_trained_elsewhere() -> None:
    told = STATE.problems(SECTION, "fp32", CONFIG, "step-3")
    assert told[0].startswith("step-3 has train.dtype bf16, in which")
    assert told[0].endswith("now it is fp32. Give train.dtype: bf16.")
    imported = dataclasses.replace(STATE, imported=True)
    assert imported.problems(SECTION, "fp32", CONFIG, "step-3") == []


LARGE = ("model.embed_tokens.weight", "model.layers.0.mlp.experts.down_proj", "lm_head.weight")
SMALL = (
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.mlp.experts.down_proj_bias",
    "model.layers.0.mlp.router.bias",
    "model.norm.weight",
)


def weights() -> dict[str, torch.Tensor]:
    """Return tensors of 4 MiB with small ones between them: samples of the file miss some."""
    large = {name: torch.zeros(2**20) for name in LARGE}
    return large | {name: torch.zeros(64) for name in SMALL}


def directory(path: Path, changed: str = "", *, where: int = 0, **config: Any) -> Path:
    """Write a base in which one value of a tensor, or the configuration, is changed."""
    path.mkdir(parents=True)
    tensors = weights()
    if changed:
        tensors[changed][where] = 1.0
    save_file(tensors, path / "model.safetensors")
    values = CONFIG.to_dict() | config
    (path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return path


def test_a_base_is_known_by_its_weights_and_not_by_its_place(tmp_path: Path) -> None:
    base = AdapterBase.of(directory(tmp_path / "base"), 0, CONFIG)
    state = dataclasses.replace(STATE, base=base)
    copy = directory(tmp_path / "copy", max_position_embeddings=4096)
    other = directory(tmp_path / "other", "model.norm.weight")
    assert base_from(state, copy, CONFIG, "step-3").path == str(copy)
    with pytest.raises(ConfigError) as caught:
        base_from(state, other, CONFIG, "step-3")
    told = str(caught.value)
    assert base.hash in told and AdapterBase.of(other, 0, CONFIG).hash in told and "--base" in told
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"is not there: .*base\. Give its directory with --base"):
        base_from(state, None, CONFIG, "step-3")


@pytest.mark.parametrize("name", [*LARGE, *SMALL])
def test_a_base_in_which_one_tensor_differs_is_another(tmp_path: Path, name: str) -> None:
    base = AdapterBase.of(directory(tmp_path / "base"), 0, CONFIG)
    other = AdapterBase.of(directory(tmp_path / "other", name, where=-1), 0, CONFIG)
    assert other.hash != base.hash


def test_a_base_that_computes_something_else_with_the_same_weights_is_another(
    tmp_path: Path,
) -> None:
    base = AdapterBase.of(directory(tmp_path / "base"), 0, CONFIG)
    other = AdapterBase.of(directory(tmp_path / "other", swiglu_limit=1.0), 0, CONFIG)
    assert other.hash != base.hash


def test_known_sums_tell_what_no_sample_shows_where_both_bases_have_them(tmp_path: Path) -> None:
    plain = AdapterBase.of(directory(tmp_path / "plain"), 0, CONFIG)
    found = []
    for folder, changed in (("base", ""), ("other", "lm_head.weight")):
        path = directory(tmp_path / folder, changed, where=TENSOR_BLOCK_BYTES)
        write_sums(path, ["model.safetensors"])
        found.append(AdapterBase.of(path, 0, CONFIG))
    base, other = found
    assert plain.sums is None and plain.hash == base.hash == other.hash
    (told,) = dataclasses.replace(STATE, base=base).base_problems(other, "step-3")
    assert f"SHA-256 of its files: {base.sums}" in told and str(other.sums) in told
    assert dataclasses.replace(STATE, base=plain).base_problems(base, "step-3") == []
    assert dataclasses.replace(STATE, base=base).base_problems(plain, "step-3") == []


def test_random_weights_of_another_seed_or_size_are_another_base() -> None:
    wider = load_config(None, "tiny")
    wider.vocab_size += 64
    others = [AdapterBase.of(None, 8, CONFIG), AdapterBase.of(None, 7, wider)]
    for other in others:
        assert STATE.base_problems(other, "step-3") != []
    assert STATE.base_problems(AdapterBase.of(None, 7, CONFIG), "step-3") == []


def test_a_base_in_the_cache_of_the_hub_has_its_name_there() -> None:
    cached = "/cache/models--openai--gpt-oss-20b/snapshots/6cee5e81ee83917806bbde320786a8fb61efebee"
    assert AdapterBase(path=cached, seed=None, hash="").name == "openai/gpt-oss-20b"
    assert AdapterBase(path="/data/gpt-oss-20b", seed=None, hash="").name == "gpt-oss-20b"
    of_run = AdapterBase(path="/runs/cpt/checkpoints/step-00000100", seed=None, hash="")
    assert of_run.name == "cpt (step-00000100)"


def test_a_run_does_not_start_from_an_adapter_as_if_it_were_a_model(tmp_path: Path) -> None:
    write_adapter(tmp_path / "run", None, SECTION, CONFIG)
    told = r"holds an adapter alone.*cpt export --run_dir .*run --step 3 --out DIRECTORY"
    with pytest.raises(ConfigError, match=told):
        check_starting_weights(step_folder(tmp_path / "run", 3), parameter_shapes(CONFIG))


def test_layers_beyond_the_model_are_refused_before_they_take_memory() -> None:
    section = dataclasses.replace(SECTION, layers=(f"0-{10**12}",))
    state = dataclasses.replace(STATE, section=section)
    with pytest.raises(CheckpointError, match=r"step-3: state\.adapter .* the layers 0 to 3"):
        state.problems(SECTION, "bf16", CONFIG, "step-3")

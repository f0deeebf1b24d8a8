"""Name patterns of `train.freeze` say what they match, and what they cannot."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
from transformers import GptOssConfig

from cpt.checkpoint.loading import _log_freezing
from cpt.checkpoint.manifest import TensorRecord
from cpt.config import LaunchInfo, RunConfig, RunYaml, resolve
from cpt.model.configuration import PRESETS
from cpt.model.freezing import SHORTHANDS, freeze_problems, frozen_names
from cpt.model.parameters import parameter_numels
from cpt.planning.memory import count_parameters, device_memory, parameter_counts
from data_pipeline.config.strict_yaml import parse_yaml, read_file

CONFIG = GptOssConfig(**PRESETS["tiny"])
NAMES = list(parameter_numels(CONFIG))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("sinks", [f"model.layers.{i}.self_attn.sinks" for i in range(4)]),
        (
            "router",
            [
                f"model.layers.{i}.mlp.router.{kind}"
                for i in range(4)
                for kind in ("weight", "bias")
            ],
        ),
        ("embeddings", ["model.embed_tokens.weight"]),
        ("lm_head", ["lm_head.weight"]),
        ("model.layers.3", [name for name in NAMES if name.startswith("model.layers.3.")]),
        (
            "model.layers.[12].*norm*",
            [name for name in NAMES if name[13:14] in "12" and "norm" in name],
        ),
    ],
)
def test_pattern_matches_the_parameters_it_says(pattern: str, expected: list[str]) -> None:
    assert len(expected) > 0 and frozen_names([pattern], NAMES) == set(expected)


def test_norms_are_the_two_of_every_layer_and_the_last() -> None:
    assert len(frozen_names(["norms"], NAMES)) == 2 * 4 + 1


def test_every_word_matches_something() -> None:
    assert freeze_problems(tuple(SHORTHANDS)[:3], NAMES) == []
    assert all(frozen_names([word], NAMES) for word in SHORTHANDS)


def test_all_patterns_without_a_match_are_refused_with_the_nearest_names() -> None:
    found = freeze_problems(("rooter", "sinks", "model.layer.0.self_attn.sinks"), NAMES)
    assert len(found) == 2
    assert "train.freeze[0] is 'rooter'" in found[0] and "router" in found[0]
    assert "train.freeze[2]" in found[1] and "model.layers.0.self_attn.sinks" in found[1]


def test_freezing_everything_is_refused() -> None:
    assert "nothing is left to train" in freeze_problems(("model.*", "lm_head"), NAMES)[0]


def resolved(freeze: list[str], stage: int = 3) -> RunConfig:
    text = f"""
model: {{init: tiny}}
data: {{mix: unused.yaml}}
train:
  {{seq_len: 128, global_batch_size: 2, total_steps: 1, lr: 1e-3, freeze: {json.dumps(freeze)}}}
"""
    ds = parse_yaml(json.dumps({"zero_optimization": {"stage": stage}}), "ds.json")
    run = read_file(RunYaml, parse_yaml(text, "run.yaml"))
    return resolve(run, ds, CONFIG, LaunchInfo(world_size=2, local_world_size=2))


@pytest.mark.parametrize("stage", [1, 3])
def test_memory_of_frozen_parameters_is_their_weights_alone(stage: int) -> None:
    trained = sum(parameter_counts(CONFIG, ("experts",)))
    assert 0 < trained < sum(parameter_counts(CONFIG))
    configs = [resolved(freeze, stage) for freeze in ([], ["experts"])]
    whole, part = (
        device_memory(c, CONFIG, count_parameters(CONFIG, c.train.freeze)) for c in configs
    )
    assert part["optimizer"] == 12 * (trained // 2)
    assert part["gradients"] == (4 * (trained // 2) if stage == 3 else 2 * trained)
    same = set(whole) - {"optimizer", "gradients"}
    assert {name: whole[name] for name in same} == {name: part[name] for name in same}


def test_change_of_the_freeze_set_is_told_on_resume(caplog: pytest.LogCaptureFixture) -> None:
    record = TensorRecord(shape=(1,), dtype="float32")
    frozen = dataclasses.replace(record, trained=False)
    with caplog.at_level(logging.WARNING):
        _log_freezing(
            {"a": frozen, "b": record, "c": record}, {"a": record, "b": frozen, "c": record}
        )
    thawed, froze = (entry.getMessage() for entry in caplog.records)
    assert "moments start at zero: a" in thawed and froze.endswith("without moments: b")

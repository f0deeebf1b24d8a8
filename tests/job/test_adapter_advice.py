"""Settings that are seldom right for adapters are told at start, once, and others are not."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from cpt.config import RunYaml
from cpt.job.adapter_advice import warn_of_settings
from data_pipeline.config.strict_yaml import parse_yaml, read_file


def run_yaml(adapter: dict[str, Any], **train: Any) -> RunYaml:
    content = {
        "model": {"init": "tiny"},
        "data": {"mix": "unused.yaml"},
        "train": {"seq_len": 128, "global_batch_size": 8, "total_steps": 10, **train},
        "adapter": adapter,
    }
    return read_file(RunYaml, parse_yaml(json.dumps(content), "run.yaml"))


@pytest.mark.parametrize(
    ("adapter", "train", "told"),
    [
        ({}, {"lr": 1e-5, "weight_decay": 0.1}, []),
        ({"kind": "lora"}, {"lr": 1e-4, "weight_decay": 0.0}, []),
        ({"kind": "lora"}, {"lr": 1e-5, "weight_decay": 0.0}, ["train.lr is 1e-05"]),
        ({"kind": "lora"}, {"lr": 1e-4, "weight_decay": 0.1}, ["train.weight_decay is 0.1"]),
    ],
    ids=["no adapter", "both right", "rate of full training", "decay"],
)
def test_rates_and_decay_for_whole_weights_are_told(
    adapter: dict[str, Any],
    train: dict[str, Any],
    told: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_settings(run_yaml(adapter, **train))
    assert [
        record.getMessage()[: len(text)] for record, text in zip(caplog.records, told, strict=True)
    ] == told

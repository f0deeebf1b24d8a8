"""Private code of DeepSpeed is compared with the source that was read, where a run relies on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from cpt.deepspeed_adapter.engine import check_internals
from cpt.deepspeed_adapter.offload import offloaded_state
from cpt.deepspeed_adapter.version import RELIED_ON, check_private_code
from cpt.errors import ConfigError
from cpt.storage.file_memory import FileMemory

ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3}}


def with_nvme(*blocks: str) -> dict[str, Any]:
    """Return the JSON of a ZeRO-3 run with some of its state on NVMe."""
    block = {"device": "nvme", "nvme_path": "nvme"}
    return {"zero_optimization": {"stage": 3, **dict.fromkeys(blocks, block)}}


def other_method(zero: object) -> None:
    """Stand for a method of another DeepSpeed."""


def test_installed_deepspeed_is_the_one_that_was_read() -> None:
    check_private_code(RELIED_ON)


def test_changed_method_is_refused_with_its_name_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DeepSpeedZeroOptimizer_Stage3, "_create_fp32_partitions", other_method)
    with pytest.raises(ConfigError) as caught:
        check_internals(with_nvme("offload_optimizer"))
    text = str(caught.value)
    assert caught.value.exit_code == 78
    assert "DeepSpeedZeroOptimizer_Stage3._create_fp32_partitions" in text
    assert "2d22754c23f57f29" in text and "RELIED_ON of cpt/deepspeed_adapter/version.py" in text


def test_missing_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DeepSpeedZeroOptimizer_Stage3, "_get_norm_groups")
    with pytest.raises(ConfigError, match="_get_norm_groups, which ZeRO-3 relies on"):
        check_internals(ZERO3)


def test_only_what_the_configuration_uses_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepSpeedZeroOptimizer_Stage3, "_create_fp32_partitions", other_method)
    check_internals(ZERO3)
    check_internals(with_nvme("offload_param"))


def test_every_replaced_method_is_compared_and_is_back_after_the_block(tmp_path: Path) -> None:
    def methods() -> dict[str, Any]:
        return dict(vars(DeepSpeedZeroOptimizer_Stage3))

    before = methods()
    blocks = ("offload_optimizer", "offload_param")
    files = {name: FileMemory(tmp_path, 0) for name in blocks}
    with offloaded_state(ZERO3, files):
        replaced = {name for name, method in methods().items() if method is not before[name]}
    compared = {code.name for feature in RELIED_ON.values() for code in feature}
    assert len(replaced) == 3 and replaced <= compared
    assert methods() == before

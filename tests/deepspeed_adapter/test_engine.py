"""What DeepSpeed is given besides the user's JSON."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
from deepspeed.utils.config import get_timers_config

from cpt.deepspeed_adapter.engine import initialize


def test_the_clock_that_waits_for_the_device_in_every_micro_step_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[dict[str, Any]] = []

    def record(*, config: dict[str, Any], **_: Any) -> tuple[None, None]:
        given.append(config)
        return None, None

    monkeypatch.setattr(deepspeed, "initialize", record)
    engine_json = {"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}
    initialize(None, None, engine_json, {})  # type: ignore[arg-type]
    assert given[0].items() >= engine_json.items() and "timers" not in engine_json
    assert not get_timers_config(given[0]).enabled

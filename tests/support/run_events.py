"""Events of metrics.jsonl for tests of what reads them, and run directories that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = """
model: {init: tiny}
train: {total_steps: 30, gradient_clipping: 1.0}
guard: {tolerance_percent: 1.5}
"""


def step(number: int, **changes: Any) -> dict[str, Any]:
    event = {
        "event": "step",
        "step": number,
        "loss": 3.0,
        "grad_norm": 0.5,
        "lr": 1e-5,
        "tokens": 1000,
        "seconds": 2.0,
        "tokens_per_second": 500.0,
        "loss_by_language": {"ja": 3.5, "en": 2.5},
        "tokens_by_source": {"ja_web": 600, "en_web": 400},
        "bytes_sent": {"ulysses": 2048, "halo": 512},
    }
    return {**event, **changes}


def guard(number: int, domain: str = "english", **changes: Any) -> dict[str, Any]:
    event = {
        "event": "guard",
        "step": number,
        "domain": domain,
        "language": "en",
        "bits_per_byte": 0.9,
        "baseline": 0.9,
        "delta_percent": 0.25,
        "ci_low": 0.125,
        "ci_high": 0.5,
        "action": "none",
    }
    return {**event, **changes}


def traces(number: int, domain: str = "en-math", **changes: Any) -> dict[str, Any]:
    event = {
        "event": "guard",
        "kind": "traces",
        "step": number,
        "domain": domain,
        "language": "en",
        "divergence": 0.001 * number,
        "control_divergence": 0.002 * number,
        "delta": 0.002 * number,
        "lower_bound": 0.0015 * number,
        "upper_bound": 0.0025 * number,
        "tolerance": 0.1,
        "state": "green",
        "action": "none",
    }
    return {**event, **changes}


def checkpoint(number: int) -> dict[str, Any]:
    return {"event": "checkpoint", "step": number, "path": f"step-{number:08d}", "seconds": 1.0}


def run_dir(tmp_path: Path, *events: dict[str, Any], config: str | None = CONFIG) -> Path:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in events), encoding="utf-8"
    )
    if config is not None:
        (tmp_path / "config.resolved.yaml").write_text(config, encoding="utf-8")
    return tmp_path


def start(number: int, *, time: float = 1.8e9, **changes: Any) -> dict[str, Any]:
    event = {"event": "start", "step": number, "time": time, "start_up_seconds": 30.0}
    return {**event, **changes}


def end(number: int, **changes: Any) -> dict[str, Any]:
    return {"event": "end", "step": number, "time": 1.8e9 + 3600, **changes}


def long_run() -> list[dict[str, Any]]:
    return [
        guard(0, delta_percent=0.0),
        *(step(n) for n in range(1, 31)),
        guard(30, action="warn"),
        checkpoint(30),
    ]


def router(number: int, **changes: Any) -> dict[str, Any]:
    drift = 1 - number / 400
    values = {"load_max_over_mean": [1.5, 2.0 + number / 20, None], "overlap": [1.0, drift]}
    languages = {
        "en": {"distance": [0.1, 0.12], "load_max_over_mean": [1.7, 2.2], "overlap": [1.0, drift]},
        "ja": {
            "distance": [0.3, 0.2],
            "load_max_over_mean": [2.5, 3.0],
            "overlap": [0.99, drift - 0.05],
        },
    }
    return {
        "event": "router",
        "step": number,
        "dropped": 0,
        "by_language": languages,
        **values,
        **changes,
    }

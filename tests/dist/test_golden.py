"""Ten steps of configs/tiny.yaml, one row each, give the recorded losses and gradient norms.

Four processes share every row and the experts.

On the kind of machine where they were recorded the numbers are equal to the last bit.  Another
processor takes other matrix kernels, which add in another order: there the tolerance is that of
fp32 sums after ten updates. `python -m tests.dist.test_golden` records them again; a commit that
does so says why the numbers changed.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from cpt.telemetry.metrics import read_events
from tests.support.launcher import ROOT, launch

pytestmark = pytest.mark.dist

GOLDEN = Path(__file__).parent / "golden.json"
STEPS = 10
WORLD_SIZES = (1, 4)
OTHER_MACHINE_TOLERANCE = 2e-4
"""Relative; ten AdamW updates at a high learning rate amplify differences of 1e-7 in the sums."""


def machine() -> dict[str, str]:
    """Return what chooses the kernels: the processor, its vector instructions, and torch."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else ""
    return {
        "processor": model or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def run_steps(folder: Path, world_size: int) -> list[dict[str, Any]]:
    """Train in fp32, and return the loss and gradient norm of each step."""
    run_dir = folder / f"world{world_size}"
    settings = {
        "train.dtype": "fp32",
        "train.total_steps": STEPS,
        "train.global_batch_size": 1,
        "train.threads": 1,
        "data.build_dir": folder / "built",
        "guard.enabled": "false",
        "checkpoint.interval_steps": 0,
        "telemetry.export_at_end": "false",
    }
    ds_config = ROOT / "ds_configs" / "z3_ulysses.json"
    arguments = ["--ds_config", str(ds_config), "--run_dir", str(run_dir)]
    for key, value in settings.items():
        arguments += ["--set", f"{key}={value}"]
    codes = launch(ROOT / "cpt" / "run.py", world_size, arguments)
    assert codes == [0] * world_size
    events = [event for event in read_events(run_dir / "metrics.jsonl") if event["event"] == "step"]
    return [{"loss": event["loss"], "grad_norm": event["grad_norm"]} for event in events]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ten_steps_give_the_recorded_losses_and_gradient_norms(
    world_size: int, folder: Path
) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    steps = run_steps(folder, world_size)
    expected = golden["steps"][str(world_size)]
    assert len(steps) == len(expected) == STEPS
    if golden["machine"] == machine():
        assert steps == expected
        return
    for number, (step, recorded) in enumerate(zip(steps, expected, strict=True), 1):
        for name, value in step.items():
            assert value == pytest.approx(recorded[name], rel=OTHER_MACHINE_TOLERANCE), (
                f"step {number}: {name}"
            )


def main() -> None:
    """Record the numbers of this machine."""
    with TemporaryDirectory() as name:
        steps = {str(world_size): run_steps(Path(name), world_size) for world_size in WORLD_SIZES}
    text = json.dumps({"machine": machine(), "steps": steps}, indent=1)
    GOLDEN.write_text(text + "\n", encoding="utf-8")
    print(f"-> {GOLDEN}", file=sys.stderr)


if __name__ == "__main__":
    main()

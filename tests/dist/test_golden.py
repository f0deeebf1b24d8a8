"""Steps of configs/tiny.yaml, one row each, give the recorded losses and gradient norms.

One process does all ten. Four processes, which share every row and the experts, do the first five
of ten in `make test`, and all in `make prove`: what they do differently from one process is there
from the first step on.

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
COMPARED = [(1, STEPS), (4, STEPS // 2), pytest.param(4, STEPS, marks=pytest.mark.slow)]
"""World sizes, and the steps that are compared."""
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


def run_steps(folder: Path, world_size: int, stop_at_step: int) -> list[dict[str, Any]]:
    """Begin a training of ten steps in fp32; return the loss and gradient norm of each step."""
    run_dir = folder / f"world{world_size}-{stop_at_step}"
    settings = {
        "train.dtype": "fp32",
        "train.total_steps": STEPS,
        "train.stop_at_step": stop_at_step,
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


@pytest.mark.parametrize(("world_size", "num_steps"), COMPARED)
def test_steps_give_the_recorded_losses_and_gradient_norms(
    world_size: int, num_steps: int, folder: Path
) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    steps = run_steps(folder, world_size, num_steps)
    assert len(golden["steps"][str(world_size)]) == STEPS
    expected = golden["steps"][str(world_size)][:num_steps]
    assert len(steps) == num_steps
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
        steps = {}
        for world_size in WORLD_SIZES:
            steps[str(world_size)] = run_steps(Path(name), world_size, STEPS)
    text = json.dumps({"machine": machine(), "steps": steps}, indent=1)
    GOLDEN.write_text(text + "\n", encoding="utf-8")
    print(f"-> {GOLDEN}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""An export is measured on the traces of a run, in the unit of their tolerance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cpt.cli import main
from cpt.guard.traces.rows import Trace
from cpt.guard.traces.sampling import AskedPrompts
from cpt.guard.traces.store import TraceFolder
from cpt.training import loader
from data_pipeline.config.traces_config import TraceDomain
from tests.dist.cases import reference_model

VOCABULARY = 512


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "END_OF_TEXT", VOCABULARY - 1)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose untouched model held all tokens for equally likely."""
    generator = np.random.Generator(np.random.PCG64(0))
    traces = []
    for _ in range(6):
        tokens = generator.integers(0, 500, 24).tolist()
        traces.append(Trace(prompt=tokens[:10], reply=tokens[10:]))
    domain = TraceDomain(name="en-math", language="en", path="unused")
    asked = AskedPrompts(domain=domain, prompts=[list(trace.prompt) for trace in traces])
    folder = TraceFolder(tmp_path / "run" / "guard" / "traces")
    num_tokens = 6 * 14
    file = folder.open_targets("en-math", num_tokens, 2)
    likely = np.log(1 / VOCABULARY)
    log_p = torch.tensor([[likely, likely, np.log(1 - 2 / VOCABULARY)]]).repeat(num_tokens, 1)
    file.append(torch.tensor([[3, 5]]).repeat(num_tokens, 1), log_p.float())
    file.finish()
    folder.complete(asked.origin("weights"), "base", 2, traces)
    return tmp_path / "run"


def test_export_is_measured_on_every_domain(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference_model().save_pretrained(str(tmp_path / "model"))
    command = ["guard", "divergence", "--run_dir", str(run_dir), "--model", str(tmp_path / "model")]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "against the untouched model base" in table
    (line,) = [line for line in table.splitlines() if line.startswith("  en-math")]
    name, traces, text, at_most, *_ = line.split()
    assert (name, traces) == ("en-math", "6")
    assert 0 <= float(text) < float(at_most)


def test_run_without_traces_is_refused(tmp_path: Path) -> None:
    reference_model().save_pretrained(str(tmp_path / "model"))
    command = [
        "guard",
        "divergence",
        "--run_dir",
        str(tmp_path),
        "--model",
        str(tmp_path / "model"),
    ]
    assert main(command) == 78

"""Traces, and the divergence on them, are those of one process in every layout, killed or not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cpt.guard.audit import audit
from cpt.telemetry.metrics import read_events
from tests.dist.cases import Scenario, reference_model
from tests.support.launcher import ROOT, free_port, launch, rank_environment
from tests.support.records import write_jsonl
from tests.support.service import SMALL_GUARD

pytestmark = pytest.mark.dist

ONE = Scenario(world_size=1, sp=1, ep=1, stage=3)
RESUMED = "resumed"
"""Name of the directory of a run that is killed and started again."""
OTHERS = [
    Scenario(world_size=2, sp=1, ep=2, stage=2, micro_batch_size=2),
    Scenario(world_size=4, sp=2, ep=2, stage=3),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    model = reference_model()
    model.save_pretrained(str(folder / "model"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 2 * parameter.std() * noise
    model.save_pretrained(str(folder / "moved"))
    for world_size in (1, 2, 4):
        scenarios = [one for one in (ONE, *OTHERS) if one.world_size == world_size]
        arguments = [str(folder), *(one.dump() for one in scenarios)]
        worker = ROOT / "tests" / "dist" / "traces_worker.py"
        assert launch(worker, world_size, arguments) == [0] * world_size
    return folder


def found(folder: Path, scenario: Scenario) -> dict[str, list[float]]:
    content: dict[str, list[float]] = json.loads((folder / f"{scenario.name}.json").read_text())
    return content


def traces(folder: Path, scenario: Scenario) -> Any:
    return json.loads((folder / scenario.name / "en.json").read_text())


def test_one_process_finds_nothing_at_its_own_weights_and_something_at_others(
    folder: Path,
) -> None:
    one = found(folder, ONE)
    assert max(one["own"]) <= 1e-6 and min(one["moved"]) > 1e-2


@pytest.mark.parametrize("scenario", OTHERS, ids=lambda scenario: scenario.name)
def test_traces_are_those_of_one_process(folder: Path, scenario: Scenario) -> None:
    expected = traces(folder, ONE)
    got = traces(folder, scenario)
    assert got["replies"] == expected["replies"] and got["prompts"] == expected["prompts"]
    lengths = [len(reply) for reply in expected["replies"]]
    assert max(lengths) == 24


@pytest.mark.parametrize("scenario", OTHERS, ids=lambda scenario: scenario.name)
def test_divergence_is_that_of_one_process(folder: Path, scenario: Scenario) -> None:
    expected = found(folder, ONE)
    got = found(folder, scenario)
    assert max(got["own"]) <= 1e-6
    # fp32 sums are taken in another order
    assert got["moved"] == pytest.approx(expected["moved"], abs=1e-6, rel=1e-5)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mix with short rows and a domain of traces, a run YAML and a DeepSpeed JSON."""
    folder = tmp_path_factory.mktemp("run")
    sample = ROOT / "data_pipeline" / "sample"
    sources = []
    for name, language in {"ja_essay": "ja", "en_web": "en"}.items():
        source = {"name": name, "language": language, "domain": "web", "weight": 0.5}
        sources.append({**source, "path": str(sample / f"{name}.jsonl"), "held_out_share": 0.1})
    domain = {"name": "own", "language": "en", "path": "prompts.jsonl", "sources": ["en_web"]}
    # a model with random weights knows no format and has no peaks: its divergences are tiny
    limits = {"max_new_tokens": 6, "tolerance": 1e-6, "hard_limit": 0.5}
    guard = {**SMALL_GUARD, "traces": [{**domain, **limits}]}
    mix = {"seq_len": 256, "seed": 1, "guard": guard, "sources": sources}
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"What is {n} + 1?"} for n in range(70)])
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    train = {"seq_len": 256, "global_batch_size": 2, "total_steps": 2, "lr": 1e-2, "dtype": "fp32"}
    run = {
        "model": {"init": "tiny"},
        "data": {"mix": "mix.yaml"},
        "train": train,
        "guard": {"max_documents": 1, "policy": "warn"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    return folder


def run_once(workplace: Path, run_dir: str, fault: str = "") -> int:
    """Run one process to its end, and return its exit code."""
    command = [sys.executable, str(ROOT / "cpt" / "run.py")]
    command += ["--ds_config", "ds.json", "--config", "run.yaml", "--run_dir", run_dir]
    environment = rank_environment(0, 1, free_port())
    if fault:
        environment |= {"CPT_ALLOW_FAULTS": "1", "CPT_FAULT": fault}
    done = subprocess.run(
        command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=280
    )
    print(done.stdout, done.stderr)
    return done.returncode


def trace_files(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "guard" / "traces").iterdir()}


@pytest.fixture(scope="module")
def killed(workplace: Path) -> dict[str, bytes]:
    """The traces of the run RESUMED when it was killed, before it was started again."""
    assert run_once(workplace, RESUMED, "sample_traces:0:1:kill") == -signal.SIGKILL
    files = trace_files(workplace / RESUMED)
    assert run_once(workplace, RESUMED) == 0
    return files


@pytest.mark.slow
def test_run_killed_while_it_samples_goes_on_with_the_replies_that_it_had(
    workplace: Path, killed: dict[str, bytes]
) -> None:
    assert sorted(killed) == ["own.sampled-00000.json"]
    had = json.loads(killed["own.sampled-00000.json"])["replies"]
    files = trace_files(workplace / RESUMED)
    assert sorted(files) == ["own.json", "own.safetensors"]
    replies = json.loads(files["own.json"])["replies"]
    assert replies[: len(had)] == had and len(replies) == 70 > len(had)


@pytest.mark.slow
@pytest.mark.usefixtures("killed")
def test_run_measures_its_own_traces_before_the_first_step_and_at_the_end(
    workplace: Path,
) -> None:
    events = []
    for event in read_events(workplace / RESUMED / "metrics.jsonl"):
        if event["event"] == "guard" and event["kind"] == "traces":
            events.append(event)
    assert [event["step"] for event in events] == [0, 2]
    before, after = events
    assert before["divergence"] <= 1e-7 and before["traces"] == 70
    assert after["divergence"] > 1e-5 and after["state"] == "red" and after["action"] == "warn"
    assert all(audited.problems == [] for audited in audit(workplace / RESUMED))

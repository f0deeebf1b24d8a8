"""W&B shows one run over all starts, with every event at its step; the real client is asked what it
has recorded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.config import TelemetrySection
from cpt.telemetry.wandb_settings import WandbSettings, mode_of
from cpt.telemetry.wandb_tracker import WandbTracker
from tests.support.launcher import ROOT
from tests.support.wandb_files import Recorded, recorded_starts

Event = dict[str, Any]

SECTION = {
    "wandb": "online",
    "wandb_entity": "team",
    "wandb_group": "group",
    "wandb_tags": ["ja", "20b"],
    "wandb_notes": "notes",
    "wandb_job_type": "pretrain",
    "wandb_artifacts": "checkpoints",
}
ENVIRONMENT = {"WANDB_MODE": "offline", "WANDB_NAME": "named", "WANDB_RUN_GROUP": "other"}
SECRET = "canary" * 8
UNREACHABLE = {
    "WANDB_MODE": "online",
    "WANDB_BASE_URL": "http://127.0.0.1:9",
    "WANDB_INIT_TIMEOUT": "2",
}
"""Nothing listens on this port."""


def steps(first: int, last: int) -> list[Event]:
    events = []
    for step in range(first, last + 1):
        events.append(
            {"event": "step", "step": step, "loss": 3.0 / step, "total_tokens": 10 * step}
        )
    return events


LOOK = [
    {
        "event": "guard_decision",
        "step": 4,
        "action": "raise_replay",
        "reason": "english is worse",
        "after": {"lr_scale": 1.0, "shares": {}},
        "evidence": [{"domain": "english", "tolerance": 2.0}],
    },
    {
        "event": "guard",
        "step": 4,
        "kind": "text",
        "domain": "english",
        "bits_per_byte": 0.9,
        "baseline": 0.8,
        "delta_percent": 12.5,
        "lower_bound": 1.0,
        "upper_bound": None,
        "state": "red",
        "action": "raise_replay",
    },
    {"event": "evaluation", "step": 4, "seconds": 1.0},
]
ROUTER = {
    "event": "router",
    "step": 4,
    "aux_loss": 1.1,
    "entropy": [1.0, 2.0, None],
    "by_language": {"ja": {"overlap": [0.5, 0.75]}},
}
SAMPLES = [
    {"event": "sample", "step": 4, "number": 0, "prompt": "Once", "text": " upon", "tokens": [1]},
    {"event": "sample", "step": 4, "number": 1, "prompt": "Hello", "text": " there", "tokens": [2]},
]
CHECKPOINT = {"event": "checkpoint", "step": 2, "path": "step-00000002", "seconds": 5.0}
FIRST = [
    {"event": "start", "step": 0, "time": 1.0},
    *steps(1, 4),
    CHECKPOINT,  # of an asynchronous save: late
    ROUTER,
    *LOOK,
    *SAMPLES,
    {"event": "end", "step": 4, "time": 2.0},
]
SECOND = [{"event": "start", "step": 2, "time": 3.0}, *steps(3, 6)]
"""Goes on from the checkpoint, and is never told how it ended."""


FAILED = [
    {"event": "start", "step": 6, "time": 4.0},
    *steps(7, 7),
    {"event": "end", "step": 7, "time": 5.0, "exit_code": 70, "cause": "it broke"},
]


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """What the starts of one run directory left."""

    run_dir: Path
    starts: list[Recorded]
    seconds: list[dict[str, float]]
    """How long training waited, by start."""
    output: str


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """Two sound starts, one without its server, one whose service is killed, one whose hangs."""
    folder = tmp_path_factory.mktemp("tracked")
    run_dir = folder / "run"
    checkpoint = run_dir / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}", encoding="utf-8")
    many = steps(7, 2000)
    plan = [
        {"telemetry": SECTION, "events": FIRST},
        {"telemetry": SECTION, "events": SECOND},
        {"telemetry": SECTION, "events": FAILED, "environment": UNREACHABLE},
        {
            "telemetry": SECTION,
            "events": [*steps(7, 2000), {"event": "end", "step": 2000, "exit_code": 0}],
            "signal": signal.SIGKILL,
            "environment": {"WANDB_MODE": "offline"},
        },
        {"telemetry": SECTION, "events": many, "signal": signal.SIGSTOP},
    ]
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    command = [sys.executable, "-m", "tests.support.tracked_starts"]
    with open(folder / "output", "wb") as out:  # a pipe would stay open in a service that hangs
        code = subprocess.run(
            [*command, str(run_dir), str(folder / "plan.json")],
            cwd=folder,
            env={**inherited, **ENVIRONMENT, "WANDB_API_KEY": SECRET, "PYTHONPATH": str(ROOT)},
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=300,
        ).returncode
    output = (folder / "output").read_text(encoding="utf-8")
    assert code == 0, output
    seconds = [json.loads(line) for line in output.splitlines() if line.startswith('{"log')]
    return Tracked(run_dir=run_dir, starts=recorded_starts(run_dir), seconds=seconds, output=output)


def test_all_starts_are_one_run_whose_id_is_kept(tracked: Tracked) -> None:
    kept = json.loads((tracked.run_dir / "wandb_run.json").read_text(encoding="utf-8"))
    folders = [folder.name for folder in tracked.run_dir.glob("wandb/offline-run-*")]
    assert len(folders) == 6 and all(f"-{kept['run_id']}" in name for name in folders)
    for start in tracked.starts[:2]:
        assert start.run.run_id == kept["run_id"] and start.run.resume


def test_variables_go_before_the_run_yaml(tracked: Tracked) -> None:
    run = tracked.starts[0].run
    assert (run.display_name, run.run_group) == ("named", "other")
    assert (run.entity, run.project, run.job_type) == ("team", "gpt-oss-cpt", "pretrain")
    assert (list(run.tags), run.notes) == (["ja", "20b"], "notes")


def test_resolved_configuration_is_recorded(tracked: Tracked) -> None:
    found = {
        update.key: json.loads(update.value_json) for update in tracked.starts[0].run.config.update
    }
    assert found["train"] == {"lr": 1e-3}


def test_every_step_has_its_numbers_and_both_axes(tracked: Tracked) -> None:
    assert tracked.starts[0].series("train/loss") == {step: 3.0 / step for step in range(1, 5)}
    assert tracked.starts[0].series("total_tokens")[4] == 40
    (axis,) = [metric for metric in tracked.starts[0].metrics if metric.glob_name == "*"]
    assert axis.step_metric == "step"


def test_event_that_comes_late_is_recorded_at_its_step(tracked: Tracked) -> None:
    assert tracked.starts[0].series("checkpoint/seconds") == {2: 5.0}


def test_steps_that_a_restart_does_again_are_recorded(tracked: Tracked) -> None:
    assert sorted(tracked.starts[1].series("train/loss")) == [3, 4, 5, 6]


def test_routers_are_a_histogram_over_layers(tracked: Tracked) -> None:
    (row,) = [row for row in tracked.starts[0].rows if "router/aux_loss" in row]
    assert row["router/entropy._type"] == "histogram"
    assert sum(row["router/entropy.values"]) == 2
    assert (row["router/entropy/mean"], row["router/entropy/max"]) == (1.5, 2.0)
    assert row["router/ja/overlap._type"] == "histogram"


def table_of(tracked: Tracked, name: str) -> dict[str, Any]:
    (row,) = [row for row in tracked.starts[0].rows if f"{name}._type" in row]
    assert row["step"] == 4
    path = row[f"{name}.path"]
    (file,) = tracked.run_dir.glob(f"wandb/offline-run-*/files/{path}")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def test_measurement_of_the_guard_is_a_table(tracked: Tracked) -> None:
    table = table_of(tracked, "guard/table")
    (row,) = table["data"]
    found = dict(zip(table["columns"], row, strict=True))
    assert found == {
        "domain": "english",
        "measure": "text",
        "baseline": 0.8,
        "now": 0.9,
        "change": 12.5,
        "lower bound": 1.0,
        "upper bound": None,
        "tolerance": 2.0,
        "state": "red",
        "action": "raise_replay",
    }


def test_continuations_of_a_step_are_one_table(tracked: Tracked) -> None:
    assert table_of(tracked, "samples")["data"] == [[0, "Once", " upon"], [1, "Hello", " there"]]


def test_people_are_alerted_when_the_guard_acts_and_when_the_run_ends(tracked: Tracked) -> None:
    alerts = [(alert.title, alert.level) for alert in tracked.starts[0].alerts]
    assert alerts == [("named: guard: raise_replay", "WARN"), ("named: ended", "INFO")]
    assert tracked.starts[0].alerts[0].text == "step 4: english is worse"


def test_start_without_an_orderly_end_counts_as_failed(tracked: Tracked) -> None:
    assert tracked.starts[0].exit_code == 0
    assert tracked.starts[1].exit_code == 1


def test_checkpoint_is_an_artifact_that_refers_to_its_folder(tracked: Tracked) -> None:
    (artifact,) = [one for one in tracked.starts[0].artifacts if one.type == "checkpoint"]
    assert "step-2" in artifact.aliases
    (content,) = artifact.manifest.contents
    folder = tracked.run_dir / "checkpoints" / "step-00000002"
    assert content.ref == (folder / "manifest.json").as_uri() and not content.local_path


def test_checkpoint_that_was_deleted_meanwhile_is_no_artifact_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged: list[Any] = []
    tracker = WandbTracker.__new__(WandbTracker)
    vars(tracker).update(
        _config=SimpleNamespace(telemetry=SimpleNamespace(wandb_artifacts="checkpoints")),
        _run_dir=tmp_path,
        _id="id",
        _run=SimpleNamespace(log_artifact=lambda artifact, aliases: logged.append(aliases)),
    )
    tracker._add_artifact(CHECKPOINT)
    assert logged == [] and "W&B does not list step-00000002: ValueError" in caplog.text
    folder = tmp_path / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    tracker._add_artifact(CHECKPOINT)
    assert logged == [["step-2"]]


def test_no_file_holds_the_key(tracked: Tracked) -> None:
    for file in tracked.run_dir.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    assert SECRET not in tracked.output


def test_run_whose_server_does_not_answer_records_offline(tracked: Tracked) -> None:
    assert tracked.starts[2].series("train/loss") == {7: 3.0 / 7}
    assert "W&B cannot be reached" in tracked.output
    assert "wandb sync" in tracked.output


def test_failure_is_an_alert_with_its_cause(tracked: Tracked) -> None:
    (alert,) = tracked.starts[2].alerts
    assert (alert.title, alert.level) == ("named: failed", "ERROR")
    assert alert.text == "step 7: it broke"
    assert tracked.starts[2].exit_code == 1


def test_service_that_is_killed_is_started_again_for_the_same_run(tracked: Tracked) -> None:
    assert tracked.output.count("W&B failed (") == 1, tracked.output
    assert "Traceback" not in tracked.output, tracked.output
    steps_after = set()
    for start in tracked.starts[3:]:
        steps_after |= set(start.series("train/loss"))
    assert max(steps_after) == 2000


def test_service_that_hangs_makes_neither_a_step_nor_the_exit_wait(tracked: Tracked) -> None:
    assert len(tracked.seconds) == 5
    assert max(start["log_seconds"] for start in tracked.seconds) < 2
    assert tracked.seconds[4]["close_seconds"] < 15
    assert "W&B did not finish within 3 s and was cut off" in tracked.output


def section(**values: Any) -> TelemetrySection:
    return TelemetrySection(**values)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "online"),
        ({"WANDB_MODE": ""}, "online"),
        ({"WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
    ],
    ids=lambda value: str(value),
)
def test_mode_of_the_environment_goes_first(variables: dict[str, str], expected: str) -> None:
    assert mode_of(section(wandb="online"), variables) == expected


def test_no_variable_switches_on_what_the_run_yaml_disables() -> None:
    assert mode_of(section(wandb="disabled"), {"WANDB_MODE": "online"}) == "disabled"


def test_variables_that_overrule_the_run_yaml_are_told(tmp_path: Path) -> None:
    settings = WandbSettings.of(
        section(wandb="online", wandb_entity="team"),
        tmp_path / "name",
        {"WANDB_PROJECT": "theirs", "WANDB_ENTITY": "team"},
    )
    assert settings.overruled == ("WANDB_PROJECT",)
    assert settings.describe() == (
        "W&B: online, team/theirs, run name; WANDB_PROJECT from the environment, before the run "
        "YAML"
    )

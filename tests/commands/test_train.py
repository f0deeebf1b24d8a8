"""`cpt train` is `deepspeed cpt/run.py`, and `cpt --version` names what a report should name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cpt.cli import main
from cpt.commands.train import FLAGS, VALUES, launch_command
from cpt.run import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "cpt" / "run.py")
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner"]


def test_options_of_the_launcher_go_to_it_and_all_others_to_the_run() -> None:
    words = ["--set", "train.lr=1", "--num_gpus", "2", "--ds_config", "d.json", "--no_ssh", "-q"]
    assert launch_command(words) == [
        *LAUNCHER,
        "--num_gpus=2",
        "--no_ssh",
        RUN,
        "--set",
        "train.lr=1",
        "--ds_config",
        "d.json",
        "-q",
    ]


def test_command_becomes_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    assert main(["train", "--ds_config", "d.json", "--master_port", "29501", "--dry_run"]) == 0
    assert started == [
        [*LAUNCHER, "--master_port=29501", RUN, "--ds_config", "d.json", "--dry_run"]
    ]


def test_options_before_the_subcommand_reach_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    assert main(["--verbose", "train", "--num_gpus", "2", "--ds_config", "d.json"]) == 0
    assert started == [[*LAUNCHER, "--num_gpus=2", RUN, "--verbose", "--ds_config", "d.json"]]


def test_wrong_option_is_refused_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started"))
    with pytest.raises(SystemExit) as left:
        main(["train", "--ds_config", "d.json", "--dryrun"])
    assert left.value.code == 78


def test_deepspeed_knows_every_option_that_is_handed_to_it() -> None:
    from deepspeed.launcher.runner import parse_args

    words = [f"--{name}={1 if name.endswith(('port', 's', 'rank')) else 'x'}" for name in VALUES]
    words = [word for word in words if not word.startswith("--launcher_args")]
    found = parse_args([*words, "--launcher_args=y", *(f"--{name}" for name in FLAGS), "run.py"])
    assert found.user_script == "run.py" and found.no_ssh and found.launcher_args == "y"


def test_options_of_a_run_are_the_same_in_both_commands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--ds_config", "d.json", "--set", "a=b", "--resume", "12", "--gpu", "h100"]
    monkeypatch.setattr(os, "execv", lambda program, command: seen.append(command))
    seen: list[list[str]] = []
    main(["train", *words])
    assert seen[0][-len(words) :] == words
    options = parse_arguments(words)
    assert options.resume == "12" and options.gpu == "h100"


def test_version_names_the_packages_that_decide_how_a_run_behaves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    words = capsys.readouterr().out.split()
    assert words[0::2] == ["gpt-oss-cpt", "torch", "deepspeed", "transformers"]

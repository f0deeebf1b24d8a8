"""A wrong command line is refused at once: nothing large is imported before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from cpt.resilience.environment import LAUNCHER_VARIABLES
from tests.support.launcher import ROOT, rank_environment

HEAVY = ("torch", "transformers", "deepspeed", "numpy", "lm_eval")

WRONG: dict[str, tuple[list[str], str]] = {
    "sample-prompt": (["sample", "--model", "HERE", "--prompt", ""], "--prompt is empty"),
    "sample-sampling": (["sample", "--model", "HERE", "--prompt", "a", "--top_p", "2"], "--top_p"),
    "sample-run_dir": (["sample", "--run_dir", "no", "--prompt", "a"], "--run_dir no does not"),
    "sample-model": (["sample", "--model", "no", "--prompt", "a"], "--model"),
    "export-run_dir": (["export", "--run_dir", "no", "--out", "x"], "--run_dir no does not"),
    "export-out": (["export", "--run_dir", "HERE", "--out", "HERE"], "is not overwritten"),
    "export-format": (["export", "--run_dir", "HERE", "--out", "x", "--format", "int4"], "int4"),
    "export-base": (["export", "--run_dir", "HERE", "--out", "x", "--base", "no"], "--base: no"),
    "import_adapter-set": (
        ["import-adapter", "HERE", "--config", "tasks.yaml", "--run_dir", "x", "--set", "nonsense"],
        "--set nonsense has no '='",
    ),
    "stage-set": (
        ["stage", "--config", "tasks.yaml", "--run_dir", "x", "--to", "x", "--set", "nonsense"],
        "--set nonsense has no '='",
    ),
    "merge-base": (["merge", "--base", "no", "--tuned", "HERE", "--out", "x"], "--base"),
    "merge-score": (
        ["merge", "--base", "HERE", "--tuned", "HERE", "--out", "x", "--score_only"],
        "--score_only needs --mix",
    ),
    "evaluate-baseline": (
        ["evaluate", "--model", "HERE", "--tasks", "tasks.yaml", "--out", "x"],
        "--baseline is missing",
    ),
    "evaluate-tasks": (
        ["evaluate", "--model", "HERE", "--tasks", "no", "--out", "x", "--no_baseline"],
        "--tasks no: no such file",
    ),
    "evaluate-empty": (
        ["evaluate", "--model", "HERE", "--tasks", "tasks.yaml", "--out", "x", "--no_baseline"],
        "tasks.yaml",
    ),
    "replay-nothing": (["replay", "--model", "HERE", "--out", "x"], "are both missing"),
    "kl_targets-build": (
        ["kl_targets", "--model", "HERE", "--build", "no", "--source", "a", "--out", "x"],
        "--build no: no such folder",
    ),
    "guard-run_dir": (["guard", "audit", "--run_dir", "no"], "--run_dir no does not exist"),
    "checkpoints-run_dir": (["checkpoints", "--run_dir", "no"], "--run_dir no does not exist"),
}
"""Command lines of `cpt`, and words of their refusal; HERE is a folder with a config.json."""

SCRIPT = """
import contextlib, io, json, os, sys
from cpt.cli import main
from cpt.resilience.stop import StopRequest
from cpt.run import main as run

def told(function):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            code = function()
        except SystemExit as end:
            code = end.code
    heavy = [name for name in HEAVY if name in sys.modules]
    return {"code": code, "text": errors.getvalue(), "heavy": heavy}

answers = {name: told(lambda: main(words)) for name, words in CASES.items()}
os.environ.update(LAUNCHER)
ARGUMENTS = ["--ds_config", "x", "--resume", "latest", "--gpu", "x100", "--set", "nonsense"]
answers["run"] = told(lambda: run(ARGUMENTS, StopRequest()))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return code, text and large imports after each wrong command line, all of one process."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "tasks.yaml").write_text("nothing: 1\n", encoding="utf-8")
    cases = {}
    for name, (words, _) in WRONG.items():
        cases[name] = ["." if word == "HERE" else word for word in words]
    launcher = rank_environment(0, 1, 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in LAUNCHER_VARIABLES:
        environment.pop(name, None)
    values = f"HEAVY = {HEAVY!r}\nCASES = {cases!r}\nLAUNCHER = {launcher!r}\n"
    script = values + SCRIPT
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", WRONG)
def test_wrong_command_line_is_refused_before_large_imports(
    answers: dict[str, Any], name: str
) -> None:
    answer = answers[name]
    assert WRONG[name][1] in answer["text"]
    assert answer["code"] in (2, 78)
    assert answer["heavy"] == []


def test_wrong_command_line_of_a_run_is_refused_before_large_imports(
    answers: dict[str, Any],
) -> None:
    answer = answers["run"]
    for words in ("--resume latest must be", "--gpu x100 is not known", "--set nonsense"):
        assert words in answer["text"]
    assert answer["code"] == 78
    assert answer["heavy"] == []

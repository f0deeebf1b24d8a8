"""The same mistake ends with the same exit code, whichever command it is made with.

78   a wrong option; a file or folder that is named and is not there; no model in a folder
65   data that is there and cannot be used
74   a checkpoint or a file that cannot be read
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt import cli
from cpt.resilience.stop import StopRequest
from cpt.run import main as run_main
from data_pipeline.__main__ import main as data_main
from tests.support.launcher import rank_environment

ABSENT = "absent"
"""A path that does not exist."""
COMMANDS: dict[str, list[str]] = {
    "export": ["export", "--run_dir", ABSENT, "--out", "out"],
    "merge": ["merge", "--base", ABSENT, "--tuned", ABSENT, "--out", "out"],
    "sample": ["sample", "--model", ABSENT, "--prompt", "a"],
    "sample-run": ["sample", "--run_dir", ABSENT, "--prompt", "a"],
    "report": ["report", "--run_dir", ABSENT],
    "checkpoints": ["checkpoints", "--run_dir", ABSENT],
    "guard-audit": ["guard", "audit", "--run_dir", ABSENT],
    "guard-divergence": ["guard", "divergence", "--run_dir", ABSENT, "--model", ABSENT],
    "plan": ["plan", "--config", ABSENT, "--ds_config", ABSENT, "--gpus", "8"],
    "evaluate": ["evaluate", "--model", ABSENT, "--tasks", ABSENT, "--out", "out", "--no_baseline"],
    "suite-run": ["suite", "run", "--suite", ABSENT, "--server", "x", "--model", "m", "--out", "o"],
    "suite-collect": [
        "suite", "collect", "--suite", ABSENT, "--results", ABSENT, "--model", "m", "--out", "o"
    ],
    "suite-compare": ["suite", "compare", "--suite", ABSENT, "--result", ABSENT, "--baseline", "b"],
    "suite-plot": ["suite", "plot", ABSENT, "--out", "out.svg"],
    "replay": ["replay", "--model", ABSENT, "--prefixes", ABSENT, "--out", "out"],
    "kl_targets": [
        "kl_targets", "--model", ABSENT, "--build", ABSENT, "--source", "a", "--out", "out"
    ],
}  # fmt: skip
"""A command line of every subcommand of `cpt` that names files, none of which is there."""
DATA_COMMANDS: dict[str, list[str]] = {
    "build": ["build", ABSENT, "--out", "out"],
    "plan": ["plan", ABSENT, "--out", "out"],
    "diff": ["diff", ABSENT, ABSENT],
    "audit": ["audit", ABSENT],
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, which a refused command leaves empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code_of(main: object, arguments: list[str]) -> int:
    """Return the exit code of a command, whichever way it ends."""
    try:
        return main(arguments)  # type: ignore[operator]
    except SystemExit as ended:
        return int(ended.code or 0)


def run(arguments: list[str]) -> int:
    """Return the exit code of cpt/run.py."""
    return code_of(lambda words: run_main(words, StopRequest()), arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_file_is_a_bad_configuration(name: str, here: Path, capsys) -> None:
    code = code_of(cli.main, COMMANDS[name])
    told = capsys.readouterr().err
    assert code == 78, told
    assert ABSENT in told and "Traceback" not in told
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", DATA_COMMANDS)
def test_missing_mix_is_a_bad_configuration(name: str, here: Path, capsys) -> None:
    code = code_of(data_main, DATA_COMMANDS[name])
    told = capsys.readouterr().err
    assert code == 78, told
    assert ABSENT in told and "Traceback" not in told
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", [*COMMANDS, "status", "doctor"])
def test_wrong_option_is_a_bad_configuration(name: str, capsys) -> None:
    arguments = COMMANDS.get(name, [name])
    assert code_of(cli.main, [*arguments, "--no_such_option"]) == 78
    assert "--help helps" in capsys.readouterr().err


@pytest.mark.parametrize("name", DATA_COMMANDS)
def test_wrong_option_of_the_data_pipeline_is_a_bad_configuration(name: str, capsys) -> None:
    assert code_of(data_main, [*DATA_COMMANDS[name], "--no_such_option"]) == 78
    assert "--help helps" in capsys.readouterr().err


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that a launcher gives a run of one process."""
    for name, value in rank_environment(0, 1, 1).items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("as_rank")
def test_run_gives_the_codes_of_commands(here: Path, capsys) -> None:
    files = ["--ds_config", ABSENT, "--config", ABSENT, "--dry_run"]
    assert run([*files, "--no_such_option"]) == 78
    assert "--no_such_option" in capsys.readouterr().err
    assert run(files) == 78
    assert f"{ABSENT}: no such file." in capsys.readouterr().err
    assert run(["--dry_run"]) == 78
    assert "--ds_config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WORLD_SIZE", "a", "environment variable WORLD_SIZE is 'a', must be a whole number"),
        ("RANK", "", "no launcher: RANK not set. Start with  deepspeed cpt/run.py"),
        ("MASTER_PORT", "99999999", "environment variable MASTER_PORT is '99999999'"),
    ],
)
@pytest.mark.usefixtures("as_rank")
def test_wrong_variable_of_the_launcher_is_a_bad_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    assert run(["--ds_config", ABSENT, "--dry_run"]) == 78
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told


def broken_text(folder: Path) -> None:
    """A mix whose source holds bytes that are no UTF-8."""
    (folder / "text.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n' * 20)
    (folder / "mix.yaml").write_text(
        "seq_len: 64\nseed: 1\nsources:\n"
        "  - {name: a, language: en, domain: web, path: text.jsonl, weight: 1.0}\n"
    )


def test_bad_text_is_bad_data(here: Path, capsys) -> None:
    broken_text(here)
    assert code_of(data_main, ["build", "mix.yaml", "--out", "out"]) == 65
    assert "max_reject_share" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export", "sample-run"])
def test_run_without_a_checkpoint_is_a_matter_of_storage(here: Path, capsys, command: str) -> None:
    (here / ABSENT).mkdir()
    assert code_of(cli.main, COMMANDS[command]) == 74
    assert "holds no checkpoint yet" in capsys.readouterr().err


BROKEN = ["--config", "run.yaml", "--ds_config", "ds.json"]


@pytest.fixture
def broken_files(here: Path) -> None:
    """A run YAML and a DeepSpeed JSON that end too early."""
    (here / "run.yaml").write_text("model: [\n")
    (here / "ds.json").write_text("{")


def check_broken_files_are_told(told: str) -> None:
    assert "run.yaml:2: not valid YAML" in told and "ds.json:1: not valid JSON" in told


@pytest.mark.usefixtures("broken_files")
def test_file_that_is_no_yaml_is_a_bad_configuration_for_a_plan(capsys) -> None:
    assert code_of(cli.main, ["plan", *BROKEN, "--gpus", "8"]) == 78
    check_broken_files_are_told(capsys.readouterr().err)


@pytest.mark.usefixtures("broken_files", "as_rank")
def test_file_that_is_no_yaml_is_a_bad_configuration_for_a_run(capsys) -> None:
    assert run([*BROKEN, "--dry_run"]) == 78
    check_broken_files_are_told(capsys.readouterr().err)


def test_unreadable_report_is_told_without_a_stack_trace(here: Path, capsys) -> None:
    (here / "metrics.jsonl").mkdir()
    assert code_of(cli.main, ["report", "--run_dir", "."]) in (74, 78)
    assert "Traceback" not in capsys.readouterr().err

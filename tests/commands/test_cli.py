"""The `cpt` command answers quickly, keeps deprecated words, and refuses what it cannot do.

A refusal prints the reason on stderr, ends with the exit code of its kind, and leaves no file.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

from cpt.checkpoint.manifest import MANIFEST
from cpt.cli import main
from cpt.model.configuration import PRESETS
from tests.support.checkpoints import flip, write_checkpoint


def damage(folder: Path) -> None:
    flip(folder / "__0_0.distcp", 3)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "exported"


def export(run_dir: Path, out: Path, *more: str) -> int:
    return main(["export", "--run_dir", str(run_dir), "--out", str(out), *more])


def sample(*arguments: Any) -> int:
    return main(["sample", "--prompt", "Once", *map(str, arguments)])


# the command itself


def test_subcommands_are_listed_without_loading_torch() -> None:
    code = (
        "import sys\n"
        "from cpt.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("export", "merge", "evaluate", "replay", "kl_targets", "guard", "doctor"):
        assert command in done.stdout.split()


@pytest.mark.parametrize(
    ("deprecated", "instead"),
    [(["guard", "replay"], "cpt guard audit"), (["replay", "targets"], "cpt kl_targets")],
)
def test_deprecated_words_still_work_and_name_their_successor(
    deprecated: list[str], instead: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*deprecated, "--help"])
    captured = capsys.readouterr()
    assert caught.value.code == 0 and f"usage: {instead}" in captured.out
    assert f"'cpt {' '.join(deprecated)}' is deprecated: use '{instead}'." in captured.err


def test_replay_names_every_option_that_is_missing(capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["replay", "--temperature", "1"])
    assert caught.value.code == 78
    assert "required: --model, --out" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["plan", "--nonsense"], ["guard", "x"]])
def test_wrong_words_are_a_bad_configuration(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 78
    assert "--help helps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "there"), 74, "there: No such file"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("by zero"), 70, "ZeroDivisionError: by zero"),
    ],
)
def test_whatever_ends_a_command_is_told_without_a_stack_trace(
    raised: BaseException, code: int, said: str, capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    def broken(options: Any) -> None:
        raise raised

    monkeypatch.setattr("cpt.commands.status._run", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the trace of a bug goes there
    assert main(["status", "--run_dir", str(tmp_path)]) == code
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


# export


def test_export_of_a_missing_run_is_a_configuration_error(
    tmp_path: Path, out: Path, capsys: Any
) -> None:
    assert export(tmp_path / "nowhere", out) == 78
    assert f"{tmp_path / 'nowhere'} does not exist" in capsys.readouterr().err


def test_export_of_a_run_without_checkpoints_is_a_storage_error(
    run_dir: Path, out: Path, capsys: Any
) -> None:
    assert export(run_dir, out) == 74
    assert f"{run_dir} holds no checkpoint yet" in capsys.readouterr().err


def test_export_of_a_step_that_was_never_saved_names_it(
    run_dir: Path, out: Path, capsys: Any
) -> None:
    write_checkpoint(run_dir, 10)
    assert export(run_dir, out, "--step", "20") == 78
    assert "has no checkpoint of step 20, only of step 10" in capsys.readouterr().err


def test_export_of_a_damaged_checkpoint_names_the_file(
    run_dir: Path, out: Path, capsys: Any
) -> None:
    damage(write_checkpoint(run_dir, 10))
    assert export(run_dir, out) == 74
    assert "step-00000010/__0_0.distcp" in capsys.readouterr().err


def test_export_says_which_checkpoint_it_passed_over(run_dir: Path, out: Path, capsys: Any) -> None:
    write_checkpoint(run_dir, 10)
    damage(write_checkpoint(run_dir, 20))
    export(run_dir, out)  # it ends where the tensors are read: they are none
    assert "checkpoint rejected: step-00000020/__0_0.distcp" in capsys.readouterr().err


def test_export_of_a_damaged_step_that_was_asked_for_takes_no_other(
    run_dir: Path, out: Path
) -> None:
    write_checkpoint(run_dir, 10)
    damage(write_checkpoint(run_dir, 20))
    assert export(run_dir, out, "--step", "20") == 74


def test_export_in_an_unknown_format_names_the_known_ones(
    run_dir: Path, out: Path, capsys: Any
) -> None:
    write_checkpoint(run_dir, 10)
    assert export(run_dir, out, "--format", "fp8") == 78
    message = capsys.readouterr().err
    assert "fp8" in message and "bf16" in message and "fp32" in message


def test_export_overwrites_nothing(run_dir: Path, out: Path, capsys: Any) -> None:
    write_checkpoint(run_dir, 10)
    out.mkdir()
    (out / "mine.txt").write_text("keep", encoding="utf-8")
    assert export(run_dir, out) == 78
    assert (
        str(out) in capsys.readouterr().err
        and (out / "mine.txt").read_text(encoding="utf-8") == "keep"
    )


@pytest.mark.parametrize("problem", ["damaged", "format", "no_manifest"])
def test_refused_export_leaves_nothing_behind(run_dir: Path, out: Path, problem: str) -> None:
    folder = write_checkpoint(run_dir, 10)
    if problem == "damaged":
        damage(folder)
    if problem == "no_manifest":
        (folder / MANIFEST).unlink()
    assert export(run_dir, out, "--format", "fp8" if problem == "format" else "bf16") in (74, 78)
    assert [entry.name for entry in out.parent.iterdir()] == [run_dir.name]


# sample


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory with a configuration and no weights."""
    sizes = {
        "vocab_size": 96,
        "pad_token_id": 95,
        "bos_token_id": 94,
        "eos_token_id": 93,
        "num_hidden_layers": 1,
    }
    folder = tmp_path / "model"
    GptOssConfig(**{**PRESETS["tiny"], **sizes}).save_pretrained(str(folder))
    return folder


def test_sampling_from_a_missing_directory_is_a_configuration_error(
    tmp_path: Path, capsys: Any
) -> None:
    assert sample("--model", tmp_path / "nowhere") == 78
    assert "--model: " in (told := capsys.readouterr().err) and "nowhere does not exist" in told


def test_sampling_from_a_missing_run_is_a_configuration_error(tmp_path: Path, capsys: Any) -> None:
    assert sample("--run_dir", tmp_path / "nowhere") == 78
    assert "does not exist" in capsys.readouterr().err


def test_sampling_from_a_run_without_checkpoints_is_a_storage_error(run_dir: Path) -> None:
    assert sample("--run_dir", run_dir) == 74


def test_sampling_from_a_directory_without_weights_is_a_configuration_error(
    model_dir: Path, capsys: Any
) -> None:
    assert sample("--model", model_dir) == 78
    assert str(model_dir) in capsys.readouterr().err


def test_sampling_never_reads_a_pickle(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers falls back to pytorch_model.bin, and opens it with torch.load, unless it is told
    not to.
    """
    model = GptOssForCausalLM(GptOssConfig.from_pretrained(str(model_dir)))
    torch.save(model.state_dict(), model_dir / "pytorch_model.bin")
    opened = []
    monkeypatch.setattr(
        torch, "load", lambda *arguments, **_: opened.append(arguments) or model.state_dict()
    )
    assert sample("--model", model_dir) == 78
    assert not opened


def test_sampling_from_nothing_is_refused_before_the_model_is_loaded(
    model_dir: Path, capsys: Any
) -> None:
    """The directory has no weights: an empty prompt has to be noticed first."""
    assert main(["sample", "--model", str(model_dir), "--prompt", ""]) == 78
    assert "--prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["--run_dir", "a", "--model", "b"]], ids=["neither", "both"]
)
def test_sampling_needs_exactly_one_origin(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        sample(*arguments)
    assert caught.value.code == 78 and "--model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens 0"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--top_p", "0.9"], "--top_p 0.9 has no meaning"),
        (["--temperature", "1", "--top_p", "1.5"], "--top_p 1.5"),
        (["--developer", "Be brief."], "for --chat only"),
    ],
)
def test_settings_of_sampling_that_make_no_sense_are_refused(
    model_dir: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    """The directory has no weights: they have to be noticed first."""
    assert sample("--model", model_dir, *arguments) == 78
    assert message in capsys.readouterr().err

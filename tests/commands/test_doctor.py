"""The doctor names every backend, with a reason where it cannot run, and no secret."""

from __future__ import annotations

import pytest

from cpt.cli import main
from cpt.commands import doctor_report
from cpt.model.attention import known_names


def test_every_backend_is_listed_as_usable_or_with_its_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in set(known_names()) - {"auto"}:
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name])
        assert line.split()[1] in ("usable", "no:")
    assert "cpu " in printed and "attention: auto takes" in printed


def test_machine_without_a_tokenizer_is_told_so_and_exits_78(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        doctor_report, "_tokenizer", lambda: ({"o200k_harmony": "no: ranks are missing"}, False)
    )
    assert main(["doctor"]) == 78
    assert "ranks are missing" in capsys.readouterr().out


def test_environment_variables_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary-93c1")
    main(["doctor"])
    assert "canary-93c1" not in "".join(capsys.readouterr())

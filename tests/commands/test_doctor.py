"""The doctor names every backend, with a reason where it cannot run, and no secret."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpt.cli import main
from cpt.commands import doctor_probe, doctor_report
from cpt.model.attention import AttentionInputs, known_names, reference_attention
from cpt.model.attention.choice import BACKENDS
from cpt.parallel.transport import Port, Transport


def test_every_backend_is_listed_as_usable_or_with_its_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in set(known_names()) - {"auto"}:
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name])
        assert line.split()[1] in ("usable", "no:")
    assert "cpu " in printed and "attention: auto takes" in printed


def test_network_is_told_with_what_keeps_nccl_from_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = Port(device="mlx5_0", link="InfiniBand", active=True, gbit=400)
    found = Transport(ports=(port,), has_device_files=True, variables={"NCCL_IB_HCA": "mlx5_0"})
    monkeypatch.setattr(doctor_report, "read_transport", lambda: found)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "the node has mlx5_0, but there is no libibverbs in this environment" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["NCCL_IB_HCA", "mlx5_0"] in lines


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


SMALL = ["--head_dim", "16", "--query_heads", "4", "--kv_heads", "2", "--window", "8"]


def test_probe_prints_the_errors_of_every_usable_backend_and_dtype(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--probe", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("cpu", "reference"):
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            start = lines.index(f"{name} on cpu in {dtype}")
            assert lines[start + 1].split() == ["out", "dq", "dk", "dv", "dsink", "limit"]
            errors = [line.split()[-6:] for line in lines[start + 2 : start + 6]]
            assert all(float(x) <= float(row[5]) for row in errors for x in row[:5])


def test_probe_names_a_backend_that_is_off_and_exits_70(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_sinks(inputs: AttentionInputs) -> torch.Tensor:
        return reference_attention(inputs._replace(sinks_H=inputs.sinks_H * 0 - 1e4))

    def broken(inputs: AttentionInputs) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    right = next(backend for backend in BACKENDS if backend.name == "reference")
    wrong = replace(right, name="without_sinks", attention=without_sinks)
    unable = replace(right, name="broken", attention=broken)
    monkeypatch.setattr(doctor_probe, "BACKENDS", (wrong, unable, right))
    assert main(["doctor", "--probe", *SMALL]) == 70
    printed = capsys.readouterr()
    assert "without_sinks on cpu in float32" in printed.err
    assert "broken on cpu in float32" in printed.err and "reference" not in printed.err
    assert "does not run: RuntimeError: no such kernel" in printed.out
    assert "!" in printed.out.splitlines()[5] and "reference on cpu in float16" in printed.out


def test_probe_refuses_sizes_that_are_no_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--probe", "--query_heads", "6", "--kv_heads", "4"]) == 78
    assert "--kv_heads 4 does not divide --query_heads 6" in capsys.readouterr().err
    assert main(["doctor", "--probe", "--window", "0"]) == 78
    assert "--window is 0, must be >= 1" in capsys.readouterr().err

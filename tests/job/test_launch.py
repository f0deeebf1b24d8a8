"""A run that cannot be right ends at once: rank 0 says what and how to cure it, with the contract's
exit code.

Most cases call `main` in this process; what needs a process of its own is started once for all
tests.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cpt.config.adapter_section import AdapterSection
from cpt.config.precision_sections import QuantizeSection
from cpt.deepspeed_adapter import version
from cpt.errors import ConfigError
from cpt.job import launch
from cpt.job.run_dir import make_run_dir, move_aside
from cpt.resilience.devices import check_gpu_count
from cpt.resilience.environment import LaunchEnvironment
from cpt.resilience.stop import StopRequest
from cpt.run import main, parse_arguments
from tests.support.launcher import ROOT, free_port, rank_environment
from tests.support.launcher import start as start_ranks

DS_CONFIG = ROOT / "ds_configs" / "z3_ulysses.json"
LAUNCHER_NAMES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

Environment = Callable[..., None]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Environment:
    """`environment(rank=0, world=8)`: what `deepspeed` sets for a rank; the current directory is
    empty.
    """
    monkeypatch.chdir(tmp_path)
    for name in LAUNCHER_NAMES:
        monkeypatch.delenv(name, raising=False)

    def set_up(rank: int = 0, world: int = 8, local: int | None = None) -> None:
        local = local or world
        values = {
            "RANK": rank,
            "LOCAL_RANK": rank % local,
            "WORLD_SIZE": world,
            "LOCAL_SIZE": local,  # the deepspeed launcher's name; torchrun says LOCAL_WORLD_SIZE
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 1,
        }
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_up


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process no group is joined, no data opened and no model built."""

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("the run went on")

    for name in ("create_topology", "assemble", "hold", "train"):
        monkeypatch.setattr(launch, name, refuse)
    monkeypatch.setattr(launch, "init_distributed", refuse)


def run(*arguments: str, ds_config: Path = DS_CONFIG) -> int:
    return main(["--ds_config", str(ds_config), *arguments], StopRequest())


def write_files(folder: Path, *, mix: dict[str, Any] | None = None, **train: Any) -> Path:
    """A run YAML and its mix of one JSONL file with one document."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"text": "One short document."}) + "\n"
    (folder / "text.jsonl").write_text(line * 3, encoding="utf-8")
    source = {"name": "web", "language": "en", "domain": "web", "path": "text.jsonl", "weight": 1.0}
    content = {"seq_len": 64, "seed": 1, "sources": [{**source, **(mix or {})}]}
    (folder / "mix.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    settings = {
        "seq_len": 64,
        "global_batch_size": 4,
        "total_steps": 1,
        "lr": 1e-3,
        "dtype": "fp32",
        **train,
    }
    sections = {
        "model": {"init": "tiny"},
        "data": {"mix": "mix.yaml"},
        "train": settings,
        "guard": {"enabled": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    return folder / "run.yaml"


# the command line


def test_command_line_has_the_defaults_of_the_contract() -> None:
    options = parse_arguments(["--ds_config", "x.json"])
    assert options.config == ROOT / "configs" / "tiny.yaml" and options.resume == "auto"
    assert options.run_dir is None and not options.dry_run and options.set == []


def test_local_rank_of_the_launcher_is_accepted() -> None:
    assert parse_arguments(["--local_rank=3", "--ds_config", "x.json"]).local_rank == 3


@pytest.mark.parametrize("arguments", [["--runs_dir", "x"], ["--resume"], ["now"]], ids=" ".join)
def test_unknown_option_is_a_configuration_error(
    environment: Environment, arguments: list[str]
) -> None:
    """argparse ends with 2, which no batch script of this project knows; 78 is not requeued."""
    environment()
    try:
        code = run(*arguments)
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    assert code == 78


@pytest.mark.parametrize("item", ["train.lr", "lr 3e-4"])
def test_override_without_an_equals_sign_is_refused(
    environment: Environment, capsys: Any, item: str
) -> None:
    environment()
    assert run("--set", item) == 78
    assert f"--set {item} has no '='" in capsys.readouterr().err


def test_override_of_an_unknown_key_is_refused_with_a_suggestion(
    environment: Environment, capsys: Any
) -> None:
    environment()
    assert run("--set", "train.warmup_step=3") == 78
    assert "Did you mean 'warmup_steps'?" in capsys.readouterr().err


def test_override_may_hold_an_equals_sign(environment: Environment, capsys: Any) -> None:
    environment()
    assert run("--dry_run", "--set", "telemetry.wandb_project=a=b") == 0


@pytest.mark.parametrize("resume", ["latest", "-1", "step-100", "1.5", "\u00b2"])
def test_resume_that_is_no_step_is_refused(
    environment: Environment, capsys: Any, resume: str
) -> None:
    environment()
    assert run(f"--resume={resume}") == 78
    assert f"--resume {resume} must be auto, never or a step" in capsys.readouterr().err


def test_mistakes_on_the_command_line_are_told_together(
    environment: Environment, capsys: Any
) -> None:
    environment()
    assert run("--set", "nonsense", "--resume", "latest") == 78
    message = capsys.readouterr().err
    assert "--set nonsense" in message and "--resume latest" in message


@pytest.mark.parametrize("missing", ["run.yaml", "ds.json"])
def test_missing_configuration_file_is_named(
    environment: Environment, capsys: Any, tmp_path: Path, missing: str
) -> None:
    environment()
    config = tmp_path / "run.yaml" if missing == "run.yaml" else ROOT / "configs" / "tiny.yaml"
    ds_config = tmp_path / "ds.json" if missing == "ds.json" else DS_CONFIG
    assert run("--config", str(config), ds_config=ds_config) == 78
    assert f"{tmp_path / missing}: no such file." in capsys.readouterr().err


# the launcher


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.case("G5", "missing launcher variables named")
def test_incomplete_launcher_environment_is_refused_by_name(
    environment: Environment, capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    environment()
    monkeypatch.delenv(name)
    assert run() == 78
    assert f"no launcher: {name} not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    "variable", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"], ids=["deepspeed", "torchrun"]
)
def test_automatic_sizes_stay_within_the_node_of_the_launcher(
    environment: Environment,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    large_disk: None,
    variable: str,
) -> None:
    """Two nodes of eight ranks; the launchers call the number of ranks on a node by different
    names.
    """
    environment(world=16, local=8)
    monkeypatch.delenv("LOCAL_SIZE")
    monkeypatch.setenv(variable, "8")
    assert run("--dry_run", "--set", "model.init=gpt-oss-20b") == 0
    assert table(capsys.readouterr().out)["sequence parallel"].split(",")[0] == "8"


def test_another_deepspeed_is_refused_with_the_version(
    environment: Environment, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment()
    monkeypatch.setattr(version.deepspeed, "__version__", "0.20.0")
    assert run("--dry_run") == 78
    assert "deepspeed 0.20.0 is installed" in capsys.readouterr().err


# who speaks


@pytest.mark.parametrize("rank", [1, 7])
def test_other_ranks_say_nothing_about_a_mistake(
    environment: Environment, capsys: Any, rank: int
) -> None:
    environment(rank=rank)
    assert run("--resume", "latest") == 78
    assert capsys.readouterr() == ("", "")


def test_other_ranks_say_nothing_in_a_dry_run(environment: Environment, capsys: Any) -> None:
    environment(rank=1)
    assert run("--dry_run") == 0
    assert capsys.readouterr() == ("", "")


def test_mistake_of_the_user_shows_no_stack_trace(environment: Environment, capsys: Any) -> None:
    environment(world=3)
    assert run("--set", "train.global_batch_size=4") == 78
    assert "Traceback" not in capsys.readouterr().err


def test_mistake_of_the_program_is_an_internal_error(environment: Environment, caplog: Any) -> None:
    environment()
    assert run() == 70  # `nothing_starts` stands for any bug after validation
    assert "internal error on rank 0" in caplog.text and "the run went on" in caplog.text


# the dry run


def table(text: str) -> dict[str, str]:
    """The rows that `describe` prints: a name, two spaces or more, a value."""
    rows = [line.strip().partition("  ") for line in text.splitlines() if line.startswith("  ")]
    return {name: value.strip() for name, _, value in rows}


@pytest.mark.parametrize(
    ("init", "architecture"),
    [
        ("tiny", "4 layers, 8 experts, 8/2 heads"),
        ("gpt-oss-20b", "24 layers, 32 experts, 64/8 heads"),
        ("gpt-oss-120b", "36 layers, 128 experts, 64/8 heads"),
    ],
)
def test_dry_run_prints_the_whole_plan_and_loads_nothing(
    environment: Environment,
    capsys: Any,
    tmp_path: Path,
    large_disk: None,
    init: str,
    architecture: str,
) -> None:
    environment(world=8)
    assert (
        run("--dry_run", "--set", f"model.init={init}", "--set", "train.global_batch_size=16") == 0
    )
    rows = table(capsys.readouterr().out)
    expected = {
        "model": init,
        "architecture": architecture,
        "world size": "8",
        "sequence parallel": "8, window layers by halo",
        "expert parallel": "8",
        "data parallel": "1",
        "ZeRO stage": "3",
        "dtype": "bf16",
        "tokens per step": "16 rows x 1024 = 16384 slots",
        "accumulation": "16 x micro batch 1",
        "resumes from": "nothing",
    }
    assert {name: rows[name] for name in expected} == expected
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_folders_of_steps_that_are_no_checkpoints(
    environment: Environment, capsys: Any, tmp_path: Path
) -> None:
    environment()
    for step in (20, 100):
        (tmp_path / "mine" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    assert run("--dry_run", "--run_dir", "mine") == 74
    message = capsys.readouterr().err
    assert "no usable checkpoint:" in message
    assert "step-00000100/manifest.json: missing" in message
    assert "step-00000020/manifest.json: missing" in message
    assert run("--dry_run", "--run_dir", "mine", "--resume", "never") == 0
    assert table(capsys.readouterr().out)["resumes from"] == "nothing"


def test_dry_run_refuses_an_unknown_attention_with_the_known_ones(
    environment: Environment, capsys: Any
) -> None:
    environment()
    assert run("--dry_run", "--set", "model.attention=flash9") == 78
    message = capsys.readouterr().err
    assert "flash9" in message and "auto" in message


def test_dry_run_says_how_much_is_frozen(environment: Environment, capsys: Any) -> None:
    environment()
    assert run("--dry_run", "--set", "train.freeze=[sinks, model.layers.0.input_layernorm]") == 0
    assert table(capsys.readouterr().out)["frozen"].startswith(
        "sinks, model.layers.0.input_layernorm: 96 of "
    )


def test_dry_run_refuses_a_freeze_pattern_that_matches_nothing(
    environment: Environment, capsys: Any
) -> None:
    environment()
    assert run("--dry_run", "--set", "train.freeze=[snks]", "--set", "model.attention=flash9") == 78
    message = capsys.readouterr().err
    assert "train.freeze[0] is 'snks'" in message and "sinks" in message and "flash9" in message


def test_dry_run_refuses_a_missing_mix(
    environment: Environment, capsys: Any, tmp_path: Path
) -> None:
    environment()
    assert run("--dry_run", "--set", f"data.mix={tmp_path / 'none.yaml'}") == 78
    assert f"{tmp_path / 'none.yaml'}" in capsys.readouterr().err


def test_dry_run_refuses_rows_of_another_length_than_the_mix(
    environment: Environment, capsys: Any, tmp_path: Path
) -> None:
    environment()
    assert run("--dry_run", "--config", str(write_files(tmp_path, seq_len=128))) == 78
    assert "128" in capsys.readouterr().err


def test_missing_data_file_and_rows_of_another_length_are_told_together(
    environment: Environment, capsys: Any, tmp_path: Path
) -> None:
    environment()
    config = write_files(tmp_path, mix={"path": "gone.jsonl"}, seq_len=128)
    assert run("--dry_run", "--config", str(config)) == 78
    message = capsys.readouterr().err
    assert "gone.jsonl" in message and "train.seq_len is 128" in message


def test_dry_run_refuses_a_missing_data_file(
    environment: Environment, capsys: Any, tmp_path: Path
) -> None:
    environment()
    config = write_files(tmp_path, mix={"path": "gone.jsonl"})
    assert run("--dry_run", "--config", str(config)) == 78
    assert "gone.jsonl" in capsys.readouterr().err


# the run directory


@pytest.mark.parametrize("has_log", [True, False])
def test_finished_run_is_told_even_if_nobody_knows_since_when(has_log: bool) -> None:
    def events() -> list[dict[str, Any]]:
        if not has_log:
            raise PermissionError(13, "Permission denied", "metrics.jsonl")
        return [{"event": "end", "exit_code": 0, "time": 86400.0 * 365}]

    job = SimpleNamespace(
        telemetry=SimpleNamespace(events=events),
        config=SimpleNamespace(train=SimpleNamespace(stop_at_step=None)),
        progress=SimpleNamespace(step=4),
        last_step=4,
    )
    told = launch.finished_before(job)  # type: ignore[arg-type]
    since = "before on 19" if has_log else "before: step 4 of 4."
    assert since in told and "raise train.total_steps" in told


@pytest.mark.parametrize("is_alone", [True, False])
def test_trackers_of_a_stopped_run_are_closed_while_all_ranks_wait(
    monkeypatch: pytest.MonkeyPatch, is_alone: bool
) -> None:
    closed: list[float] = []

    def on_first_rank(group: str, action: Callable[[], None]) -> None:
        assert group == "all ranks"
        if is_alone:
            raise RuntimeError("Connection closed by peer")
        action()

    monkeypatch.setattr(launch, "on_first_rank", on_first_rank)
    job = SimpleNamespace(
        topology=SimpleNamespace(control_group="all ranks"),
        telemetry=SimpleNamespace(close=closed.append),
    )
    launch.close_together(job)  # type: ignore[arg-type]
    assert closed == ([] if is_alone else [launch.STOPPED_CLOSE_SECONDS])


@pytest.mark.case("X7", "run directory 0700")
def test_run_directory_is_private(tmp_path: Path) -> None:
    make_run_dir(tmp_path / "a" / "run")
    assert (tmp_path / "a" / "run").stat().st_mode & 0o777 == 0o700


def test_fresh_start_moves_what_was_there_aside(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(f"run {number}", encoding="utf-8")
        make_run_dir(tmp_path)
        move_aside(tmp_path)
    aside = sorted(tmp_path.rglob("metrics.jsonl"))
    assert [file.read_text(encoding="utf-8") for file in aside] == ["run 1", "run 2"]
    assert {entry.name for entry in tmp_path.iterdir()} == {"previous-1", "previous-2"}


def test_continuing_leaves_the_run_directory_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("events", encoding="utf-8")
    make_run_dir(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


# processes of their own


class Started:
    """One run of cpt/run.py, given all the time it needs."""

    def __init__(self, folder: Path, arguments: list[str], environment: dict[str, str]) -> None:
        self.run_dir = folder / "run"
        options = ["--ds_config", str(DS_CONFIG), *arguments]
        self._launch = start_ranks(ROOT / "cpt" / "run.py", options, [environment], folder)

    def finish(self) -> tuple[int, str]:
        (code,), (output,) = self._launch.wait(timeout_seconds=200)
        return code, output


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, Path, int]]:
    """Exit code, output, run directory and the taken port of every case; two at a time: there are
    few cores.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    taken_port = listening.getsockname()[1]
    cases: dict[str, Callable[[Path], Started]] = {
        "no_launcher": lambda folder: Started(
            folder,
            [],
            {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES},
        ),
        "missing_mix": lambda folder: _one_rank(
            folder, "--set", f"data.mix={folder / 'none.yaml'}"
        ),
        "missing_data": lambda folder: _one_rank(folder, mix={"path": "gone.jsonl"}),
        "run_dir_is_a_file": lambda folder: _one_rank(folder, file_in_the_way=True),
        "port_in_use": lambda folder: _one_rank(folder, port=taken_port),
    }
    results, waiting = {}, list(cases.items())
    while waiting:
        pair = [(name, start(tmp_path_factory.mktemp(name))) for name, start in waiting[:2]]
        waiting = waiting[2:]
        results |= {
            name: (*process.finish(), process.run_dir, taken_port) for name, process in pair
        }
    listening.close()
    return results


def _one_rank(
    folder: Path,
    *arguments: str,
    mix: dict[str, Any] | None = None,
    port: int | None = None,
    file_in_the_way: bool = False,
) -> Started:
    config = write_files(folder, mix=mix)
    if file_in_the_way:
        (folder / "run").write_text("mine", encoding="utf-8")
    environment = rank_environment(0, 1, port or free_port())
    return Started(folder, ["--config", str(config), "--run_dir", "run", *arguments], environment)


def assert_refused(result: tuple[int, str, Path, int], code: int, *words: str) -> None:
    found, output, *_ = result
    assert found == code, output
    assert "Traceback" not in output and all(word in output for word in words), output


@pytest.mark.case("G5", "exit 78 with the right command")
def test_start_without_a_launcher_shows_the_right_command(started: Any) -> None:
    assert_refused(
        started["no_launcher"], 78, "no launcher", f"deepspeed cpt/run.py --ds_config {DS_CONFIG}"
    )


def test_start_with_a_missing_mix_names_the_file(started: Any) -> None:
    assert_refused(started["missing_mix"], 78, "none.yaml: no such file")


def test_start_with_a_missing_data_file_names_it(started: Any) -> None:
    assert_refused(started["missing_data"], 78, "gone.jsonl")


def test_run_directory_that_is_a_file_is_a_storage_error(started: Any) -> None:
    assert_refused(started["run_dir_is_a_file"], 74, "run directory run", "--run_dir")


def test_file_in_the_way_of_a_run_directory_stays(started: Any) -> None:
    assert started["run_dir_is_a_file"][2].read_text(encoding="utf-8") == "mine"


@pytest.mark.case("G5", "exit 78 naming the port")
def test_port_in_use_is_named(started: Any) -> None:
    assert_refused(
        started["port_in_use"], 78, f"port {started['port_in_use'][3]} is in use", "--master_port"
    )


@pytest.mark.parametrize("case", ["missing_mix", "missing_data"])
def test_refused_run_leaves_nothing_half_written(started: Any, case: str) -> None:
    run_dir = started[case][2]
    assert not run_dir.exists() or list(run_dir.iterdir()) == []
    assert {entry.name for entry in run_dir.parent.iterdir()} <= {
        "run",
        "run.yaml",
        "mix.yaml",
        "text.jsonl",
    }


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "first", "RANK is 'first'"),
        ("WORLD_SIZE", "", "no launcher: WORLD_SIZE not set"),
        ("LOCAL_RANK", "7", "LOCAL_RANK is '7', but this node has 2 ranks"),
        ("SLURM_RESTART_COUNT", "none", "SLURM_RESTART_COUNT is 'none'"),
        ("SLURM_JOB_END_TIME", "1000", "left over from a job that has ended"),
        ("CUDA_VISIBLE_DEVICES", "cuda:0", "is no number, GPU-UUID or MIG-UUID"),
    ],
)
def test_environment_that_cannot_be_right_is_refused(
    environment: Environment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    name: str,
    value: str,
    words: str,
) -> None:
    environment(world=2)
    monkeypatch.setenv(name, value)
    assert main(["--ds_config", str(DS_CONFIG), "--dry_run"], StopRequest()) == 78
    assert words in capsys.readouterr().err


def test_more_ranks_than_gpus_are_refused_with_both_numbers() -> None:
    place = LaunchEnvironment(
        rank=3,
        world_size=4,
        local_rank=3,
        local_world_size=4,
        master_port=1,
        restarts=0,
        gpu_ids=("4", "5"),
    )
    with pytest.raises(ConfigError, match=r"CUDA shows 2 GPUs, but rank 3 .* is '4,5'"):
        check_gpu_count(2, place)
    check_gpu_count(4, place)


@pytest.mark.parametrize(
    ("adapter", "quantize", "expected"),
    [
        ("none", {}, "bf16"),
        ("lora", {}, "peft"),
        ("none", {"experts": "mxfp4", "start_step": 5}, "mxfp4"),
        ("none", {"experts": "mxfp4", "start_step": 6}, "bf16"),
    ],
)
def test_end_of_a_run_exports_the_model_that_was_trained(
    adapter: Any, quantize: dict[str, Any], expected: str
) -> None:
    config: Any = SimpleNamespace(
        adapter=AdapterSection(kind=adapter),
        train=SimpleNamespace(quantize=QuantizeSection(**quantize)),
    )
    assert launch.format_at_end(config, 5) == expected

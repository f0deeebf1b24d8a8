"""`cpt data where` names the records of a step's rows, by the ledger of the run's checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.cli import main
from cpt.config.sections import DataSection
from data_pipeline.build.build import build
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.ledger import Ledger
from data_pipeline.mixture.stages import StagePlan, mixture_of, plan_stages
from data_pipeline.text.tokenizer import decode_bytes
from tests.data_pipeline.conftest import make_mix as make_mix
from tests.data_pipeline.inputs import MakeMix, make_texts
from tests.support.checkpoints import sign_again, write_checkpoint

BATCH = 4


@pytest.fixture
def mix(make_mix: MakeMix) -> MixConfig:
    texts = {"ja": make_texts(80, "ja"), "en": make_texts(80, "en")}
    return make_mix(texts, sources={"en": {"keep": ["id"]}})


@pytest.fixture
def run_dir(mix: MixConfig, tmp_path: Path) -> Path:
    """Return a run directory as a run leaves it that has built its mix and saved nothing."""
    build(mix, tmp_path / "build", workers=1)
    folder = tmp_path / "run"
    folder.mkdir()
    config = {
        "data": {"mix": str(tmp_path / "in" / "mix.yaml"), "build_dir": str(tmp_path / "build")},
        "train": {"global_batch_size": BATCH},
    }
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    return folder


def ask(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    assert main(["data", "where", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def save(
    run_dir: Path,
    ledger: Ledger,
    step: int,
    skip_ranges: list[list[int]],
    stages: StagePlan | None = None,
) -> None:
    folder = write_checkpoint(run_dir, step)

    def add(manifest: dict[str, Any]) -> None:
        manifest["state"]["ledger"] = ledger.to_json()
        manifest["state"]["progress"]["skip_ranges"] = skip_ranges
        manifest["state"]["identity"] = {} if stages is None else {"stages": stages.to_json()}

    sign_again(folder, add)


def check(
    found: Any,
    data: BuiltData,
    ledger: Ledger,
    batch: int,
    folder: Path,
    stages: StagePlan | None = None,
) -> None:
    """Compare an answer with the batch itself."""
    if stages is not None:
        data = data.of_stage(stages.stage_of(batch))
    drawn = mixture_of(data, ledger, 7, stages).global_batch(batch, BATCH)
    assert [row["row"] for row in found["rows"]] == list(range(BATCH))
    for number, row in enumerate(found["rows"]):
        packed = data.read_row(int(drawn.sources[number]), int(drawn.rows[number]))
        assert [one["document"] for one in row["documents"]] == packed.documents.tolist()
        for one in row["documents"]:
            name = data.source_names[drawn.sources[number]]
            assert one["source"] == name and one["path"] == str(folder / f"{name}.jsonl")
            lines = (folder / f"{name}.jsonl").read_text().splitlines()
            record = json.loads(lines[one["origin"]["record"] - 1])
            stop = one["first_slot"] + one["slots"]
            tokens = packed.input_ids[one["first_slot"] : stop].astype("uint32")
            assert decode_bytes(tokens) in record["text"].encode()
            assert one["origin"]["kept"] == ({"id": record["id"]} if name == "en" else {})


def test_the_rows_of_a_step_are_those_of_the_mixture(
    run_dir: Path, mix: MixConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = BuiltData.open(tmp_path / "build")
    ledger = Ledger.start(mix, data.manifest.row_hashes())
    found = ask(capsys, "--run_dir", run_dir, "--step", 3)
    check(found, data, ledger, 2, tmp_path / "in")
    one = ask(capsys, "--run_dir", run_dir, "--step", 3, "--row", 1)
    assert one["rows"] == [found["rows"][1]]


def test_the_ledger_and_the_batches_given_up_are_those_of_the_checkpoint(
    run_dir: Path, mix: MixConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = BuiltData.open(tmp_path / "build")
    ledger = Ledger.start(mix, data.manifest.row_hashes())
    (segment,) = ledger.segments
    later = dataclasses.replace(segment, start_step=2, weights={"ja": 0.05, "en": 0.95})
    ledger = Ledger((segment, later))
    save(run_dir, ledger, 6, [[1, 3]])
    rollback = {"from_step": 5, "to_step": 4, "first_batch": 6, "last_batch": 8}
    (run_dir / "rollbacks.json").write_text(json.dumps([rollback]))
    for step, batch in ((1, 0), (2, 3), (4, 5), (5, 8)):
        found = ask(capsys, "--run_dir", run_dir, "--step", step)
        check(found, data, ledger, batch, tmp_path / "in")


def test_a_build_with_other_rows_is_refused(
    run_dir: Path,
    mix: MixConfig,
    make_mix: MakeMix,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = BuiltData.open(tmp_path / "build").manifest.row_hashes()
    save(run_dir, Ledger.start(mix, rows), 6, [])
    texts = {"ja": make_texts(80, "ja"), "en": make_texts(80, "other")}
    build(make_mix(texts, folder="other"), tmp_path / "other-build", workers=1)
    words = ["--run_dir", str(run_dir), "--step", "1", "--build_dir", str(tmp_path / "other-build")]
    assert main(["data", "where", *words]) == 78
    assert "the rows of en are others" in capsys.readouterr().err


def test_other_rows_of_a_source_that_comes_later_in_a_phase_are_refused(
    run_dir: Path, mix: MixConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = BuiltData.open(tmp_path / "build").manifest.row_hashes()
    (segment,) = Ledger.start(mix, {**rows, "en": "others"}).segments
    changing = dataclasses.replace(
        segment,
        weights={"ja": 1.0, "en": 0.0},
        to_weights={"ja": 0.0, "en": 1.0},
        phase="change",
        stop_step=8,
        total_steps=8,
    )
    save(run_dir, Ledger((changing,)), 6, [])
    assert main(["data", "where", "--run_dir", str(run_dir), "--step", "6"]) == 78
    assert "the rows of en are others" in capsys.readouterr().err


def test_a_document_of_a_build_is_shown_to_people(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--build_dir", str(tmp_path / "build"), "--source", "en", "--document", "4"]
    assert main(["data", "where", *words]) == 0
    assert capsys.readouterr().out == "source en, document 4: en.jsonl:5\n    id: 4\n"
    assert main(["data", "where", "--run_dir", str(run_dir), "--step", "1", "--row", "0"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("step 1, row 0:\nslots 0 to ") and ".jsonl:" in shown.out
    assert "step 1 is not in a checkpoint" in shown.err


STAGES = [{"seq_len": 32, "share": 0.5}, {"seq_len": 64, "share": 0.5}]


def test_the_rows_of_a_step_in_stages_are_those_of_its_stage(
    run_dir: Path, make_mix: MakeMix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"ja": make_texts(80, "ja"), "en": make_texts(80, "en")}
    mix = make_mix(texts, folder="staged", sources={"en": {"keep": ["id"]}}, stages=STAGES)
    build(mix, tmp_path / "staged-build", workers=1)
    config = yaml.safe_load((run_dir / "config.resolved.yaml").read_text())
    config["data"] = {
        "mix": str(tmp_path / "staged" / "mix.yaml"),
        "build_dir": str(tmp_path / "staged-build"),
    }
    config["train"]["total_steps"] = 8
    config["stages"] = [
        {"seq_len": 32, "global_batch_size": BATCH},
        {"seq_len": 64, "global_batch_size": BATCH},
    ]
    (run_dir / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    data = BuiltData.open(tmp_path / "staged-build", mix=mix)
    ledger = Ledger.start(mix, data.manifest.row_hashes(), 8)
    planned = plan_stages(mix.stages, [BATCH, BATCH], 8)
    first = planned.spans[1].first_batch
    assert 1 < first < 7
    for batch in (0, first - 1, first, 7):
        found = ask(capsys, "--run_dir", run_dir, "--step", batch + 1)
        check(found, data, ledger, batch, tmp_path / "staged", planned)

    # a run goes on with the borders of its checkpoint, whatever its configuration says by then
    spans = (planned.spans[0], dataclasses.replace(planned.spans[1], first_batch=first - 1))
    save(run_dir, ledger, 8, [[0, 1]], StagePlan(spans))
    for batch in (first - 2, first - 1, first):
        found = ask(capsys, "--run_dir", run_dir, "--step", batch)  # one batch was given up
        check(found, data, ledger, batch, tmp_path / "staged", StagePlan(spans))

    longer = (planned.spans[0], dataclasses.replace(planned.spans[1], seq_len=128))
    save(run_dir, ledger, 9, [], StagePlan(longer))
    assert main(["data", "where", "--run_dir", str(run_dir), "--step", "1"]) == 78
    assert "its rows have [32, 64] tokens, those of the run [32, 128]" in capsys.readouterr().err


def test_a_mix_that_got_stages_after_the_run_began_is_refused(
    run_dir: Path, make_mix: MakeMix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"ja": make_texts(80, "ja"), "en": make_texts(80, "en")}
    make_mix(texts, sources={"en": {"keep": ["id"]}}, stages=STAGES)
    assert main(["data", "where", "--run_dir", str(run_dir), "--step", "1"]) == 78
    assert "has 0 stages, its mix mix has 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --run_dir and --step, or --build_dir, --source and --document"),
        (["--run_dir", "RUN"], "--run_dir needs --step"),
        (["--run_dir", "RUN", "--step", "0"], "steps are counted from 1"),
        (["--run_dir", "RUN", "--step", "1", "--row", "4"], "a step has the rows 0 to 3"),
        (["--run_dir", "RUN", "--step", "1", "--source", "en"], "go with --build_dir alone"),
        (["--run_dir", "none", "--step", "1"], "--run_dir none does not exist"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(
    run_dir: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run_dir) if word == "RUN" else word for word in words]
    assert main(["data", "where", *words]) == 78
    assert message in capsys.readouterr().err


def test_a_run_directory_without_a_start_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "where", "--run_dir", str(tmp_path), "--step", "1"]) == 78
    assert "not the configuration of a run that has started" in capsys.readouterr().err


def test_the_keys_that_are_read_are_those_of_the_run_yaml() -> None:
    assert {"mix", "build_dir"} <= set(DataSection.__dataclass_fields__)

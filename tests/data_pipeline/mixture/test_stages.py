"""Stages of sequence length follow each other in one run, each exact at every prefix."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.__main__ import main
from data_pipeline.build.build import build
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.stage_config import StageConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import ConfigError
from data_pipeline.mixture.ledger import Ledger
from data_pipeline.mixture.staged_plan import StagedPlan, make_staged_plan, plan_mix
from data_pipeline.mixture.stages import StagePlan, mixture_of, plan_stages
from tests.data_pipeline.inputs import MakeMix, make_texts

STAGES = (StageConfig(seq_len=32, share=0.6), StageConfig(seq_len=64, share=0.4))
LISTED = [{"seq_len": 32, "share": 0.6}, {"seq_len": 64, "share": 0.4}]
WEIGHTS = {"ja_web": 0.7, "en_web": 0.3}


def staged_mix(make_mix: MakeMix, **keys: object) -> MixConfig:
    texts = {"ja_web": make_texts(60, "ja"), "en_web": make_texts(60, "english")}
    return make_mix(texts, weights=WEIGHTS, held_out_share=0.1, **{"stages": LISTED, **keys})


@pytest.fixture
def opened(make_mix: MakeMix, tmp_path: Path) -> tuple[BuiltData, MixConfig]:
    mix = staged_mix(make_mix)
    build(mix, tmp_path / "build", progress=False)
    return BuiltData.open(tmp_path / "build", mix=mix), mix


@settings(max_examples=80, deadline=None)
@given(
    parts=st.lists(st.integers(1, 20), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 64), min_size=4, max_size=4),
    total=st.integers(1, 10_000),
)
def test_borders_give_every_stage_its_share_of_the_tokens_up_to_a_step(
    parts: list[int], sizes: list[int], total: int
) -> None:
    stages = []
    for number, part in enumerate(parts):
        stages.append(StageConfig(seq_len=64 << number, share=part / sum(parts)))
    try:
        plan = plan_stages(stages, sizes[: len(parts)], total)
    except ConfigError:  # a stage without a step is refused
        return
    per_step = np.array([span.seq_len * span.global_batch_size for span in plan.spans])
    steps = []
    for number in range(len(stages)):
        first, last = plan.batches_of(number, total)
        assert first < last
        assert {plan.stage_of(first), plan.stage_of(last - 1)} == {number}
        steps.append(last - first)
    assert sum(steps) == total
    # both borders of a stage are rounded, so it is at most one step from the exact length
    lengths = np.array([stage.share for stage in stages]) / per_step
    assert np.abs(np.array(steps) - total * lengths / lengths.sum()).max() <= 1.0 + 1e-6


def test_plan_survives_its_checkpoint() -> None:
    plan = plan_stages(STAGES, [8, 4], 100)
    assert plan.to_json() == [
        {"first_batch": 0, "seq_len": 32, "global_batch_size": 8},
        {"first_batch": 60, "seq_len": 64, "global_batch_size": 4},
    ]
    assert StagePlan.from_json(plan.to_json()) == plan
    with pytest.raises(ConfigError, match="must rise from 0"):
        StagePlan.from_json(plan.to_json()[::-1])


def test_batches_are_pure_and_every_stage_is_exact_at_every_prefix(
    opened: tuple[BuiltData, MixConfig],
) -> None:
    built, mix = opened
    plan = plan_stages(mix.stages, [4, 2], 60)
    halves = {"ja_web": 0.5, "en_web": 0.5}
    ledger = Ledger.start(mix).adjust(mix, 10, lambda segment, planned: halves)
    for number in range(2):
        rows = built.of_stage(number)
        size = plan.spans[number].global_batch_size
        first, last = plan.batches_of(number, 60)
        mixture = mixture_of(rows, ledger, mix.seed, plan)
        in_order = [mixture.global_batch(batch, size) for batch in range(first, last)]
        shuffled = list(range(first, last))
        random.Random(3).shuffle(shuffled)
        for batch in shuffled:
            # a start in the middle of the stage knows only the number of its batch
            fresh = mixture_of(rows, ledger, mix.seed, plan)
            again = fresh.global_batch(batch, size)
            assert again.chain_hash("") == in_order[batch - first].chain_hash("")
        given_tokens = np.zeros(2)
        for batch in in_order:
            if batch.step == 10:
                given_tokens[:] = 0  # a segment has its own account
            weights = np.array([0.5, 0.5] if batch.step >= 10 else [0.7, 0.3])
            for source, tokens in zip(batch.sources, batch.predicted_tokens, strict=True):
                given_tokens[source] += tokens
                target = weights * given_tokens.sum()
                assert np.abs(target - given_tokens).max() <= rows.seq_len


PHASES = [
    {"name": "main", "share": 0.4},
    {
        "name": "shift",
        "share": 0.4,
        "weights": {"ja_web": 0.7, "en_web": 0.3},
        "to": {"ja_web": 0.3, "en_web": 0.7},
    },
    {"name": "end", "share": "rest", "weights": {"en_web": 1.0}},
]
SHARES_OF_JA = {("main", 0): 0.7, ("shift", 0): 0.6, ("shift", 1): 0.4, ("end", 1): 0.0}
"""By phase and stage; the border of the stages is in the middle of the linear change."""


def test_phases_of_a_schedule_go_on_over_the_border_of_stages(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    mix = staged_mix(make_mix, schedule=PHASES)
    build(mix, tmp_path / "build", progress=False)
    built = BuiltData.open(tmp_path / "build", mix=mix)
    plan = plan_stages(mix.stages, [4, 2], 60)
    ledger = Ledger.start(mix, total_steps=60)
    tokens_of: dict[tuple[str, int], list[int]] = {}
    for number in range(2):
        rows = built.of_stage(number)
        size = plan.spans[number].global_batch_size
        mixture = mixture_of(rows, ledger, mix.seed, plan)
        drawn = {}
        for batch in range(*plan.batches_of(number, 60)):
            drawn[batch] = mixture.global_batch(batch, size)
            phase = ledger.segment_at(batch).phase
            tokens = tokens_of.setdefault((phase, number), [0, 0])
            for source, count in zip(
                drawn[batch].sources, drawn[batch].predicted_tokens, strict=True
            ):
                tokens[source] += int(count)
        for batch in random.Random(5).sample(sorted(drawn), 6):
            fresh = mixture_of(rows, ledger, mix.seed, plan).global_batch(batch, size)
            assert fresh.chain_hash("") == drawn[batch].chain_hash("")
    assert tokens_of.keys() == SHARES_OF_JA.keys()
    for (phase, number), tokens in tokens_of.items():
        expected = SHARES_OF_JA[phase, number] * sum(tokens)
        # a row at the beginning and one at the end of what the phase has of the stage
        assert abs(tokens[0] - expected) <= 2 * mix.stages[number].seq_len, (phase, number, tokens)


def test_first_epoch_of_all_stages_has_every_training_document_once(
    opened: tuple[BuiltData, MixConfig],
) -> None:
    """Counted in tokens, too: a document is cut at the rows of its own stage only."""
    built, mix = opened
    plan = plan_stages(mix.stages, [4, 2], 200)
    pairs: dict[tuple[int, int], int] = {}
    stages_of: dict[tuple[int, int], set[int]] = {}
    for number in range(2):
        rows = built.of_stage(number)
        mixture = mixture_of(rows, Ledger.start(mix), mix.seed, plan)
        for batch in range(*plan.batches_of(number, 200)):
            drawn = mixture.global_batch(batch, plan.spans[number].global_batch_size)
            for source, row, epoch in zip(drawn.sources, drawn.rows, drawn.epochs, strict=True):
                if epoch:
                    continue
                packed = rows.read_row(int(source), int(row))
                for document, first, last in zip(
                    packed.documents.tolist(), packed.bounds, packed.bounds[1:], strict=False
                ):
                    key = (int(source), document)
                    pairs[key] = pairs.get(key, 0) + last - first
                    stages_of.setdefault(key, set()).add(number)
    assert all(len(stages) == 1 for stages in stages_of.values())
    for source, entry in enumerate(built.manifest.sources):
        found = {key: count for key, count in pairs.items() if key[0] == source}
        assert len(found) == entry.documents
        assert sum(found.values()) == entry.predicted_tokens


def test_plan_tells_each_stage_and_their_sum(opened: tuple[BuiltData, MixConfig]) -> None:
    built, mix = opened
    plan = plan_mix(built, mix, 50, 4)
    assert isinstance(plan, StagedPlan)
    assert [one.steps for one in plan.plans] == [30, 20]
    whole = plan.whole()
    assert whole.drawn_tokens == plan.drawn_tokens == sum(one.drawn_tokens for one in plan.plans)
    # slots are filled, so tokens of equally long steps are nearly equal
    assert plan.plans[0].drawn_tokens / whole.drawn_tokens == pytest.approx(0.6, abs=0.03)
    for number, source in enumerate(whole.sources):
        assert source.tokens == built.manifest.sources[number].predicted_tokens
        assert source.share == pytest.approx(WEIGHTS[source.name], abs=0.03)
    assert "stage 2 (rows of 64)" in plan.describe()
    assert [stage["seq_len"] for stage in plan.to_json()["stages"]] == [32, 64]
    assert list(whole.curve_steps) == sorted(whole.curve_steps)


def test_epochs_of_a_stage_are_limited_by_themselves(make_mix: MakeMix, tmp_path: Path) -> None:
    mix = staged_mix(make_mix, sources={"ja_web": {"max_epochs": 2.0}})
    build(mix, tmp_path / "build", progress=False)
    built = BuiltData.open(tmp_path / "build", mix=mix)
    plan = make_staged_plan(built, mix, plan_stages(mix.stages, [64, 1], 60), 10)
    assert len(plan.problems) == 1
    assert plan.problems[0].startswith("stage 1 (rows of 32): source 'ja_web': ")


def test_command_plans_stages(
    make_mix: MakeMix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(staged_mix(make_mix), tmp_path / "build", progress=False)
    mix = str(tmp_path / "in" / "mix.yaml")
    command = ["plan", mix, "--out", str(tmp_path / "build")]
    plot = ["--plot", str(tmp_path / "plan.svg")]
    assert main([*command, "--steps", "50", "--global_batch_size", "4", *plot]) == 0
    told = capsys.readouterr().out
    assert "stage 1 (rows of 32)" in told and "31 to 50" in told
    assert (tmp_path / "plan.svg").exists()
    assert main([*command, "--steps", "1", "--global_batch_size", "4"]) == 78
    assert "needs one at least" in capsys.readouterr().err

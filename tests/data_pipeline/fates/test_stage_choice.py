"""Every training document is in one stage of sequence length, and every stage has its share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.build.build import build
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.config.stage_config import StageConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import DataError
from data_pipeline.fates.stage_choice import choose_stages
from data_pipeline.reading.content_hashes import HASH_DTYPE, Hashes
from data_pipeline.reading.stored_rows import read_build_texts
from tests.data_pipeline.inputs import MakeMix, make_texts


def some_hashes(count: int, seed: int = 0) -> Hashes:
    bits = np.random.default_rng(seed).integers(0, 2**64, (count, 2), dtype=np.uint64)
    hashes = np.zeros(count, HASH_DTYPE)
    hashes["high"] = bits[:, 0]
    hashes["low"] = bits[:, 1]
    return hashes


def stages(*parts: tuple[int, float, int]) -> tuple[StageConfig, ...]:
    found = []
    for seq_len, share, min_tokens in parts:
        found.append(StageConfig(seq_len=seq_len, share=share, min_tokens=min_tokens))
    return tuple(found)


def shares_of(chosen: np.ndarray, tokens: np.ndarray, num_stages: int) -> list[float]:
    counts = np.bincount(chosen, weights=tokens, minlength=num_stages)
    return (counts / tokens.sum()).tolist()


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.integers(1, 20), min_size=2, max_size=4),
    least=st.lists(st.sampled_from([0, 300, 2000]), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_every_stage_has_its_share_of_the_tokens(
    parts: list[int], least: list[int], seed: int
) -> None:
    total = sum(parts)
    listed = []
    for number, part in enumerate(parts):
        listed.append((64 << number, part / total, least[number] if number else 0))
    tokens = np.random.default_rng(seed).integers(2, 1000, 20_000)
    chosen = choose_stages(some_hashes(20_000, seed), tokens, stages(*listed), is_chat=False)
    found = shares_of(chosen, tokens, len(parts))
    # the standard deviation of a share is at most 0.5 * sqrt(4/3 / 20,000) = 0.004
    assert found == pytest.approx([part / total for part in parts], abs=0.025)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), kept=st.integers(100, 400))
def test_content_alone_decides_without_min_tokens(seed: int, kept: int) -> None:
    hashes = some_hashes(400, seed)
    tokens = np.random.default_rng(seed).integers(2, 1000, 400)
    listed = stages((64, 0.5, 0), (128, 0.3, 0), (256, 0.2, 0))
    chosen = choose_stages(hashes, tokens, listed, is_chat=False)
    order = np.random.default_rng(seed + 1).permutation(400)[:kept]
    assert choose_stages(hashes[order], tokens[order] + 7, listed, is_chat=False).tolist() == (
        chosen[order].tolist()
    )


def test_long_documents_come_first_where_a_stage_asks_for_them() -> None:
    tokens = np.random.default_rng(5).integers(2, 1000, 5000)
    listed = stages((64, 0.9, 0), (512, 0.1, 600))
    chosen = choose_stages(some_hashes(5000), tokens, listed, is_chat=False)
    assert tokens[chosen == 1].min() >= 600
    assert shares_of(chosen, tokens, 2)[1] == pytest.approx(0.1, abs=0.02)


def test_short_documents_fill_up_where_there_are_too_few_long_ones() -> None:
    tokens = np.full(5000, 50)
    tokens[:10] = 5000  # a sixth of the tokens
    listed = stages((64, 0.5, 0), (512, 0.5, 600))
    chosen = choose_stages(some_hashes(5000), tokens, listed, is_chat=False)
    assert (chosen[:10] == 1).all()
    assert shares_of(chosen, tokens, 2)[1] == pytest.approx(0.5, abs=0.03)


def test_conversation_is_in_a_stage_whose_rows_it_fits() -> None:
    tokens = np.random.default_rng(6).integers(2, 257, 4000)
    listed = stages((64, 0.8, 0), (128, 0.1, 0), (256, 0.1, 0))
    chosen = choose_stages(some_hashes(4000), tokens, listed, is_chat=True)
    assert tokens[chosen == 0].max() - 1 <= 64
    assert tokens[chosen == 1].max() - 1 <= 128


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(0, 12), seed=st.integers(0, 100), share=st.sampled_from([0.001, 0.5, 0.998])
)
def test_every_stage_has_a_document_of_a_source_with_enough(
    count: int, seed: int, share: float
) -> None:
    listed = stages((64, share, 0), (128, (1 - share) / 2, 0), (256, (1 - share) / 2, 100))
    chosen = choose_stages(some_hashes(count, seed), np.full(count, 50), listed, is_chat=False)
    assert len(set(chosen.tolist())) == min(count, 3)


TWO_STAGES = [{"seq_len": 32, "share": 0.6}, {"seq_len": 64, "share": 0.4, "min_tokens": 40}]


def staged_mix(make_mix: MakeMix, **keys: object) -> MixConfig:
    texts = {"ja_web": make_texts(60, "ja"), "en_web": make_texts(40, "english")}
    return make_mix(texts, stages=TWO_STAGES, held_out_share=0.1, **keys)


def test_build_packs_each_document_into_the_rows_of_one_stage(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    mix = staged_mix(make_mix)
    assert mix.seq_len == 32
    manifest = build(mix, tmp_path / "build", progress=False)
    built = BuiltData.open(tmp_path / "build", mix=mix)
    assert built.num_stages == 2
    for source, entry in enumerate(manifest.sources):
        seen: list[int] = []
        for number, stage in enumerate(entry.stages):
            rows = built.of_stage(number)
            assert rows.seq_len == (32, 64)[number] == stage.seq_len
            documents = set()
            for row in range(rows.num_rows(source)):
                packed = rows.read_row(source, row)
                assert len(packed.input_ids) == stage.seq_len
                documents |= set(packed.documents.tolist())
            assert len(documents) == stage.documents > 0
            assert int(rows.row_tokens(source).sum()) == stage.predicted_tokens
            seen += sorted(documents)
        assert len(seen) == len(set(seen)) == entry.documents
        assert sum(stage.tokens for stage in entry.stages) == entry.tokens
        assert sum(stage.rows for stage in entry.stages) == entry.rows
    # held-out text is measured in the rows of the first stage throughout
    assert {domain.seq_len for domain in built.of_stage(1).held_out} == {32}


def test_stages_share_shards_and_documents_with_a_build_without_them(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    staged = build(staged_mix(make_mix), tmp_path / "staged", progress=False)
    texts = {"ja_web": make_texts(60, "ja"), "en_web": make_texts(40, "english")}
    plain_mix = make_mix(texts, held_out_share=0.1)
    plain = build(plain_mix, tmp_path / "plain", progress=False)
    shards = [name for name in plain.files if name.endswith(".tokens")]
    assert {name: staged.files[name] for name in shards} == {
        name: plain.files[name] for name in shards
    }
    for entry, other in zip(staged.sources, plain.sources, strict=True):
        assert (entry.documents, entry.tokens) == (other.documents, other.tokens)
        assert entry.held_out_hash == other.held_out_hash
    assert staged.fingerprint != plain.fingerprint


def test_build_of_a_build_takes_the_documents_of_all_stages(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    build(staged_mix(make_mix), tmp_path / "staged", progress=False)
    build(
        make_mix(
            {"ja_web": make_texts(60, "ja"), "en_web": make_texts(40, "english")},
            held_out_share=0.1,
        ),
        tmp_path / "plain",
        progress=False,
    )
    found = []
    for name in ("staged", "plain"):
        source = SourceConfig(
            name="old",
            language="ja",
            domain="web",
            format="build",
            path=(str(tmp_path / name),),
            weight=1.0,
            held_out_share=0.0,
        )
        found.append(list(read_build_texts(source, 0, 10**6)))
    assert found[0] == found[1]


def test_source_with_fewer_documents_than_stages_is_refused(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    mix = make_mix({"ja_web": ["only one text here"]}, stages=TWO_STAGES)
    with pytest.raises(
        DataError, match="'ja_web': no document is left for the stage of rows of 64"
    ):
        build(mix, tmp_path / "build", progress=False)


@pytest.mark.parametrize(("held_out_share", "longest"), [(0.0, 256), (0.2, 128)])
def test_conversation_is_as_long_as_the_rows_in_which_it_may_stand(
    make_mix: MakeMix, tmp_path: Path, held_out_share: float, longest: int
) -> None:
    """A conversation that is held out is measured in the rows of the first stage, uncut."""
    lines = []
    for number in range(60):
        question = {"role": "user", "content": f"{number} " + "why so " * (3 * number)}
        answer = {"role": "assistant", "content": f"because {number}"}
        lines.append(json.dumps({"messages": [question, answer]}))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "chat.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    mix = make_mix(
        {"en_chat": []},
        sources={"en_chat": {"format": "harmony", "path": "chat.jsonl"}},
        held_out_share=held_out_share,
        stages=[{"seq_len": 128, "share": 0.5}, {"seq_len": 256, "share": 0.5}],
        max_reject_share=1.0,
    )
    manifest = build(mix, tmp_path / "build", progress=False)
    (entry,) = manifest.sources
    assert list(entry.rejects) == [f"conversation longer than a row of {longest} tokens"]
    built = BuiltData.open(tmp_path / "build", mix=mix)
    for number in range(2):
        rows = built.of_stage(number)
        for row in range(rows.num_rows(0)):
            packed = rows.read_row(0, row)
            # each piece is a whole conversation: it starts at its document's start
            assert len(set(packed.documents.tolist())) == len(packed.documents)

"""A baseline that nothing can be compared with is never kept; scores are kept where they can be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from cpt.errors import ConfigError, StorageError
from cpt.guard.baseline import (
    DomainBaseline,
    check_finite,
    check_same_text,
    check_same_weights,
    keep_on_first_rank,
    write_on_first_rank,
)
from cpt.guard.score import DomainScore


def score(*nats: float, fresh: tuple[float, ...] = ()) -> DomainBaseline:
    panel = DomainScore(
        name="web",
        language="en",
        nats=np.array(nats, dtype=np.float64),
        bytes=np.array([10] * len(nats)),
    )
    return DomainBaseline(
        panel=panel,
        clusters=np.arange(len(nats)),
        fresh=np.array(fresh, dtype=np.float64),
        fresh_per_look=len(fresh),
    )


def test_finite_scores_are_kept() -> None:
    check_finite({"web": score(3.0, 4.0), "wiki": score()}, "model", "Look.")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused_by_domain(value: float) -> None:
    scores = {
        "web": score(3.0, value),
        "wiki": score(1.0, 2.0),
        "code": score(3.0, fresh=(value, value)),
    }
    with pytest.raises(ConfigError) as caught:
        check_finite(scores, "model.path base", "Look at the weights.")
    text = str(caught.value)
    assert caught.value.exit_code == 78
    assert "model.path base" in text and text.endswith("Look at the weights.")
    assert "web (1 of 2 documents), code (2 of 3 documents)" in text and "wiki" not in text


def test_baseline_of_other_documents_is_refused() -> None:
    stored = {"web": {"content_hash": "a", "fresh_content_hash": "b", "fresh_per_look": 5}}
    check_same_text(Path("f"), stored, {"web": {"content_hash": "a", "fresh_content_hash": "b"}})
    with pytest.raises(ConfigError, match="other held-out text of web"):
        check_same_text(
            Path("f"), stored, {"web": {"content_hash": "a", "fresh_content_hash": "x"}}
        )


def test_baseline_of_the_first_documents_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"before 0\.2.*--set guard\.enabled=false"):
        check_same_text(Path("f"), {"web": {"content_hash": "a"}}, {"web": {"content_hash": "a"}})


@pytest.mark.parametrize("stated", ["tensors:new+old", "old"], ids=["of now", "of before"])
def test_baseline_is_that_of_the_weights_that_it_states(stated: str) -> None:
    stored = {"web": {"model": "base", "weights": stated}}
    check_same_weights(Path("f"), stored, "base", "tensors:new+old")
    # the samples of before do not see small tensors, so they may be those of other weights
    with pytest.raises(ConfigError, match="another untouched model: base"):
        check_same_weights(Path("f"), stored, "base", "tensors:new+other")
    if stated != "old":
        with pytest.raises(ConfigError, match="another untouched model: base"):
            check_same_weights(Path("f"), stored, "base", "tensors:other+old")


def test_baseline_survives_json() -> None:
    before = score(3.0, 4.0, fresh=(1.0, 2.0))
    again = DomainBaseline.from_json("web", json.loads(json.dumps(before.to_json())))
    assert again.to_json() == before.to_json()
    assert again.fresh_at(1).tolist() == [1.0, 2.0]


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_scores_of_a_step_that_is_done_again_get_a_file_of_their_own(
    group: dist.ProcessGroup, tmp_path: Path
) -> None:
    names = [keep_on_first_rank(group, tmp_path, "scores", 2, {"try": n}) for n in (1, 2)]
    assert names == ["scores-00000002.json", "scores-00000002-2.json"]
    assert json.loads((tmp_path / names[1]).read_text(encoding="utf-8")) == {"try": 2}


def test_scores_that_cannot_be_written_cost_a_warning(
    group: dist.ProcessGroup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "guard"
    place.write_text("in the way", encoding="utf-8")
    assert keep_on_first_rank(group, place, "scores", 2, {}) == ""
    assert "The scores of the guard at step 2 are not kept" in caplog.text


def test_baseline_that_cannot_be_written_is_a_matter_of_storage(
    group: dist.ProcessGroup, tmp_path: Path
) -> None:
    place = tmp_path / "guard"
    place.write_text("in the way", encoding="utf-8")
    with pytest.raises(StorageError, match="guard"):
        write_on_first_rank(group, place / "baseline.json", {})

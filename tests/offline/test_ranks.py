"""The experts are spread so that the model fits, and what cannot be is refused with figures."""

from __future__ import annotations

import pytest

from cpt.errors import ConfigError
from cpt.model.configuration import load_config
from cpt.offline.rank_options import RankOptions
from cpt.offline.ranks import choose_ep_size, weight_bytes

GIB = 2**30
LARGE = load_config(None, "gpt-oss-120b")
SMALL = load_config(None, "gpt-oss-20b")


def choose(world_size: int, local_world_size: int, gib: float | None, **wanted: int) -> int:
    return choose_ep_size(
        LARGE,
        wanted.get("ep_size"),
        world_size=world_size,
        local_world_size=local_world_size,
        device_bytes=None if gib is None else int(gib * GIB),
    )


def test_the_largest_model_fits_on_eight_gpus_without_zero() -> None:
    assert choose(8, 8, 80) == 8
    assert weight_bytes(LARGE, 8, 2) / GIB == pytest.approx(30.7, abs=0.1)
    assert weight_bytes(LARGE, 1, 2) / GIB == pytest.approx(217.6, abs=0.1)
    # what every rank holds beside its experts
    assert weight_bytes(LARGE, 128, 2) / GIB == pytest.approx(5.6, abs=0.1)


def test_the_exchange_of_the_experts_stays_inside_a_node_unless_that_does_not_fit() -> None:
    assert choose(16, 8, 80) == 8
    assert choose(16, 4, 80) == 4
    assert choose(16, 4, 50) == 8
    assert choose(12, 12, None) == 4


def test_a_size_that_is_asked_for_is_taken_or_refused() -> None:
    assert choose(16, 8, 80, ep_size=16) == 16
    with pytest.raises(ConfigError, match="--ep_size 3 must divide the 8 ranks and the 128") as why:
        choose(8, 8, 80, ep_size=3)
    assert "Possible here: 1, 2, 4, 8" in str(why.value)


def test_a_model_that_does_not_fit_is_refused_with_both_figures() -> None:
    with pytest.raises(ConfigError, match=r"a GPU has 80.0 GiB.*Start more ranks") as why:
        choose(2, 2, 80)
    assert why.value.exit_code == 78 and "over 2 of 2 ranks" in str(why.value)


def test_a_save_after_no_item_is_refused() -> None:
    with pytest.raises(ConfigError, match="--save_every 0 must be >= 1"):
        RankOptions(save_every=0)

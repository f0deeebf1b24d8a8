"""The layout of one process, in which traces are sampled and measured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cpt.offline.ranks import single_process
from cpt.parallel.topology import Topology


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with single_process() as layout:
        yield layout

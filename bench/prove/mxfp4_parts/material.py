"""What the trainings of a proof read: held-out documents, and the rows of every seed."""

from __future__ import annotations

from pathlib import Path

from cpt.parallel.topology import Topology
from mxfp4_parts import texts
from mxfp4_parts.scale import Scale
from mxfp4_parts.training import Rows, scored_sets


class Material:
    """The texts of a proof and their build."""

    def __init__(self, work_dir: Path, scale: Scale, *, from_sample: bool) -> None:
        """Write the texts and build them, unless that is done.

        Args:
            work_dir: Folder of the proof.
            scale: Sizes.
            from_sample: Whether the texts are the sample corpora.
        """
        self._work_dir = work_dir
        self._scale = scale
        texts.write_all_texts(work_dir / "text", scale, from_sample=from_sample)
        self._data = texts.open_texts(work_dir, scale)
        self.sets = list(scored_sets(self._data))
        """The held-out domains."""

    def rows(self, shares: dict[str, float], seed: int, topology: Topology) -> Rows:
        """Return the rows of a mix of the sources, in the order of a seed."""
        mix = texts.read_mix(self._work_dir, self._scale, seed, shares)
        return Rows(self._data, mix, self._scale, topology)

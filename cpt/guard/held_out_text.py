"""The first yardstick: bits per byte of held-out text, against those of the untouched model.

    documents (drawing.py) -> scores (score.py) -> readings (text_judge.py)

The baseline is measured before step 0 and kept in baseline.json (baseline.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpt.config import RunConfig
from cpt.errors import ConfigError
from cpt.guard.baseline import (
    BASELINE_FILE,
    DomainBaseline,
    check_finite,
    check_same_text,
    check_same_weights,
    missing_baseline,
    read_baseline,
    stored_baselines,
    write_on_first_rank,
)
from cpt.guard.drawing import Drawing, draw, drawing_order
from cpt.guard.paired_test import cluster_sums, effective_documents
from cpt.guard.requirements import (
    WARN_INSTEAD,
    SampleSize,
    acts,
    domain_problems,
    tolerance_problems,
)
from cpt.guard.score import DomainScore, Floats, ScoredSet, content_hashes, score_domain
from cpt.guard.text_judge import TextJudge
from cpt.guard.untouched_model import untouched_name, untouched_weights
from cpt.guard.yardstick import Json, Kind, Look
from cpt.parallel.agreement import on_first_rank
from cpt.parallel.topology import Topology
from cpt.resilience.agreed_stop import agreed_reason
from cpt.resilience.best_effort import best_effort
from cpt.resilience.stop import StopRequest
from cpt.training.engine import TrainingEngine
from data_pipeline.dataset import BuiltData, HeldOutSet
from data_pipeline.store.files import write_json
from data_pipeline.store.packing import Integers

log = logging.getLogger("cpt.guard")

BLOCK_DOCUMENTS = 512
"""Documents that are scored between two looks at requests to stop."""
BEST_FILE = "best.json"
"""Scores of the panel of each domain at the looks that were better than all before them."""


class HeldOutText(TextJudge):
    """The held-out domains of a run and the scores of the untouched model on them."""

    kind: Kind = "text"

    def __init__(
        self,
        data: BuiltData,
        config: RunConfig,
        topology: Topology,
        run_dir: Path,
        *,
        observe: bool = False,
    ) -> None:
        """Take the held-out domains of the data; nothing is measured yet.

        Args:
            data: The built data.
            config: The run's configuration.
            topology: The layout.
            run_dir: The run directory.
            observe: Whether another job may be at work in the run directory; then no file is
                written.

        Raises:
            ConfigError: see `cpt.guard.requirements.domain_problems`.
        """
        super().__init__({})
        num_documents = {domain.name: domain.num_documents for domain in data.held_out}
        problems = domain_problems(config.guard, num_documents)
        if problems:
            raise ConfigError(problems)
        self._observe = observe
        self._config = config
        self._topology = topology
        self._data = {domain.name: domain for domain in data.held_out}
        self.domain_names = [domain.name for domain in data.held_out]
        self._model = untouched_name(config)
        self._folder = run_dir / "guard"
        self._baseline_file = self._folder / BASELINE_FILE
        self._drawings: dict[str, Drawing] = {}
        self._best: Json | None = None

    def is_due(self, look: Look) -> bool:
        """Return that text is scored at every look."""
        return True

    def open_untouched(self, step: int) -> None:
        """Read the baseline; see `cpt.guard.yardstick.Yardstick.open_untouched`."""
        if self.baseline:
            return
        self.baseline = self._stored_baseline()
        if not self.baseline and step:
            raise missing_baseline(self._baseline_file, step)
        unknown = self._unmeasured()
        if unknown and step and self._topology.rank == 0:
            log.warning(
                "held-out domains %s are left out: the untouched model was not measured on them.",
                ", ".join(unknown),
            )

    def keep_untouched(self, look: Look, engine: TrainingEngine, stop: StopRequest | None) -> bool:
        """Measure the baseline; see `cpt.guard.yardstick.Yardstick.keep_untouched`."""
        self.open_untouched(0)
        return not self._unmeasured() or self._measure_baseline(look, engine, stop)

    def _unmeasured(self) -> list[str]:
        """Return the domains on which the untouched model was not measured."""
        return [name for name in self.domain_names if name not in self.baseline]

    def measure(self, look: Look, engine: TrainingEngine, stop: StopRequest | None) -> Json | None:
        """Score the domains that have a baseline, all of them at step 0.

        Returns:
            Scores as `TextJudge.judge` takes them; None if a stop was requested before every
            domain was scored.

        Raises:
            ConfigError: see `cpt.guard.yardstick.Yardstick.measure`.
        """
        self.open_untouched(look.step)
        if look.step == 0 and self._unmeasured():
            is_new = not self.baseline
            if not self._measure_baseline(look, engine, stop):
                return None
            if is_new:
                nats = {name: one.panel.nats.tolist() for name, one in self.baseline.items()}
                return {"nats": nats}
        panels: dict[str, Floats] = {}
        fresh: dict[str, Floats] = {}
        for name in self.baseline:
            if panels and self._is_stopped(stop):
                return None
            drawing = self._drawings[name]
            panels[name] = self._score(name, drawing.panel, engine)
            documents = drawing.fresh_at(look.number)
            if len(documents):
                fresh[name] = self._score(name, documents, engine)
        return {
            "nats": {name: nats.tolist() for name, nats in panels.items()},
            "fresh": {name: nats.tolist() for name, nats in fresh.items()},
            "best": self._best_before(look, panels),
        }

    def _score(self, name: str, documents: Integers, engine: TrainingEngine) -> Floats:
        """Return the nats of some documents of a domain under the present weights."""
        return self._domain_score(name, documents, engine).nats

    def _domain_score(self, name: str, documents: Integers, engine: TrainingEngine) -> DomainScore:
        return score_domain(
            ScoredSet(self._data[name], documents),
            engine,
            self._topology,
            micro_batch_size=self._config.micro_batch_size,
        )

    def _is_stopped(self, stop: StopRequest | None) -> bool:
        return stop is not None and bool(agreed_reason(stop, self._topology.control_group))

    def _measure_baseline(
        self, look: Look, engine: TrainingEngine, stop: StopRequest | None
    ) -> bool:
        """Score the panels and all fresh documents of the run, and keep the baseline.

        What an earlier start has kept of other domains stays, since a run may be given more of them
        before its first step.

        Returns:
            False if a stop was requested before every domain was scored.

        Raises:
            ConfigError: its scores are not finite, or its documents cannot show a loss of the
                tolerance while the guard is to act on one.
        """
        baselines: dict[str, DomainBaseline] = {}
        for name in self._unmeasured():
            domain = self._data[name]
            if baselines and self._is_stopped(stop):
                return False
            drawing = draw(
                look.settings, name, domain.document_clusters, look.num_looks, look.num_domains
            )
            self._drawings[name] = drawing
            panel = self._domain_score(name, drawing.panel, engine)
            fresh = self._score_in_blocks(name, drawing.fresh, engine, stop)
            if fresh is None:
                return False
            baselines[name] = DomainBaseline(
                panel=panel,
                clusters=domain.document_clusters[drawing.panel],
                fresh=fresh,
                fresh_per_look=drawing.fresh_per_look,
            )
        self._keep_baseline(look, baselines)
        self.baseline = {**self.baseline, **baselines}
        return True

    def _keep_baseline(self, look: Look, baselines: Mapping[str, DomainBaseline]) -> None:
        """Write the baseline, unless nothing can be told from it."""
        check_finite(
            baselines,
            self._model_in_words(),
            "Look at the weights: a value that is not finite or far too large, or a file that is "
            "damaged. Compare their SHA-256 with the published ones, or give another model.",
        )
        self._check_tolerances(look, baselines)
        content = self._read_baseline()
        weights = self._base_weights()
        hashes = self._content_hashes(baselines)
        for name, baseline in baselines.items():
            entry = {"model": self._model, "weights": weights, **hashes[name]}
            content[name] = {**entry, **baseline.to_json()}
        if not self._observe:
            write_on_first_rank(self._topology.control_group, self._baseline_file, content)

    def _score_in_blocks(
        self, name: str, documents: Integers, engine: TrainingEngine, stop: StopRequest | None
    ) -> Floats | None:
        """Return the nats of many documents; None if a stop was requested on the way."""
        scores = [np.zeros(0)]
        for first in range(0, len(documents), BLOCK_DOCUMENTS):
            if self._is_stopped(stop):
                return None
            block = documents[first : first + BLOCK_DOCUMENTS]
            scores.append(self._score(name, block, engine))
        return np.concatenate(scores)

    def _content_hashes(self, names: Iterable[str]) -> dict[str, Json]:
        """Return hashes of the documents of the panel, and of the fresh ones, by domain."""
        fields: list[tuple[str, str]] = []
        sets: list[tuple[HeldOutSet, Integers]] = []
        for name in names:
            drawing = self._drawings[name]
            fields.append((name, "content_hash"))
            sets.append((self._data[name], drawing.panel))
            if len(drawing.fresh):
                fields.append((name, "fresh_content_hash"))
                sets.append((self._data[name], drawing.fresh))
        hashes: dict[str, Json] = {}
        for (name, field), digest in zip(fields, content_hashes(sets, self._topology), strict=True):
            hashes.setdefault(name, {})[field] = digest
        return hashes

    def _check_tolerances(self, look: Look, baselines: Mapping[str, DomainBaseline]) -> None:
        sizes = {}
        for name, baseline in baselines.items():
            clusters = self._data[name].document_clusters
            nats = cluster_sums(baseline.panel.nats, baseline.clusters)
            sizes[name] = SampleSize(
                num_held_out=len(np.unique(clusters)),
                num_panel=len(nats),
                effective_panel=effective_documents(nats),
                fresh_per_look=baseline.fresh_per_look,
                num_looks=look.num_looks,
            )
        problems = tolerance_problems(look.settings, sizes, look.num_tests)
        if problems and acts(look.settings):
            raise ConfigError([*problems, WARN_INSTEAD])
        for problem in problems:
            log.info("%s", problem)

    def _best_before(self, look: Look, panels: Mapping[str, Floats]) -> Json:
        """Return the best look before of every domain, and keep this one where it is better.

        A file of its own holds every look that was better than all before it, so that a run that
        goes back to an earlier step also goes back to the best look before that.
        """
        file = self._folder / BEST_FILE
        group = self._topology.control_group
        if self._best is None:
            self._best = on_first_rank(group, lambda: read_baseline(file))
        known: Json = {}
        better: Json = dict(self._best)
        for name, nats in panels.items():
            earlier = [one for one in self._best.get(name, []) if one["step"] < look.step]
            untouched = {"step": 0, "nats": self.baseline[name].panel.nats.tolist()}
            known[name] = earlier[-1] if earlier else untouched
            if nats.sum() < sum(known[name]["nats"]):
                earlier.append({"step": look.step, "nats": nats.tolist()})
            better[name] = earlier
        if better != self._best:
            self._best = better
            if not self._observe:
                on_first_rank(group, lambda: keep_best(file, better))
        return known

    def table(self, events: Sequence[Json]) -> str:
        """Return the changes of all domains as a table for people."""
        return change_table(events)

    def _stored_baseline(self) -> dict[str, DomainBaseline]:
        """Return the scores of the untouched model on the domains of this run; empty if none.

        Raises:
            ConfigError: they are of other text, of another model, or not finite.
        """
        stored = self._read_baseline()
        known = {name: stored[name] for name in self.domain_names if name in stored}
        baselines = stored_baselines(known)
        for name, baseline in baselines.items():
            self._drawings[name] = self._drawing_of(name, baseline)
        if known:
            check_same_text(self._baseline_file, known, self._content_hashes(baselines))
            check_same_weights(self._baseline_file, known, self._model, self._base_weights())
        check_finite(
            baselines,
            str(self._baseline_file),
            "Use a new --run_dir, and look at the weights that the run started from.",
        )
        return baselines

    def _read_baseline(self) -> Json:
        """Return the content of baseline.json on every rank."""
        return on_first_rank(
            self._topology.control_group, lambda: read_baseline(self._baseline_file)
        )

    def _drawing_of(self, name: str, baseline: DomainBaseline) -> Drawing:
        """Return the drawing that a baseline was measured on."""
        order, _ = drawing_order(self._data[name].document_clusters)
        num_looks = 0
        if baseline.fresh_per_look:
            num_looks = len(baseline.fresh) // baseline.fresh_per_look
        return Drawing(
            order=order,
            num_panel=len(baseline.panel.nats),
            fresh_per_look=baseline.fresh_per_look,
            num_looks=num_looks,
        )

    def _base_weights(self) -> str:
        return untouched_weights(self._config, self._topology)

    def _model_in_words(self) -> str:
        if self._config.guard.baseline_model is not None:
            return f"guard.baseline_model {self._model}"
        return f"model.path {self._model}" if self._config.model.path else f"model {self._model}"


def change_table(events: Sequence[Mapping[str, Any]]) -> str:
    """Return the changes of all domains as a table for people.

    Args:
        events: `guard` lines of held-out text.
    """
    width = max([15, *(len(event["domain"]) for event in events)])
    lines = [
        "bits per byte",
        f"  {'held-out domain':<{width}}  untouched    now   change %  (95 % interval)",
    ]
    for event in events:
        line = (
            f"  {event['domain']:<{width}}  {event['baseline']:9.3f}  "
            f"{event['bits_per_byte']:5.3f}  {_signed(event['delta_percent']):>9}  "
            f"({_signed(event['ci_low'])} to {_signed(event['ci_high'])})  {event['state']}"
        )
        if event.get("action", "none") != "none" and event["state"] == "red":
            line += "  WARNING"
        lines.append(line)
    return "\n".join(lines)


def _signed(percent: float) -> str:
    return f"{percent:+.2f}" if math.isfinite(percent) else str(percent)


def keep_best(file: Path, better: Json) -> None:
    """Write the best looks of a run; a later start that lacks one compares with an earlier one."""
    with best_effort("The guard's best look is not kept for later starts"):
        write_json(file, better)

"""The first yardstick: bits per byte of held-out text, against those of the untouched model.

    rows -> scores (score.py) -> change since step 0 (paired_test.py) -> readings

The baseline is measured before step 0 and kept in baseline.json (baseline.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cpt.config import GuardSection, RunConfig
from cpt.errors import ConfigError
from cpt.guard.baseline import (
    BASELINE_FILE,
    baseline_content,
    baseline_scores,
    check_finite,
    check_same_text,
    check_same_weights,
    read_baseline,
    write_on_first_rank,
)
from cpt.guard.paired_test import CONFIDENCE, PairedChange, compare_scores
from cpt.guard.requirements import WARN_INSTEAD, acts, domain_problems, tolerance_problems
from cpt.guard.score import DomainScore, ScoredSet, as_floats, score_domain
from cpt.guard.yardstick import Json, Judgement, Kind, Look, Reading, state_of
from cpt.model.weights.checksums import sampled_hash
from cpt.model.weights.hf_layout import tensor_files
from cpt.parallel.agreement import on_first_rank
from cpt.parallel.topology import Topology
from cpt.resilience.agreed_stop import agreed_reason
from cpt.resilience.stop import StopRequest
from cpt.training.engine import TrainingEngine
from data_pipeline.dataset import BuiltData

log = logging.getLogger("cpt.guard")

FINAL_CONFIDENCE = 0.99
"""Confidence of the upper bounds at the end of a run, when a model may be released."""


class TextJudge:
    """The pure half: the scores of the untouched model, which readings are compared with."""

    def __init__(self, baseline: Mapping[str, DomainScore]) -> None:
        """Take the scores of the untouched model by domain."""
        self.baseline = baseline

    @classmethod
    def stored(cls, folder: Path) -> TextJudge:
        """Read the baseline of a run; without one, no domain is known.

        Args:
            folder: <run_dir>/guard.
        """
        return cls(baseline_scores(read_baseline(folder / BASELINE_FILE)))

    def judge(self, scores: Json, state: Json, look: Look) -> Judgement:
        """Compare scores with the baseline; see `cpt.guard.yardstick.Judge`.

        Args:
            scores: `nats`: by domain, a list over documents.
            state: Unused.
            look: The look.
        """
        confidence = FINAL_CONFIDENCE if look.last else CONFIDENCE
        readings = []
        events = []
        for name, nats in scores["nats"].items():
            before = self.baseline[name]
            now = replace(before, nats=as_floats(nats))
            change = compare_scores(now, before, look.num_tests, upper_confidence=confidence)
            readings.append(reading_of(name, change, look))
            events.append(
                {
                    "domain": name,
                    "language": before.language,
                    "bits_per_byte": now.bits_per_byte,
                    **asdict(change),
                }
            )
        return Judgement(readings=readings, state=state, events=events)

    def restarted(self, state: Json, domains: Collection[str]) -> Json:
        """Return the state unchanged: readings depend on the present scores alone."""
        return state


def reading_of(name: str, change: PairedChange, look: Look) -> Reading:
    """Return the reading of a domain whose change is known."""
    tolerance, hard_limit = look.settings.limits(name)
    lower_bound = change.finite_bound
    upper_bound = change.finite_upper_bound
    line = look.settings.act_at * tolerance
    return Reading(
        domain=name,
        kind="text",
        step=look.step,
        state=state_of(lower_bound, upper_bound, line=line, tolerance=tolerance),
        delta=change.finite_delta,
        lower_bound=lower_bound,
        upper_bound=upper_bound,
        tolerance=tolerance,
        hard_limit=hard_limit,
    )


class HeldOutText(TextJudge):
    """The held-out domains of a run and the scores of the untouched model on them."""

    kind: Kind = "text"

    def __init__(
        self, data: BuiltData, config: RunConfig, topology: Topology, run_dir: Path
    ) -> None:
        """Take the held-out domains of the data; nothing is measured yet.

        Raises:
            ConfigError: see `cpt.guard.requirements.domain_problems`.
        """
        super().__init__({})
        num_documents = {domain.name: domain.num_documents for domain in data.held_out}
        problems = domain_problems(config.guard, num_documents)
        if problems:
            raise ConfigError(problems)
        self._config = config
        self._topology = topology
        self._domains = [ScoredSet(domain, config.guard.max_documents) for domain in data.held_out]
        self.domain_names = [domain.name for domain in self._domains]
        self._model = str(config.model.path or f"{config.model.init}, seed {config.train.seed}")
        self._baseline_file = run_dir / "guard" / BASELINE_FILE

    def is_due(self, look: Look) -> bool:
        """Return that text is scored at every look."""
        return True

    def measure(self, look: Look, engine: TrainingEngine, stop: StopRequest | None) -> Json | None:
        """Score the domains that have a baseline, all of them at step 0.

        Returns:
            `nats`: by domain, a list over documents; None if a stop was requested before every
            domain was scored.

        Raises:
            ConfigError: see `cpt.guard.yardstick.Yardstick.measure`.
        """
        if not self.baseline:
            self.baseline = self._stored_baseline()
        scores: dict[str, DomainScore] = {}
        for domain in self._domains:
            if scores and stop is not None and agreed_reason(stop, self._topology.control_group):
                return None
            if look.step == 0 or domain.name in self.baseline:
                scores[domain.name] = score_domain(
                    domain, engine, self._topology, micro_batch_size=self._config.micro_batch_size
                )
        if not self.baseline:
            self._freeze_baseline(scores, look)
        return {"nats": {name: score.nats.tolist() for name, score in scores.items()}}

    def table(self, events: Sequence[Json]) -> str:
        """Return the changes of all domains as a table for people."""
        return change_table(events)

    def _freeze_baseline(self, scores: dict[str, DomainScore], look: Look) -> None:
        """Keep the scores of the untouched model, in memory and on disk.

        Raises:
            ConfigError: the model is not untouched, its scores are not finite, or its documents
                cannot show a rise of the tolerance while the guard is to act on one.
        """
        if look.step != 0:
            raise ConfigError(
                f"{self._baseline_file} is missing, and at step {look.step} the untouched model is "
                "gone. Restore the file, or go on with --set guard.enabled=false."
            )
        check_finite(
            scores,
            f"model.path {self._model}" if self._config.model.path else f"model {self._model}",
            "Look at the weights: a value that is not finite or far too large, or a file that is "
            "damaged. Compare their SHA-256 with the published ones, or give another model.",
        )
        self._check_tolerances(look.settings, scores, look.num_tests)
        content = baseline_content(self._domains, scores, self._model, self._base_weights())
        write_on_first_rank(self._topology.control_group, self._baseline_file, content)
        self.baseline = scores

    def _check_tolerances(
        self, settings: GuardSection, scores: Mapping[str, DomainScore], num_tests: int
    ) -> None:
        nats = {name: score.nats for name, score in scores.items()}
        problems = tolerance_problems(settings, nats, num_tests)
        if problems and acts(settings):
            raise ConfigError([*problems, WARN_INSTEAD])
        for problem in problems:
            log.info("%s", problem)

    def _stored_baseline(self) -> dict[str, DomainScore]:
        """Return the scores of the untouched model on the domains of this run; empty if none.

        Raises:
            ConfigError: they are of other text, of another model, or not finite.
        """
        stored = on_first_rank(
            self._topology.control_group, lambda: read_baseline(self._baseline_file)
        )
        known = {}
        added = []
        for name in self.domain_names:
            if name in stored:
                known[name] = stored[name]
            else:
                added.append(name)
        if known:
            check_same_text(self._baseline_file, known, self._domains)
            check_same_weights(self._baseline_file, known, self._model, self._base_weights())
        if stored and added and self._topology.rank == 0:
            log.warning(
                "held-out domains %s are left out: the untouched model was not measured on them.",
                ", ".join(added),
            )
        scores = baseline_scores(known)
        check_finite(
            scores,
            str(self._baseline_file),
            "Use a new --run_dir, and look at the weights that the run started from.",
        )
        return scores

    def _base_weights(self) -> str:
        return base_weights(self._config, self._topology)


def base_weights(config: RunConfig, topology: Topology) -> str:
    """Return a hash of the untouched weights, which does not depend on where they lie.

    Of random weights it is the name of the preset with the seed.
    """
    path = config.model.path
    if path is None:
        return f"{config.model.init}, seed {config.train.seed}"
    return on_first_rank(
        topology.control_group, lambda: sampled_hash(set(tensor_files(path).values()))
    )


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

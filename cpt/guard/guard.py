"""The guard of one run: it measures held-out text, compares it with the untouched model, decides.

    rows -> scores (score.py) -> change since step 0 (paired_test.py) -> decision (ladder.py)

The baseline is measured before step 0 and kept on disk (baseline.py). metrics.jsonl gets one line
per domain and one per decision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
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
    free_scores_file,
    read_baseline,
)
from cpt.guard.ladder import (
    Decision,
    Evidence,
    GuardState,
    ReplayLimits,
    decide,
    evidence_of,
)
from cpt.guard.paired_test import PairedChange, compare_scores
from cpt.guard.requirements import (
    WARN_INSTEAD,
    acts,
    domain_problems,
    num_tests,
    tolerance_problems,
)
from cpt.guard.score import DomainScore, ScoredSet, score_domain
from cpt.model.weights.checksums import sampled_hash
from cpt.model.weights.hf_layout import tensor_files
from cpt.parallel.agreement import on_first_rank
from cpt.parallel.topology import Topology
from cpt.resilience.agreed_stop import agreed_reason
from cpt.resilience.faults import fault_point
from cpt.resilience.stop import StopRequest
from cpt.telemetry.metrics import Telemetry
from cpt.training.engine import TrainingEngine
from data_pipeline.dataset import BuiltData
from data_pipeline.store.files import write_json

log = logging.getLogger("cpt.guard")


class Guard:
    """Held-out domains, the scores of the untouched model on them, and the state of the ladder."""

    def __init__(
        self, data: BuiltData, config: RunConfig, topology: Topology, run_dir: Path
    ) -> None:
        """Take the held-out domains of the data; nothing is measured yet.

        Raises:
            ConfigError: see `cpt.guard.requirements.domain_problems`.
        """
        num_documents = {domain.name: domain.num_documents for domain in data.held_out}
        problems = domain_problems(config.guard, num_documents)
        if problems:
            raise ConfigError(problems)
        self._config = config
        self._topology = topology
        self._domains = [ScoredSet(domain, config.guard.max_documents) for domain in data.held_out]
        self._model = str(config.model.path or f"{config.model.init}, seed {config.train.seed}")
        self._folder = run_dir / "guard"
        self._baseline_file = self._folder / BASELINE_FILE
        self._baseline: dict[str, DomainScore] = {}
        self._scores_name = ""
        self.state = GuardState()
        """State of the ladder after the last decision."""
        self.latest: dict[str, PairedChange] = {}
        """The last measurement of each domain."""
        self.decision: Decision | None = None
        """The decision that followed from it."""

    @property
    def domain_names(self) -> list[str]:
        """Names of the held-out domains."""
        return [domain.name for domain in self._domains]

    @property
    def num_tests(self) -> int:
        """Domains times measurements of the whole run: how many bounds must hold together."""
        config = self._config
        return num_tests(config.guard, len(self._domains), config.train.total_steps)

    def measure(
        self,
        step: int,
        engine: TrainingEngine,
        telemetry: Telemetry,
        *,
        stop: StopRequest | None = None,
        replay: Callable[[], ReplayLimits] | None = None,
    ) -> Decision | None:
        """Score all domains, compare them with the baseline, decide, and log it.

        All ranks call it together and get the same decision. At step 0 the scores become the
        baseline.

        Args:
            step: Optimizer steps done.
            engine: The model that is scored.
            telemetry: Receiver of the events.
            stop: Looked at after each domain, because a measurement is not worth a missed deadline.
            replay: Returns the limits of raising replay; None at the end of the run, when nothing
                but a warning makes sense.

        Returns:
            The decision; None if a stop was requested before every domain was scored.
        """
        fault_point("evaluate", step)
        scores = self._score(step, engine, stop)
        if scores is None:
            return None
        if step:
            self._scores_name = self._keep_scores(step, scores)
        self.decision = self._decide(step, telemetry, replay() if replay is not None else None)
        for name, score in scores.items():
            self._report(step, score, self.decision.actions[name], telemetry)
        return self.decision

    def measure_apart(self, step: int, engine: TrainingEngine) -> Path:
        """Score all domains with no consequence for the run; return the file with the result.

        Raises:
            ConfigError: the untouched model was never measured.
        """
        scores = self._score(step, engine, None)
        assert scores is not None
        domains = {}
        for name, score in scores.items():
            domains[name] = {
                "language": score.language,
                "bits_per_byte": score.bits_per_byte,
                **asdict(self.latest[name]),
            }
        file = self._folder / f"measured-{step:08d}.json"
        self._write_on_first_rank(file, {"step": step, "domains": domains})
        return file

    def evidence(self, replay: ReplayLimits) -> list[Evidence]:
        """Return the last measurement as the ladder takes it."""
        evidence = []
        for name, change in self.latest.items():
            evidence.append(evidence_of(name, change.finite_bound, self._config.guard, replay))
        return evidence

    def table(self) -> str:
        """Return the last measurement as a table for people."""
        actions = self.decision.actions if self.decision is not None else {}
        return change_table(self.latest, actions)

    def _score(
        self, step: int, engine: TrainingEngine, stop: StopRequest | None
    ) -> dict[str, DomainScore] | None:
        """Score the domains that have a baseline, all of them at step 0, and set `latest`.

        Returns:
            Scores by domain; None if a stop was requested before every domain was scored.
        """
        if not self._baseline:
            self._baseline = self._stored_baseline()
        scores: dict[str, DomainScore] = {}
        for domain in self._domains:
            if scores and stop is not None and agreed_reason(stop, self._topology.control_group):
                return None
            if step == 0 or domain.name in self._baseline:
                scores[domain.name] = score_domain(
                    domain, engine, self._topology, micro_batch_size=self._config.micro_batch_size
                )
        if not self._baseline:
            self._freeze_baseline(scores, step)
        self.latest = {}
        for name, score in scores.items():
            self.latest[name] = compare_scores(score, self._baseline[name], self.num_tests)
        return scores

    def _keep_scores(self, step: int, scores: Mapping[str, DomainScore]) -> str:
        """Write the scores of a step and return the name of the file."""
        name = on_first_rank(
            self._topology.control_group, lambda: free_scores_file(self._folder, step).name
        )
        nats = {}
        for domain, score in scores.items():
            nats[domain] = score.nats.tolist()
        content = {"num_tests": self.num_tests, "nats": nats}
        self._write_on_first_rank(self._folder / name, content)
        return name

    def _decide(self, step: int, telemetry: Telemetry, replay: ReplayLimits | None) -> Decision:
        """Climb the ladder, and log the decision with everything that it follows from."""
        is_last = replay is None
        limits = replay or ReplayLimits(shares={}, room=0.0)
        settings = self._config.guard
        evidence = self.evidence(limits)
        before = self.state
        after, decision = decide(before, evidence, settings, replay_room=limits.room, last=is_last)
        if step == 0:  # the untouched model has changed nothing
            return decision
        self.state = after
        event = decision_event(
            step, decision, evidence, settings, before, after, limits.room, last=is_last
        )
        telemetry.log({**event, "scores": self._scores_name})
        return decision

    def _report(self, step: int, score: DomainScore, action: str, telemetry: Telemetry) -> None:
        """Log the measurement of one domain, and warn if it led to an action."""
        change = self.latest[score.name]
        event: dict[str, Any] = {
            "event": "guard",
            "step": step,
            "domain": score.name,
            "language": score.language,
            "bits_per_byte": score.bits_per_byte,
            **asdict(change),
            "action": action,
        }
        telemetry.log(event)
        if action != "none" and self._topology.rank == 0:
            log.warning(
                "held-out domain %s is %.2f %% worse than the untouched model "
                "(95 %% interval %.2f to %.2f): %s.",
                score.name,
                change.delta_percent,
                change.ci_low,
                change.ci_high,
                action,
            )

    def _freeze_baseline(self, scores: dict[str, DomainScore], step: int) -> None:
        """Keep the scores of the untouched model, in memory and on disk.

        Raises:
            ConfigError: the model is not untouched, its scores are not finite, or its documents
                cannot show a rise of the tolerance while the guard is to act on one.
        """
        if step != 0:
            raise ConfigError(
                f"{self._baseline_file} is missing, and at step {step} the untouched model is "
                "gone. Restore the file, or go on with --set guard.enabled=false."
            )
        check_finite(
            scores,
            f"model.path {self._model}" if self._config.model.path else f"model {self._model}",
            "Look at the weights: a value that is not finite or far too large, or a file that is "
            "damaged. Compare their SHA-256 with the published ones, or give another model.",
        )
        settings = self._config.guard
        nats = {name: score.nats for name, score in scores.items()}
        problems = tolerance_problems(settings, nats, self.num_tests)
        if problems and acts(settings):
            raise ConfigError([*problems, WARN_INSTEAD])
        for problem in problems:
            log.info("%s", problem)
        content = baseline_content(self._domains, scores, self._model, self._base_weights())
        self._write_on_first_rank(self._baseline_file, content)
        self._baseline = scores

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
        """Return a hash of the untouched weights, which does not depend on where they lie."""
        path = self._config.model.path
        if path is None:
            return self._model
        return on_first_rank(
            self._topology.control_group, lambda: sampled_hash(set(tensor_files(path).values()))
        )

    def _write_on_first_rank(self, path: Path, content: dict[str, Any]) -> None:
        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, content)

        on_first_rank(self._topology.control_group, write)


def decision_event(
    step: int,
    decision: Decision,
    evidence: Sequence[Evidence],
    settings: GuardSection,
    before: GuardState,
    after: GuardState,
    replay_room: float,
    *,
    last: bool,
) -> dict[str, Any]:
    """Return a decision with everything that it follows from, as one line of metrics.jsonl."""
    return {
        "event": "guard_decision",
        "step": step,
        "action": decision.action,
        "reason": decision.reason,
        "actions": dict(decision.actions),
        "evidence": [one.to_json() for one in evidence],
        "replay_room": replay_room,
        "last": last,
        "settings": asdict(settings),
        "before": before.to_json(),
        "after": after.to_json(),
    }


def change_table(changes: Mapping[str, PairedChange], actions: Mapping[str, str]) -> str:
    """Return the changes of all domains as a table for people.

    Args:
        changes: Changes by domain.
        actions: Actions by domain, for those that have one.
    """
    width = max(15, *map(len, changes), 0)
    lines = [
        "bits per byte",
        f"  {'held-out domain':<{width}}  untouched    now   change %  (95 % interval)",
    ]
    for name, change in changes.items():
        now = change.baseline * (1 + change.delta_percent / 100)
        line = (
            f"  {name:<{width}}  {change.baseline:9.3f}  {now:5.3f}  "
            f"{change.delta_percent:+9.2f}  ({change.ci_low:+.2f} to {change.ci_high:+.2f})"
        )
        if actions.get(name, "none") != "none":
            line += "  WARNING"
        lines.append(line)
    return "\n".join(lines)

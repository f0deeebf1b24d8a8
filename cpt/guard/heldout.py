"""The guard of one run: baseline frozen before step 0, measurements paired against it, and what
follows from them.

The baseline lives in <run_dir>/guard/baseline.json with a hash of the text it was measured on.  It
is written once and never again: resuming a run reads it.  Scores of later steps lie beside it, so
that every interval can be computed again; metrics.jsonl has one line per domain and one per
decision.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpt.config import GuardSection, RunConfig
from cpt.errors import ConfigError
from cpt.guard.ladder import Decision, Evidence, GuardState, decide
from cpt.guard.paired_test import Judgement, judge
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReplayLimits:
    """What replay may still do for the domains of a run, at one step."""

    shares: dict[str, tuple[float | None, float]]
    """Share of each domain's sources now (None: there are none to raise), and what it may grow
    to.
    """
    room: float
    """Share of the tokens by which all replay together may still grow."""


class Guard:
    """Held-out domains, the scores of the untouched model on them, and the state of the ladder."""

    def __init__(
        self, data: BuiltData, config: RunConfig, topology: Topology, run_dir: Path
    ) -> None:
        self._config, self._topology = config, topology
        num_documents = {domain.name: domain.num_documents for domain in data.held_out}
        problems = domain_problems(config.guard, num_documents)
        if problems:
            raise ConfigError(problems)
        self._domains = [ScoredSet(domain, config.guard.max_documents) for domain in data.held_out]
        self._model = str(config.model.path or f"{config.model.init}, seed {config.train.seed}")
        self._folder = run_dir / "guard"
        self._file = self._folder / "baseline.json"
        self._baseline: dict[str, DomainScore] = {}
        self._scores_name = ""
        self.state = GuardState()
        self.latest: dict[str, Judgement] = {}
        """The last measurement of each domain."""
        self.decision: Decision | None = None
        """What followed from it."""

    @property
    def domain_names(self) -> list[str]:
        """The domains of the mix."""
        return [domain.name for domain in self._domains]

    def measure(
        self,
        step: int,
        engine: TrainingEngine,
        telemetry: Telemetry,
        *,
        stop: StopRequest | None = None,
        replay: Callable[[], ReplayLimits] | None = None,
    ) -> Decision | None:
        """Score all domains, freeze or compare, decide, and log it; all ranks call it together and
        get the same.

        Args:
            step: Optimizer steps done.
            engine: Scores.
            telemetry: Where the events go.
            stop: Looked at after each domain; a measurement is not worth a missed deadline.
            replay: What replay may still do; None if the run is over, when nothing but warnings
                makes sense.

        Returns:
            What is to be done; None if a stop was asked for before all was measured.
        """
        fault_point("evaluate", step)
        scores = self._score(step, engine, stop)
        if scores is None:
            return None
        if step:
            plain = {name: score.nats.tolist() for name, score in scores.items()}
            name = on_first_rank(
                self._topology.control_group, lambda: free_scores_file(self._folder, step).name
            )
            self._on_first_rank_write(
                self._folder / name, {"num_tests": self.num_tests, "nats": plain}
            )
            self._scores_name = name
        self.decision = self._decide(step, telemetry, replay() if replay is not None else None)
        for name, verdict in self.latest.items():
            event = {
                "event": "guard",
                "step": step,
                "domain": name,
                "language": scores[name].language,
            }
            event |= {"bits_per_byte": scores[name].bits_per_byte, **asdict(verdict)}
            telemetry.log({**event, "action": self.decision.actions[name]})
            if self.decision.actions[name] != "none" and self._topology.rank == 0:
                log.warning(
                    "held-out domain %s is %.2f %% worse than the untouched model (95 %% interval %.2f to %.2f): %s.",
                    *(
                        name,
                        verdict.delta_percent,
                        verdict.ci_low,
                        verdict.ci_high,
                        self.decision.actions[name],
                    ),
                )
        return self.decision

    def measure_apart(self, step: int, engine: TrainingEngine) -> Path:
        """Score all domains without any consequence for the run; returns the file with the result.

        Raises:
            ConfigError: the untouched model was never measured.
        """
        scores = self._score(step, engine, None)
        assert scores is not None
        file = self._folder / f"measured-{step:08d}.json"
        found = {
            name: {
                "language": score.language,
                "bits_per_byte": score.bits_per_byte,
                **asdict(self.latest[name]),
            }
            for name, score in scores.items()
        }
        self._on_first_rank_write(file, {"step": step, "domains": found})
        return file

    def _score(
        self, step: int, engine: TrainingEngine, stop: StopRequest | None
    ) -> dict[str, DomainScore] | None:
        """Scores of all domains, their judgement in `latest`; None if a stop was asked for before
        all was scored.
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
            self._baseline = self._freeze(scores, step)
        self.latest = {
            name: judge(score, self._baseline[name], self.num_tests)
            for name, score in scores.items()
        }
        return scores

    @property
    def num_tests(self) -> int:
        """Domains times measurements of the whole run: how many bounds must hold together."""
        config = self._config
        return num_tests(config.guard, len(self._domains), config.train.total_steps)

    def evidence(self, replay: ReplayLimits) -> list[Evidence]:
        """The last measurement as the ladder wants it."""
        return [
            evidence_of(name, verdict.decided_on, self._config.guard, replay)
            for name, verdict in self.latest.items()
        ]

    def _decide(self, step: int, telemetry: Telemetry, replay: ReplayLimits | None) -> Decision:
        """Climb the ladder and log the decision with all that led to it."""
        last, before = replay is None, self.state
        replay = replay or ReplayLimits(shares={}, room=0.0)
        evidence, settings = self.evidence(replay), self._config.guard
        after, decision = decide(before, evidence, settings, replay_room=replay.room, last=last)
        if step > 0:  # the untouched model has changed nothing
            self.state = after
            event = decision_event(
                step, decision, evidence, settings, before, after, replay.room, last=last
            )
            telemetry.log({**event, "scores": self._scores_name})
        return decision

    def table(self) -> str:
        """The last measurement for people: bits per byte of each domain, before and now."""
        width = max(map(len, self.latest), default=0)
        actions = self.decision.actions if self.decision is not None else {}
        head = (
            f"  {'held-out domain':<{max(width, 15)}}  untouched    now   change %  (95 % interval)"
        )
        rows = [
            f"  {name:<{max(width, 15)}}  {v.baseline:9.3f}  {v.baseline * (1 + v.delta_percent / 100):5.3f}  "
            f"{v.delta_percent:+9.2f}  ({v.ci_low:+.2f} to {v.ci_high:+.2f})"
            f"{'  WARNING' * (actions.get(name, 'none') != 'none')}"
            for name, v in self.latest.items()
        ]
        return "\n".join(["bits per byte", head, *rows])

    def _freeze(self, scores: dict[str, DomainScore], step: int) -> dict[str, DomainScore]:
        if step != 0:
            raise ConfigError(
                f"{self._file} is missing, and at step {step} the untouched model is gone. Restore the file, or go on "
                "with --set guard.enabled=false."
            )
        self._check_noise(scores)
        weights = self._base_weights()
        plain = {
            domain.name: {
                "model": self._model,
                "weights": weights,
                "language": domain.language,
                "content_hash": domain.content_hash,
                "nats": scores[domain.name].nats.tolist(),
                "bytes": scores[domain.name].bytes.tolist(),
            }
            for domain in self._domains
        }
        self._on_first_rank_write(self._file, plain)
        return scores

    def _check_noise(self, scores: dict[str, DomainScore]) -> None:
        """Refuse tolerances that the held-out documents cannot show; where the guard only tells,
        say so.

        Raises:
            ConfigError: naming each domain, what it can show, and the cure.
        """
        settings = self._config.guard
        baseline = {name: score.nats for name, score in scores.items()}
        problems = tolerance_problems(settings, baseline, self.num_tests)
        if problems and acts(settings):
            raise ConfigError([*problems, WARN_INSTEAD])
        for problem in problems:
            log.info("%s", problem)

    def _on_first_rank_write(self, path: Path, content: dict[str, Any]) -> None:
        on_first_rank(self._topology.control_group, lambda: _write(path, content))

    def _base_weights(self) -> str:
        """What tells the untouched model from others, wherever it lies."""
        path = self._config.model.path
        if path is None:
            return self._model
        return on_first_rank(
            self._topology.control_group, lambda: sampled_hash(set(tensor_files(path).values()))
        )

    def _stored_baseline(self) -> dict[str, DomainScore]:
        """Scores of the untouched model on the domains of this run; empty if none were stored.

        Raises:
            ConfigError: a domain holds other text than the one that was measured.
        """
        stored = on_first_rank(
            self._topology.control_group,
            lambda: (
                json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
            ),
        )
        known = [domain for domain in self._domains if domain.name in stored]
        changed = [
            domain.name
            for domain in known
            if domain.content_hash != stored[domain.name]["content_hash"]
        ]
        if changed:
            raise ConfigError(
                f"{self._file} was measured on other held-out text of {', '.join(changed)} than the data holds now. "
                "Change the data back, or use a new --run_dir."
            )
        weights = self._base_weights() if known else ""
        others = sorted(
            {stored[d.name]["model"] for d in known if stored[d.name].get("weights") != weights}
        )
        if others:
            raise ConfigError(
                f"{self._file} holds the scores of another untouched model: of {', '.join(others)} as it was then, and "
                f"this run starts from {self._model} with other weights. Change it back, or use a new --run_dir."
            )
        if stored and len(known) < len(self._domains) and self._topology.rank == 0:
            names = ", ".join(domain.name for domain in self._domains if domain.name not in stored)
            log.warning(
                "held-out domains %s are new: the untouched model was not measured on them; left out.",
                names,
            )
        return {
            domain.name: DomainScore.from_json(domain.name, stored[domain.name]) for domain in known
        }


def evidence_of(
    domain: str, lower_bound: float | None, settings: GuardSection, replay: ReplayLimits
) -> Evidence:
    """What the ladder is told of a domain; None as the bound is above every line."""
    tolerance_percent, hard_limit_percent = settings.limits(domain)
    share, largest_share = replay.shares.get(domain, (None, 1.0))
    return Evidence(
        domain=domain,
        lower_bound=lower_bound,
        tolerance_percent=tolerance_percent,
        hard_limit_percent=hard_limit_percent,
        share=share,
        largest_share=largest_share,
    )


def free_scores_file(folder: Path, step: int) -> Path:
    """Where the scores of a step are kept, for `cpt guard audit`; a step that is done again gets
    another file.
    """
    path, number = folder / f"scores-{step:08d}.json", 2
    while path.exists():
        path, number = folder / f"scores-{step:08d}-{number}.json", number + 1
    return path


def decision_event(
    step: int,
    decision: Decision,
    evidence: list[Evidence],
    settings: GuardSection,
    before: GuardState,
    after: GuardState,
    replay_room: float,
    *,
    last: bool,
) -> dict[str, Any]:
    """A decision with everything that it follows from, as one line of metrics.jsonl."""
    return {
        "event": "guard_decision",
        "step": step,
        "action": decision.action,
        "reason": decision.reason,
        "actions": dict(decision.actions),
        "evidence": [e.to_json() for e in evidence],
        "replay_room": replay_room,
        "last": last,
        "settings": asdict(settings),
        "before": before.to_json(),
        "after": after.to_json(),
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)

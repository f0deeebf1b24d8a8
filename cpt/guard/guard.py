"""The guard of one run: it measures with all its yardsticks, decides once, and logs it.

    yardsticks -> raw scores -> judged (yardstick.py) -> decision (decision.py)

Every yardstick keeps a baseline of the untouched model on disk. metrics.jsonl gets one line or more
per domain and one per decision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cpt.config import RunConfig
from cpt.errors import ConfigError
from cpt.guard.baseline import keep_on_first_rank, write_on_first_rank
from cpt.guard.decision import decide
from cpt.guard.ladder import (
    LEVERS,
    Decision,
    GuardState,
    evidence_at,
)
from cpt.guard.lever_limits import LeverLimits
from cpt.guard.requirements import num_looks
from cpt.guard.yardstick import Evidence, Json, Judge, Kind, Look, Yardstick
from cpt.parallel.agreement import on_first_rank
from cpt.parallel.topology import Topology
from cpt.resilience.faults import fault_point
from cpt.resilience.stop import StopRequest
from cpt.telemetry.metrics import Telemetry
from cpt.training.engine import TrainingEngine

log = logging.getLogger("cpt.guard")


class Guard:
    """The yardsticks of a run, and the state of the guard."""

    def __init__(
        self,
        yardsticks: Sequence[Yardstick],
        config: RunConfig,
        topology: Topology,
        run_dir: Path,
    ) -> None:
        """Take the yardsticks; nothing is measured yet.

        Raises:
            ConfigError: two domains have the same name.
        """
        self._yardsticks = yardsticks
        self._config = config
        self._topology = topology
        self._folder = run_dir / "guard"
        self._scores_name = ""
        self.domain_names: list[str] = []
        """Names of the domains of all yardsticks."""
        for yardstick in yardsticks:
            self.domain_names += yardstick.domain_names
        self._check_names()
        self.state = GuardState()
        """State of the guard after the last decision."""
        self.latest: dict[Kind, list[Json]] = {}
        """The last `guard` lines of every yardstick."""
        self.decision: Decision | None = None
        """The decision that followed from them."""

    def _check_names(self) -> None:
        repeated = {name for name in self.domain_names if self.domain_names.count(name) > 1}
        if repeated:
            raise ConfigError(
                f"guard: {', '.join(sorted(repeated))}: several domains of the mix have this name. "
                "Names must differ between held-out text, generation and traces: rename one."
            )

    def look_at(self, step: int, *, last: bool) -> Look:
        """Return the look of a step."""
        settings = self._config.guard
        looks = num_looks(settings, self._config.train.total_steps)
        number = step // settings.interval_steps if settings.interval_steps else 0
        return Look(
            step=step,
            number=looks if last else number,
            num_looks=looks,
            num_domains=len(self.domain_names),
            last=last,
            settings=settings,
        )

    def is_owed(self, step: int) -> bool:
        """Return whether a run that starts at a step has to look at the model first.

        It owes the look of the untouched model, and one in which it was stopped.
        """
        interval = self._config.guard.interval_steps
        if not step or not interval or step % interval:
            return step == 0
        measured = [reading["step"] for reading in self.state.readings.values()]
        return step not in measured

    def open_untouched(self, step: int) -> None:
        """Read what every yardstick kept of the untouched model, before a run goes on.

        Otherwise a run would train to its next look only to be refused there.

        Raises:
            ConfigError: a baseline is missing, or of another model or other content.
        """
        for yardstick in self._yardsticks:
            yardstick.open_untouched(step)

    def keep_untouched(self, engine: TrainingEngine, stop: StopRequest | None) -> bool:
        """Measure the untouched model, whose weights the engine has now, and keep the baselines.

        Only a run with `guard.baseline_model` needs this: otherwise `measure` does it at step 0.

        Returns:
            False if a stop was requested before all was measured.

        Raises:
            ConfigError: what an earlier start kept is of another model or other content.
        """
        look = self.look_at(0, last=False)
        return all(one.keep_untouched(look, engine, stop) for one in self._yardsticks)

    def measure(
        self,
        step: int,
        engine: TrainingEngine,
        telemetry: Telemetry,
        *,
        stop: StopRequest | None = None,
        replay: Callable[[], LeverLimits] | None = None,
    ) -> Decision | None:
        """Measure with every yardstick that is due, decide, and log it.

        All ranks call it together and get the same decision. At step 0 the scores become the
        baselines, unless there are some (`keep_untouched`), and no lever is pulled.

        Args:
            step: Optimizer steps done.
            engine: The model that is measured.
            telemetry: Receiver of the events.
            stop: Looked at on the way, because a measurement is not worth a missed deadline.
            replay: Returns the limits of raising replay; None at the end of the run, when nothing
                but a warning makes sense.

        Returns:
            The decision; None if a stop was requested before all was measured.
        """
        fault_point("evaluate", step)
        look = self.look_at(step, last=replay is None)
        scores = self._measure(look, engine, stop)
        if scores is None:
            return None
        if step:
            self._scores_name = self._keep_scores(look, scores)
        limits = replay() if replay is not None else LeverLimits(shares={}, room=0.0)
        self._decide(look, scores, limits, telemetry)
        self._report(look, telemetry)
        return self.decision

    def measure_apart(self, step: int, engine: TrainingEngine) -> Path:
        """Measure with every yardstick and no consequence for the run.

        Returns:
            The file with the result.

        Raises:
            ConfigError: the untouched model was never measured.
        """
        look = self.look_at(step, last=True)
        scores = self._measure(look, engine, None)
        assert scores is not None
        _, self.latest = judged(self._judges(), scores, self.state, look)
        domains: dict[str, Any] = {}
        for events in self.latest.values():
            for event in events:
                found = domains.setdefault(event["domain"], {})
                if "measure" in event:
                    found[event["measure"]] = event
                else:
                    found.update(event)
        file = self._folder / f"measured-{step:08d}.json"
        self._write(file, {"step": step, "domains": domains})
        return file

    def return_to(self, step: int, after: GuardState, saved: GuardState | None) -> None:
        """Go on after a pause; see `returned`."""
        self.state = returned(self._judges(), self.domain_names, after, saved, step)

    def table(self) -> str:
        """Return the last measurement as tables for people."""
        tables = []
        for yardstick in self._yardsticks:
            if yardstick.kind in self.latest:
                tables.append(yardstick.table(self.latest[yardstick.kind]))
        return "\n".join(tables)

    def verdict(self) -> str:
        """Return the last measurement and what follows from it in one line for people."""
        assert self.decision is not None
        return f"{describe_states(self.latest)}; action: {self.decision.action}"

    def _judges(self) -> dict[Kind, Judge]:
        judges: dict[Kind, Judge] = {}
        for yardstick in self._yardsticks:
            judges[yardstick.kind] = yardstick
        return judges

    def _measure(
        self, look: Look, engine: TrainingEngine, stop: StopRequest | None
    ) -> dict[Kind, Json] | None:
        """Return the raw scores by kind of yardstick; None if a stop was requested."""
        scores: dict[Kind, Json] = {}
        for yardstick in self._yardsticks:
            if not yardstick.is_due(look):
                continue
            measured = yardstick.measure(look, engine, stop)
            if measured is None:
                return None
            scores[yardstick.kind] = measured
        return scores

    def _keep_scores(self, look: Look, scores: Mapping[Kind, Json]) -> str:
        """Keep the scores of a look and return the name of the file; see `keep_on_first_rank`."""
        content = {
            "look": {
                "number": look.number,
                "num_looks": look.num_looks,
                "num_domains": look.num_domains,
            },
            "yardsticks": dict(scores),
        }
        return keep_on_first_rank(
            self._topology.control_group, self._folder, "scores", look.step, content
        )

    def _decide(
        self,
        look: Look,
        scores: Mapping[Kind, Json],
        limits: LeverLimits,
        telemetry: Telemetry,
    ) -> None:
        """Judge and decide on the first rank, tell all ranks, and log the decision.

        All ranks have the same scores, but processors of two kinds may round a logarithm
        differently, and two decisions would be two mixtures.
        """
        outcome = on_first_rank(
            self._topology.control_group, lambda: self._outcome(look, scores, limits)
        )
        self.latest = outcome["lines"]
        self.decision = Decision(**outcome["decision"])
        if look.step == 0:
            self._note_start(outcome["after"])
            return
        self.state = GuardState.from_json(outcome["after"])
        telemetry.log({**outcome["event"], "scores": self._scores_name})

    def _note_start(self, after: Json) -> None:
        """Take from the look of step 0 whether the model that the run starts from is green.

        It is, unless it is compared with another model: then it may have lost too much already. A
        checkpoint before the next look is not one to go back to, nor is one of a look that has not
        measured the domains that were lost. Nothing else follows.
        """
        if self._config.guard.baseline_model is None:
            return
        readings = {}
        for yardstick in filter(self._is_due_on_the_way, self._yardsticks):
            for name in yardstick.domain_names:
                if name in after["readings"]:
                    readings[name] = after["readings"][name]
        self.state = replace(self.state, green=after["green"], readings=readings)

    def _is_due_on_the_way(self, yardstick: Yardstick) -> bool:
        """Return whether a yardstick measures between step 0 and the end of the run."""
        interval = self._config.guard.interval_steps or self._config.train.total_steps
        steps = range(interval, self._config.train.total_steps, max(1, interval))
        return any(yardstick.is_due(self.look_at(step, last=False)) for step in steps)

    def _outcome(self, look: Look, scores: Mapping[Kind, Json], limits: LeverLimits) -> Json:
        """Return what a look leads to, as JSON values.

        Returns:
            `lines` (`guard` lines by kind), `decision`, `after` (the next state) and `event` (the
            decision with everything that it follows from).
        """
        before = self.state
        seen, lines = judged(self._judges(), scores, before, look)
        evidence = evidence_at(look.step, self.domain_names, seen.readings, limits)
        after, decision = decide(seen, evidence, look.settings, limits, last=look.last)
        after = restarted(self._judges(), after, decision)
        if look.step == 0:  # this run has changed nothing yet, whatever one before it has
            decision = Decision(
                action="none", actions=dict.fromkeys(self.domain_names, "none"), reason=""
            )
        return {
            "lines": lines,
            "decision": asdict(decision),
            "after": after.to_json(),
            "event": decision_event(look, decision, evidence, before, after, limits),
        }

    def _report(self, look: Look, telemetry: Telemetry) -> None:
        """Log the measurement of every domain, and warn of those that led to an action."""
        assert self.decision is not None
        acted = set()
        are_red = False
        for kind, events in self.latest.items():
            for event in events:
                action = self.decision.actions[event["domain"]]
                event["action"] = action
                telemetry.log({"event": "guard", "step": look.step, "kind": kind, **event})
                if action != "none":
                    acted.add(event["domain"])
                    are_red = are_red or event["state"] == "red"
        if acted and self._topology.rank == 0:
            level = logging.WARNING if are_red else logging.INFO
            log.log(level, "step %d: %s", look.step, self.decision.reason)

    def _write(self, path: Path, content: Json) -> None:
        write_on_first_rank(self._topology.control_group, path, content)


def describe_states(latest: Mapping[Kind, list[Json]]) -> str:
    """Return the state of every domain in one line, with its change where there is one in percent.

    Args:
        latest: The last `guard` lines of every yardstick.
    """
    domains = {}
    for events in latest.values():
        for event in events:
            text = f"{event['domain']} {event['state']}"
            if event.get("delta_percent") is not None:
                text += f" ({event['delta_percent']:+.2f} %)"
            domains[event["domain"]] = text
    return ", ".join(domains.values())


def judged(
    judges: Mapping[Kind, Judge], scores: Mapping[Kind, Json], state: GuardState, look: Look
) -> tuple[GuardState, dict[Kind, list[Json]]]:
    """Judge the raw scores of a look.

    Args:
        judges: Judges by kind of yardstick.
        scores: Raw scores by kind; a yardstick that was not due has none.
        state: State before the look.
        look: The look.

    Returns:
        The state with the new readings and sequential states, and the `guard` lines by kind.
    """
    yardsticks = dict(state.yardsticks)
    readings = dict(state.readings)
    events: dict[Kind, list[Json]] = {}
    for kind, measured in scores.items():
        judgement = judges[kind].judge(measured, yardsticks.get(kind, {}), look)
        yardsticks[kind] = judgement.state
        events[kind] = []
        states = {}
        for reading in judgement.readings:
            readings[reading.domain] = reading.to_json()
            states[reading.domain] = reading.state
        for event in judgement.events:
            events[kind].append({"state": states[event["domain"]], **event})
    return replace(state, yardsticks=yardsticks, readings=readings), events


def restarted(judges: Mapping[Kind, Judge], state: GuardState, decision: Decision) -> GuardState:
    """Return the state in which the domains that a lever was pulled for begin to count anew."""
    pulled = {name for name, action in decision.actions.items() if action in LEVERS}
    if not pulled:
        return state
    yardsticks = dict(state.yardsticks)
    for kind, judge in judges.items():
        if kind in yardsticks:
            yardsticks[kind] = judge.restarted(yardsticks[kind], pulled)
    return replace(state, yardsticks=yardsticks)


def returned(
    judges: Mapping[Kind, Judge],
    domains: Collection[str],
    after: GuardState,
    saved: GuardState | None,
    step: int,
) -> GuardState:
    """Return the state with which a paused run goes on, without what was measured on lost weights.

    Args:
        judges: Judges by kind of yardstick.
        domains: Names of the domains of all yardsticks.
        after: The state that `after_pause` gave.
        saved: The state in the green checkpoint that the run went back to; None if it stays where
            it paused. Then every domain begins to count anew, because the levers have moved.
        step: Optimizer steps done where the run goes on.
    """
    if saved is not None:
        yardsticks = dict(saved.yardsticks)
        readings = saved.readings
        for kind, judge in judges.items():
            if kind in after.yardsticks:
                lost = after.yardsticks[kind]
                yardsticks[kind] = judge.returned(yardsticks.get(kind, {}), lost)
    else:
        yardsticks = dict(after.yardsticks)
        readings = after.readings
        for kind, judge in judges.items():
            if kind in yardsticks:
                yardsticks[kind] = judge.restarted(yardsticks[kind], domains)
    known = {}
    for domain, reading in readings.items():
        if reading["step"] <= step:
            known[domain] = reading
    return replace(after, yardsticks=yardsticks, readings=known, green=saved is not None)


def decision_event(
    look: Look,
    decision: Decision,
    evidence: Sequence[Evidence],
    before: GuardState,
    after: GuardState,
    limits: LeverLimits,
) -> Json:
    """Return a decision with everything that it follows from, as one line of metrics.jsonl."""
    settings = asdict(look.settings)
    del settings["baseline_model"]  # the model whose scores baseline.json holds and names
    return {
        "event": "guard_decision",
        "step": look.step,
        "action": decision.action,
        "reason": decision.reason,
        "actions": dict(decision.actions),
        "evidence": [one.to_json() for one in evidence],
        "replay_room": limits.room,
        "limits": limits.to_json(),
        "last": look.last,
        "settings": settings,
        "before": before.to_json(),
        "after": after.to_json(),
    }

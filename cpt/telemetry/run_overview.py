"""The state of a run as data, from what lies in its directory; nothing is written there.

    metrics.jsonl, config.resolved.yaml, checkpoints/, .lock, last_failure.json -> RunOverview

States
    running        its lock is held by a process that shows signs of life
    stopped        it saved and may go on
    paused         the guard paused it; starting it again goes back to the last green checkpoint
    failed         it ended by an error, or without a word: killed, or its node was lost
    finished       its planned last step is saved
    never started  no step was begun
    unknown        the directory cannot be read

`run_overview` looks once.  `RunFollower` looks again and again and reads each line once, which
keeps long runs cheap.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cpt.errors import EXIT_DONE, RequeueRequested
from cpt.resilience.lock import describe, look_at_lock
from cpt.telemetry.event_reader import CHUNK_BYTES, EventReader
from cpt.telemetry.json_values import finite
from cpt.telemetry.run_end import METRICS, EndRecord, read_failure
from cpt.telemetry.run_tally import (
    GuardAction,
    GuardStanding,
    RunTally,
    badness,
    number,
    whole_number,
)
from data_pipeline.bounded.files import MalformedInput
from data_pipeline.bounded.yaml_text import read_yaml
from data_pipeline.escaping import escaped_line

RunState = Literal["running", "stopped", "paused", "failed", "finished", "never started", "unknown"]
ORDERLY_CODES = (EXIT_DONE, RequeueRequested.exit_code)
"""Exit codes of a start that ended as it should."""
QUIET_SECONDS = 900.0
"""A running run that has logged nothing for so long is pointed out."""
TAIL_BYTES = 64 * 2**20
"""Of a longer metrics.jsonl, `run_overview` reads the end only."""
CONFIG = "config.resolved.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOverview:
    """The state of one run at one time."""

    name: str
    """Name of the run directory."""
    state: RunState
    cause: str
    """One line for people: why it is in this state; empty where the state says it all."""
    exit_code: int | None
    """Of the last start, if it could be written."""
    step: int
    """Optimizer steps done."""
    planned_steps: int | None
    """Steps at which the run ends; None if the plan cannot be read."""
    saved_step: int | None
    """Step of the newest complete checkpoint."""
    tokens: int | None
    """Predicted tokens of all steps that count; None if only the end of the log was read."""
    loss: float
    """Nats per predicted token of the last step; NaN if there is none, as for all below."""
    learning_rate: float
    tokens_per_second: float
    """Over the last steps."""
    seconds_per_step: float
    """Over the last steps, without measurements and saves."""
    eta_seconds: float
    """Time to the planned end at this speed and goodput; NaN unless the run is running."""
    utilization: float
    """Share of the peak arithmetic, 0 to 1."""
    peak_memory_bytes: int | None
    """Most memory that the first rank has used; None in logs that do not tell."""
    goodput: float
    """Productive share of the time of all starts, 0 to 1."""
    guard: tuple[GuardStanding, ...]
    """Newest measurement of each held-out domain, those that lost most first."""
    actions: tuple[GuardAction, ...]
    """What the guard did last, newest first."""
    num_starts: int
    """Starts that reached their first step, as far as the log was read."""
    num_going_back: int
    """How often steps were done again after a restart or a rollback."""
    last_sign: float
    """Unix time of the last sign of life: a line of the log or of the lock; NaN if none."""
    host: str
    """Who works or worked on it, as the lock tells; empty if there is none."""
    problems: tuple[str, ...]
    """What a person should look at, and what could not be read."""

    @property
    def worst(self) -> GuardStanding | None:
        """The held-out domain that is nearest to its tolerance, or beyond it."""
        return self.guard[0] if self.guard else None

    def with_problem(self, problem: str) -> RunOverview:
        """Return the same state with one more thing to look at."""
        return replace(self, problems=(*self.problems, problem))

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; what is not a number is None."""
        plain: dict[str, Any] = finite(asdict(self))
        return plain


def run_overview(run_dir: Path, *, tail_bytes: int = TAIL_BYTES) -> RunOverview:
    """Look at a run directory once.

    Of a metrics.jsonl that is longer than `tail_bytes` only the end is read; the goodput is then
    the last one that the run itself logged.
    """
    follower = RunFollower(run_dir, tail_bytes=tail_bytes)
    while not follower.read_on():
        pass
    return follower.overview()


def broken_run(run_dir: Path, problem: str) -> RunOverview:
    """Return the state of a run that cannot be looked at."""
    return RunOverview(
        name=run_dir.name,
        state="unknown",
        cause=problem,
        exit_code=None,
        step=0,
        planned_steps=None,
        saved_step=None,
        tokens=None,
        loss=math.nan,
        learning_rate=math.nan,
        tokens_per_second=math.nan,
        seconds_per_step=math.nan,
        eta_seconds=math.nan,
        utilization=math.nan,
        peak_memory_bytes=None,
        goodput=math.nan,
        guard=(),
        actions=(),
        num_starts=0,
        num_going_back=0,
        last_sign=math.nan,
        host="",
        problems=(),
    )


class RunFollower:
    """One run directory that is looked at again and again."""

    def __init__(self, run_dir: Path, *, tail_bytes: int | None = None) -> None:
        """Read nothing yet.

        Args:
            run_dir: The run directory, which need not exist.
            tail_bytes: Read only so much of the log's end.
        """
        self.run_dir = run_dir
        self._reader = EventReader(run_dir / METRICS, tail_bytes=tail_bytes)
        self._tally = RunTally()
        self._config: dict[str, Any] = {}
        self._config_problem = ""
        self._config_stamp: float | None = None
        self._log_problem = ""

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.resolved.yaml; empty if it cannot be read."""
        return self._config

    @property
    def is_caught_up(self) -> bool:
        """Whether the last look came to the end of the log."""
        return self._reader.is_caught_up

    @property
    def share_read(self) -> float:
        """Share of the log that was read, 0 to 1."""
        return self._reader.share_read

    def read_on(self, max_bytes: int = CHUNK_BYTES) -> bool:
        """Read what was added to the log, and return whether its end was reached."""
        if not self._reader.find_file():
            self._tally = RunTally()
        self._log_problem = ""
        try:
            for event in self._reader.read(max_bytes):
                self._tally.take(event)
        except OSError as error:
            self._log_problem = f"{METRICS}: {error.strerror}"
            return True
        return self._reader.is_caught_up

    def overview(self) -> RunOverview:
        """Return the state as far as the log was read."""
        self._read_config()
        tally = self._tally
        lock = look_at_lock(self.run_dir)
        planned = _planned_steps(self._config)
        saved = newest_saved_step(self.run_dir)
        failure = read_failure(self.run_dir)
        signs = [self._reader.written or math.nan, lock.refreshed if lock else math.nan]
        last_sign = max((sign for sign in signs if not math.isnan(sign)), default=math.nan)
        is_running = lock is not None and lock.is_held
        facts = _Facts(
            run_dir=self.run_dir,
            tally=tally,
            is_running=is_running,
            is_lock_left=lock is not None and not lock.is_held,
            planned=planned,
            saved=saved,
            failure=failure,
            last_sign=last_sign,
        )
        state, cause, exit_code = facts.judge()
        goodput = tally.goodput() if self._reader.is_whole else tally.logged_goodput()
        return RunOverview(
            name=self.run_dir.resolve().name,
            state=state,
            cause=one_line(cause),
            exit_code=exit_code,
            step=tally.step,
            planned_steps=planned,
            saved_step=saved,
            tokens=tally.tokens() if self._reader.is_whole else tally.logged_tokens(),
            loss=tally.loss,
            learning_rate=tally.learning_rate,
            tokens_per_second=tally.tokens_per_second(),
            seconds_per_step=tally.seconds_per_step(),
            eta_seconds=_eta_seconds(tally, planned, goodput) if is_running else math.nan,
            utilization=tally.utilization,
            peak_memory_bytes=tally.peak_memory_bytes,
            goodput=goodput,
            guard=_with_tolerances(tally.standings(), self._config),
            actions=tuple(reversed(tally.actions)),
            num_starts=tally.num_starts,
            num_going_back=tally.num_going_back,
            last_sign=last_sign,
            host=describe(lock.holder) if lock else "",
            problems=tuple(self._problems(state)),
        )

    def _problems(self, state: RunState) -> list[str]:
        """Return what a person should look at."""
        found = [text for text in (self._log_problem, self._config_problem) if text]
        reader, tally = self._reader, self._tally
        if reader.num_damaged:
            found.append(f"{METRICS}: {reader.num_damaged:,} lines are no JSON objects")
        if tally.failed_save:
            found.append(f"the newest save failed: {one_line(tally.failed_save)}")
        if tally.step and math.isnan(tally.loss):
            found.append(f"the loss of step {tally.step:,} is not a number")
        if state == "running" and reader.written is not None:
            silent = time.time() - reader.written
            if silent > QUIET_SECONDS:
                found.append(f"nothing was logged for {silent / 60:.0f} min")
        return found

    def _read_config(self) -> None:
        """Read config.resolved.yaml, if it has changed."""
        path = self.run_dir / CONFIG
        self._config_problem = ""
        try:
            stamp = path.stat().st_mtime
            if stamp == self._config_stamp:
                return
            self._config, self._config_stamp = {}, None
            self._config = read_small_yaml(path)
            self._config_stamp = stamp
        except FileNotFoundError:
            self._config, self._config_stamp = {}, None
            if self._tally.step > 0:
                self._config_problem = f"{CONFIG} is missing"
        except (OSError, MalformedInput) as error:
            self._config_problem = f"{CONFIG} cannot be read: {one_line(error)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Facts:
    """What the state of a run follows from."""

    run_dir: Path
    tally: RunTally
    is_running: bool
    is_lock_left: bool
    """Whether there is a lock of a process that is gone."""
    planned: int | None
    saved: int | None
    failure: EndRecord | None
    """Content of last_failure.json; None if there is none."""
    last_sign: float

    def judge(self) -> tuple[RunState, str, int | None]:
        """Return the state, its cause, and the exit code."""
        tally, end = self.tally, self.tally.end
        if not self.run_dir.is_dir():
            return "unknown", "there is no such directory", None
        if self.is_running:
            return "running", self._running_text(), None
        failed_code, failed_cause = self._failure()
        if failed_cause:
            return "failed", failed_cause, failed_code
        code = end.exit_code if end is not None else None
        is_saved = self.planned is not None and (self.saved or -1) >= self.planned > 0
        if end is not None and code is not None and code not in ORDERLY_CODES:
            return "failed", end.cause or f"exit code {code}", code
        if tally.pause_reason and end is not None:
            return "paused", tally.pause_reason, code
        if is_saved and (end is not None or tally.num_events == 0):
            return "finished", "", EXIT_DONE if code is None else code
        if end is not None:
            return "stopped", end.cause or self._saved_text(), code
        if tally.num_starts == 0 and tally.step == 0 and not self.is_lock_left:
            return "never started", "", None
        text = "it ended without a word (killed, or its node was lost)"
        if not math.isnan(self.last_sign):
            text += f"; no sign of life since {utc(self.last_sign)}"
        return "failed", f"{text}; {self._saved_text()}", None

    def _running_text(self) -> str:
        """Return what a run does that has not done a step since its start."""
        if self.tally.num_events == 0 or self.tally.end is not None:
            return "starting"
        return ""

    def _saved_text(self) -> str:
        return "nothing is saved" if self.saved is None else f"step {self.saved:,} is saved"

    def _failure(self) -> tuple[int | None, str]:
        """Return exit code and cause of last_failure.json, unless the run has gone on since."""
        if self.failure is None:
            return None, ""
        failed_at = number(self.failure.time)
        end = self.tally.end
        is_ended_since = (
            end is not None and end.exit_code in ORDERLY_CODES and not end.time <= failed_at
        )
        if self.tally.started > failed_at or is_ended_since:
            return None, ""
        return whole_number(self.failure.exit_code), self.failure.cause


def _eta_seconds(tally: RunTally, planned: int | None, goodput: float) -> float:
    """Return the time to the planned end; NaN if it cannot be told."""
    if planned is None or planned < tally.step:
        return math.nan
    share = goodput if 0 < goodput <= 1 else 1.0
    return (planned - tally.step) * tally.seconds_per_step() / share


def _planned_steps(config: dict[str, Any]) -> int | None:
    """Return the step at which the run ends."""
    train = _section(config, "train")
    stop = whole_number(train.get("stop_at_step"))
    return whole_number(train.get("total_steps")) if stop is None else stop


def _with_tolerances(
    standings: list[GuardStanding], config: dict[str, Any]
) -> tuple[GuardStanding, ...]:
    """Give text the tolerance of the configuration where its log has none, and sort again."""
    found = []
    for standing in standings:
        if standing.kind == "text" and math.isnan(standing.tolerance):
            standing = replace(standing, tolerance=_text_tolerance(standing.domain, config))
        found.append(standing)
    return tuple(sorted(found, key=badness, reverse=True))


def _text_tolerance(domain: str, config: dict[str, Any]) -> float:
    """Return the tolerance of a domain in percent, its own or that of all; NaN if it is unknown."""
    guard = _section(config, "guard")
    own = number(_section(_section(guard, "domains"), domain).get("tolerance_percent"))
    return number(guard.get("tolerance_percent")) if math.isnan(own) else own


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a map within a map from a file; empty if it is missing or no map."""
    section = config.get(key)
    return section if isinstance(section, dict) else {}


def newest_saved_step(run_dir: Path) -> int | None:
    """Return the step of the newest folder with a manifest; the manifest is not read."""
    try:
        folders = sorted((run_dir / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)
        for folder in folders:
            if (folder / "manifest.json").is_file():
                return int(folder.name.removeprefix("step-"))
    except OSError:
        pass
    return None


def read_small_yaml(path: Path) -> dict[str, Any]:
    """Return a map from a YAML file that may hold anything.

    Raises:
        OSError: it cannot be read.
        MalformedInput: it is no YAML, beyond a limit, or no map.
    """
    content = read_yaml(path, follow_links=False)
    if not isinstance(content, dict):
        raise MalformedInput("it is no map")
    return content


def utc(seconds: float) -> str:
    """Return a Unix time for people."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def one_line(text: object, limit: int = 300) -> str:
    """Return a text in one printable line that is not too long."""
    shown = escaped_line(" ".join(str(text).split())[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."

"""How a run uses Weights & Biases: run YAML and WANDB_* variables brought together, and what would
keep the run from reaching the server.

A variable goes before the key of the run YAML, as users of W&B expect:

    WANDB_MODE       telemetry.wandb             WANDB_TAGS       telemetry.wandb_tags
    WANDB_PROJECT    telemetry.wandb_project     WANDB_NOTES      telemetry.wandb_notes
    WANDB_ENTITY     telemetry.wandb_entity      WANDB_JOB_TYPE   telemetry.wandb_job_type
    WANDB_RUN_GROUP  telemetry.wandb_group       WANDB_NAME       name of the run directory
    WANDB_RUN_ID     the id in the run directory WANDB_DIR        the run directory

No variable switches W&B on in a run whose `telemetry.wandb` is `disabled`.
"""

from __future__ import annotations

import base64
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cpt.config import TelemetrySection
from cpt.resilience.environment import restarts_of_job

log = logging.getLogger("cpt.telemetry.wandb")

Mode = Literal["disabled", "offline", "online"]

MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""Modes by the words that WANDB_MODE may hold; `run` and `dryrun` are old names."""
REACH_SECONDS = 8.0
"""Longest wait for an answer of the server before a start."""
_NO_LOGIN = (
    "telemetry.wandb is online, but there is no login for {host}. Run `wandb login` on this "
    "machine, set WANDB_API_KEY, or record with --set telemetry.wandb=offline and send it later "
    "with `wandb sync`."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbSettings:
    """How a run uses Weights & Biases."""

    mode: Mode
    project: str
    entity: str | None
    """User or team; None takes the login's default."""
    name: str
    """Name of the W&B run."""
    group: str | None
    job_type: str | None
    tags: tuple[str, ...]
    notes: str | None
    folder: Path
    """Holds the folder `wandb` with the files of the run."""
    run_id: str | None
    """Id of the W&B run that the environment asks for; None leaves it to the run directory."""
    overruled: tuple[str, ...]
    """Variables that go before a key of the run YAML with another value."""

    @classmethod
    def of(
        cls, section: TelemetrySection, run_dir: Path, variables: Mapping[str, str] = os.environ
    ) -> WandbSettings:
        """Bring run YAML and environment together.

        Raises:
            ValueError: WANDB_MODE holds a word that is no mode.
        """
        chosen = _Chosen(variables)
        tags = chosen.text("WANDB_TAGS", ",".join(section.wandb_tags)) or ""
        return cls(
            mode=mode_of(section, variables),
            project=chosen.text("WANDB_PROJECT", section.wandb_project) or section.wandb_project,
            entity=chosen.text("WANDB_ENTITY", section.wandb_entity),
            name=chosen.text("WANDB_NAME", None) or run_dir.resolve().name,
            group=chosen.text("WANDB_RUN_GROUP", section.wandb_group),
            job_type=chosen.text("WANDB_JOB_TYPE", section.wandb_job_type),
            tags=tuple(tag.strip() for tag in tags.split(",") if tag.strip()),
            notes=chosen.text("WANDB_NOTES", section.wandb_notes),
            folder=Path(chosen.text("WANDB_DIR", None) or run_dir),
            run_id=chosen.text("WANDB_RUN_ID", None),
            overruled=tuple(chosen.overruled),
        )

    def describe(self) -> str:
        """Return one line for people."""
        place = f"{self.entity}/{self.project}" if self.entity else self.project
        text = f"W&B: {self.mode}, {place}, run {self.name}"
        if self.overruled:
            text += f"; {', '.join(self.overruled)} from the environment, before the run YAML"
        return text


class _Chosen:
    """Takes values from the environment or, where it has none, from the run YAML."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self.overruled: list[str] = []

    def text(self, variable: str, configured: str | None) -> str | None:
        """Return the value of a variable, or the configured one if it is unset or empty."""
        value = self._variables.get(variable, "").strip()
        if not value:
            return configured or None
        if value != configured:
            self.overruled.append(variable)
        return value


def mode_of(section: TelemetrySection, variables: Mapping[str, str] = os.environ) -> Mode:
    """Return the mode that holds.

    Raises:
        ValueError: WANDB_MODE holds a word that is no mode.
    """
    if section.wandb == "disabled":
        return "disabled"
    if variables.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes"):
        return "disabled"
    word = variables.get("WANDB_MODE", "").strip().lower()
    if not word:
        return section.wandb
    if word not in MODES:
        raise ValueError(
            f"WANDB_MODE is '{word}', which is no mode. Set it to online, offline or disabled, or "
            "unset it: then telemetry.wandb holds."
        )
    return MODES[word]


def wandb_problems(section: TelemetrySection) -> list[str]:
    """Return what would keep a run from recording with W&B; asks the server only if it is online.

    A job that was queued again goes on without its server: it records offline (`WandbTracker`).
    """
    try:
        mode = mode_of(section)
    except ValueError as error:
        return [str(error)]
    if mode == "disabled":
        return []
    try:
        import wandb
    except ImportError as error:
        return [
            f"telemetry.wandb is {mode}, but wandb cannot be imported ({error}). Install it with "
            "`pip install wandb`, or use --set telemetry.wandb=disabled."
        ]
    if mode == "offline":
        return []
    try:
        problem = login_problem()
    finally:
        wandb.teardown()  # the tracker starts afresh, in its own thread
    if problem and restarts_of_job():
        log.warning("%s This job was queued again and goes on.", problem)
        return []
    return [problem] if problem else []


def login_problem() -> str:
    """Return why there is no way to the W&B server; empty if it takes this user."""
    from wandb.errors import Error
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    host = wandb_setup.singleton().settings.base_url
    try:
        login = wbauth.authenticate_session(
            host=host, source="cpt", prompt=False, update_session=False
        )
    except (Error, ValueError) as error:
        return f"telemetry.wandb is online, but the login for {host} cannot be used: {error}"
    if login is None:
        return _NO_LOGIN.format(host=host)
    key = login.api_key if isinstance(login, wbauth.AuthApiKey) else None
    return answer_problem(host, key, REACH_SECONDS)


def answer_problem(host: str, key: str | None, timeout_seconds: float) -> str:
    """Ask a W&B server who this user is, and return what is wrong with the answer.

    Args:
        host: URL of the server.
        key: API key; None asks only whether something answers.
        timeout_seconds: Longest wait.

    Returns:
        A sentence without the key; empty if the server takes it.
    """
    request = urllib.request.Request(
        f"{host.rstrip('/')}/graphql",
        data=b'{"query": "query Viewer { viewer { id } }"}',
        headers={"Content-Type": "application/json", "User-Agent": "gpt-oss-cpt"},
    )
    if key is not None:
        token = base64.b64encode(f"api:{key}".encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
    offline = "Record with --set telemetry.wandb=offline and send it later with `wandb sync`."
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds) as answer:
            answer.read(1)
    except urllib.error.HTTPError as error:
        if key is not None and error.code in (401, 403):
            return (
                f"telemetry.wandb is online, but {host} does not take this login ({error.code}). "
                f"Run `wandb login --relogin`, or set another WANDB_API_KEY. {offline}"
            )
    except OSError as error:  # among them urllib's own and timeouts
        reason = getattr(error, "reason", None) or error
        return (
            f"telemetry.wandb is online, but {host} cannot be reached ({reason}; waited at most "
            f"{timeout_seconds:.0f} s). Check the network and HTTPS_PROXY. {offline}"
        )
    return ""

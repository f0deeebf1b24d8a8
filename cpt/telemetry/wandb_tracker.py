"""One Weights & Biases run over all starts of a run.

Decisions
    The id is kept in <run_dir>/wandb_run.json, and `resume="allow"` goes on with it.
    W&B's own step only rises, and refuses what comes late: the checkpoint of an asynchronous save,
    everything after a rollback.  So it is left alone, and every row carries `step`, the axis of all
    charts, and `total_tokens`, another one.
    A server that does not answer costs nothing: the run records offline.
    The terminal is not captured, because a service that hangs would then hang whoever prints.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.config import RunConfig
from cpt.errors import EXIT_DONE, RequeueRequested
from cpt.resilience.best_effort import best_effort, reason_of
from cpt.resilience.processes import command_of, parent_of, process_ids
from cpt.telemetry.shown import Event, StepTable, StepTables, distributions, scalars
from cpt.telemetry.wandb_settings import Mode, WandbSettings
from data_pipeline.bounded.json_text import read_json
from data_pipeline.store.files import make_folder, write_json

if TYPE_CHECKING:
    import wandb

log = logging.getLogger("cpt.telemetry.wandb")

ID_FILE = "wandb_run.json"
FINISH_SECONDS = 30.0
"""Longest wait for what is not sent yet at the end; it stays on disk for `wandb sync`."""
INIT_SECONDS = 30.0
"""Longest wait for the server at the start, in the tracker's thread; WANDB_INIT_TIMEOUT goes before
it.
"""
SERVICE = "wandb-core"
"""Name of the process of the wandb library that talks to the server."""
ORDERLY_CODES = (EXIT_DONE, RequeueRequested.exit_code)
"""Exit codes of a start that ended as it should."""


class WandbTracker:
    """Sends events to Weights & Biases."""

    def __init__(self, config: RunConfig, run_dir: Path, run_id: str) -> None:
        """Open the W&B run of a run directory.

        Args:
            config: The run.
            run_dir: Its run directory.
            run_id: Id of the W&B run; see `kept_id`.

        Raises:
            Exception: whatever keeps the library from recording even offline.
        """
        self._config = config
        self._run_dir = run_dir
        self._settings = WandbSettings.of(config.telemetry, run_dir)
        self._id = run_id
        self._tables = StepTables()
        self._exit_code: int | None = None
        self._total_tokens: tuple[int, int] = (0, 0)
        """The newest step, and the tokens of the run until then."""
        self._run = self._open()
        place = self._run.dir if self._run.offline else self._run.url
        log.info("W&B run %s: %s", self._id, place)
        # the axis of all charts, whatever order events come in
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("total_tokens", step_metric="step", summary="max")
        with best_effort("W&B does not show the log of rank 0"):
            self._run.save(
                run_dir / "logs" / "rank-00000.log", base_path=run_dir, policy="live", glob=False
            )

    def _open(self) -> wandb.Run:
        mode = self._settings.mode
        try:
            return self._init(mode)
        except Exception as error:
            if mode != "online":
                raise
            log.warning(
                "W&B cannot be reached (%s): recording offline. Send it later with: "
                "wandb sync %s/wandb/offline-run-*-%s*",
                reason_of(error),
                self._settings.folder,
                self._id,
            )
            with contextlib.suppress(Exception):
                import wandb

                wandb.teardown()
            return self._init("offline")

    def _init(self, mode: Mode) -> wandb.Run:
        import wandb

        settings = self._settings
        make_folder(settings.folder)
        # tables wait here until they are sent; a home directory may be small or read-only
        os.environ.setdefault("WANDB_DATA_DIR", str(settings.folder / "wandb" / "data"))
        return wandb.init(
            project=settings.project,
            entity=settings.entity,
            id=self._id,
            resume="allow",
            name=settings.name,
            group=settings.group,
            job_type=settings.job_type,
            tags=settings.tags or None,
            notes=settings.notes,
            mode=mode,
            dir=str(settings.folder),
            config=self._config.to_plain(),
            allow_val_change=True,
            settings=wandb.Settings(
                console="off",
                silent=True,
                finish_timeout=FINISH_SECONDS,
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT") or INIT_SECONDS),
            ),
        )

    def log(self, event: Event) -> None:
        """Show one event."""
        for table in self._tables.take(event):
            self._log_table(table)
        if event["event"] == "end":
            self._exit_code = event.get("exit_code", EXIT_DONE)
        self._alert(event)
        self._add_artifact(event)
        if "step" not in event:
            return
        row: dict[str, Any] = dict(scalars(event))
        for name, values in distributions(event).items():
            row |= self._distribution(name, values)
        if "total_tokens" in event:
            self._total_tokens = (event["step"], event["total_tokens"])
        if row:
            self._log_row(row, event["step"])

    def _log_row(self, row: dict[str, Any], step: int) -> None:
        """Log values of a step, with both axes where both are known."""
        axes = {"step": step}
        if self._total_tokens[0] == step:
            axes["total_tokens"] = self._total_tokens[1]
        self._run.log({**row, **axes})

    def _distribution(self, name: str, values: list[float]) -> dict[str, Any]:
        import wandb

        mean = sum(values) / len(values)
        return {
            name: wandb.Histogram(values),
            f"{name}/mean": mean,
            f"{name}/max": max(values),
        }

    def _log_table(self, table: StepTable) -> None:
        import wandb

        # cells of one column may be numbers or missing
        shown = wandb.Table(columns=list(table.columns), data=table.rows, allow_mixed_types=True)
        self._log_row({table.name: shown}, table.step)

    def _alert(self, event: Event) -> None:
        """Tell people that the guard acts, or that the run ended."""
        kind, step = event["event"], event.get("step")
        name = self._settings.name
        if kind == "guard_decision" and event.get("action", "none") != "none":
            self._run.alert(
                title=f"{name}: guard: {event['action']}"[:63],
                text=f"step {step}: {event.get('reason', '')}",
                level="WARN",
            )
        elif kind == "guard_rollback":
            self._run.alert(
                title=f"{name}: back to step {step}"[:63],
                text=f"from step {event.get('from_step')}: {event.get('reason', '')}",
                level="WARN",
            )
        elif kind == "end":
            is_orderly = event.get("exit_code", EXIT_DONE) in ORDERLY_CODES
            self._run.alert(
                title=f"{name}: {'ended' if is_orderly else 'failed'}"[:63],
                text=f"step {step}: {event.get('cause') or 'the run ended.'}",
                level="INFO" if is_orderly else "ERROR",
            )

    def _add_artifact(self, event: Event) -> None:
        """Name a checkpoint or an export as an artifact, if that is asked for."""
        import wandb

        wanted = {"none": (), "export": ("export",), "checkpoints": ("export", "checkpoint")}
        kind = event["event"]
        if kind not in wanted[self._config.telemetry.wandb_artifacts]:
            return
        folder = (self._run_dir / f"{kind}s" / event["path"]).resolve()
        if kind == "export":
            folder = (self._run_dir / event["path"]).resolve()
        artifact = wandb.Artifact(
            f"{kind}-{self._id}", type=kind, metadata={"step": event["step"], "path": str(folder)}
        )
        # its files are neither read nor sent: a checkpoint of the largest model has 1.4 TB
        is_there = False
        with best_effort(f"W&B does not list {folder.name}"):  # it may have been deleted meanwhile
            artifact.add_reference(folder.as_uri(), checksum=False)
            is_there = True
        if is_there:
            self._run.log_artifact(artifact, aliases=[f"step-{event['step']}"])

    def close(self) -> None:
        """Send what is left, and end the W&B run and the library's service."""
        import wandb

        for table in self._tables.rest():
            self._log_table(table)
        # a run that ended without a word failed
        is_orderly = self._exit_code in ORDERLY_CODES
        self._run.finish(exit_code=0 if is_orderly else 1)
        wandb.teardown()


def end_service() -> None:
    """End the library's service, and its hook that would wait for it when Python exits.

    Raises:
        Exception: whatever the library makes of a service that is gone.
    """
    import wandb

    for pid in service_pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wandb.teardown()


def service_pids() -> list[int]:
    """Return the services of the wandb library that this process has started."""
    own = os.getpid()
    found = []
    for pid in process_ids():
        if parent_of(pid) == own and SERVICE in " ".join(command_of(pid)[:1]):
            found.append(pid)
    return found


def kept_id(run_dir: Path, settings: WandbSettings) -> str:
    """Return the id of the W&B run of a run directory, and keep a new one there."""
    path = run_dir / ID_FILE
    known = ""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = str(read_json(path, follow_links=False)["run_id"])
    wanted = settings.run_id or known or secrets.token_hex(4)
    if wanted != known:
        with best_effort("The next start will begin another W&B run, since its id was not kept"):
            write_json(path, {"run_id": wanted, "project": settings.project}, indent=1)
    return wanted

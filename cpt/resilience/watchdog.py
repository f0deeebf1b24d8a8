"""A hung rank is named, all stacks are written, and every rank leaves with the same code.

    main thread      says where it is (`PhaseClock.enter`), nothing else
    talking thread   exchanges positions with the other ranks through the store of the process group, over a connection
                     of its own, so that it works while the main thread is blocked in a collective
    watching thread  never blocks: judges, writes stacks, leaves with os._exit

Decisions
    Rank 0 sees all positions and judges (`cpt.resilience.heartbeat`); the others watch that rank 0
    answers.  A verdict is one record in the store; the first one written holds, and every rank
    obeys it. A rank that fails alone writes such a record too: otherwise its peers would wait for
    it in a collective, until a timeout with NCCL, and the error of the connection would hide the
    cause. A stopped rank (SIGSTOP) on this node is sent SIGCONT: it wakes up, finds the verdict,
    writes its own stack and leaves with the same code.  If it cannot, the launcher kills it.
    The rank whose record it is, and rank 0, which holds the store, leave last.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cpt.config import WatchdogSection
from cpt.errors import CptError, HungRankError, RequeueRequested
from cpt.parallel.topology import Topology
from cpt.resilience.heartbeat import Beat, Limits, Observer
from cpt.resilience.phase import PhaseClock

LEAVE_SECONDS = 10.0
"""How long the last to leave wait for the others."""
GONE_SECONDS = 30.0
"""How long the store may be gone, refused or reset, before a rank that is not done leaves."""
VERDICT = "verdict"


class Watchdog:
    """Watches all ranks of a run from when the groups exist until `close`."""

    def __init__(
        self,
        run_dir: Path,
        topology: Topology,
        settings: WatchdogSection,
        clock: PhaseClock,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        """Prepare to watch.

        Args:
            run_dir: Receives the stacks of hung ranks, in `stacks/`.
            topology: The ranks to watch.
            settings: The `watchdog` section of the run YAML.
            clock: Knows the phase of this rank.
            report: Takes an event for metrics.jsonl; called from the talking thread of rank 0.
        """
        self._clock = clock
        self._report = report
        self._stacks, self._topology, self._settings = run_dir / "stacks", topology, settings
        self._limits = Limits(step=settings.timeout_seconds, long=settings.long_timeout_seconds)
        self._observer = Observer(topology.world_size, self._limits, settings.straggler_ratio)
        self._closed, self._told, self._left = (
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )
        self._all_left = threading.Event()
        self._threads: list[threading.Thread] = []
        self._failure: dict[str, Any] | None = None
        self._verdict: dict[str, Any] | None = None
        self._heard_at = time.monotonic()
        self._store_error = ""
        self._first_beat: Beat | None = None

    def start(self) -> None:
        """Begin to watch; does nothing if it is switched off."""
        for target in (self._talk, self._watch) if self._settings.enabled else ():
            self._threads.append(
                threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True)
            )
            self._threads[-1].start()

    def close(self) -> None:
        """Stop watching: the run has come to its end on this rank."""
        self._closed.set()
        for thread in (
            self._threads
        ):  # one that is inside the store when the interpreter ends would abort the process
            if thread is not threading.current_thread():
                thread.join(LEAVE_SECONDS)

    def failed(self, error: Exception) -> None:
        """Tell all ranks that this one cannot go on; called by the main thread with what it caught.

        Returns if the caller shall report the error itself.  Otherwise another rank failed before,
        this error is only its consequence, and the process ends here with the other one's code.
        """
        if not self._settings.enabled:
            return
        position, code = self._clock.now(), getattr(error, "exit_code", 70)
        cause = str(error) if isinstance(error, CptError) else f"{type(error).__name__}: {error}"
        text = f"rank {self._topology.rank} failed in phase={position.phase} step={position.step}: {cause}"
        self._failure = {
            "kind": "failed",
            "rank": self._topology.rank,
            "code": code,
            "text": text,
            "wake": {},
        }
        self._failure["agreed"] = isinstance(error, CptError)
        if not self._told.wait(LEAVE_SECONDS / 2):
            return  # the store does not answer; the others will find out by themselves
        if self._verdict is not None and self._stays_for_main(self._verdict):
            if self._is_own(self._verdict) and not isinstance(error, CptError):
                _say(text)
            self._last_to_leave()
            return
        self._closed.wait()  # until the watching thread has ended this process

    def _is_own(self, verdict: dict[str, Any]) -> bool:
        return bool(verdict["kind"] == "failed" and verdict["rank"] == self._topology.rank)

    def _stays_for_main(self, verdict: dict[str, Any]) -> bool:
        """Whether the main thread ends the process: its error is the cause, or all ranks have
        raised the same one.
        """
        same = (
            self._failure is not None
            and self._failure["agreed"]
            and self._failure["code"] == verdict["code"]
        )
        return self._is_own(verdict) or same

    def _talk(self) -> None:
        """Everything that may block on the store."""
        try:
            store = self._connect()
            while not self._all_left.is_set() and not self._closed.wait(
                self._settings.interval_seconds
            ):
                self._exchange(store)
                self._heard_at = time.monotonic()
        except (
            Exception
        ) as error:  # the store's errors have no common class; the watching thread decides
            self._store_error = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )

    def _connect(self) -> dist.Store:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = dist.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        return dist.PrefixStore("cpt/watchdog", client)

    def _exchange(self, store: dist.Store) -> None:
        """Publish, read the verdict if there is one, else look at the others."""
        rank, world = self._topology.rank, self._topology.world_size
        if self._left.is_set():
            store.set(f"left/{rank}", "1")
            if store.check([f"left/{other}" for other in range(world)]):
                self._all_left.set()
            return
        beat = Beat.of(self._clock.now(), time.monotonic(), os.getpid(), socket.gethostname())
        store.set(f"beat/{rank}", beat.dump())
        if self._failure is not None:
            self._publish(store, self._failure)
        if store.check([VERDICT]):
            self._verdict = json.loads(store.get(VERDICT))
            self._told.set()
            return
        if rank != 0:
            if store.check(["beat/0"]):
                self._first_beat = Beat.load(store.get("beat/0"))
            return
        names = [f"beat/{other}" for other in range(world)]
        if store.check(names):
            self._observe(store, [Beat.load(text) for text in store.multi_get(names)])

    def _observe(self, store: dist.Store, beats: list[Beat]) -> None:
        now = time.monotonic()
        self._observer.see(now, beats, self._clock.median_step_seconds())
        for straggler in self._observer.take_stragglers():
            _say(straggler.describe())
            self._report(straggler.event())
        hung = self._observer.hung(now)
        if hung is not None:
            wake = {rank: [beats[rank].host, beats[rank].pid] for rank in hung.ranks}
            self._publish(
                store,
                {
                    "kind": "hung",
                    "rank": 0,
                    "code": HungRankError.exit_code,
                    "text": hung.text,
                    "wake": wake,
                },
            )

    def _publish(self, store: dist.Store, verdict: dict[str, Any]) -> None:
        """The first verdict holds."""
        store.compare_set(VERDICT, "", json.dumps(verdict))

    def _watch(self) -> None:
        """Decide; never blocks on another process."""
        interval, woke = self._settings.interval_seconds, time.monotonic()
        while not self._closed.wait(interval):
            now = time.monotonic()
            if (
                now - woke > 5 * interval + 5
            ):  # this process was stopped: what it did not hear says nothing
                self._heard_at = now
                self._observer.forget()
            woke = now
            if self._verdict is not None and not self._stays_for_main(self._verdict):
                self._leave(self._verdict)
            silent = now - self._heard_at
            limit = self._limits.of(self._clock.now().phase)
            if (
                silent > (min(GONE_SECONDS, limit) if self._store_error else limit)
                and self._failure is None
            ):
                self._leave(self._without_store(silent))

    def _without_store(self, silent: float) -> dict[str, Any]:
        """The verdict of a rank that cannot ask anybody."""
        beat = self._first_beat
        seen = f"last seen in phase={beat.phase} step={beat.step}" if beat else "never seen"
        text = f"rank 0, which holds the store, {seen}, has not answered for {silent:.0f} s. {self._store_error}".strip()
        wake = {0: [beat.host, beat.pid]} if beat else {}
        rank, code = self._topology.rank, HungRankError.exit_code
        return {
            "kind": "hung",
            "rank": rank,
            "code": code,
            "text": text,
            "wake": wake,
            "agreed": False,
        }

    def _leave(self, verdict: dict[str, Any]) -> None:
        """Obey a verdict: say why, write stacks if a rank hangs, end this process."""
        rank = self._topology.rank
        if rank == verdict["rank"]:
            _say(verdict["text"])
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            _say(f"rank {rank} leaves: {verdict['text']}")
        position = self._clock.now()
        if str(rank) in verdict["wake"]:
            _say(
                f"rank {rank} runs again; it stands in phase={position.phase} step={position.step}"
            )
        if verdict["kind"] == "hung":
            with contextlib.suppress(OSError):  # a full disk must not keep a hung run alive
                self._stacks.mkdir(parents=True, exist_ok=True)
                for other, (host, pid) in verdict["wake"].items():
                    if host == socket.gethostname() and int(other) != rank:
                        _note_state(self._stacks / f"rank-{other}.txt", pid)
                with open(self._stacks / f"rank-{rank}.txt", "a", encoding="utf-8") as file:
                    file.write(
                        f"{verdict['text']}\nstacks of rank {rank} in phase={position.phase} step={position.step}:\n"
                    )
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
            if (
                self._verdict is None
            ):  # the store will answer once rank 0 runs again, and rank 0 must find it there
                self._failure = verdict
            for other, (host, pid) in verdict["wake"].items():
                if host == socket.gethostname() and int(other) != rank:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGCONT)
            self._told.wait(LEAVE_SECONDS / 2)
        if rank == 0:
            self._last_to_leave()
        else:
            self._left.set()
            self._all_left.wait(
                2 * self._settings.interval_seconds
            )  # until this rank's own mark is in the store
        os._exit(verdict["code"])

    def _last_to_leave(self) -> None:
        """Wait until every rank is about to go, so that none meets a closed connection before it
        knows why.
        """
        self._left.set()
        self._all_left.wait(LEAVE_SECONDS)
        if self._topology.rank == 0:
            time.sleep(
                2 * self._settings.interval_seconds
            )  # the others see it too, and no longer ask the store


@contextlib.contextmanager
def watching(
    run_dir: Path,
    topology: Topology,
    settings: WatchdogSection,
    clock: PhaseClock,
    report: Callable[[dict[str, Any]], None],
) -> Iterator[None]:
    """Watch all ranks while the body runs, and tell them of an error of the body before it is
    raised; the arguments are those of `Watchdog`.
    """
    watchdog = Watchdog(run_dir, topology, settings, clock, report)
    watchdog.start()
    try:
        yield
    except RequeueRequested:  # agreed on by all
        raise
    except Exception as error:
        watchdog.failed(error)
        raise
    finally:
        watchdog.close()


def _note_state(path: Path, pid: int) -> None:
    """What the kernel says about a process that may not be able to speak for itself."""
    lines = []
    for name in ("status", "wchan", "syscall", "stack"):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
            kept = [
                line
                for line in text.splitlines()
                if name != "status" or line.startswith(("State", "Threads", "VmRSS"))
            ]
            lines += [f"{name}: {line}" for line in kept]
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n".join([f"pid {pid} as the kernel sees it:", *lines, ""]))


def _say(text: str) -> None:
    """One line past logging, whose lock a hung thread may hold."""
    os.write(2, f"watchdog: {text}\n".encode())

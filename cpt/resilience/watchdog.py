"""The watchdog: a hung rank is named, all stacks are written, and every rank leaves with one code.

    main thread      records which phase it is in (`PhaseClock.enter`), nothing else
    talking thread   exchanges phases with the other ranks through the store of the process group,
                     over a connection of its own, so that it works while the main thread is blocked
                     in a collective
    watching thread  never blocks: decides, writes stacks, leaves with os._exit
    neighbor thread  waits for the end of other processes of this node (cpt.resilience.neighbors)

Decisions
    Rank 0 sees the phases of all ranks and judges them (`cpt.resilience.heartbeat`); the others
    watch that rank 0 answers. A ruling is one record in the store. The first one written holds, and
    every rank obeys it.
    Whoever reaches the port of the store can write into it. Records that this job has not signed
    are passed over and counted (`cpt.resilience.signed_store`).
    A rank that fails alone writes such a record, too. Otherwise its peers would wait for it in a
    collective until the timeout of its group, and the error of the connection would hide the cause.
    A rank that is killed cannot write one. The ranks of its node see its process end and write it
    (`cpt.resilience.neighbors`). A rank that lost a connection waits for such a record before it
    speaks for itself.
    A stopped rank (SIGSTOP) on this node is sent SIGCONT, if the process is still the one that the
    rank itself named: it wakes up, finds the ruling, writes its
    own stack, and leaves with the same code. If it cannot, the launcher kills it.
    The rank that caused the ruling and rank 0, which holds the store, leave last.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cpt.config import WatchdogSection
from cpt.errors import CptError, RequeueRequested
from cpt.parallel.group_timeout import wait_at_least
from cpt.parallel.topology import Topology
from cpt.resilience.best_effort import best_effort
from cpt.resilience.causes import (
    ruling_on_dead_store,
    ruling_on_error,
    ruling_on_hang,
    ruling_on_kill,
    ruling_on_silence,
    ruling_on_wordless_end,
)
from cpt.resilience.conversation import RankConversation, connect
from cpt.resilience.environment import ranks_of_node
from cpt.resilience.heartbeat import Beat, Observer, PhaseTimeouts, Process
from cpt.resilience.job_secret import agree_on_key
from cpt.resilience.neighbors import Death, Neighbors
from cpt.resilience.out_of_memory import kill_counts
from cpt.resilience.phase import PhaseClock
from cpt.resilience.processes import is_own_process, kernel_report_of, send_signal
from cpt.resilience.ruling import Ruling
from cpt.resilience.signed_store import SignedStore
from cpt.resilience.stack_files import append_stacks, append_text
from cpt.resilience.time_limit import at_most
from cpt.resilience.voice import Voice
from data_pipeline.escaping import escaped_line

LEAVE_SECONDS = 10.0
"""How long the last to leave wait for the others."""
GONE_SECONDS = 30.0
"""How long the store may refuse connections before a rank that is not done leaves."""
GROUP_MARGIN_SECONDS = 600.0
"""How much longer than the longest phase torch's process groups wait, so that a hung rank is found
and named before torch ends those that wait for it."""
POLL_SECONDS = 0.1
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "remote process exit",
)
"""Words of gloo's and NCCL's errors about a peer that is gone."""


class Watchdog:
    """Watches all ranks of a run from when the process groups exist until `close`."""

    def __init__(
        self,
        run_dir: Path,
        topology: Topology,
        settings: WatchdogSection,
        clock: PhaseClock,
        report: Callable[[dict[str, Any]], None],
        record: Callable[[Ruling], None] | None = None,
        *,
        key: bytes,
    ) -> None:
        """Prepare to watch.

        Args:
            run_dir: Receives the stacks of hung ranks, in `stacks/`.
            topology: The ranks to watch.
            settings: The `watchdog` section of the run YAML.
            clock: Knows the phase of this rank.
            report: Takes an event for metrics.jsonl; called from the talking thread of rank 0.
            record: Keeps a ruling in the run directory; called once, from the thread that ends the
                process, on rank 0 or, if that is gone, on those that notice.
            key: Signs what the ranks say to each other; the same on all ranks.
        """
        self._key = key
        self._voice = Voice()
        self._stacks = run_dir / "stacks"
        self._topology = topology
        self._settings = settings
        self._clock = clock
        self._report = report
        self._record = record
        self._timeouts = PhaseTimeouts(
            step=settings.timeout_seconds, long=settings.long_timeout_seconds
        )
        self._observer = Observer(topology.world_size, self._timeouts, settings.straggler_ratio)
        self._process = Process.this()
        self._neighbors = Neighbors()
        self._unmet = set(ranks_of_node()) - {topology.rank}
        self._met: dict[int, Beat] = {}
        self._num_foreign = 0
        self._next_told = 1
        self._ended: list[Death] = []
        self._killed: set[int] = set()
        self._has_told_death = False
        self._kills_before = kill_counts()
        self._ruling_lock = threading.Lock()
        self._closed = threading.Event()
        self._told = threading.Event()
        self._leaving = threading.Event()
        self._all_leaving = threading.Event()
        self._threads: list[threading.Thread] = []
        self._own_ruling: Ruling | None = None
        self._ruling: Ruling | None = None
        self._heard_at = time.monotonic()
        self._store_error = ""
        self._first_rank_beat: Beat | None = None

    def start(self) -> None:
        """Begin to watch; does nothing if the watchdog is switched off."""
        if not self._settings.enabled:
            return
        for target in (self._talk, self._watch, self._look_after_neighbors):
            thread = threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Stop watching, because the run has come to its end on this rank."""
        self._closed.set()
        self._neighbors.wake()
        # A thread that is inside the store when the interpreter ends would abort the process.
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(LEAVE_SECONDS)
        if not any(thread.is_alive() for thread in self._threads):
            self._neighbors.close()

    def report_failure(self, error: Exception) -> None:
        """Tell all ranks that this one cannot go on; called by the main thread with what it caught.

        Returns if the caller shall report the error itself. Otherwise another rank failed before,
        this error is only its consequence, and the process ends here with the other one's code.
        """
        if not self._settings.enabled:
            return
        is_expected = isinstance(error, CptError)
        if is_lost_peer(error):
            self._wait_for_cause()
            if self._told.is_set():
                self._closed.wait()  # this error follows from the ruling, which ends the process
                return
        own = self._rule(self._ruling_on_failure(error))
        if own.kind == "hung" or (own.kind == "killed" and own.rank == 0):
            self._leave(own)  # the store is gone, and nobody can be asked
        if not self._told.wait(LEAVE_SECONDS / 2):
            return  # the store does not answer; the others will find out by themselves
        if self._ruling is not None and self._is_left_to_main_thread(self._ruling):
            if self._is_own(self._ruling) and not is_expected:
                self._voice.say(own.text)
            self._leave_last()
            return
        self._closed.wait()  # until the watching thread has ended this process

    def _wait_for_cause(self) -> None:
        """Wait until another rank has said why a connection was lost, or time is up.

        The first rank, which sees who is silent, waits less than the others.
        """
        looks = 3 if self._topology.rank == 0 else 6
        deadline = time.monotonic() + looks * self._settings.interval_seconds + 1
        while self._own_ruling is None and time.monotonic() < deadline:
            if self._told.wait(POLL_SECONDS):
                return

    def _ruling_on_failure(self, error: Exception) -> Ruling:
        """Return the ruling of a rank whose main thread has met an error."""
        if is_lost_peer(error):
            lost = self._ruling_on_lost_ranks()
            if lost is not None:
                return lost
        return ruling_on_error(error, self._topology.rank, self._location(), self._process)

    def _ruling_on_lost_ranks(self) -> Ruling | None:
        """Return the ruling if other ranks are gone without a word; None if none is known to be."""
        for death in self._ended:
            if death.code != 0:
                return ruling_on_wordless_end(death, self._process)
        seconds = 2.5 * self._settings.interval_seconds
        silent = self._observer.find_lost(time.monotonic(), seconds)
        lost = [rank for rank in silent if rank != self._topology.rank]
        if lost:
            return ruling_on_silence(lost, self._observer)
        if self._store_error and self._topology.rank != 0:
            return self._rule_without_store(time.monotonic() - self._heard_at)
        return None

    def _rule(self, ruling: Ruling) -> Ruling:
        """Make a ruling this rank's, unless it has one; return the one that it has."""
        with self._ruling_lock:
            if self._own_ruling is None:
                self._own_ruling = ruling
            return self._own_ruling

    def _look_after_neighbors(self) -> None:
        """Notice the end of other ranks of this node, and rule if a signal ended one."""
        while not self._closed.is_set():
            for death in self._neighbors.wait():
                if not self._closed.is_set():
                    self._on_death(death)

    def _on_death(self, death: Death) -> None:
        self._ended.append(death)
        if not death.signal or self._ruling is not None:
            return
        cause = kill_counts().since(self._kills_before)
        ruling = ruling_on_kill(death, self._clock.now().step, cause, self._process)
        if self._rule(ruling) is not ruling:
            return
        if self._topology.rank < min(self._neighbors.ranks, default=self._topology.world_size):
            self._voice.say(ruling.text)
            self._has_told_death = True
        if death.rank == 0:
            self._leave(ruling)  # the store died with it

    def _location(self) -> str:
        record = self._clock.now()
        return f"phase={record.phase} step={record.step}"

    def _is_own(self, ruling: Ruling) -> bool:
        return ruling.kind == "failed" and ruling.rank == self._topology.rank

    def _is_left_to_main_thread(self, ruling: Ruling) -> bool:
        """Return whether the main thread ends the process.

        It does if its error is the cause, or if all ranks have raised the same error.
        """
        own = self._own_ruling
        is_same = own is not None and own.agreed and own.code == ruling.code
        return self._is_own(ruling) or is_same

    def _talk(self) -> None:
        """Do everything that may block on the store."""
        try:
            talk = self._join()
            interval = self._settings.interval_seconds
            while not self._all_leaving.is_set() and not self._closed.wait(interval):
                self._look(talk)
                self._heard_at = time.monotonic()
        except Exception as error:
            # The store's errors have no common class. The watching thread decides what follows.
            first_line = str(error).partition("\n")[0]
            self._store_error = f"{type(error).__name__}: {first_line}"

    def _join(self) -> RankConversation:
        store = SignedStore(connect(self._key), self._key, self._note_foreign)
        world_size = self._topology.world_size
        return RankConversation(self._topology.rank, world_size, store, self._note_foreign)

    def _note_foreign(self, name: str, why: str) -> None:
        """Count a record that this job did not write; rank 0 tells of the 1st, 10th, 100th ..."""
        self._num_foreign += 1
        if self._num_foreign < self._next_told:
            return
        self._next_told *= 10
        if self._topology.rank != 0:
            return
        self._voice.say(
            f"somebody writes into the store of this run, port {os.environ['MASTER_PORT']}: record "
            f"{name} is not one of this job ({why}). Such records are passed over, "
            f"{self._num_foreign} so far. Others can reach the port: see docs/security.md."
        )
        self._report(
            {"event": "foreign_record", "key": name, "reason": why, "count": self._num_foreign}
        )

    def _look(self, talk: RankConversation) -> None:
        """Publish this rank's beat; read the ruling if there is one, else look at the others."""
        rank = self._topology.rank
        if self._leaving.is_set():
            self._look_at_farewells(talk)
            return
        beat = Beat.of(self._clock.now(), time.monotonic(), self._process)
        talk.publish(beat)
        self._meet_neighbors(talk)
        own = self._own_ruling
        ruling = talk.ruling() if own is None else talk.settle(own)
        if ruling is not None:
            self._obey(ruling)
            return
        if rank != 0:
            self._first_rank_beat = talk.beat_of(0)
            return
        beats = talk.beats()
        if beats is not None:
            self._observe(talk, beats)

    def _look_at_farewells(self, talk: RankConversation) -> None:
        """Say that this rank leaves, and note whether all do."""
        if self._ruling is not None:
            talk.settle(self._ruling)  # those who do not know it find it, whoever removed it
        talk.say_farewell()
        ranks = range(self._topology.world_size)
        if talk.have_left(rank for rank in ranks if rank not in self._killed):
            self._all_leaving.set()

    def _obey(self, ruling: Ruling) -> None:
        """Let the other threads know the ruling."""
        self._ruling = ruling
        self._told.set()

    def _meet_neighbors(self, talk: RankConversation) -> None:
        """Begin to watch the processes of the other ranks of this node, once they have spoken."""
        for rank in sorted(self._unmet):
            beat = talk.beat_of(rank)
            if beat is None:
                return
            self._unmet.discard(rank)
            if beat.machine == self._process.machine:
                self._met[rank] = beat
                self._neighbors.meet(rank, beat.pid)

    def _observe(self, talk: RankConversation, beats: list[Beat]) -> None:
        now = time.monotonic()
        self._observer.see(now, beats, self._clock.median_step_seconds())
        for straggler in self._observer.take_stragglers():
            self._voice.say(straggler.describe())
            self._report(straggler.event())
        hang = self._observer.find_hang(now)
        if hang is not None:
            self._obey(talk.settle(ruling_on_hang(hang, beats)))

    def _watch(self) -> None:
        """Decide whether this rank leaves; never blocks on another process."""
        interval = self._settings.interval_seconds
        last_look = time.monotonic()
        while not self._closed.wait(interval):
            now = time.monotonic()
            if now - last_look > 5 * interval + 5:
                # This process was stopped meanwhile, so that it heard nothing means nothing.
                self._heard_at = now
                self._observer.forget()
            last_look = now
            if self._ruling is not None and not self._is_left_to_main_thread(self._ruling):
                self._leave(self._ruling)
            silent = now - self._heard_at
            limit = self._timeouts.of(self._clock.now().phase)
            if self._store_error:
                limit = min(GONE_SECONDS, limit)
            if silent > limit and self._own_ruling is None:
                self._leave(self._rule_without_store(silent))

    def _rule_without_store(self, silent_seconds: float) -> Ruling:
        """Return the ruling of a rank that cannot ask anybody."""
        rank = self._topology.rank
        return ruling_on_dead_store(rank, self._first_rank_beat, silent_seconds, self._store_error)

    def _leave(self, ruling: Ruling) -> None:
        """Obey a ruling: say why, write stacks if a rank hangs, and end this process."""
        rank = self._topology.rank
        if ruling.kind == "killed":
            self._killed = {ruling.rank}
        if rank == ruling.rank:
            self._voice.say(ruling.text)
        elif self._has_told_death:
            pass
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            self._voice.say(f"rank {rank} leaves: {ruling.text}")
        if rank in ruling.hung_ranks:
            self._voice.say(f"rank {rank} runs again; it stands in {self._location()}")
        if ruling.kind == "hung":
            # A full disk, or one that does not answer, must not keep a hung run alive.
            at_most(LEAVE_SECONDS / 2, lambda: self._write_stacks(ruling), "watchdog stacks")
            if self._ruling is None:
                # The store answers once rank 0 runs again, and rank 0 must find the ruling there.
                self._rule(ruling)
            for neighbor in self._hung_neighbors(ruling).values():
                send_signal(neighbor.pid, neighbor.started, signal.SIGCONT)
            self._told.wait(LEAVE_SECONDS / 2)
        # the first rank writes for all, unless it is gone itself
        is_first_gone = ruling.kind != "failed" and ruling.to_blame() == 0
        if rank == 0 or is_first_gone:
            self._keep(ruling)
        if rank == 0:
            self._leave_last()
        else:
            self._leaving.set()
            # Wait until this rank's own mark is in the store.
            self._all_leaving.wait(2 * self._settings.interval_seconds)
        os._exit(ruling.code)

    def _hung_neighbors(self, ruling: Ruling) -> dict[int, Beat]:
        """Return what the other hung ranks of this node have said of their processes, by rank.

        A ruling names no process: only the rank itself can have said which one is its own.
        """
        neighbors = {}
        for rank in ruling.hung_ranks:
            if rank in self._met and rank != self._topology.rank:
                neighbors[rank] = self._met[rank]
        return neighbors

    def _write_stacks(self, ruling: Ruling) -> None:
        """Write this rank's stacks, and what the kernel says about the hung ranks of this node."""
        rank = self._topology.rank
        for other, neighbor in self._hung_neighbors(ruling).items():
            if is_own_process(neighbor.pid, neighbor.started):
                append_text(self._stacks, other, "\n".join(kernel_report_of(neighbor.pid)))
        heading = f"{escaped_line(ruling.text)}\nstacks of rank {rank} in {self._location()}:"
        append_stacks(self._stacks, rank, heading)

    def _keep(self, ruling: Ruling) -> None:
        """Record a ruling, unless the file system does not answer in time."""
        record = self._record
        if record is not None:
            at_most(LEAVE_SECONDS / 2, lambda: record(ruling), "watchdog record")

    def _leave_last(self) -> None:
        """Wait until every rank is about to leave.

        Otherwise a rank would meet a closed connection before it knows why.
        """
        self._leaving.set()
        self._all_leaving.wait(LEAVE_SECONDS)
        if self._topology.rank == 0:
            # The others see it, too, within this time, and no longer ask the store.
            time.sleep(2 * self._settings.interval_seconds)


@contextlib.contextmanager
def watching(
    run_dir: Path,
    topology: Topology,
    settings: WatchdogSection,
    clock: PhaseClock,
    report: Callable[[dict[str, Any]], None],
    record: Callable[[Ruling], None] | None = None,
    *,
    secret: bytes | None,
) -> Iterator[None]:
    """Watch all ranks while the body runs, and tell them of an error of the body before it is
    raised; all ranks call this together, once their process groups exist.

    Process groups then wait longer than the watchdog does.

    Args:
        run_dir: Receives stacks and, for a moment, the secret of the job; it need not exist.
        topology: The ranks to watch.
        settings: The `watchdog` section of the run YAML.
        clock: As for `Watchdog`.
        report: As for `Watchdog`.
        record: As for `Watchdog`.
        secret: The secret of the job from the environment; None if it has none.

    Raises:
        ConfigError: not all ranks have the same secret.
        StorageError: they cannot share one through the run directory.
    """
    key = b""
    if settings.enabled:
        longest = max(settings.timeout_seconds, settings.long_timeout_seconds)
        with best_effort("Process groups keep torch's limits"):
            wait_at_least(longest + GROUP_MARGIN_SECONDS)
        key = agree_on_key(secret, run_dir, topology.control_group)
    watchdog = Watchdog(run_dir, topology, settings, clock, report, record, key=key)
    watchdog.start()
    try:
        yield
    except RequeueRequested:  # agreed on by all
        raise
    except Exception as error:
        watchdog.report_failure(error)
        raise
    finally:
        watchdog.close()


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error is what the end of another rank looks like from here."""
    if isinstance(error, CptError):
        return False
    if isinstance(error, dist.DistError | ConnectionError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_PEER)

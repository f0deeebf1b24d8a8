"""What is in the store counts only if this start of this job has signed it under that name."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from cpt.resilience.conversation import RankConversation
from cpt.resilience.heartbeat import Beat, Process
from cpt.resilience.phase import PhaseRecord
from cpt.resilience.ruling import Ruling, failure_code
from cpt.resilience.signed_store import MAX_RECORD_BYTES, SignedStore

KEY = b"k" * 32
RULING = Ruling(kind="hung", rank=0, code=71, text="rank 1", hung_ranks=(1,), host="h", node="n")


@pytest.fixture(scope="module")
def server() -> dist.TCPStore:
    """The store of a process group, as rank 0 opens it."""
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )


@pytest.fixture(scope="module")
def connections(server: dist.TCPStore) -> list[dist.TCPStore]:
    """Three connections, as every process that reaches the port can have one."""
    found = []
    for _ in range(3):
        client = dist.TCPStore(
            "127.0.0.1",
            server.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=20),
        )
        client.set_timeout(timedelta(seconds=1))
        found.append(client)
    return found


class Ranks:
    """One rank that writes, one that reads, and somebody who has not their key."""

    def __init__(self, connections: list[dist.TCPStore], place: str) -> None:
        self.told: list[tuple[str, str]] = []
        self._places = [dist.PrefixStore(place, client) for client in connections]
        self.writer = SignedStore(self._places[0], KEY, self._tell)
        self.reader = SignedStore(self._places[1], KEY, self._tell)
        self.stranger = self._places[2]

    def arrive(self) -> None:
        """Wait until what was set is in the store: `set` itself does not wait for an answer."""
        for place in self._places:
            place.check(["nothing"])

    def _tell(self, name: str, why: str) -> None:
        self.told.append((name, why))


@pytest.fixture
def ranks(connections: list[dist.TCPStore], request: pytest.FixtureRequest) -> Ranks:
    return Ranks(connections, request.node.name)


def test_record_of_the_job_is_read_back(ranks: Ranks) -> None:
    assert ranks.reader.read("beat/0") is None
    ranks.writer.write("beat/0", {"a": 1})
    ranks.arrive()
    assert ranks.reader.read("beat/0") == {"a": 1}
    assert ranks.reader.read_all(["beat/0", "beat/1"]) == [{"a": 1}, None]
    assert ranks.told == []


def unsigned(ranks: Ranks) -> None:
    ranks.stranger.set("beat/0", '{"number": 9, "record": {"a": 2}}')


def signed_by_another(ranks: Ranks) -> None:
    SignedStore(ranks.stranger, b"x" * 32, print).write("beat/0", {"a": 2})


def moved(ranks: Ranks) -> None:
    ranks.writer.write("beat/1", {"a": 2})
    ranks.stranger.set("beat/0", ranks.stranger.get("beat/1"))


def no_text(ranks: Ranks) -> None:
    ranks.stranger.set("beat/0", b"\xff\x00" * 50)


def nested(ranks: Ranks) -> None:
    ranks.stranger.set("beat/0", "0" * 64 + "[" * 100_000)


def empty(ranks: Ranks) -> None:
    ranks.stranger.set("beat/0", b"")


@pytest.mark.parametrize("attack", [unsigned, signed_by_another, moved, no_text, nested, empty])
def test_foreign_record_is_not_taken_and_told_once(
    ranks: Ranks, attack: Callable[[Ranks], None]
) -> None:
    ranks.writer.write("beat/0", {"a": 1})
    ranks.arrive()
    assert ranks.reader.read("beat/0") == {"a": 1}
    attack(ranks)
    ranks.arrive()
    for _ in range(3):
        assert ranks.reader.read("beat/0") is None
    assert ranks.told == [("beat/0", "its signature is wrong")]
    ranks.writer.write("beat/0", {"a": 3})
    ranks.arrive()
    assert ranks.reader.read("beat/0") == {"a": 3}


def test_old_record_is_not_taken_for_a_new_one(ranks: Ranks) -> None:
    ranks.writer.write("beat/0", {"a": 1})
    ranks.arrive()
    old = ranks.stranger.get("beat/0")
    ranks.writer.write("beat/0", {"a": 2})
    ranks.arrive()
    assert ranks.reader.read("beat/0") == {"a": 2}
    ranks.stranger.set("beat/0", old)
    ranks.arrive()
    assert ranks.reader.read("beat/0") is None
    assert ranks.told == [("beat/0", "it is an old record")]


def test_removed_record_is_told_and_nobody_waits_for_it(ranks: Ranks) -> None:
    ranks.writer.write("beat/0", {"a": 1})
    ranks.arrive()
    assert ranks.reader.read("beat/0") == {"a": 1}
    ranks.stranger.delete_key("beat/0")
    assert ranks.reader.read_all(["beat/0"]) == [None]
    assert ranks.told == [("beat/0", "it was removed")]


def test_value_longer_than_any_record_is_removed(ranks: Ranks) -> None:
    piece = "x" * (MAX_RECORD_BYTES // 2 + 1)
    ranks.stranger.append("beat/0", piece)
    ranks.stranger.append("beat/0", piece)
    ranks.arrive()
    assert ranks.reader.read("beat/0") is None
    assert ranks.told == [("beat/0", f"it has {2 * len(piece)} bytes")]
    assert not ranks.stranger.check(["beat/0"])


@pytest.mark.parametrize("value", [b"", b'{"code": 0}', b"\xff\xfe", b"x" * (MAX_RECORD_BYTES + 1)])
def test_first_record_of_the_job_holds_over_what_others_put_there(
    ranks: Ranks, value: bytes
) -> None:
    ranks.stranger.set("verdict", value)
    ranks.arrive()
    assert ranks.writer.settle("verdict", {"a": 1}) == {"a": 1}
    assert ranks.reader.settle("verdict", {"a": 2}) == {"a": 1}
    assert ranks.reader.read("verdict") == {"a": 1}


def conversations(ranks: Ranks) -> tuple[RankConversation, RankConversation]:
    """The conversation of two ranks, as each of them sees it."""
    first = RankConversation(0, 2, ranks.reader, ranks.reader._on_foreign)
    second = RankConversation(1, 2, ranks.writer, ranks.writer._on_foreign)
    return first, second


def beat(count: int) -> Beat:
    record = PhaseRecord(count=count, phase="data", step=1)
    return Beat.of(record, float(count), Process.this())


def test_beat_that_was_overwritten_leaves_the_last_one_and_the_next_one_counts(
    ranks: Ranks,
) -> None:
    first, second = conversations(ranks)
    first.publish(beat(1))
    ranks.arrive()
    assert first.beats() is None
    second.publish(beat(1))
    ranks.arrive()
    assert first.beats() == [beat(1), beat(1)]
    ranks.stranger.set("beat/0", "not mine")
    ranks.stranger.set("beat/1", "nor yours")
    ranks.arrive()
    first.publish(beat(2))
    ranks.arrive()
    assert first.beats() == [beat(2), beat(1)]
    second.publish(beat(2))
    ranks.arrive()
    assert first.beats() == [beat(2), beat(2)]
    assert [name for name, _ in ranks.told] == ["beat/1"]


def test_own_beat_is_the_one_that_was_published_whatever_the_store_says(ranks: Ranks) -> None:
    first, second = conversations(ranks)
    second.publish(beat(1))
    first.publish(beat(1))
    ranks.arrive()
    old = ranks.stranger.get("beat/0")
    first.publish(beat(7))
    ranks.stranger.set("beat/0", old)
    ranks.arrive()
    found = first.beats()
    assert found is not None and found[0] == beat(7)


def test_ruling_goes_through_the_store_and_farewells_are_signed(ranks: Ranks) -> None:
    first, second = conversations(ranks)
    assert second.settle(RULING) == RULING
    assert first.ruling() == RULING and ranks.told == []
    later = Ruling(kind="failed", rank=1, code=70, text="later")
    assert first.settle(later) == RULING
    ranks.stranger.set("left/0", "1")
    ranks.stranger.set("left/1", "1")
    ranks.arrive()
    assert not first.have_left([0, 1])
    first.say_farewell()
    second.say_farewell()
    ranks.arrive()
    assert first.have_left([0, 1])


RECORD = Ruling(kind="failed", rank=0, code=74, text="the disk is full").to_record()


@pytest.mark.parametrize(
    "change",
    [
        {"code": 0},
        {"code": 75},
        {"code": 1},
        {"code": 137},
        {"code": True},
        {"code": "74"},
        {"code": 74 + 256},
        {"kind": "done"},
        {"kind": "hung"},
        {"rank": 2},
        {"rank": -1},
        {"kind": "killed", "code": 137, "signal": 15},
        {"kind": "killed", "code": 128 + 99, "signal": 99},
        {"hung_ranks": [7]},
        {"hung_ranks": {"0": ["h", 1]}},
        {"text": "x" * 5000},
        {"host": 3},
        {"agreed": 1},
        {"wake": {}},
    ],
    ids=lambda change: ", ".join(f"{name} {value!r:.12}" for name, value in change.items()),
)
def test_record_that_no_ruling_can_be_is_passed_over(
    ranks: Ranks, change: dict[str, object]
) -> None:
    """Such a record is signed: a rank of another version may have written it."""
    ranks.writer.settle("verdict", RECORD | change)
    first, _ = conversations(ranks)
    assert first.ruling() is None
    assert [name for name, _ in ranks.told] == ["verdict"]


def test_run_never_leaves_with_the_code_of_success_or_of_a_requeue() -> None:
    assert [failure_code(code) for code in (0, 75, 1, 65, 70, 71, 74, 78)] == [
        70,
        70,
        70,
        65,
        70,
        71,
        74,
        78,
    ]
    for kind in ("hung", "failed", "killed"):
        for code in (0, 75):
            with pytest.raises(ValueError, match="cannot have the code"):
                Ruling(kind=kind, rank=0, code=code, text="")


def test_longest_ruling_and_beat_fit_into_a_record(ranks: Ranks) -> None:
    ruling = Ruling(
        kind="hung",
        rank=0,
        code=71,
        text="\U0001f600" * 9000,
        hung_ranks=tuple(range(10_000)),
        host="\udcff" * 999,
    )
    ranks.writer.settle("verdict", ruling.to_record())
    found = RankConversation(0, 10_000, ranks.reader, ranks.reader._on_foreign).ruling()
    assert found is not None and found.text == "\U0001f600" * 4000 and ranks.told == []


def test_process_id_of_this_test_is_in_its_beat() -> None:
    """Guards the fields that decide who is sent a signal."""
    own = beat(1)
    assert own.pid == os.getpid() and own.started.isdigit() and own.machine

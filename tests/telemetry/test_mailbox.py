"""Posted events are collected once, in the order in which they were posted."""

from __future__ import annotations

from cpt.telemetry.mailbox import EventMailbox


def test_events_are_collected_once_in_order() -> None:
    mailbox = EventMailbox()
    mailbox.post({"event": "straggler"})
    mailbox.post({"event": "memory"})
    assert mailbox.collect() == [{"event": "straggler"}, {"event": "memory"}]
    assert mailbox.collect() == []

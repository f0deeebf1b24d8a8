"""A SIGKILL is put down to the kernel's out-of-memory killer as surely as its counts allow."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.resilience.out_of_memory import KillCounts, kill_counts


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


EVENTS = "low 0\nhigh 0\nmax 12\noom 2\noom_kill 2\noom_group_kill 0\n"


@pytest.mark.parametrize(
    ("groups", "file", "text"),
    [
        ("0::/job/step\n", "sys/fs/cgroup/job/step/memory.events", EVENTS),
        ("0::/job/step\n", "sys/fs/cgroup/memory.events", EVENTS),
        (
            "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n",
            "sys/fs/cgroup/memory/job/memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        ),
        (
            "4:memory:/job\n",
            "sys/fs/cgroup/memory/memory.oom_control",
            "oom_kill_disable 0\noom_kill 2\n",
        ),
    ],
    ids=["v2", "v2-in-a-container", "v1", "v1-in-a-container"],
)
def test_kills_of_the_job_are_read_from_its_control_group(
    tmp_path, groups: str, file: str, text: str
) -> None:
    root = machine(
        tmp_path,
        {"proc/self/cgroup": groups, "proc/vmstat": "nr_free 5\noom_kill 7\n", file: text},
    )
    assert kill_counts(root) == KillCounts(job=2, machine=7)


def test_what_the_kernel_does_not_say_is_unknown(tmp_path) -> None:
    assert kill_counts(tmp_path) == KillCounts(job=None, machine=None)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (
            (0, 0),
            (1, 1),
            "the job's memory was used up (kills in its control group since the start: 1).",
        ),
        ((0, 3), (0, 5), "is the likely cause (its kills on this machine since the start: 2)."),
        (
            (None, 3),
            (None, 4),
            "is the likely cause (its kills on this machine since the start: 1).",
        ),
        ((0, 3), (0, 3), "counts no kill for lack of memory in this run, so the batch system"),
        ((None, None), (None, None), "out-of-memory killer is the usual cause."),
    ],
)
def test_certainty_of_the_words_is_that_of_the_counts(
    before: tuple[int | None, int | None], now: tuple[int | None, int | None], words: str
) -> None:
    counts = KillCounts(job=now[0], machine=now[1])
    assert words in counts.since(KillCounts(job=before[0], machine=before[1]))

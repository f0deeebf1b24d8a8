"""Promises of the rule on whose directories are read back and written to."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.store import ownership
from data_pipeline.store.files import make_folder, write_text
from data_pipeline.store.ownership import (
    SHARED_VARIABLE,
    foreign_problems,
    refuse_foreign,
    shared_dirs,
)
from tests.support.other_users import (
    ATTACKER,
    VICTIM,
    as_user,
    common_folder,
    needs_root,
    owned_folder,
    owned_link,
)

NO_ID = 0xFFFFFFFF
"""The id of an entry of an ACL that names nobody."""


@pytest.fixture
def common() -> Iterator[Path]:
    with common_folder() as folder:
        yield folder


def problems_for(uid: int, path: Path, folders: tuple[str, ...] = ()) -> list[str]:
    return as_user(uid, lambda: foreign_problems(path, "run directory", folders))


@needs_root
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o2750])
def test_directory_of_the_user_that_nobody_else_may_write_to_is_accepted(
    common: Path, mode: int
) -> None:
    assert problems_for(VICTIM, owned_folder(common / "own", VICTIM, mode)) == []


@needs_root
def test_directory_of_root_is_accepted(common: Path) -> None:
    assert problems_for(VICTIM, owned_folder(common / "roots", 0, 0o755)) == []


@needs_root
def test_directory_of_another_user_is_refused_with_path_owner_mode_and_cure(common: Path) -> None:
    folder = owned_folder(common / "foreign", ATTACKER, 0o2770)
    (message,) = problems_for(VICTIM, folder)
    assert f"run directory {folder} belongs to uid {ATTACKER}, not to uid {VICTIM}" in message
    assert "mode drwxrws---" in message
    assert f"{SHARED_VARIABLE}={folder}" in message


@pytest.mark.parametrize(
    ("mode", "who"), [(0o770, "its group"), (0o2775, "its group"), (0o1777, "everybody")]
)
def test_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int, who: str) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=f"may be written to by {who}.*chmod -R g-w,o-w"):
        refuse_foreign(folder, "build")


def test_directory_under_a_group_writable_parent_is_accepted(tmp_path: Path) -> None:
    parent = tmp_path / "lab"
    parent.mkdir()
    parent.chmod(0o2770)
    own = parent / "own"
    own.mkdir(mode=0o700)
    refuse_foreign(own, "run directory")


def test_path_that_is_not_there_is_accepted(tmp_path: Path) -> None:
    refuse_foreign(tmp_path / "no" / "such", "run directory")


def test_shared_setting_covers_a_directory_and_what_lies_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_to_all = tmp_path / "shared" / "run"
    open_to_all.mkdir(parents=True)
    open_to_all.chmod(0o777)
    neighbor = tmp_path / "shared-not"
    neighbor.mkdir()
    neighbor.chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    for named in (tmp_path / "shared", open_to_all, tmp_path / "link"):
        monkeypatch.setenv(SHARED_VARIABLE, f"/no/such:{named}")
        assert foreign_problems(open_to_all, "run directory") == []
        assert foreign_problems(tmp_path / "link" / "run", "run directory") == []
        assert foreign_problems(neighbor, "run directory") != []


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("shared/run", "'shared/run', which is not an absolute path"),
        ("/a:~/b", "'~/b', which is not an absolute path"),
        ("/", "the whole file system"),
        ("/a:/usr/../", "the whole file system"),
    ],
)
def test_wrong_shared_setting_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, reason: str
) -> None:
    monkeypatch.setenv(SHARED_VARIABLE, value)
    with pytest.raises(ConfigError, match=reason):
        refuse_foreign(tmp_path, "build")


def test_empty_entries_of_the_shared_setting_name_nothing() -> None:
    assert shared_dirs({SHARED_VARIABLE: "::"}) == ()
    assert shared_dirs({}) == ()


@needs_root
def test_link_of_another_user_is_refused_though_it_leads_to_a_directory_of_this_one(
    common: Path,
) -> None:
    own = owned_folder(common / "private", VICTIM, 0o700)
    link = owned_link(common / "run", own, ATTACKER)
    (message,) = problems_for(VICTIM, link)
    assert f"leads over {link}, a link of uid {ATTACKER}" in message
    assert f"without the link: {own}" in message


@needs_root
def test_link_of_another_user_in_the_middle_of_a_path_is_refused(common: Path) -> None:
    own = owned_folder(common / "private", VICTIM, 0o700)
    owned_folder(own / "run", VICTIM, 0o700)
    owned_link(common / "away", own, ATTACKER)
    owned_link(common / "mine", Path("away"), VICTIM)
    assert len(problems_for(VICTIM, common / "mine" / "run")) == 1
    assert problems_for(VICTIM, common / "private" / "run") == []


@needs_root
def test_link_of_the_user_is_followed_and_its_target_is_judged(common: Path) -> None:
    owned_folder(common / "good", VICTIM, 0o755)
    owned_folder(common / "bad", VICTIM, 0o775)
    good = owned_link(common / "to-good", common / "good", VICTIM)
    bad = owned_link(common / "to-bad", common / "bad", VICTIM)
    assert problems_for(VICTIM, good) == []
    assert "may be written to by its group" in problems_for(VICTIM, bad)[0]


def test_links_in_a_circle_are_an_error_of_the_operating_system(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="Too many levels"):
        refuse_foreign(tmp_path / "a", "run directory")


@needs_root
def test_foreign_entries_are_named(common: Path) -> None:
    run = owned_folder(common / "run", VICTIM, 0o755)
    owned_link(run / "metrics.jsonl", common / "victims-file", ATTACKER)
    owned_folder(run / "logs", VICTIM, 0o770)
    owned_folder(run / "checkpoints", VICTIM, 0o755)
    owned_folder(run / "checkpoints" / "step-00000001", ATTACKER, 0o755)
    (message,) = problems_for(VICTIM, run, ("checkpoints", "guard"))
    assert f"{run}/metrics.jsonl is a link of uid {ATTACKER}" in message
    assert f"{run}/logs may be written to by its group" in message
    assert f"{run}/checkpoints/step-00000001 belongs to uid {ATTACKER}" in message


@needs_root
def test_modes_inside_a_directory_that_nobody_else_can_enter_do_not_matter(common: Path) -> None:
    run = owned_folder(common / "run", VICTIM, 0o700)
    owned_folder(run / "logs", VICTIM, 0o775)
    assert problems_for(VICTIM, run) == []
    owned_folder(run / "guard", ATTACKER, 0o755)
    assert f"{run}/guard belongs to uid {ATTACKER}" in problems_for(VICTIM, run)[0]


@needs_root
def test_link_inside_is_accepted_if_the_user_made_it_and_its_target_is_his(common: Path) -> None:
    run = owned_folder(common / "run", VICTIM, 0o755)
    disk = owned_folder(common / "disk", VICTIM, 0o755)
    owned_link(run / "checkpoints", disk, VICTIM)
    assert problems_for(VICTIM, run, ("checkpoints",)) == []
    disk.chmod(0o777)
    message = problems_for(VICTIM, run)[0]
    assert f"{run}/checkpoints leads to {disk}, which may be written to by everybody" in message


@needs_root
def test_many_foreign_entries_are_counted(common: Path) -> None:
    run = owned_folder(common / "run", VICTIM, 0o755)
    for number in range(12):
        owned_folder(run / f"{number:02}", ATTACKER, 0o755)
    (message,) = problems_for(VICTIM, run)
    assert "and 7 more" in message


def open_tree(common: Path) -> Path:
    """A folder with a file two folders down; all of it can be entered by others."""
    (common / "built" / "web" / "shards").mkdir(parents=True)
    (common / "built" / "web" / "shards" / "documents-00000.tokens").write_bytes(b"")
    for path in (common / "built").rglob("*"):
        path.chmod(0o755)
    (common / "built").chmod(0o755)
    return common / "built"


def test_file_that_others_may_write_to_is_found_however_deep(common: Path) -> None:
    built = open_tree(common)
    refuse_foreign(built, "build")
    shard = built / "web" / "shards" / "documents-00000.tokens"
    shard.chmod(0o666)
    with pytest.raises(ConfigError, match=f"{shard} may be written to by everybody"):
        refuse_foreign(built, "build")
    (built / "web").chmod(0o700)
    refuse_foreign(built, "build")


def test_folders_are_not_entered_through_links(common: Path) -> None:
    built = open_tree(common)
    (built / "web" / "around").symlink_to(built)
    refuse_foreign(built, "build")


def test_very_many_entries_are_refused_with_a_cure(
    common: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "MOST_ENTRIES", 10)
    built = open_tree(common)
    for number in range(10):
        (built / "web" / f"{number}").touch(0o644)
    with pytest.raises(ConfigError, match=f"more than 10 entries.*chmod go-rwx {built}"):
        refuse_foreign(built, "build")
    built.chmod(0o700)
    refuse_foreign(built, "build")


def test_mode_in_a_run_directory_that_nobody_else_can_enter_does_not_matter(common: Path) -> None:
    step = common / "run" / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    step.chmod(0o775)
    (common / "run" / "checkpoints").chmod(0o755)
    (common / "run").chmod(0o700)
    refuse_foreign(step, "checkpoint", in_run_dir=True)
    (common / "run").chmod(0o755)
    with pytest.raises(ConfigError, match="may be written to by its group"):
        refuse_foreign(step, "checkpoint", in_run_dir=True)


@needs_root
def test_folder_of_another_user_in_a_closed_run_directory_is_refused(common: Path) -> None:
    run = owned_folder(common / "run", VICTIM, 0o700)
    step = owned_folder(run / "step-00000001", ATTACKER, 0o755)
    (message,) = as_user(VICTIM, lambda: foreign_problems(step, "checkpoint", in_run_dir=True))
    assert f"belongs to uid {ATTACKER}" in message


@needs_root
def test_folder_that_cannot_be_looked_into_is_named_with_its_owner(common: Path) -> None:
    run = owned_folder(common / "run", VICTIM, 0o700)
    owned_folder(run / "logs", 0, 0o700)
    (message,) = problems_for(VICTIM, run, ("logs",))
    assert f"{run}/logs cannot be looked into (owner root (uid 0), mode drwx------)" in message
    locked = owned_folder(common / "built", VICTIM, 0o755)
    owned_folder(locked / "web", 0, 0o711)
    (message,) = as_user(VICTIM, lambda: foreign_problems(locked, "build"))
    assert f"{locked}/web cannot be looked into (owner root (uid 0), mode drwx--x--x)" in message


@needs_root
def test_names_that_another_user_has_given_steer_no_terminal(common: Path) -> None:
    run = owned_folder(common / "run", VICTIM, 0o755)
    owned_folder(run / "x\x1b]0;owned\x07\nFAKE: fine", ATTACKER, 0o755)
    (message,) = problems_for(VICTIM, run)
    assert "\x1b" not in message and "\nFAKE" not in message
    assert "x\\x1b]0;owned\\x07\\nFAKE: fine belongs to" in message


ACL_OF_ATTACKER = (
    (0x01, 7, NO_ID),
    (0x02, 7, ATTACKER),
    (0x04, 0, NO_ID),
    (0x10, 7, NO_ID),
    (0x20, 0, NO_ID),
)
"""Tag, permissions and id of each entry: rwx for the owner, for one more user, and as the mask
(linux/posix_acl.h, linux/posix_acl_xattr.h).
"""


def set_acl(path: Path, kind: str) -> None:
    entries = b"".join(struct.pack("<HHI", *entry) for entry in ACL_OF_ATTACKER)
    try:
        os.setxattr(path, f"system.posix_acl_{kind}", struct.pack("<I", 2) + entries)
    except OSError as error:
        pytest.skip(f"no POSIX ACLs here: {error.strerror}")


def test_acl_that_lets_another_user_write_is_seen_and_the_cure_takes_it_away(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "own"
    folder.mkdir(mode=0o700)
    set_acl(folder, "access")
    with pytest.raises(ConfigError, match="may be written to by its group"):
        refuse_foreign(folder, "build")
    folder.chmod(stat.S_IMODE(folder.stat().st_mode) & ~0o022)
    refuse_foreign(folder, "build")


def test_what_is_made_under_a_default_acl_passes_the_check(tmp_path: Path) -> None:
    set_acl(tmp_path, "default")
    make_folder(tmp_path / "run" / "guard")
    write_text(tmp_path / "run" / "guard" / "one.json", "{}")
    refuse_foreign(tmp_path / "run", "run directory")
    for path in (tmp_path / "run").rglob("*"):
        refuse_foreign(path, "file")

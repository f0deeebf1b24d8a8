"""`cpt watch` shows all runs of a folder as they are, nothing else, and writes nothing."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from cpt.cli import main
from cpt.errors import ConfigError
from cpt.telemetry.run_overview import RunFollower
from cpt.telemetry.watch.board import Board, find_runs
from cpt.telemetry.watch.bounded_server import MAX_CONNECTIONS
from cpt.telemetry.watch.pages import Pages
from tests.support.browser import running_browser
from tests.support.launcher import ROOT
from tests.support.run_events import end, guard, start, step
from tests.support.run_folders import PAUSE, falling_steps, leave_lock, make_run, steps

CANARY = "canary-of-a-key"


def fill(root: Path) -> None:
    """Make one run of each state, and what is none."""
    going = make_run(
        root / "going",
        start(0),
        *falling_steps(1, 20),
        guard(10, delta_percent=0.4, state="green"),
        guard(20, delta_percent=0.9, state="green"),
    )
    leave_lock(going)
    (going / "secret.txt").write_text(CANARY)
    make_run(
        root / "ja" / "paused",
        start(0),
        *falling_steps(1, 4),
        guard(4, delta_percent=2.0, state="green"),
        PAUSE,
        end(4),
    )
    cause = "no space left on the file system"
    make_run(root / "ja" / "failed", start(0), *steps(1, 5), end(5, exit_code=74, cause=cause))
    make_run(root / "ja" / "finished", start(0), *steps(1, 30), end(30), saved=30)
    make_run(root / "deep" / "er" / "still" / "lost", start(0))
    (root / "broken" / "metrics.jsonl").mkdir(parents=True)
    (root / "notes").mkdir()


@dataclass(kw_only=True)
class Served:
    """A server at work."""

    root: Path
    address: str
    """What was printed, with the token."""

    @property
    def token(self) -> str:
        """The token of this start."""
        return self.address.partition("?token=")[2]

    def ask(
        self, path: str, *, method: str = "GET", host: str | None = None, cookie: str | None = None
    ) -> tuple[int, dict[str, str], str]:
        """Return status, headers and text of an answer; the path is sent as it is.

        The cookie is the one that a browser has been given, unless another one is given.
        """
        place = urlsplit(self.address)
        connection = http.client.HTTPConnection(place.netloc, timeout=60)
        own = f"cpt-watch-{place.port}={self.token}"
        headers = {"Cookie": own if cookie is None else cookie}
        if host is not None:
            headers["Host"] = host
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, dict(answer.getheaders()), text

    def run(self, key: str) -> dict[str, Any]:
        """Return the state of a run as JSON."""
        found: dict[str, Any] = json.loads(self.ask(f"/api/run/{key}")[2])
        return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("watched")
    fill(root)
    command = [sys.executable, "-m", "cpt.cli", "watch", "--root", str(root), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_API_KEY": CANARY}
    process = subprocess.Popen(
        [*command, "--interval", "1"], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        found = re.search(r"http://\S+", told)
        assert found is not None, told
        yield Served(root=root, address=found.group())
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_silent_connections_of_others_do_not_lock_the_owner_out(served: Served) -> None:
    place = urlsplit(served.address)
    assert place.hostname is not None and place.port is not None
    owner = http.client.HTTPConnection(place.netloc, timeout=60)
    cookie = {"Cookie": f"cpt-watch-{place.port}={served.token}"}
    owner.request("GET", "/rows", headers=cookie)
    assert owner.getresponse().read()
    first = owner.sock
    with contextlib.ExitStack() as held:
        for _ in range(MAX_CONNECTIONS + 12):
            held.enter_context(socket.create_connection((place.hostname, place.port)))
        time.sleep(0.3)
        assert served.ask("/rows")[0] == 200, "a new connection"
        owner.request("GET", "/rows", headers=cookie)
        assert owner.getresponse().status == 200
        assert owner.sock is first, "the old connection"
    owner.close()


@pytest.mark.parametrize(
    "path", ["/", "/rows", "/run/going", "/report/going", "/compare?run=going"]
)
@pytest.mark.parametrize("known", ["", "x" * 32, "\xe9"], ids=["none", "wrong", "no-ascii"])
def test_another_user_of_the_machine_gets_no_page_without_the_token(
    served: Served, path: str, known: str
) -> None:
    joint = "&" if "?" in path else "?"
    quoted = quote(known)
    for cookie in ("", f"cpt-watch-{urlsplit(served.address).port}={quoted}"):
        for asked in (path, f"{path}{joint}token={quoted}"):
            status, headers, page = served.ask(asked, cookie=cookie)
            assert status == 403 and "going" not in page and "Set-Cookie" not in headers
            assert served.token not in page


@pytest.mark.parametrize("path", ["/api/runs", "/api/run/going", "/version?run=going"])
def test_numbers_are_not_given_without_the_token_either(served: Served, path: str) -> None:
    assert served.ask(path, cookie="")[0] == 403


def test_address_that_was_printed_gives_a_cookie_and_leads_to_one_without_the_token(
    served: Served,
) -> None:
    assert len(served.token) >= 32
    path = f"/compare?run=going&token={served.token}&run=ja%2Fpaused"
    status, headers, page = served.ask(path, cookie="")
    assert status == 303 and page == ""
    assert headers["Location"] == "/compare?run=going&run=ja%2Fpaused"
    cookie, *settings = headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(settings)
    assert served.ask(headers["Location"], cookie=cookie)[0] == 200
    status, headers, text = served.ask(f"/api/runs?token={served.token}", cookie="")
    assert status == 200 and "going" in json.loads(text) and "Set-Cookie" not in headers


def test_index_lists_every_run_with_its_state(served: Served) -> None:
    status, headers, page = served.ask("/")
    assert status == 200
    rows = re.findall(r'<tr data-run="([^"]+)">(.*?)</tr>', page, re.DOTALL)
    assert rows[0][0] == "going"
    texts = {key: " ".join(re.sub(r"<[^>]+>", " ", row).split()) for key, row in rows}
    assert set(texts) == {"going", "broken", "ja/paused", "ja/failed", "ja/finished"}
    assert "running" in texts["going"] and "20 of 30" in texts["going"]
    assert "+0.9 %, tolerated +1, green" in texts["going"]
    assert "paused by the guard english lost 2 %" in texts["ja/paused"]
    assert "step 4: pause" in texts["ja/paused"]
    assert "failed no space left on the file system (exit code 74)" in texts["ja/failed"]
    assert "finished" in texts["ja/finished"]
    assert "metrics.jsonl: Is a directory" in texts["broken"]
    assert "newest" not in texts
    assert CANARY not in page and "script-src 'self'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/run/../../etc/passwd",
        "/report/..%2f..%2f..%2fetc%2fpasswd",
        "/report/going/secret.txt",
        "/run//etc",
        "/run/notes",
        "/static/../board.py",
        "/static/server.py",
        "/api/run/deep/er/still/lost",
        "/going/metrics.jsonl",
    ],
)
def test_no_address_leads_out_of_the_runs(served: Served, path: str) -> None:
    status, _, text = served.ask(path)
    assert status == 404
    assert CANARY not in text and "root:" not in text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_only_reading_is_answered(served: Served, method: str) -> None:
    for path in ("/", "/run/going", "/api/runs", "/nothing"):
        assert served.ask(path, method=method)[0] in (404, 405)


def test_requests_by_a_foreign_name_are_refused(served: Served) -> None:
    assert served.ask("/", host="attacker.example")[0] == 403
    assert served.ask("/", host="localhost")[0] == 200


def test_run_page_frames_its_report(served: Served) -> None:
    status, headers, page = served.ask("/run/ja/paused")
    assert status == 200 and 'src="/report/ja/paused"' in page
    status, headers, report = served.ask("/report/ja/paused")
    assert status == 200 and "paused by the guard" in report
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    status, _, empty = served.ask("/report/broken")
    assert status == 200 and "logged nothing yet" in empty


def test_runs_are_laid_over_each_other(served: Served) -> None:
    query = "run=going&run=ja/paused"
    assert "/comparison?run=going" in served.ask(f"/compare?{query}")[2]
    status, _, page = served.ask(f"/comparison?{query}&axis=tokens")
    assert status == 200 and "going / ja/paused" in page
    assert served.ask("/compare")[0] == 400
    assert served.ask("/compare?run=nothing")[0] == 404
    assert served.ask(f"/comparison?{query}&axis=years")[0] == 400


def test_run_is_followed_while_it_writes_and_nothing_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", start(0), *steps(1, 3))
    leave_lock(run)
    board = Board(tmp_path, depth=1)
    board.refresh()
    line = json.dumps(step(4))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line[:10])
        file.flush()
        board.refresh()
        assert board.runs()[0].overview.step == 3
        file.write(line[10:] + "\n")
    before = {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}
    board.refresh()
    assert board.runs()[0].overview.step == 4
    assert {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]} == before


def test_log_that_is_long_is_told_by_its_end_until_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", start(0), *steps(1, 500))
    monkeypatch.setattr("cpt.telemetry.watch.board.CHUNK_BYTES", 10_000)
    monkeypatch.setattr("cpt.telemetry.watch.board.READ_SECONDS", 0.0)
    board = Board(tmp_path, depth=1)
    board.refresh()
    seen = board.runs()[0].overview
    assert seen.step == 500 and "of its log is read so far" in seen.problems[-1]
    monkeypatch.setattr("cpt.telemetry.watch.board.READ_SECONDS", 60.0)
    board.refresh()
    assert board.runs()[0].overview.problems == ()
    assert board.runs()[0].overview.tokens == 500_000


def test_depth_is_bounded_and_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    make_run(root / "a" / "b" / "c", start(0))
    make_run(tmp_path / "outside" / "x", start(0))
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "round").symlink_to(root)
    (root / "newest").symlink_to(root / "old")
    make_run(root / "old", start(0))
    make_run(root / "a" / "previous", start(0))
    assert [path.name for path in find_runs(root, 1)] == ["old"]
    found = [path.relative_to(root).as_posix() for path in find_runs(root, 2)]
    assert "a/previous" in found and not any("link" in name for name in found)
    assert [path.name for path in find_runs(root / "a" / "b" / "c", 0)] == ["c"]


@pytest.mark.parametrize("name", ["config.resolved.yaml", "metrics.jsonl", "guard/generation/a"])
def test_run_with_a_file_outside_the_folder_is_listed_and_not_read(
    name: str, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    run = make_run(root / "run", start(0), step(1))
    other = make_run(root / "other", start(0), step(1))
    secret = tmp_path / "secret"
    secret.write_text(f'{{"{CANARY}": 1}}\n')
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    (root / "kept.yaml").write_text("train: {total_steps: 7}")
    (other / "config.resolved.yaml").unlink()
    (other / "config.resolved.yaml").symlink_to("../kept.yaml")
    board = Board(root, depth=1)
    board.refresh()
    found, linked = board.find("run"), board.find("other")
    assert found is not None and linked is not None
    assert found.overview.cause == f"{name} is a link out of the folder"
    # one that stays inside is not followed either
    assert linked.overview.planned_steps is None
    assert any("symbolic link" in problem for problem in linked.overview.problems)
    pages = Pages()
    for page in (
        pages.rows(board),
        pages.report(found),
        pages.comparison([linked, found], "steps"),
    ):
        assert f"{name} is a link out of the folder" in page and CANARY not in page


def test_link_to_itself_is_told_as_what_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", start(0), step(1))
    (run / "config.resolved.yaml").unlink()
    (run / "config.resolved.yaml").symlink_to("config.resolved.yaml")
    board = Board(tmp_path, depth=1)
    board.refresh()
    (found,) = board.runs()
    assert not found.is_closed and found.overview.step == 1
    assert "Too many levels of symbolic links" in found.overview.problems[-1]


def test_folder_that_cannot_be_looked_at_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", start(0))
    (tmp_path / "gone").mkdir()
    is_dir = Path.is_dir

    def stale(path: Path) -> bool:
        if path.name == "gone":
            raise OSError(errno.ESTALE, "Stale file handle")
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", stale)
    assert [path.name for path in find_runs(tmp_path, 1)] == ["run"]


def test_root_that_cannot_be_read_for_a_moment_keeps_its_runs_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", start(0))
    board = Board(tmp_path, depth=1)
    board.refresh()
    monkeypatch.setattr("cpt.telemetry.watch.board.SEARCH_SECONDS", 0.0)
    monkeypatch.setattr(os, "listdir", lambda _: no_answer())
    board.refresh()
    page = Pages().rows(board)
    assert 'data-run="run"' in page and "Input/output error" in page


def no_answer() -> list[str]:
    """Fail as a file server does that does not answer."""
    raise OSError(errno.EIO, "Input/output error")


def test_log_that_is_not_understood_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "odd", start(0), step(1), {"event": "end", "step": 1, "time": 10**400})
    make_run(tmp_path / "run", start(0), step(1))
    board = Board(tmp_path, depth=1)
    board.refresh()
    assert [run.overview.step for run in board.runs()] == [1, 1]
    read_on = RunFollower.read_on

    def broken(follower: RunFollower, max_bytes: int) -> bool:
        if follower.run_dir.name == "odd":
            raise OverflowError("too large")
        return read_on(follower, max_bytes)

    monkeypatch.setattr(RunFollower, "read_on", broken)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(2)) + "\n")
    board.refresh()
    run, odd = board.find("run"), board.find("odd")
    assert run is not None and run.overview.step == 2 and run.overview.problems == ()
    assert odd is not None and "OverflowError: too large" in odd.overview.problems[-1]


def test_run_whose_name_is_no_text_is_listed(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff?#%<b>"))
    make_run(folder, start(0), step(1))
    board = Board(tmp_path, depth=1)
    board.refresh()
    page = Pages().rows(board).encode()
    assert b"/run/r%EF%BF%BD%3F%23%25%3Cb%3E" in page and b"<b>" not in page
    assert board.runs()[0].overview.step == 1


def test_wrong_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = ConfigError.exit_code
    assert main(["watch", "--root", str(tmp_path / "missing")]) == code
    assert "is no directory" in capsys.readouterr().err
    assert main(["watch", "--root", str(tmp_path), "--interval", "0"]) == code


def test_pages_live_in_a_browser(served: Served) -> None:
    with running_browser() as browser:
        for width, dark in ((390, True), (1280, False)):
            page = browser.open(served.address, width=width, dark=dark)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert "paused by the guard" in page.evaluate("document.body.innerText")
        page.evaluate("document.querySelector('[value=going]').click()")
        assert page.evaluate("document.querySelector('#compare button').disabled")
        page.evaluate("document.querySelector('[value=\"ja/paused\"]').click()")
        with (served.root / "going" / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps(event) + "\n" for event in falling_steps(21, 22)))
        page.wait_for("document.querySelector('[data-run=going]').innerText.includes('22 of 30')")
        assert page.evaluate("document.querySelectorAll('input:checked').length") == 2
        page.evaluate("document.querySelector('#compare button').click()")
        page.wait_for("location.pathname === '/compare'")
        page.wait_for("document.querySelector('iframe')?.contentDocument?.title.includes('going')")
        address = served.address.replace("/?token=", "/run/going?token=")
        run = browser.open(address, width=390, dark=True)
        framed = "document.querySelector('iframe')?.contentDocument"
        run.wait_for(f"{framed}?.querySelector('html.ready') != null")
        with (served.root / "going" / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps(event) + "\n" for event in falling_steps(23, 23)))
        run.wait_for(f"{framed}?.body?.innerText.includes('step 23 of 30')")
        assert page.complaints == [] and run.complaints == []

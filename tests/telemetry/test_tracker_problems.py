"""What would keep trackers from working is told before a start, in seconds and without secrets."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.config import TelemetrySection
from cpt.telemetry.trackers import tracker_problems
from cpt.telemetry.wandb_settings import answer_problem

KEY = "k" * 40


class Server(http.server.ThreadingHTTPServer):
    """A stand-in for a W&B server that answers everything in one way."""

    code = 200
    logins: list[str]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.logins.append(self.headers.get("Authorization", ""))
        self.send_response(self.server.code)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server(("127.0.0.1", 0), _Handler)
    running.logins = []
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide this machine's own login, mode and proxies."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def problems(**telemetry: Any) -> list[str]:
    config = SimpleNamespace(telemetry=TelemetrySection(**telemetry))
    return tracker_problems(config)  # type: ignore[arg-type]


def test_online_without_a_login_is_refused_with_what_to_do() -> None:
    (problem,) = problems(wandb="online")
    for cure in ("`wandb login`", "WANDB_API_KEY", "telemetry.wandb=offline"):
        assert cure in problem


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_nobody_is_asked_unless_the_run_records_online(
    mode: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", address(server))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert problems(wandb=mode) == [] and server.logins == []


def test_mode_of_the_environment_decides_whether_a_login_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert problems(wandb="online") == []


def test_word_that_is_no_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "of-line")
    (problem,) = problems(wandb="offline")
    assert "WANDB_MODE is 'of-line'" in problem


@pytest.mark.parametrize("code", [200, 404, 500])
def test_server_that_answers_is_enough(
    code: int, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.code = code
    monkeypatch.setenv("WANDB_BASE_URL", address(server))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert problems(wandb="online") == []
    assert len(server.logins) == 1 and server.logins[0].startswith("Basic ")


def test_key_that_the_server_does_not_take_is_refused_and_not_shown(server: Server) -> None:
    server.code = 401
    problem = answer_problem(address(server), KEY, 5.0)
    assert "does not take this login (401)" in problem and KEY not in problem


def test_server_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        (problem,) = problems(wandb="online")
    assert "cannot be reached" in problem and "telemetry.wandb=offline" in problem


def test_server_that_never_answers_costs_a_limited_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        problem = answer_problem(f"http://127.0.0.1:{silent.getsockname()[1]}", KEY, 0.3)
        assert "cannot be reached" in problem and time.monotonic() - started < 5


def test_job_that_was_queued_again_goes_on_without_a_login(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert problems(wandb="online") == []
    assert "no login" in caplog.text and "goes on" in caplog.text

"""A headless Chromium, asked over the two pipes of its DevTools protocol.

One browser serves many pages; a page is a file that is opened at a width in one of the two color
schemes.  The protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = "no Chromium on this machine (Debian: apt-get install chromium)"
TIMEOUT_SECONDS = 60.0
OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    # tests run as root in containers
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-component-update",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
)


def find_browser() -> str | None:
    """Return the path of a Chromium, or None."""
    for name in NAMES:
        found = shutil.which(name)
        if found:
            return found
    return None


def require_browser() -> str:
    """Return the path of a Chromium; skip the test without one, or fail it where CI promised it."""
    found = find_browser()
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    return found


class Page:
    """One open page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.complaints: list[str] = []
        """Errors and warnings of the console, and exceptions that nobody caught."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call one method of the protocol."""
        return self._browser.call(method, session=self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + TIMEOUT_SECONDS
        while not self.evaluate(condition):
            if time.monotonic() > end:
                raise AssertionError(f"never true: {condition}; console: {self.complaints}")
            time.sleep(0.05)

    def show(self, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Bring the page to the front, at a width of the window in pixels, in a color scheme."""
        self.call("Page.bringToFront")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, *, whole: bool = True) -> bytes:
        """Return a picture of the page as PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def pdf(self) -> bytes:
        """Return the page as it is printed on A4."""
        answer = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)
        return base64.b64decode(answer["data"])


class Browser:
    """A running Chromium."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to_browser = to_browser
        self._from_browser = from_browser
        self._unread = b""
        self._num_calls = 0
        self._pages: dict[str, Page] = {}

    def open(self, url: str, *, width: int = 1280, dark: bool = False) -> Page:
        """Open a page and wait until it is loaded.

        Args:
            url: An address; of a file, `path.as_uri()`.
            width: Of the window in pixels.
            dark: Whether the reader prefers dark colors.
        """
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        self._pages[session] = page
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.show(width=width, dark=dark)
        page.call("Page.navigate", url=url)
        page.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page

    def call(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call one method of the protocol and return its result."""
        self._num_calls += 1
        message = {"id": self._num_calls, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read_message()
            if answer.get("id") == self._num_calls:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        """Keep what a page complains about."""
        page = self._pages.get(event.get("sessionId", ""))
        if page is None:
            return
        details = event["params"]
        method = event["method"]
        if method == "Runtime.exceptionThrown":
            page.complaints.append(str(details["exceptionDetails"]))
        elif method == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            page.complaints.append(details["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning"):
            page.complaints.append(str(details["args"]))

    def _read_message(self) -> dict[str, Any]:
        end = time.monotonic() + TIMEOUT_SECONDS
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from_browser], [], [], end - time.monotonic())
            if not ready:
                raise AssertionError(f"the browser said nothing for {TIMEOUT_SECONDS:.0f} s")
            part = os.read(self._from_browser, 1 << 20)
            if not part:
                raise AssertionError("the browser has ended")
            self._unread += part
        message, self._unread = self._unread.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Start a Chromium with a profile of its own and end it afterwards."""
    program = require_browser()
    read_commands, to_browser = os.pipe()
    from_browser, write_answers = os.pipe()
    profile = tempfile.mkdtemp(prefix="browser-")
    # Chromium reads commands from descriptor 3 and writes to descriptor 4
    shell = f'exec 3<&{read_commands} 4>&{write_answers}; exec "$@"'
    command = [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        ["bash", "-c", shell, "browser", *command],
        pass_fds=(read_commands, write_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        os.close(to_browser)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(from_browser)
        shutil.rmtree(Path(profile), ignore_errors=True)
